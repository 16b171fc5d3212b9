"""What a row of logits is to become, as the sampling kernels read it: one record of 64 bytes a row.

Records lie one after another in one int32 tensor (rows, RECORD_WORDS), so that a step uploads them in
one transfer and a kernel takes one pointer. The constants are columns of that tensor; UNIFORM and TOP_P
are columns of the same memory seen as float64, the columns marked float32 hold that type's bits.
"""

from __future__ import annotations

from typing import NamedTuple

RECORD_WORDS = 16

# Columns of the float64 view (rows, 8).
UNIFORM = 0  # the number in (0, 1) that chooses the token
TOP_P = 1  # 1: off

# Columns of the int32 tensor.
TEMPERATURE = 4  # float32; 0: the largest logit
LOG_MIN_P = 5  # float32, the logarithm of min_p; minus infinity: off
TOP_K = 6  # 0: off
SOURCE = 7  # the row of the logits to sample from
TARGET = 8  # the row of the results, and of the raw logits
SEAT = 9  # the row of the per-seat tables
NUM_EDITS = 10  # leading entries of the seat's row of `edits` that count
IS_SHORT = 11  # 1: tokens that end the sequence are banned
IS_PENALIZED = 12  # 1: `counts` is read, and counts the new token
REPETITION = 13  # float32
PRESENCE = 14  # float32
FREQUENCY = 15  # float32

PROMPT_FLAG = 1 << 30  # in `counts`: the token is in the prompt; the bits below count outputs
BAN_FLAG = 1 << 30  # in the token of an edit: the token ends the sequence


class Filters(NamedTuple):
    """How the last records of a batch drop unlikely tokens, so that no kernel runs for nothing.

    Attributes:
        num_rows: trailing records with min_p, top_k or top_p.
        has_top_k, has_top_p: whether any of them has it.
    """

    num_rows: int = 0
    has_top_k: bool = False
    has_top_p: bool = False
