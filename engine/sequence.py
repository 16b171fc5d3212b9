"""One request inside one engine: its tokens, its KV and its state. Never leaves the process."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from engine.config import SloConfig
from engine.memory.backing import Backing
from engine.memory.blocks import Opened, TokenChain
from engine.messages import PENDING_TOKEN, BlockCopy, FinishReason, GenerateRequest, SamplingParams


class State(Enum):
    """Where a sequence is in its life. Legal moves are in `_MOVES`."""

    WAITING = "waiting"  # holds no KV: new, or preempted
    PREFILLING = "prefilling"  # has a slot; not all known tokens are in it
    RUNNING = "running"  # every known token but the newest is in its slot
    PARKED = "parked"  # its KV is in the balloon, or on its way there or back
    FINISHED = "finished"


_MOVES = {
    State.WAITING: {State.PREFILLING, State.PARKED, State.FINISHED},
    State.PREFILLING: {State.RUNNING, State.WAITING, State.FINISHED},
    State.RUNNING: {State.PARKED, State.WAITING, State.FINISHED},
    State.PARKED: {State.RUNNING, State.WAITING, State.FINISHED},
    State.FINISHED: set(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's life inside the engine. Only the engine loop writes to it.

    Attributes:
        seed: of its random draws; fixed at birth, so that a preempted sequence repeats itself.
        arrival_s: the engine's clock at submission.
        chain: hashes of its blocks, as far as they have been needed.
        slot: its KV slot while it has one.
        seat: its place in the sampler's tables, while it has a slot.
        shared_slot, shared_tokens: its first `shared_tokens` tokens are read through that slot.
        copy: of a block that agrees in part, to be made with its first step.
        wants: while it waits, a slot that holds its beginning.
        num_lacking: tokens that were not there when it began to wait.
        num_cached_tokens: tokens of the prompt that were there when it started.
        num_found: tokens that were there when it got the slot it has.
        num_computed: tokens whose KV is there once every launched step has finished.
        num_written: tokens whose KV is there by now, as far as a token that was read tells.
        num_in_flight: tokens that launched steps choose and the host has not read yet.
        is_new_to_slot: the slot holds nothing of this sequence for the sampler to go on from.
        num_preemptions: how often its KV was dropped to make room.
        num_overtaken: how often another request started first although this one had come before.
        ttft_slo_s, tpot_slo_s: what its client is promised.
        first_token_s: the engine's clock when its first token was read.
        backing: what of its KV is in the balloon.
        num_outputs_before: output tokens that it had when it last came back from there.
        num_migrations: how often it came from another engine.
        came_s: when it last did.
    """

    request: GenerateRequest
    seed: int
    arrival_s: float
    chain: TokenChain
    state: State = State.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    seat: int = 0
    shared_slot: int = 0
    shared_tokens: int = 0
    copy: BlockCopy | None = None
    wants: int | None = None
    num_lacking: int = 0
    num_cached_tokens: int = 0
    num_found: int = 0
    num_computed: int = 0
    num_written: int = 0
    num_in_flight: int = 0
    is_new_to_slot: bool = True
    num_preemptions: int = 0
    num_overtaken: int = 0
    ttft_slo_s: float = math.inf
    tpot_slo_s: float = math.inf
    first_token_s: float | None = None
    backing: Backing = field(default_factory=Backing)
    num_outputs_before: int = -1
    num_migrations: int = 0
    came_s: float = -math.inf

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def num_outputs(self) -> int:
        """Output tokens, those in flight included."""
        return len(self.output_token_ids) + self.num_in_flight

    @property
    def num_tokens(self) -> int:
        """Prompt and output, tokens in flight included."""
        return len(self.request.prompt_token_ids) + self.num_outputs

    @property
    def num_known(self) -> int:
        """Prompt and output, without tokens in flight."""
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_known_computed(self) -> int:
        """Known tokens whose KV is there."""
        return min(self.num_computed, self.num_known)

    @property
    def held_slot(self) -> int:
        """Its slot; ValueError if it has none."""
        if self.slot is None:
            raise ValueError(f"sequence {self.request_id} holds no slot")
        return self.slot

    @property
    def is_decoding(self) -> bool:
        """Whether it has said something, so that its client waits for the next token."""
        return self.state is State.RUNNING

    @property
    def is_arriving(self) -> bool:
        """Whether KV that it goes on from is being copied to the device."""
        return self.backing.coming is not None

    @property
    def due_s(self) -> float:
        """When its client is promised the newest token that was read, on the engine's clock."""
        if self.first_token_s is None:
            return self.arrival_s + self.ttft_slo_s
        return self.first_token_s + (len(self.output_token_ids) - 1) * self.tpot_slo_s

    @property
    def may_be_parked(self) -> bool:
        """Whether it has gained a token since it last came back; or it could come and go for ever."""
        return self.num_outputs > self.num_outputs_before

    def longest(self, max_model_len: int) -> int:
        """Tokens it can have in the end."""
        return min(len(self.request.prompt_token_ids) + self.sampling.max_tokens, max_model_len)

    def ending(self, eos_token_ids: Collection[int], max_model_len: int) -> FinishReason | None:
        """Why it ends with its newest token, if it does."""
        token, sampling = self.output_token_ids[-1], self.sampling
        if (token in eos_token_ids and not sampling.ignore_eos) or token in sampling.stop_token_ids:
            return "stop"
        return "length" if self.num_known >= self.longest(max_model_len) else None

    def open(self, opened: Opened, seat: int) -> None:
        """Move into a slot, and take over what is there of it."""
        self.slot, self.seat = opened.slot, seat
        self.shared_slot, self.shared_tokens = opened.shared_slot, opened.shared_tokens
        self.copy = opened.copy
        self.num_written = 0  # what was found may be in a step in flight
        self.found(opened.num_tokens)

    def found(self, num_tokens: int) -> None:
        """So many tokens need not be computed: their KV is in the slot."""
        self.num_computed = self.num_found = num_tokens
        if not self.num_preemptions:
            self.num_cached_tokens = min(num_tokens, len(self.request.prompt_token_ids))

    def leave(self) -> None:
        """Move out of the slot, with nothing computed."""
        self.slot = self.copy = None
        self.backing = Backing()
        self.shared_slot = self.shared_tokens = self.num_computed = self.num_written = 0
        self.is_new_to_slot = True

    def read_one(self) -> None:
        """A token in flight was read: its step has ended, and those still in flight compute a token each."""
        self.num_in_flight -= 1
        self.num_written = self.num_computed - self.num_in_flight

    def next_tokens(self, count: int) -> tuple[int, ...]:
        """The first `count` tokens whose KV is not in the slot; PENDING_TOKEN for those in flight."""
        if count == 1 and self.state is State.RUNNING:
            return (PENDING_TOKEN,) if self.num_in_flight else (self.output_token_ids[-1],)
        return self.tokens(self.num_computed, self.num_computed + count)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens at positions start .. end - 1 of prompt and output; PENDING_TOKEN for those in flight."""
        prompt = self.request.prompt_token_ids
        known = len(prompt) + len(self.output_token_ids)
        pending = (PENDING_TOKEN,) * max(0, end - max(start, known))
        if start >= len(prompt):
            return (*self.output_token_ids[start - len(prompt) : end - len(prompt)], *pending)
        return (*prompt[start:end], *self.output_token_ids[: max(0, end - len(prompt))], *pending)

    def move(self, to: State) -> None:
        """Enter another state; an illegal move is a bug and raises ValueError."""
        if to not in _MOVES[self.state]:
            raise ValueError(
                f"sequence {self.request_id}: {self.state.value} -> {to.value} is not a legal move"
            )
        self.state = to


def new_sequence(request: GenerateRequest, now_s: float, chain: TokenChain, slo: SloConfig) -> Sequence:
    """A request that arrives now, with the promises of its own or those of the model."""
    ttft_s, tpot_s, seed = request.ttft_slo_s, request.tpot_slo_s, request.sampling.seed
    return Sequence(
        request,
        secrets.randbits(63) if seed is None else seed,
        now_s,
        chain,
        ttft_slo_s=slo.ttft_ms / 1e3 if ttft_s is None else ttft_s,
        tpot_slo_s=slo.tpot_ms / 1e3 if tpot_s is None else tpot_s,
    )
