"""The model: configuration, weights, the decoder, and what turns logits into tokens."""
