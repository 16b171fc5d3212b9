"""A linear layer in the form its device multiplies fastest.

In plain PyTorch: weights as (out, in), `torch.mm` into the caller's buffer. On a GPU the same, but for
few rows, for which a kernel of our own reads the weights faster (a decode step of one sequence of
Llama-3.1-8B: 5.0 ms of products instead of 5.7, of 16 sequences 5.4 instead of 5.7; H100). On a CPU oneDNN,
because torch's own matmul runs a one-row product on one thread: 30 layers of SmolLM2 take 41 ms so, and
20 ms in oneDNN; at 16 rows 68 and 29 ms (two Zen 4 cores, float32).
"""

from __future__ import annotations

import torch

from kernels.backend import for_device

_SKINNY_ROWS = 16  # what `Kernels.skinny_matmul` takes
# oneDNN lays packed weights out for one number of rows. A layout for 16 was as fast as or faster
# than any other from 1 to 256 rows; a layout for 1 is the plain one.
_PACKED_ROWS = 16
# oneDNN allocates its result, which is copied into the pool's buffer: this bounds the temporary.
_MAX_ROWS = 256


class Linear:
    """out = x @ weight.T + bias.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self._transposed = weight.t()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Multiply x (rows, in) into out (rows, out), which must not overlap it; returns out."""
        if self.bias is None:
            return torch.mm(x, self._transposed, out=out)
        return torch.addmm(self.bias, x, self._transposed, out=out)


class CudaLinear(Linear):
    """The same on a GPU: a few rows by a kernel of our own, more by cuBLAS."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight, bias)
        self._weight = weight
        self._multiply = for_device(weight.device).skinny_matmul
        # float32 has no tensor cores at full precision: one row waits for memory, more would compute.
        self._most_rows = _SKINNY_ROWS if weight.element_size() == 2 else 1

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= self._most_rows:
            return self._multiply(x, self._weight, self.bias, out)
        return super().__call__(x, out)


class OneDnnLinear(Linear):
    """The same on a CPU, through oneDNN.

    Args:
        keep_plain: leave the weight as it is, because it is also read as an embedding.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, keep_plain: bool = False
    ) -> None:
        super().__init__(weight, bias)
        del self._transposed
        self._weight = weight
        if not keep_plain:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_ROWS)
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if x.shape[0] <= _MAX_ROWS:
            return out.copy_(self._multiply(x, self._weight, self.bias, "none", [], ""))
        for begin in range(0, x.shape[0], _MAX_ROWS):
            rows = slice(begin, begin + _MAX_ROWS)
            out[rows] = self._multiply(x[rows], self._weight, self.bias, "none", [], "")
        return out


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None, is_embedding: bool = False) -> Linear:
    """The fastest form for the weight's device and type. May hold a repacked copy: let go of `weight`."""
    if weight.device.type == "cpu" and _has_onednn(weight.dtype):
        return OneDnnLinear(weight, bias, keep_plain=is_embedding)
    if weight.device.type == "cuda":
        return CudaLinear(weight, bias)
    return Linear(weight, bias)


def _has_onednn(dtype: torch.dtype) -> bool:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
