"""What the host knows of each seat's sampling: parameters as arrays, so that a step's records are one
gather whatever the number of rows.

The arrays belong to the sequence that was last assigned to the seat. What only the device knows, the
newest token and the counts of penalties, is `engine.model.sampler`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.messages import SamplingParams
from kernels.sampling_record import BAN_FLAG, RECORD_WORDS, Filters

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

# The columns of `kernels.sampling_record`, in their order.
RECORD = np.dtype(
    [
        ("uniform", np.float64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("log_min_p", np.float32),
        ("top_k", np.int32),
        ("source", np.int32),
        ("target", np.int32),
        ("seat", np.int32),
        ("num_edits", np.int32),
        ("is_short", np.int32),
        ("is_penalized", np.int32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
    ]
)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_UNIFORM_BITS = 48
_COLDEST = 1e-30  # a denormal divisor is zero to a GPU, and 0 / 0 is NaN


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a step: first the rows sampled from the raw logits, then those from adjusted ones.

    Attributes:
        words: (rows, RECORD_WORDS) int32.
        num_raw: rows of the first kind.
        raw, adjusted: how the last rows of either kind drop unlikely tokens.
    """

    words: Int32Array
    num_raw: int
    raw: Filters
    adjusted: Filters


class SeatTable:
    """The sampling parameters of the sequence in each seat."""

    def __init__(self, num_seats: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._records = np.zeros(num_seats, RECORD)
        self._seeds = np.zeros(num_seats, np.uint64)
        self._min_tokens = np.zeros(num_seats, np.int64)
        self._asks = np.zeros(num_seats, np.bool_)
        self._filters = np.zeros(num_seats, np.bool_)

    def assign(self, seat: int, params: SamplingParams, seed: int) -> Int32Array:
        """Give the seat to a sequence.

        Returns:
            (entries, 2) its row of the kernels' `edits`, empty if it has neither biases nor bans.
        """
        greedy = params.temperature == 0.0 or params.top_k == 1
        top_k = params.top_k if params.top_k < self._vocab_size else 0
        edits = self._edits(params)
        record = self._records[seat]
        record["seat"] = seat
        record["temperature"] = 0.0 if greedy else max(params.temperature, _COLDEST)
        record["top_p"] = params.top_p
        record["top_k"] = top_k
        record["log_min_p"] = np.log(params.min_p) if params.min_p > 0.0 else -np.inf
        record["num_edits"] = len(edits)
        record["is_penalized"] = is_penalized(params)
        record["repetition"] = params.repetition_penalty
        record["presence"] = params.presence_penalty
        record["frequency"] = params.frequency_penalty
        self._seeds[seat] = _mix_one(seed & _MASK)
        has_bans = bool((edits[:, 0] & BAN_FLAG).any())
        self._min_tokens[seat] = params.min_tokens if has_bans else 0
        self._asks[seat] = is_penalized(params) or bool(params.logit_bias)
        self._filters[seat] = not greedy and (params.min_p > 0.0 or top_k > 0 or params.top_p < 1.0)
        return edits

    def records(self, seats: Int64Array, num_outputs: Int64Array) -> Records:
        """The records of a step.

        Args:
            seats: (rows,) the seat of each row of logits.
            num_outputs: (rows,) output tokens before the one to choose.
        """
        records = self._records[seats]
        records["uniform"] = uniforms(self._seeds[seats], num_outputs)
        records["source"] = records["target"] = np.arange(len(seats), dtype=np.int32)
        is_short = num_outputs < self._min_tokens[seats]
        records["is_short"] = is_short
        asks, filters = self._asks[seats] | is_short, self._filters[seats]
        num_asking = int(np.count_nonzero(asks))
        num_raw = len(seats) - num_asking
        if num_asking or filters.any():
            order = np.argsort(2 * asks + filters, kind="stable")
            records, filters = records[order], filters[order]
            records["source"][num_raw:] = np.arange(num_asking, dtype=np.int32)
        return Records(
            records.view(np.int32).reshape(-1, RECORD_WORDS),
            num_raw,
            _filters(records[:num_raw], filters[:num_raw]),
            _filters(records[num_raw:], filters[num_raw:]),
        )

    def _edits(self, params: SamplingParams) -> Int32Array:
        """Ids past the vocabulary, which no logit can choose, are left out. Biases of one token add up."""
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        banned: set[int] = set()
        if params.min_tokens:
            banned.update(params.stop_token_ids)
            banned.update(() if params.ignore_eos else self._eos_token_ids)
        tokens = [token for token in {*biases, *banned} if 0 <= token < self._vocab_size]
        edits = np.empty((len(tokens), 2), np.int32)
        edits[:, 0] = [token | (BAN_FLAG if token in banned else 0) for token in tokens]
        edits[:, 1].view(np.float32)[:] = [biases.get(token, 0.0) for token in tokens]
        return edits


def is_penalized(params: SamplingParams) -> bool:
    """Whether tokens count that the sequence already has."""
    additive = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return additive or params.repetition_penalty != 1.0


def uniforms(seeds: npt.NDArray[np.uint64], counts: Int64Array) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1) that choose token `counts` of sequences with these mixed seeds.

    splitmix64 of both, so that a token depends on its own sequence and on no generator's state. 48
    bits and a half, so that a product with a float64 total stays below the total.
    """
    bits = _mix(seeds + (counts.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
    return ((bits >> np.uint64(64 - _UNIFORM_BITS)) + 0.5) / (1 << _UNIFORM_BITS)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64, a bijection of 64-bit numbers; arrays wrap around without a warning."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FACTORS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return z ^ (z >> np.uint64(31))


def _mix_one(z: int) -> int:
    return int(_mix(np.array([z], np.uint64))[0])


def _filters(records: npt.NDArray[np.void], filters: npt.NDArray[np.bool_]) -> Filters:
    num_rows = int(np.count_nonzero(filters))
    if not num_rows:
        return Filters()
    last = records[-num_rows:]
    return Filters(num_rows, bool((last["top_k"] > 0).any()), bool((last["top_p"] < 1.0).any()))
