"""The elastic pool: address ranges, chunks, virtual tensors and what lives in them."""
