"""The forward pass of the Llama, Mistral and Qwen families over the elastic KV cache.

Knows tensors only: what a step computes comes in as a `Batch`, the memory to compute in as buffers
that live in the pool. Weights, plans and sampling are other files' business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.model.rank_group import RankGroup
from engine.model.rope import rope_tables
from engine.model.shard import Shard
from engine.model.sums import Place, Summing
from engine.model.weights import LayerWeights, Weights
from kernels.backend import Kernels

if TYPE_CHECKING:
    from engine.model.peers import Peers


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes: one-token pieces (decodes) first, then prefill pieces.

    Attributes:
        input_ids, positions: (tokens,) int64.
        pending_seats, is_pending: (num_decodes,) int64 and bool: the decodes whose token is still only
            on the device, and the seats it was chosen for.
        token_first_rows: (tokens,) int64, the first KV row of each token's sequence.
        num_decodes: leading tokens that are pieces of their own.
        decode_first_rows: (num_decodes,) int64.
        decode_shared_first_rows, decode_shared_lens: (num_decodes,) int64 and int32: the first tokens of a
            sequence, a multiple of T, lie from that row on instead.
        decode_context_lens: (num_decodes,) int32, with the new token.
        query_starts: (prefills + 1,) int32, where each prefill piece begins among the prefill tokens.
        prefill_first_rows: (prefills,) int64.
        prefill_shared_first_rows, prefill_shared_lens: (prefills,) int64 and int32, as for decodes.
        prefill_context_lens: (prefills,) int32, with the new tokens.
        max_query_len: tokens of the longest prefill piece.
        sample_indices: (rows,) int64, the tokens whose logits are wanted; None is all of them.
    """

    input_ids: torch.Tensor
    pending_seats: torch.Tensor
    is_pending: torch.Tensor
    positions: torch.Tensor
    token_first_rows: torch.Tensor
    num_decodes: int
    decode_first_rows: torch.Tensor
    decode_shared_first_rows: torch.Tensor
    decode_shared_lens: torch.Tensor
    decode_context_lens: torch.Tensor
    query_starts: torch.Tensor
    prefill_first_rows: torch.Tensor
    prefill_shared_first_rows: torch.Tensor
    prefill_shared_lens: torch.Tensor
    prefill_context_lens: torch.Tensor
    max_query_len: int
    sample_indices: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Views:
    """The buffers of one pass, cut once: every layer uses the same memory."""

    hidden: torch.Tensor
    residual: torch.Tensor
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attention: torch.Tensor
    attention_heads: torch.Tensor
    workspace: torch.Tensor
    gate_up: torch.Tensor
    activated: torch.Tensor


class LayerHook(Protocol):
    """Is told what has been launched, in the order of the device's stream."""

    def before(self, layer: int) -> None:
        """A layer is about to be launched."""

    def after(self, layer: int) -> None:
        """What writes and reads a layer's keys and values has been launched."""


class Decoder:
    """A decoder-only transformer, or one rank's share of it.

    Args:
        shard: what of the model `weights` are.
        weights: on the device the decoder is to run on.
        kernels: the implementation for that device.
        max_positions: positions to prepare rotations for; None is the model's own limit.
        ranks: those that have the rest of the model.
        peers: memory of theirs, where the GPUs reach one another.

    Attributes:
        config: the architecture of the share.
    """

    def __init__(
        self,
        shard: Shard,
        weights: Weights,
        kernels: Kernels,
        max_positions: int | None = None,
        ranks: RankGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.config = config = shard.local
        self._tokens = shard.tokens
        self._ranks = ranks
        self._summing = Summing(kernels, config.rms_norm_eps, ranks, peers)
        self._weights = weights
        self._kernels = kernels
        self._scale = config.head_dim**-0.5
        self._cos, self._sin = rope_tables(
            config.rope, config.head_dim, max_positions or config.max_context, weights.embedding.device
        )
        # Each layer ends with the next one's norm, so that it is fused with the residual's addition.
        norms = [layer.input_norm for layer in weights.layers] + [weights.final_norm]
        self._first_norm, self._next_norms = norms[0], norms[1:]

    @torch.inference_mode()
    def forward(
        self,
        batch: Batch,
        kv_layers: Sequence[torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        hook: LayerHook | None = None,
    ) -> torch.Tensor:
        """Compute a step and write its keys and values.

        Args:
            kv_layers: a (rows, 2, T, kv_heads, head_dim) view of the pool for each layer.
            buffers: what `activation_specs` declares, for this many tokens and rows.
            hook: told of each layer as it is launched.

        Returns:
            Logits (rows, vocab) in the model's type, in the order of `sample_indices`. They lie in
            `buffers` and hold until the next pass.
        """
        views = self._views(buffers)
        hidden, residual, sums = views.hidden, views.residual, self._summing.of(views.hidden.shape[0])
        if batch.num_decodes:
            self._kernels.decode_plan(kv_layers[0], batch.decode_context_lens, views.workspace)
        self._embed(batch.input_ids, residual)
        sums.add(Place.EMBEDDING, hidden, residual, self._first_norm)
        stack = zip(self._weights.layers, kv_layers, self._next_norms, strict=True)
        for number, (layer, kv, next_norm) in enumerate(stack):
            if hook is not None:
                hook.before(number)
            self._attend(layer, batch, kv, views)
            if hook is not None:
                hook.after(number)
            layer.output(views.attention, hidden)
            sums.add(Place.ATTENTION, hidden, residual, layer.mlp_norm)
            layer.gate_up(hidden, views.gate_up)
            self._kernels.silu_and_mul(views.gate_up, out=views.activated)
            layer.down(views.activated, hidden)
            sums.add(Place.MLP, hidden, residual, next_norm)
        sampled = hidden
        if batch.sample_indices is not None:
            sampled = torch.index_select(hidden, 0, batch.sample_indices, out=buffers["sampled_hidden"])
        if self._ranks is None:
            return self._weights.lm_head(sampled, buffers["logits"])
        self._weights.lm_head(sampled, buffers["logits_part"])
        return self._join(self._ranks, buffers)

    def _embed(self, input_ids: torch.Tensor, out: torch.Tensor) -> None:
        """Look tokens up; each rank knows some of them, and the others' are zero there."""
        if self._ranks is None:
            torch.index_select(self._weights.embedding, 0, input_ids, out=out)
            return
        ids = input_ids - self._tokens.begin
        is_known = (ids >= 0) & (ids < self._tokens.count)
        torch.index_select(self._weights.embedding, 0, ids * is_known, out=out)
        out.mul_(is_known.unsqueeze(1))

    def _join(self, ranks: RankGroup, buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The logits of all tokens from those of each rank's."""
        part, logits = buffers["logits_part"], buffers["logits"]
        parts = buffers["logits_parts"].view(ranks.size, *part.shape)
        ranks.join(part, parts)
        for rank, found in enumerate(parts):
            begin = rank * self._tokens.size
            columns = logits[:, begin : begin + self._tokens.size]
            columns.copy_(found[:, : columns.shape[1]])
        return logits

    def _attend(self, layer: LayerWeights, batch: Batch, kv: torch.Tensor, views: _Views) -> None:
        kernels, eps, split = self._kernels, self.config.rms_norm_eps, batch.num_decodes
        q, out = views.q, views.attention_heads
        layer.qkv(views.hidden, views.qkv)
        kernels.rotary_and_kv_write(
            q,
            views.k,
            views.v,
            self._cos,
            self._sin,
            batch.positions,
            kv,
            batch.token_first_rows,
            layer.q_norm,
            layer.k_norm,
            eps,
        )
        if split:
            kernels.decode_attention(
                q[:split],
                kv,
                batch.decode_first_rows,
                batch.decode_shared_first_rows,
                batch.decode_shared_lens,
                batch.decode_context_lens,
                self._scale,
                views.workspace,
                out=out[:split],
            )
        if split < q.shape[0]:
            kernels.prefill_attention(
                q[split:],
                kv,
                batch.query_starts,
                batch.prefill_first_rows,
                batch.prefill_shared_first_rows,
                batch.prefill_shared_lens,
                batch.prefill_context_lens,
                batch.max_query_len,
                self._scale,
                out=out[split:],
            )

    def _views(self, buffers: Mapping[str, torch.Tensor]) -> _Views:
        config = self.config
        qkv, attention = buffers["qkv"], buffers["attention"]
        q, k, v = torch.split(qkv, [config.q_size, config.kv_size, config.kv_size], dim=1)
        kv_shape = (qkv.shape[0], config.num_kv_heads, config.head_dim)
        q_shape = (qkv.shape[0], config.num_heads, config.head_dim)
        return _Views(
            hidden=buffers["hidden"],
            residual=buffers["residual"],
            qkv=qkv,
            q=q.view(q_shape),
            k=k.view(kv_shape),
            v=v.view(kv_shape),
            attention=attention,
            attention_heads=attention.view(q_shape),
            workspace=buffers["workspace"].view(-1),
            gate_up=buffers["gate_up"],
            activated=buffers["activated"],
        )
