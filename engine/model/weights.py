"""The weights of a model on its device: packed per layer, read one tensor at a time.

The order of loading is here; where the numbers come from (safetensors, GGUF, a random generator) is
in `engine.model.checkpoint`. No second copy of the model exists at any moment: each tensor is read
into its place in a packed matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm

from engine.config import ModelSource
from engine.model.checkpoint import Checkpoint, open_checkpoint
from engine.model.linear import Linear, make_linear
from engine.model.shard import Shard, Span


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer.

    Attributes:
        qkv: queries, keys, values, one after another.
        q_norm, k_norm: (head_dim,) weights of the norms on heads, where the family has them.
        gate_up: gate, then up.
    """

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything the decoder multiplies by.

    Attributes:
        embedding: (vocab, hidden), or the rank's part of it.
        lm_head: shares its memory with `embedding` if the model ties them.
        num_bytes: memory of all weights, shared ones counted once.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: Linear
    num_bytes: int


def load_weights(source: ModelSource, shard: Shard, device: torch.device, dtype: torch.dtype) -> Weights:
    """Read one rank's share of a model's weights, or draw them if `load_format` is `dummy`.

    Progress goes to stderr, from the first rank.

    Raises:
        ModelLoadError: the weights are not there, or a tensor is missing, unexpected or of a wrong shape.
    """
    config = shard.config
    checkpoint = open_checkpoint(source, config, device)
    loader = _Loader(shard, checkpoint, device, dtype)
    title, is_silent = f"loading {source.model_id}", shard.rank > 0
    with tqdm(total=config.num_layers + 2, desc=title, unit="layer", disable=is_silent) as progress:
        embedding = loader.matrix([("model.embed_tokens", shard.tokens)], config.hidden_size)
        progress.update()
        layers = []
        for index in range(config.num_layers):
            layers.append(loader.layer(f"model.layers.{index}"))
            progress.update()
        final_norm = loader.vector("model.norm.weight", config.hidden_size)
        if config.tie_word_embeddings:
            lm_head = make_linear(embedding, is_embedding=True)
        else:
            lm_head = loader.linear([("lm_head", shard.tokens)], config.hidden_size, has_bias=False)
        progress.update()
    checkpoint.close()
    return Weights(embedding, tuple(layers), final_norm, lm_head, loader.num_bytes)


class _Loader:
    """Allocates packed tensors on the device and has the checkpoint fill them piece by piece."""

    def __init__(
        self, shard: Shard, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._shard = shard
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self.num_bytes = 0

    def layer(self, prefix: str) -> LayerWeights:
        """Load `model.layers.N`."""
        shard, config = self._shard, self._shard.config
        hidden = config.hidden_size
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [
            (f"{attention}.q_proj", shard.queries),
            (f"{attention}.k_proj", shard.keys),
            (f"{attention}.v_proj", shard.keys),
        ]
        gate_up = [(f"{mlp}.gate_proj", shard.inner), (f"{mlp}.up_proj", shard.inner)]
        return LayerWeights(
            input_norm=self.vector(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self.linear(qkv, hidden, config.attention_bias),
            q_norm=self._head_norm(f"{attention}.q_norm.weight"),
            k_norm=self._head_norm(f"{attention}.k_norm.weight"),
            output=self.summed(f"{attention}.o_proj", shard.queries, config.output_bias),
            mlp_norm=self.vector(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self.linear(gate_up, hidden, config.mlp_bias),
            down=self.summed(f"{mlp}.down_proj", shard.inner, config.mlp_bias),
        )

    def linear(self, parts: list[tuple[str, Span]], in_features: int, has_bias: bool) -> Linear:
        """The rank's outputs of the projections named in `parts`, stacked."""
        weight, bias = self.matrix(parts, in_features), None
        if has_bias:
            bias = self._empty(sum(span.size for _, span in parts))
            for (name, span), piece in zip(parts, _split(bias, parts), strict=True):
                self._checkpoint.fill(f"{name}.bias", piece, self._unless_whole(span))
        return make_linear(weight, bias)

    def summed(self, name: str, inputs: Span, has_bias: bool) -> Linear:
        """A projection of the rank's inputs, whose outputs are summed over the ranks."""
        hidden = self._shard.config.hidden_size
        weight, bias = self._empty(hidden, inputs.size), None
        self._checkpoint.fill(f"{name}.weight", weight, self._unless_whole(inputs), dim=1)
        if has_bias:
            bias = self.vector(f"{name}.bias", hidden)
            if self._shard.rank > 0:  # it would be summed as well
                bias = None
        return make_linear(weight, bias)

    def matrix(self, parts: list[tuple[str, Span]], in_features: int) -> torch.Tensor:
        """(outputs of the rank, in features) from `NAME.weight` of each part."""
        matrix = self._empty(sum(span.size for _, span in parts), in_features)
        for (name, span), piece in zip(parts, _split(matrix, parts), strict=True):
            self._checkpoint.fill(f"{name}.weight", piece, self._unless_whole(span))
        return matrix

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A one-dimensional tensor that every rank has."""
        vector = self._empty(size)
        self._checkpoint.fill(name, vector)
        return vector

    def _head_norm(self, name: str) -> torch.Tensor | None:
        config = self._shard.config
        return self.vector(name, config.head_dim) if config.qk_norm else None

    def _unless_whole(self, span: Span) -> Span | None:
        return span if self._shard.size > 1 else None

    def _empty(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.num_bytes += tensor.nbytes
        return tensor


def _split(packed: torch.Tensor, parts: list[tuple[str, Span]]) -> tuple[torch.Tensor, ...]:
    return torch.split(packed, [span.size for _, span in parts])
