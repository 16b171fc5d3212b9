"""The lowest logit that top_k and top_p keep, found by its bits without a sort or a wait.

A pass sums, above 16 thresholds between the bounds of each row, ranks or masses, and the program that
finishes last narrows the bounds to the gap where enough ends. 4 bits a pass: 4 passes for bfloat16, 8
for float32, whatever the row holds; tokens as likely as the last one kept stay together.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import sampling_record
from kernels.sampling_tile import (
    LOG_MIN_P,
    LOWEST_KEY,
    RECORD_WORDS,
    SOURCE,
    TEMPERATURE,
    is_last_part,
    key_value,
    load_float32,
    load_logits,
    order_key,
)

BITS = 4  # a pass
PIVOTS = tl.constexpr(1 << BITS)

# A row's state, float64. Bounds are order keys, which float64 holds exactly.
STATE_WORDS = tl.constexpr(8)
PEAK = tl.constexpr(0)
LOW = tl.constexpr(1)  # a threshold that keeps enough
_HIGH = tl.constexpr(2)  # one that does not
_RANK = tl.constexpr(3)  # tokens that LOW keeps, once top_k has been searched
_TARGET_MASS = tl.constexpr(4)

_TOP_P = tl.constexpr(sampling_record.TOP_P)
_TOP_K = tl.constexpr(sampling_record.TOP_K)


@triton.jit
def open_bounds(state_ptr, peak, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The state of a row before its search: any threshold from below all logits to above them."""
    tl.store(state_ptr + PEAK, peak.to(tl.float64))
    tl.store(state_ptr + LOW, (LOWEST_KEY >> SHIFT) * 1.0)
    tl.store(state_ptr + _HIGH, (order_key(peak, SHIFT) + 1).to(tl.float64))
    tl.store(state_ptr + _RANK, 0.0)


@triton.jit(do_not_specialize=["num_parts", "first_filtered", "is_mass", "is_first"])
def search_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    records_ptr,
    doubles_ptr,
    part_peaks_ptr,
    pivot_sums_ptr,
    state_ptr,
    arrivals_ptr,
    logits_stride,
    vocab_size,
    num_parts,
    first_filtered,
    is_mass,
    is_first,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """One pass: of ranks for the rows with top_k, or of masses for those with top_p."""
    row = first_filtered + tl.program_id(0)
    part = tl.program_id(1)
    record_ptr = records_ptr + row * RECORD_WORDS
    state = state_ptr + row * STATE_WORDS
    top_k = tl.load(record_ptr + _TOP_K)
    top_p = tl.load(doubles_ptr + row * (RECORD_WORDS // 2) + _TOP_P)
    is_wanted = tl.where(is_mass != 0, top_p < 1.0, top_k > 0)
    peak = tl.load(state + PEAK).to(tl.float32)
    low = tl.load(state + LOW).to(tl.int64)
    high = tl.load(state + _HIGH).to(tl.int64)
    if (is_mass != 0) & (is_first != 0):
        high = order_key(peak, SHIFT).to(tl.int64) + 1  # top_k has closed the bounds around its own
    if is_wanted & (high - low > 1) & (tl.abs(peak) < float("inf")):
        step = (high - low + PIVOTS - 1) // PIVOTS
        order = tl.arange(0, PIVOTS)
        pivots = low + order * step
        temperature = load_float32(record_ptr, TEMPERATURE)
        log_min_p = load_float32(record_ptr, LOG_MIN_P)
        # Only the first pass asks for what lies above the lower bound itself.
        lowest = tl.where(is_first != 0, low, low + step)
        place = row * num_parts + part
        acc = tl.zeros([PIVOTS, BLOCK], dtype=tl.float32)
        if order_key(tl.load(part_peaks_ptr + place), SHIFT) >= lowest:
            row_ptr = logits_ptr + tl.load(record_ptr + SOURCE).to(tl.int64) * logits_stride
            thresholds = pivots.to(tl.int32)[:, None]
            for block in tl.static_range(PART // BLOCK):
                columns = part * PART + block * BLOCK + tl.arange(0, BLOCK)[None, :]
                x = load_logits(row_ptr, columns, vocab_size)
                score = (x - peak) / temperature
                weight = tl.where(is_mass != 0, tl.exp(score), 1.0)
                weight = tl.where((score >= log_min_p) & (columns < vocab_size), weight, 0.0)
                acc += tl.where(order_key(x, SHIFT) >= thresholds, weight, 0.0)
        tl.store(pivot_sums_ptr + place * PIVOTS + order, tl.sum(acc, 1))
        if is_last_part(arrivals_ptr, row, num_parts):
            parts = tl.arange(0, BLOCK_PARTS)
            sums_ptr = pivot_sums_ptr + row * num_parts * PIVOTS
            sums = tl.load(
                sums_ptr + parts[:, None] * PIVOTS + order[None, :],
                mask=(parts < num_parts)[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            above = tl.sum(sums.to(tl.float64), 0)
            need = top_k.to(tl.float64)
            if is_mass != 0:
                if is_first != 0:
                    # Ties at the k-th place are kept, and count towards top_p's mass only up to k.
                    surplus = tl.where(top_k > 0, tl.maximum(tl.load(state + _RANK) - top_k, 0.0), 0.0)
                    tie = tl.exp((key_value(low.to(tl.int32), SHIFT) - peak) / temperature)
                    surplus_mass = tl.where(surplus > 0.0, surplus * tie.to(tl.float64), 0.0)
                    total = tl.sum(tl.where(order == 0, above, 0.0), 0)
                    tl.store(state + _TARGET_MASS, top_p * (total - surplus_mass))
                    need = top_p * (total - surplus_mass)
                else:
                    need = tl.load(state + _TARGET_MASS)
            is_enough = (above >= need) & (pivots < high) & (order > 0)
            num_enough = tl.sum(is_enough.to(tl.int32), 0)
            new_low = low + num_enough * step
            new_high = tl.minimum(high, new_low + step)
            if is_mass == 0:
                rank = tl.sum(tl.where(order == num_enough, above, 0.0), 0)
                if (num_enough > 0) | (is_first != 0):
                    tl.store(state + _RANK, rank)
                    if rank <= need:
                        new_high = new_low + 1  # k are kept, or all there are: a higher one keeps fewer
            tl.store(state + LOW, new_low.to(tl.float64))
            tl.store(state + _HIGH, new_high.to(tl.float64))
