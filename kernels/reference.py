"""The kernels in plain PyTorch: what each one means, and the backend of the CPU engine.

Shapes, the same everywhere in this package:

    kv            (rows, 2, T, kv_heads, head_dim)   one layer's view of the pool. A row is a chunk;
                                                     [:, 0] is K, [:, 1] is V; T tokens a row
    first_rows    (sequences,) int64                 the row where a sequence's own tokens count from
    shared_first_rows, shared_lens                   (sequences,) int64 and int32, see below
    context_lens  (sequences,) int32                 tokens of KV to attend to, new ones included
    query_starts  (sequences + 1,) int32             where each sequence's queries begin in `q`

Token t of a sequence lies in row `first_row + t // T` at offset `t % T`: no block table. A prefix may lie
in another sequence's rows: tokens t < shared_len are read in row `shared_first_row + t // T` instead. A
shared_len is a multiple of T, 0 if nothing is shared, and new tokens lie beyond it. Mapping shared chunks
into every slot would take 34 us of driver calls each: 2.2 s for 256 sequences behind a prompt of 4k tokens.

Rows past a sequence's last token and its own rows of a shared prefix may not be mapped at all, so nothing
here reads them; the tail of its last row may hold any bit pattern, so it is sliced off (a kernel masks V
as well as the scores: 0 * NaN is NaN).

Arguments are not checked here; the Triton launchers name what is wrong with theirs. A torch operation
costs a few microseconds whatever its size and a step runs all this once a layer: operations are few.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.sampling_reference import adjust_logits as adjust_logits
from kernels.sampling_reference import sample as sample
from kernels.sampling_reference import sampling_workspace as sampling_workspace


def rotary_and_kv_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> None:
    """Norm and rotate queries in place, keys likewise into the pool, and write the values beside them.

    Rotation turns the pairs (i, i + head_dim / 2), as Llama's checkpoints expect, in float32. What a norm
    gives is rounded to the tensor's type first, as `rms_norm` does.

    Args:
        q: (tokens, query_heads, head_dim), head_dim even, any stride over tokens; changed in place.
        k, v: (tokens, kv_heads, head_dim), any stride over tokens. `k` is left undefined.
        cos, sin: (max positions, head_dim / 2) float32.
        positions: (tokens,) int64, each token's position in its sequence.
        kv: written at each token's position.
        first_rows: (tokens,) int64, the first row of each token's sequence.
        q_norm, k_norm: (head_dim,), the weights of an RMS norm over each head; None is no norm.
        eps: of both norms.
    """
    if q_norm is not None:
        rms_norm(q, q_norm, eps, q)
    if k_norm is not None:
        rms_norm(k, k_norm, eps, k)
    c, s = cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]
    for x in (q, k):
        low, high = x.chunk(2, dim=-1)
        turned_low = (low * c).sub_(high * s)
        high.copy_((high * c).add_(low * s))
        low.copy_(turned_low)
    tokens_per_row = kv.shape[2]
    rows = first_rows + positions // tokens_per_row
    offsets = positions % tokens_per_row
    kv[rows, 0, offsets] = k
    kv[rows, 1, offsets] = v


def decode_workspace_floats(query_heads: int, kv_heads: int, head_dim: int) -> int:
    """Elements that the workspace of `decode_plan` and `decode_attention` must have: none here."""
    return 0


def decode_plan(kv: torch.Tensor, context_lens: torch.Tensor, workspace: torch.Tensor) -> None:
    """Divide the work of `decode_attention` among the GPU's programs; nothing to do here.

    Once a step, before its first `decode_attention`. The plan lies in the workspace, whose bytes must
    stay as they are until the step's last one. Reads nothing on the host: it may be captured in a graph.

    Args:
        kv: any layer's view; only its shape is looked at.
        context_lens: (sequences,), as the step's `decode_attention` gets them.
        workspace: at least `decode_workspace_floats` float32 elements, contiguous, of any content.
    """


def decode_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    workspace: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of one new token a sequence over that sequence's KV.

    Args:
        q: (sequences, query_heads, head_dim), any stride over sequences.
        context_lens: 0 marks a row of padding: its KV is not read and its row of `out` is undefined.
        scale: factor on the scores, usually head_dim ** -0.5.
        workspace: as `decode_plan` left it, with these `context_lens` and these shapes.
        out: (sequences, query_heads, head_dim), written and returned.
    """
    # A sequence at a time: padding a ragged batch to its longest would copy far more KV than it has.
    shape = (q.shape[0], kv.shape[3], q.shape[1] // kv.shape[3], q.shape[2])
    grouped, result = q.view(shape), out.view(shape)
    places = _places(first_rows, shared_first_rows, shared_lens, context_lens)
    for index, (row, shared_row, shared, context) in enumerate(places):
        if context == 0:
            continue
        keys, values = _context(kv, row, shared_row, shared, context)
        result[index] = F.scaled_dot_product_attention(grouped[index : index + 1], keys, values, scale=scale)[
            0
        ]
    return out


def prefill_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    query_starts: torch.Tensor,
    first_rows: torch.Tensor,
    shared_first_rows: torch.Tensor,
    shared_lens: torch.Tensor,
    context_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of each sequence's newest tokens over its KV, cached prefix included.

    A sequence with n queries and context length c has its queries at positions c - n .. c - 1.

    Args:
        q: (tokens, query_heads, head_dim), sequences one after another, any stride over tokens.
        max_query_len: at least the most queries any sequence has.
        out: (tokens, query_heads, head_dim), written and returned.
    """
    group = q.shape[1] // kv.shape[3]
    shape = (q.shape[0], kv.shape[3], group, q.shape[2])
    # (group, kv_heads, tokens, head_dim): the group as a batch lets K and V be broadcast, not repeated.
    grouped, result = q.view(shape).permute(2, 1, 0, 3), out.view(shape).permute(2, 1, 0, 3)
    starts = query_starts.tolist()
    places = _places(first_rows, shared_first_rows, shared_lens, context_lens)
    for index, (row, shared_row, shared, context) in enumerate(places):
        begin, end = starts[index], starts[index + 1]
        queries = end - begin
        keys, values = _context(kv, row, shared_row, shared, context)
        seen = None
        if 1 < queries < context:
            seen = torch.ones(queries, context, dtype=torch.bool, device=q.device).tril(context - queries)
        result[:, :, begin:end] = F.scaled_dot_product_attention(
            grouped[:, :, begin:end],
            keys.expand(group, -1, -1, -1),
            values.expand(group, -1, -1, -1),
            attn_mask=seen,
            is_causal=1 < queries == context,
            scale=scale,
        )
    return out


def _places(*columns: torch.Tensor) -> Iterator[tuple[int, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)


def _context(
    kv: torch.Tensor, row: int, shared_row: int, shared: int, context: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a sequence's `context` tokens, each (1, kv_heads, context, head_dim).

    One row is a view; several are copied, which costs less than attending to each row on its own.
    """
    num_rows, num_shared = -(-context // kv.shape[2]), shared // kv.shape[2]
    rows = kv[row + num_shared : row + num_rows].transpose(0, 1)
    if num_shared:
        rows = torch.cat((kv[shared_row : shared_row + num_shared].transpose(0, 1), rows), dim=1)
    both = rows.flatten(1, 2)[:, :context].transpose(1, 2)
    return both[:1], both[1:]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside.

    Args:
        x: (tokens, width) or (tokens, heads, width), last dimension contiguous.
        weight: (width,).
        out: the shape of `x`, may be `x` itself; written and returned.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul((x * scale).to(x.dtype), weight, out=out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """residual += x, then out = rms_norm(residual). All (tokens, width); `out` may be `x`."""
    residual.add_(x)
    return rms_norm(residual, weight, eps, out)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = silu(gate) * up for gate_up (tokens, 2 * width) = [gate, up]; out (tokens, width)."""
    width = out.shape[-1]
    return torch.mul(F.silu(gate_up[:, :width]), gate_up[:, width:], out=out)


def skinny_matmul(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out = x @ weight.T + bias for a few rows.

    Args:
        x: (rows, in), 16 rows at most.
        weight: (out, in), rows packed.
        bias: (out,) or None.
        out: (rows, out), written and returned.
    """
    product = x.float() @ weight.float().t()
    return out.copy_(product if bias is None else product + bias.float())


def copy_words(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """target = source. On a GPU one of them may be in pinned host memory, and the call does not wait.

    Args:
        source: any shape, int32, contiguous.
        target: the same, written and returned.
    """
    return target.copy_(source)
