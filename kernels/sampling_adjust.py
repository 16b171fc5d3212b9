"""Biases, bans and penalties on the logits of rows that ask. Semantics: `kernels.reference.adjust_logits`.

What a seat has said is counted in a table on the device, so that a penalty knows of a token that the
host has not seen yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import sampling_record
from kernels.checks import require, require_launchable, require_like
from kernels.sampling_tile import IS_PENALIZED, RECORD_WORDS, SEAT, TARGET, load_float32

_PART = 2048
_INTERPRETED_PART = 256
_BLOCK_EDITS = 64

_NUM_EDITS = tl.constexpr(sampling_record.NUM_EDITS)
_IS_SHORT = tl.constexpr(sampling_record.IS_SHORT)
_REPETITION = tl.constexpr(sampling_record.REPETITION)
_PRESENCE = tl.constexpr(sampling_record.PRESENCE)
_FREQUENCY = tl.constexpr(sampling_record.FREQUENCY)
_PROMPT_FLAG = tl.constexpr(sampling_record.PROMPT_FLAG)
_BAN_FLAG = tl.constexpr(sampling_record.BAN_FLAG)


@triton.jit
def _penalize(x, count, record_ptr):  # type: ignore[no-untyped-def]
    penalty = load_float32(record_ptr, _REPETITION)
    repelled = tl.where(x > 0.0, x / penalty, x * penalty)
    x = tl.where(count != 0, repelled, x)
    times = count & (_PROMPT_FLAG - 1)
    frequency = load_float32(record_ptr, _FREQUENCY) * times.to(tl.float32)
    return tl.where(times > 0, x - (load_float32(record_ptr, _PRESENCE) + frequency), x)


@triton.jit
def _adjust_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    records_ptr,
    edits_ptr,
    counts_ptr,
    out_ptr,
    logits_stride,
    edits_stride,
    vocab_size,
    PART: tl.constexpr,
    BLOCK_EDITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    record_ptr = records_ptr + row * RECORD_WORDS
    seat = tl.load(record_ptr + SEAT).to(tl.int64)
    is_penalized = tl.load(record_ptr + IS_PENALIZED) != 0
    row_ptr = logits_ptr + tl.load(record_ptr + TARGET).to(tl.int64) * logits_stride
    row_counts_ptr = counts_ptr + seat * vocab_size
    row_out_ptr = out_ptr + row * vocab_size
    begin = tl.program_id(1) * PART
    columns = begin + tl.arange(0, PART)
    mask = columns < vocab_size
    x = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if is_penalized:
        x = _penalize(x, tl.load(row_counts_ptr + columns, mask=mask, other=0), record_ptr)
    tl.store(row_out_ptr + columns, x, mask=mask)
    num_edits = tl.load(record_ptr + _NUM_EDITS)
    if num_edits > 0:
        tl.debug_barrier()  # an edit may overwrite what another thread has just stored
        is_short = tl.load(record_ptr + _IS_SHORT) != 0
        for first in range(0, num_edits, BLOCK_EDITS):
            entries = first + tl.arange(0, BLOCK_EDITS)
            is_entry = entries < num_edits
            entry_ptrs = edits_ptr + seat * edits_stride + 2 * entries
            flagged = tl.load(entry_ptrs, mask=is_entry, other=vocab_size)
            bias = tl.load(entry_ptrs + 1, mask=is_entry, other=0).to(tl.float32, bitcast=True)
            tokens = flagged & (_BAN_FLAG - 1)
            is_here = is_entry & (tokens >= begin) & (tokens < begin + PART) & (tokens < vocab_size)
            y = tl.load(row_ptr + tokens, mask=is_here, other=0.0).to(tl.float32) + bias
            y = tl.where(((flagged & _BAN_FLAG) != 0) & is_short, float("-inf"), y)
            if is_penalized:
                y = _penalize(y, tl.load(row_counts_ptr + tokens, mask=is_here, other=0), record_ptr)
            tl.store(row_out_ptr + tokens, y, mask=is_here)


def adjust_logits(
    logits: torch.Tensor, records: torch.Tensor, edits: torch.Tensor, counts: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """See `kernels.reference.adjust_logits`. Raises ValueError naming an argument that is wrong."""
    require_launchable("logits", logits)
    require(logits.dim() == 2 and logits.stride(1) == 1, "logits", "rows of contiguous logits")
    num_rows, vocab_size = records.shape[0], logits.shape[1]
    require_like("records", records, (num_rows, sampling_record.RECORD_WORDS), records)
    for name, tensor in (("records", records), ("edits", edits), ("counts", counts)):
        require(tensor.dtype == torch.int32 and tensor.is_contiguous(), name, "contiguous int32")
    require(edits.dim() == 3 and edits.shape[2] == 2, "edits", "of shape (seats, entries, 2)")
    require(out.dtype == torch.float32 and out.is_contiguous(), "out", "contiguous float32")
    require(out.shape == (num_rows, vocab_size), "out", f"of shape ({num_rows}, {vocab_size})")
    if num_rows == 0:
        return out
    part = _PART if logits.is_cuda else _INTERPRETED_PART
    _adjust_kernel[(num_rows, triton.cdiv(vocab_size, part))](
        logits, records, edits, counts, out, logits.stride(0), edits.stride(0), vocab_size,
        PART=part, BLOCK_EDITS=_BLOCK_EDITS, num_warps=4,
    )  # fmt: skip
    return out
