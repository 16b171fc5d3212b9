"""Pieces the sampling kernels share: a float's key, what a part of a row weighs, and the draw itself.

A row is read in parts of fixed length, a program each. The program that finishes last, whichever it
is, joins what all of them wrote, in the order of the parts: results depend on no schedule and on no
other row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import sampling_record

RECORD_WORDS = tl.constexpr(sampling_record.RECORD_WORDS)
UNIFORM = tl.constexpr(sampling_record.UNIFORM)
TEMPERATURE = tl.constexpr(sampling_record.TEMPERATURE)
LOG_MIN_P = tl.constexpr(sampling_record.LOG_MIN_P)
SOURCE = tl.constexpr(sampling_record.SOURCE)
TARGET = tl.constexpr(sampling_record.TARGET)
SEAT = tl.constexpr(sampling_record.SEAT)
IS_PENALIZED = tl.constexpr(sampling_record.IS_PENALIZED)
LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of any float


@triton.jit
def load_float32(record_ptr, COLUMN: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 that a record holds as bits."""
    return tl.load(record_ptr + COLUMN).to(tl.float32, bitcast=True)


@triton.jit
def order_key(x, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """An int32 for each float32, in the same order; SHIFT drops low bits that are always the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def key_value(key, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 whose `order_key` this is."""
    ordered = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(row_ptr, columns, vocab_size):  # type: ignore[no-untyped-def]
    """Logits as float32; NaN becomes plus infinity, so that the largest one tells of it."""
    x = tl.load(row_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("inf"))


@triton.jit
def weigh(x, top, temperature):  # type: ignore[no-untyped-def]
    """exp((x - top) / temperature) in float64; `top` counts as 0 where it is infinite."""
    base = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    return tl.exp((x - base) / temperature).to(tl.float64)


@triton.jit
def is_kept(x, peak, temperature, lowest_key, log_min_p, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether min_p and the threshold of top_k and top_p leave a token in."""
    return ((x - peak) / temperature >= log_min_p) & (order_key(x, SHIFT) >= lowest_key)


@triton.jit
def is_last_part(arrivals_ptr, row, num_parts):  # type: ignore[no-untyped-def]
    """Whether every other program of the row has stored its part; readies the counter for its next use."""
    tl.debug_barrier()  # the atomic below speaks for the stores of all threads
    is_last = tl.atomic_add(arrivals_ptr + row, 1) == num_parts - 1
    if is_last:
        tl.store(arrivals_ptr + row, 0)
    return is_last


@triton.jit
def choose(  # type: ignore[no-untyped-def]
    row_ptr,
    record_ptr,
    doubles_ptr,
    part_peaks_ptr,
    part_tokens_ptr,
    part_sums_ptr,
    counts_ptr,
    last_tokens_ptr,
    results_ptr,
    lowest_key,
    vocab_size,
    num_parts,
    PART: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Join the parts of a row into a token and store it everywhere it is wanted."""
    parts = tl.arange(0, BLOCK_PARTS)
    is_part = parts < num_parts
    peaks = tl.load(part_peaks_ptr + parts, mask=is_part, other=float("-inf"), cache_modifier=".cg")
    tokens = tl.load(part_tokens_ptr + parts, mask=is_part, other=vocab_size, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, tokens, vocab_size), 0)
    temperature = load_float32(record_ptr, TEMPERATURE)
    if (temperature > 0.0) & (tl.abs(peak) < float("inf")):
        sums = tl.load(part_sums_ptr + parts, mask=is_part, other=0.0, cache_modifier=".cg")
        weights = sums * weigh(peaks, peak, temperature)
        reached = tl.cumsum(weights, 0)
        has_weight = weights > 0.0
        spot = tl.load(doubles_ptr + UNIFORM) * tl.max(reached, 0)
        # Rounding may leave no part beyond the spot: then it is the last one with any weight.
        part = tl.min(tl.where(has_weight & (reached > spot), parts, BLOCK_PARTS), 0)
        part = tl.minimum(part, tl.max(tl.where(has_weight, parts, 0), 0))
        is_chosen = parts == part
        before = tl.sum(tl.where(is_chosen, reached - weights, 0.0), 0)
        share = (spot - before) / tl.sum(tl.where(is_chosen, weights, 0.0), 0)

        offsets = tl.arange(0, PART)
        x = load_logits(row_ptr, part * PART + offsets, vocab_size)
        keep = is_kept(x, peak, temperature, lowest_key, load_float32(record_ptr, LOG_MIN_P), SHIFT)
        inside = tl.where(keep, weigh(x, tl.max(x, 0), temperature), 0.0)
        reached_inside = tl.cumsum(inside, 0)
        has_weight_inside = inside > 0.0
        target = share * tl.max(reached_inside, 0)
        offset = tl.min(tl.where(has_weight_inside & (reached_inside > target), offsets, PART), 0)
        offset = tl.minimum(offset, tl.max(tl.where(has_weight_inside, offsets, 0), 0))
        token = part * PART + offset
    seat = tl.load(record_ptr + SEAT).to(tl.int64)
    target_row = tl.load(record_ptr + TARGET)
    tl.store(last_tokens_ptr + seat, token.to(tl.int64))
    tl.store(results_ptr + 2 * target_row, token)
    tl.store(results_ptr + 2 * target_row + 1, peak.to(tl.int32, bitcast=True))
    if tl.load(record_ptr + IS_PENALIZED) != 0:
        count_ptr = counts_ptr + seat * vocab_size + token
        tl.store(count_ptr, tl.load(count_ptr) + 1)
