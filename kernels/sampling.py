"""Tokens from logits without a wait. Semantics: `kernels.reference.sample`.

Rows that keep every token take one kernel: each program finds the largest logit of a part of a row and
the part's share of the mass, and the last one to finish draws. For top_k and top_p the lowest logit
that they keep is searched first (`kernels.sampling_search`), and a last kernel sums what is left and
draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import sampling_record
from kernels.checks import require, require_launchable, require_like
from kernels.sampling_record import Filters
from kernels.sampling_search import BITS, LOW, PEAK, PIVOTS, STATE_WORDS, open_bounds, search_kernel
from kernels.sampling_tile import (
    LOG_MIN_P,
    LOWEST_KEY,
    RECORD_WORDS,
    SOURCE,
    TEMPERATURE,
    choose,
    is_kept,
    is_last_part,
    load_float32,
    load_logits,
    order_key,
    weigh,
)

_PART = 4096  # tokens a program reads: 32 programs share a row of 128,256
_INTERPRETED_PART = 256  # small, so that small vocabularies have several parts too
_BLOCK = 512  # tokens at a time while searching: 16 sums for two tokens a thread stay in registers
_FEWEST_PARTS = 32  # to allow for: vocabularies of up to 131,072 share what is compiled
_NUM_WARPS = 8
_MAX_REGISTERS = 64  # a thread: four programs share an SM; only the last one of a row spills, once

# The bits of a logit that may differ once it is a float32.
_KEY_BITS = {torch.float32: 32, torch.float16: 19, torch.bfloat16: 16}

_VARYING = ["num_parts", "first_filtered"]  # no compilation for 1 or for multiples of 16


@triton.jit(do_not_specialize=_VARYING)
def _peak_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    records_ptr,
    doubles_ptr,
    counts_ptr,
    last_tokens_ptr,
    results_ptr,
    part_peaks_ptr,
    part_tokens_ptr,
    part_sums_ptr,
    state_ptr,
    arrivals_ptr,
    logits_stride,
    vocab_size,
    num_parts,
    first_filtered,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = tl.program_id(0)
    part = tl.program_id(1)
    record_ptr = records_ptr + row * RECORD_WORDS
    row_ptr = logits_ptr + tl.load(record_ptr + SOURCE).to(tl.int64) * logits_stride
    columns = part * PART + tl.arange(0, PART)
    x = load_logits(row_ptr, columns, vocab_size)
    peak = tl.max(x, 0)
    place = row * num_parts + part
    tl.store(part_peaks_ptr + place, peak)
    tl.store(part_tokens_ptr + place, tl.min(tl.where(x == peak, columns, vocab_size), 0))
    temperature = load_float32(record_ptr, TEMPERATURE)
    if (temperature > 0.0) & (row < first_filtered):
        tl.store(part_sums_ptr + place, tl.sum(weigh(x, peak, temperature), 0))
    if is_last_part(arrivals_ptr, row, num_parts):
        first = row * num_parts
        if row < first_filtered:
            choose(
                row_ptr, record_ptr, doubles_ptr + row * (RECORD_WORDS // 2),
                part_peaks_ptr + first, part_tokens_ptr + first, part_sums_ptr + first,
                counts_ptr, last_tokens_ptr, results_ptr, LOWEST_KEY, vocab_size, num_parts,
                PART, BLOCK_PARTS, SHIFT,
            )  # fmt: skip
        else:
            parts = tl.arange(0, BLOCK_PARTS)
            peaks = tl.load(
                part_peaks_ptr + first + parts,
                mask=parts < num_parts,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            row_peak = tl.max(peaks, 0)
            open_bounds(state_ptr + row * STATE_WORDS, row_peak, SHIFT)


@triton.jit(do_not_specialize=_VARYING)
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    records_ptr,
    doubles_ptr,
    counts_ptr,
    last_tokens_ptr,
    results_ptr,
    part_peaks_ptr,
    part_tokens_ptr,
    part_sums_ptr,
    state_ptr,
    arrivals_ptr,
    logits_stride,
    vocab_size,
    num_parts,
    first_filtered,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    row = first_filtered + tl.program_id(0)
    part = tl.program_id(1)
    record_ptr = records_ptr + row * RECORD_WORDS
    row_ptr = logits_ptr + tl.load(record_ptr + SOURCE).to(tl.int64) * logits_stride
    state = state_ptr + row * STATE_WORDS
    peak = tl.load(state + PEAK).to(tl.float32)
    lowest_key = tl.load(state + LOW).to(tl.int32)
    first = row * num_parts
    top = tl.load(part_peaks_ptr + first + part)
    total = tl.zeros([], dtype=tl.float64)
    if (order_key(top, SHIFT) >= lowest_key) & (tl.abs(peak) < float("inf")):
        x = load_logits(row_ptr, part * PART + tl.arange(0, PART), vocab_size)
        temperature = load_float32(record_ptr, TEMPERATURE)
        keep = is_kept(x, peak, temperature, lowest_key, load_float32(record_ptr, LOG_MIN_P), SHIFT)
        total = tl.sum(tl.where(keep, weigh(x, top, temperature), 0.0), 0)
    tl.store(part_sums_ptr + first + part, total)
    if is_last_part(arrivals_ptr, row, num_parts):
        choose(
            row_ptr, record_ptr, doubles_ptr + row * (RECORD_WORDS // 2),
            part_peaks_ptr + first, part_tokens_ptr + first, part_sums_ptr + first,
            counts_ptr, last_tokens_ptr, results_ptr, lowest_key, vocab_size, num_parts,
            PART, BLOCK_PARTS, SHIFT,
        )  # fmt: skip


def sampling_workspace(num_rows: int, vocab_size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """See `kernels.reference.sampling_workspace`. 80 bytes a row and part of 4,096 tokens."""
    num_parts = triton.cdiv(vocab_size, _part(device))
    parts = (num_rows, num_parts)
    return (
        torch.empty(parts, dtype=torch.float32, device=device),  # largest logits
        torch.empty(parts, dtype=torch.int32, device=device),  # their tokens
        torch.empty(parts, dtype=torch.float64, device=device),  # masses
        torch.empty((*parts, PIVOTS.value), dtype=torch.float32, device=device),  # above each pivot
        torch.empty((num_rows, STATE_WORDS.value), dtype=torch.float64, device=device),
        torch.zeros(num_rows, dtype=torch.int32, device=device),  # programs that have finished
    )


def sample(
    logits: torch.Tensor,
    records: torch.Tensor,
    filters: Filters,
    counts: torch.Tensor,
    last_tokens: torch.Tensor,
    results: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
) -> None:
    """See `kernels.reference.sample`. Raises ValueError naming an argument that is wrong."""
    _check(logits, records, counts, last_tokens, results, workspace)
    num_rows, vocab_size = records.shape[0], logits.shape[1]
    if num_rows == 0:
        return
    peaks, tokens, sums, pivot_sums, state, arrivals = workspace
    doubles, num_parts, bits = records.view(torch.float64), peaks.shape[1], _KEY_BITS[logits.dtype]
    first_filtered = num_rows - filters.num_rows
    part = _part(logits.device)
    shape = {
        "PART": part, "BLOCK_PARTS": max(_FEWEST_PARTS, triton.next_power_of_2(num_parts)),
        "SHIFT": 32 - bits, "num_warps": _NUM_WARPS, "maxnreg": _MAX_REGISTERS,
    }  # fmt: skip
    arguments = (
        logits, records, doubles, counts, last_tokens, results, peaks, tokens, sums, state, arrivals,
        logits.stride(0), vocab_size, num_parts, first_filtered,
    )  # fmt: skip
    _peak_kernel[(num_rows, num_parts)](*arguments, **shape)
    if filters.num_rows == 0:
        return
    grid = (filters.num_rows, num_parts)
    for is_mass in [False] * filters.has_top_k + [True] * filters.has_top_p:
        for number in range(triton.cdiv(bits, BITS)):
            search_kernel[grid](
                logits, records, doubles, peaks, pivot_sums, state, arrivals,
                logits.stride(0), vocab_size, num_parts, first_filtered, int(is_mass), int(number == 0),
                BLOCK=min(_BLOCK, part), **shape,
            )  # fmt: skip
    _draw_kernel[grid](*arguments, **shape)


def _part(device: torch.device) -> int:
    return _PART if device.type == "cuda" else _INTERPRETED_PART


def _check(
    logits: torch.Tensor,
    records: torch.Tensor,
    counts: torch.Tensor,
    last_tokens: torch.Tensor,
    results: torch.Tensor,
    workspace: tuple[torch.Tensor, ...],
) -> None:
    require_launchable("logits", logits)
    require(logits.dim() == 2 and logits.stride(1) == 1, "logits", "rows of contiguous logits")
    require(logits.dtype in _KEY_BITS, "logits", "float32, bfloat16 or float16")
    width = sampling_record.RECORD_WORDS
    require_like("records", records, (records.shape[0], width), records)
    require(records.dtype == torch.int32 and records.is_contiguous(), "records", "contiguous int32")
    require(counts.dtype == torch.int32 and counts.is_contiguous(), "counts", "contiguous int32")
    require(last_tokens.dtype == torch.int64 and last_tokens.dim() == 1, "last_tokens", "a vector of int64")
    require(results.dtype == torch.int32 and results.is_contiguous(), "results", "contiguous int32")
    parts = triton.cdiv(logits.shape[1], _part(logits.device))
    expected = "made by sampling_workspace for this vocabulary and as many rows"
    require(len(workspace) == 6 and workspace[0].shape[1] == parts, "workspace", expected)
    require(workspace[0].shape[0] >= records.shape[0], "workspace", expected)
