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
from engine.model.architecture import ModelConfig
from engine.model.checkpoint import Checkpoint, open_checkpoint
from engine.model.linear import Linear, make_linear


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
        embedding: (vocab, hidden).
        lm_head: shares its memory with `embedding` if the model ties them.
        num_bytes: memory of all weights, shared ones counted once.
    """

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    lm_head: Linear
    num_bytes: int


def load_weights(
    source: ModelSource, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Weights:
    """Read a model's weights, or draw them if `load_format` is `dummy`.

    Progress goes to stderr.

    Raises:
        ModelLoadError: the weights are not there, or a tensor is missing, unexpected or of a wrong shape.
    """
    checkpoint = open_checkpoint(source, config, device)
    loader = _Loader(config, checkpoint, device, dtype)
    with tqdm(total=config.num_layers + 2, desc=f"loading {source.model_id}", unit="layer") as progress:
        embedding = loader.matrix([("model.embed_tokens", config.vocab_size)], config.hidden_size)
        progress.update()
        layers = []
        for index in range(config.num_layers):
            layers.append(loader.layer(f"model.layers.{index}"))
            progress.update()
        final_norm = loader.vector(["model.norm.weight"], [config.hidden_size])
        if config.tie_word_embeddings:
            lm_head = make_linear(embedding, is_embedding=True)
        else:
            lm_head = loader.linear([("lm_head", config.vocab_size)], config.hidden_size, has_bias=False)
        progress.update()
    checkpoint.close()
    return Weights(embedding, tuple(layers), final_norm, lm_head, loader.num_bytes)


class _Loader:
    """Allocates packed tensors on the device and has the checkpoint fill them piece by piece."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self.num_bytes = 0

    def layer(self, prefix: str) -> LayerWeights:
        """Load `model.layers.N`."""
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [
            (f"{attention}.q_proj", config.q_size),
            (f"{attention}.k_proj", config.kv_size),
            (f"{attention}.v_proj", config.kv_size),
        ]
        gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
        return LayerWeights(
            input_norm=self.vector([f"{prefix}.input_layernorm.weight"], [hidden]),
            qkv=self.linear(qkv, hidden, config.attention_bias),
            q_norm=self._head_norm(f"{attention}.q_norm.weight"),
            k_norm=self._head_norm(f"{attention}.k_norm.weight"),
            output=self.linear([(f"{attention}.o_proj", hidden)], config.q_size, config.output_bias),
            mlp_norm=self.vector([f"{prefix}.post_attention_layernorm.weight"], [hidden]),
            gate_up=self.linear(gate_up, hidden, config.mlp_bias),
            down=self.linear([(f"{mlp}.down_proj", hidden)], inner, config.mlp_bias),
        )

    def linear(self, parts: list[tuple[str, int]], in_features: int, has_bias: bool) -> Linear:
        """The projections named in `parts` (name, out features), stacked."""
        weight = self.matrix(parts, in_features)
        bias = None
        if has_bias:
            bias = self.vector([f"{name}.bias" for name, _ in parts], [size for _, size in parts])
        return make_linear(weight, bias)

    def matrix(self, parts: list[tuple[str, int]], in_features: int) -> torch.Tensor:
        """(sum of out features, in features) from `NAME.weight` of each part."""
        matrix = self._empty(sum(size for _, size in parts), in_features)
        pieces = torch.split(matrix, [size for _, size in parts])
        for (name, _), piece in zip(parts, pieces, strict=True):
            self._checkpoint.fill(f"{name}.weight", piece)
        return matrix

    def vector(self, names: list[str], sizes: list[int]) -> torch.Tensor:
        """The one-dimensional tensors `names`, one after another."""
        vector = self._empty(sum(sizes))
        for name, piece in zip(names, torch.split(vector, sizes), strict=True):
            self._checkpoint.fill(name, piece)
        return vector

    def _head_norm(self, name: str) -> torch.Tensor | None:
        return self.vector([name], [self._config.head_dim]) if self._config.qk_norm else None

    def _empty(self, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.num_bytes += tensor.nbytes
        return tensor
