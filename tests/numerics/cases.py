"""What the numerics tests share: tolerances, poisoned memory, and pools of KV laid out as the engine's.

Everything a kernel must not use is NaN: outputs before the run, rows of no sequence, the tails of
last rows, the other layers of a chunk and the padding between strided rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kernels.backend import Kernels

# (relative, absolute). float32 allows for another order of summation, the 16-bit types for a few
# roundings of values around 1: their machine epsilons are 2^-8 and 2^-11.
TOLERANCES = {
    torch.float32: (2e-5, 2e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (3e-3, 3e-3),
}
DTYPES = list(TOLERANCES)
NUM_LAYERS = 3


@dataclass(frozen=True)
class Backend:
    """An implementation of the kernels and where its tensors live."""

    kernels: Kernels
    device: torch.device


@dataclass(frozen=True)
class AttentionShape:
    """Heads and chunk geometry of a model; `tokens_per_row` is T."""

    query_heads: int
    kv_heads: int
    head_dim: int
    tokens_per_row: int

    def lengths(self) -> list[int]:
        """Context lengths around the edges of rows, in no order."""
        t = self.tokens_per_row
        return [t + 1, 1, 3 * t + 5, t, max(1, t - 1)]


# By sequence: whose first rows hold its prefix, and how many rows of it. An owner shares no prefix itself.
Sharing = dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Context:
    """The KV of a batch: in a pool as kernels see it, and as plain tensors for the oracle."""

    kv: torch.Tensor
    first_rows: torch.Tensor
    shared_first_rows: torch.Tensor
    shared_lens: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of attention that say where KV lies."""
        return self.first_rows, self.shared_first_rows, self.shared_lens


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """`actual` equals the float64 `expected` within its dtype's tolerance; NaN equals nothing."""
    rtol, atol = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=rtol, atol=atol)


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values, drawn on the CPU so that devices get the same."""
    return torch.randn(*shape).to(dtype).to(device)


def strided(tensor: torch.Tensor, extra: int = 16) -> torch.Tensor:
    """The same values as a view into NaN-filled memory: `extra` elements between rows."""
    tokens, *rest = tensor.shape
    width = tensor[0].numel() if tokens else 0
    memory = torch.full((tokens, width + extra), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = memory[:, :width].view(tokens, *rest)
    view.copy_(tensor)
    return view


def poisoned_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous output full of NaN, of the shape of `tensor`."""
    return torch.full(tensor.shape, float("nan"), dtype=tensor.dtype, device=tensor.device)


def make_context(
    shape: AttentionShape,
    lengths: list[int],
    dtype: torch.dtype,
    device: torch.device,
    sharing: Sharing | None = None,
    large_keys: Mapping[int, float] | None = None,
) -> Context:
    """Sequences of these lengths in shuffled order, with rows of NaN between.

    A sequence that shares a prefix has rows of its own for it too, which are NaN.

    Args:
        large_keys: by token, how many times larger its keys are than others.
    """
    sharing, t = sharing or {}, shape.tokens_per_row
    num_rows = [-(-length // t) for length in lengths]
    kv_shape = (sum(num_rows) + len(lengths) + 1, NUM_LAYERS, 2, t, shape.kv_heads, shape.head_dim)
    pool = torch.full(kv_shape, float("nan"), dtype=dtype)
    kv = pool[:, 1]
    first_rows, keys, values = [0] * len(lengths), [], []
    next_row = 1
    for index in torch.randperm(len(lengths)).tolist():
        first_rows[index] = next_row
        next_row += num_rows[index] + 1
    owners = [sharing.get(index, (index, 0)) for index in range(len(lengths))]
    for index, (length, first_row) in enumerate(zip(lengths, first_rows, strict=True)):
        k = torch.randn(length, shape.kv_heads, shape.head_dim)
        for token, factor in (large_keys or {}).items():
            k[token : token + 1] *= factor
        k = k.to(dtype)
        v = torch.randn(length, shape.kv_heads, shape.head_dim).to(dtype)
        for token in range(owners[index][1] * t, length):
            kv[first_row + token // t, 0, token % t] = k[token]
            kv[first_row + token // t, 1, token % t] = v[token]
        keys.append(k)
        values.append(v)
    for index, (owner, shared) in sharing.items():
        assert owner not in sharing
        assert shared * t <= min(lengths[index] - 1, lengths[owner])
        keys[index][: shared * t], values[index][: shared * t] = (
            both[owner][: shared * t] for both in (keys, values)
        )
    return Context(
        kv=pool.to(device)[:, 1],
        first_rows=torch.tensor(first_rows, dtype=torch.int64, device=device),
        shared_first_rows=torch.tensor(
            [first_rows[owner] if shared else 0 for owner, shared in owners], dtype=torch.int64, device=device
        ),
        shared_lens=int32([shared * t for _, shared in owners], device),
        keys=keys,
        values=values,
    )


def make_workspace(backend: Backend, shape: AttentionShape) -> torch.Tensor:
    """What decode attention works in, as small as it may be and full of NaN."""
    floats = backend.kernels.decode_workspace_floats(shape.query_heads, shape.kv_heads, shape.head_dim)
    return torch.full((floats,), float("nan"), device=backend.device)


def int32(values: list[int], device: torch.device) -> torch.Tensor:
    """Lengths as kernels take them."""
    return torch.tensor(values, dtype=torch.int32, device=device)
