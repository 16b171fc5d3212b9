"""Everything that crosses a process boundary: frozen, free of torch and of ray, cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.control import HostSnapshot, Order
from engine.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request wants its tokens chosen. Field names and meanings are vLLM's.

    Attributes:
        max_tokens: tokens to generate at most, at least 1.
        temperature: 0 is greedy; at most 2.
        top_k: 0 keeps every token.
        min_p: drops tokens less likely than `min_p` times the most likely one.
        seed: the same seed gives the same tokens for the same prompt, whatever else is in the batch
            and whether or not the sequence was preempted. None draws one.
        presence_penalty, frequency_penalty: over generated tokens, -2 to 2.
        repetition_penalty: over prompt and generated tokens; 1 is off.
        logit_bias: (token id, bias) pairs added to the logits.
        logprobs: how many alternatives to report a token, besides the one chosen; None for none.
        stop_token_ids: end the sequence like the model's own end-of-sequence tokens.
        ignore_eos: do not stop at the model's own end-of-sequence tokens.
        min_tokens: tokens before which no stop token may be chosen.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        _require(0.0 <= self.temperature <= 2.0, "temperature", "between 0 and 2", self.temperature)
        _require(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1", self.top_p)
        _require(self.top_k >= 0, "top_k", "0 (off) or more", self.top_k)
        _require(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1", self.min_p)
        _require(
            abs(self.presence_penalty) <= 2.0, "presence_penalty", "between -2 and 2", self.presence_penalty
        )
        _require(
            abs(self.frequency_penalty) <= 2.0,
            "frequency_penalty",
            "between -2 and 2",
            self.frequency_penalty,
        )
        _require(
            0.01 <= self.repetition_penalty <= 10.0,  # logits are divided by it, and must stay finite
            "repetition_penalty",
            "between 0.01 and 10",
            self.repetition_penalty,
        )
        _require(
            all(abs(bias) <= 100.0 for _, bias in self.logit_bias),
            "logit_bias",
            "between -100 and 100",
            self.logit_bias,
        )
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            f"between 0 and {MAX_LOGPROBS}",
            self.logprobs,
        )
        _require(
            0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens", self.min_tokens
        )
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer", self.seed)


def _require(holds: bool, param: str, expected: str, value: object) -> None:
    if not holds:
        raise RequestError(f"{param} must be {expected}, not {value!r}", param)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client asked for, in token ids. One choice: `n` choices are `n` requests.

    Attributes:
        cache_salt: prefixes are shared between requests of the same salt only.
        ttft_slo_s, tpot_slo_s: what this client is promised, in seconds; None is the model's own.
        priority: smaller is sooner (vLLM's field); one step is worth ten seconds of waiting.
        unpaced: its tokens are handed out as soon as they exist, also those ahead of the pace it is promised.
        session_id: requests of one session are routed alike while it pays; the engine does not look at it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: str = ""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    priority: int = 0
    unpaced: bool = False
    session_id: str = ""


PENDING_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that one step computes.

    Attributes:
        slot: the KV slot of the sequence.
        seat: its place in the sampler's tables, below the number of sequences that may run.
        start: position of the first token, which is also how many tokens the sequence already holds.
        token_ids: PENDING_TOKEN stands for the one that the step before chose for this seat: it is on
            the device, and the host has not read it yet.
        samples: whether the logits of the last token choose the sequence's next one.
        shared_slot, shared_tokens: the sequence's first `shared_tokens` tokens, a multiple of the tokens
            a chunk holds, lie in the range of `shared_slot` instead; no tokens if nothing is shared.
    """

    request_id: str
    slot: int
    seat: int
    start: int
    token_ids: tuple[int, ...]
    samples: bool
    shared_slot: int = 0
    shared_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A copy on the device before a step computes: KV rows of every layer group, one to another."""

    source_row: int
    target_row: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What every rank computes in one step. Frozen; the same on every rank.

    Attributes:
        step: counts up from 1; also the epoch by which retired chunks wait.
        pieces: those of one token first, so that they share one decode kernel.
        num_decodes: how many leading pieces have one token.
        copies: blocks to copy before anything is computed.
        has_staged: the last piece is a whole prompt whose KV leaves while it is computed.
    """

    step: int
    pieces: tuple[Piece, ...]
    num_decodes: int
    copies: tuple[BlockCopy, ...] = ()
    has_staged: bool = False

    @property
    def staged_tokens(self) -> int:
        """Tokens of the prompt whose KV leaves while it is computed; 0 if there is none."""
        return len(self.pieces[-1].token_ids) if self.has_staged else 0

    @property
    def num_tokens(self) -> int:
        """Tokens the step computes."""
        return self.num_decodes + sum([len(piece.token_ids) for piece in self.pieces[self.num_decodes :]])

    @property
    def num_rows(self) -> int:
        """Rows of logits the step needs."""
        return sum([piece.samples for piece in self.pieces])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, from the model's raw logits.

    Attributes:
        logprob: of the token that was chosen.
        top: (token id, log probability) of the most likely tokens, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """Tokens one request gained since the last delta, and perhaps its end.

    When `finish_reason` is `stop`, the last token is the stop token itself: it counts as generated
    but is not text. Stop strings are no matter of the engine's, which knows no text.

    Attributes:
        token_ids: new tokens, oldest first; empty only beside a finish reason.
        logprobs: one entry a token if the request asked for them, else empty.
        error: why the request failed, when `finish_reason` is `error`.
        num_preemptions: how often the sequence lost its KV and had it computed again, so far.
        num_cached_tokens: tokens of the prompt that were not computed, because their KV was there.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_preemptions: int = 0
    num_cached_tokens: int = 0

    def then(self, later: TokenDelta) -> TokenDelta:
        """This delta and the next one of the same request as one."""
        return TokenDelta(
            self.request_id,
            self.token_ids + later.token_ids,
            self.logprobs + later.logprobs,
            later.finish_reason,
            later.error,
            later.num_preemptions,
            later.num_cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the deltas of one request are to go (`engine.token_wire`).

    Attributes:
        address: ZMQ endpoint that its ingress process listens on.
        secret: what that process believes a sender by; drawn anew by each process.
        stream: the request's number there; one that is retried gets another.
    """

    address: str
    secret: bytes = field(repr=False)
    stream: int


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Who has the memory of one device, now.

    Chunks of the pool by state, `free + kv + cached + activation + guard + retiring == total`, and bytes
    outside it.

    Attributes:
        kv: chunks with KV that a live sequence reads, shared ones once.
        cached: chunks with KV that no live sequence reads, kept for prompts that begin alike; given up,
            the oldest first, when memory is short.
        warm: free chunks that are still mapped where they were last used, or where one will be needed
            (a part of `free`).
        created: chunks with physical memory behind them; the rest is address space only.
        limit, configured: chunks that there may be, by order and by configuration; `total` is more while
            what is beyond the limit is in use, and less while the device does not give them.
        floor: chunks that the longest open request needs to be served alone; told by engines that share
            their device.
        balloon: chunks of host memory that hold KV.
        balloon_cached: those of them that no sequence uses, kept for prompts that begin alike.
        balloon_logical, balloon_physical: chunks that new requests may send others to, and that there are.
        balloon_limit: chunks that there may be, by configuration or order; 0 if there is no balloon.
        balloon_slab: chunks that it grows and shrinks by.
        copied_out_bytes, copied_in_bytes: between the device and the balloon, since start.
        kv_tokens: tokens whose KV is held by live sequences.
        driver_calls: create, map, unmap and release calls since start, in the engine's thread.
        driver_calls_beside: those made by the mapping thread, beside the steps.
        weight_bytes, graph_bytes, workspace_bytes: model weights; CUDA graphs; and what torch, cuBLAS and
            the sampler's tables hold.
    """

    chunk_bytes: int
    total: int
    free: int
    kv: int
    cached: int
    activation: int
    guard: int
    retiring: int
    warm: int
    created: int
    kv_tokens: int
    driver_calls: int
    limit: int = 0
    configured: int = 0
    floor: int = 0
    driver_calls_beside: int = 0
    balloon: int = 0
    balloon_cached: int = 0
    balloon_logical: int = 0
    balloon_physical: int = 0
    balloon_limit: int = 0
    balloon_slab: int = 0
    copied_out_bytes: int = 0
    copied_in_bytes: int = 0
    weight_bytes: int = 0
    graph_bytes: int = 0
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Raw facts of one engine at one moment; verdicts are the controller's.

    Attributes:
        monotonic_s: the engine's clock when the snapshot was made.
        finished: requests ended so far, by finish reason.
        last_step_s: duration of the newest step.
        prefix_queries, prefix_hits: tokens of prompts that were looked up in the prefix cache, and those
            of them that were found.
        num_parked: sequences whose KV is in the balloon, or on its way there or back.
        num_parked_late: those of them whose client waits longer for tokens than can be made up for.
        num_parkings: how often a sequence was parked so far.
        num_deposited: tokens held back, because they are ahead of the pace that their clients were promised.
        expected_ttft_s: how long a new request would wait for its first token, by the newest rate of prompts.
        decisions: how often what was decided, by name: `park_for_prompt`, `park_for_turn`, `park_for_growth`,
            `return`, `recompute` (memory was taken and the balloon had no room), `shed` and `refuse` (a
            request was not taken: it would come too late, or the queue is full), `fetch_prefix` (the
            balloon had a prompt's beginning, or more of it), and the balloon's logical size, `deflate` (next
            tokens late) and `inflate` (first tokens late).
        first_in_time, first_late: first tokens so far that came when promised, and that came later.
        paced_in_time, paced_late: answers in full whose mean time per token was as promised, or was longer.
        num_waiting_late: requests that wait for a first token and cannot have it in time any more.
        oldest_wait_s: how long the request that came first has waited for its first token.
        prompt_token_s: seconds that a step takes for each token of a prompt; 0 while nothing is known.
        order: of the controller, that is obeyed.
        order_age_s: since it came.
        host: the machine; None where the engine's process does not tell.
        num_ranks: devices of that machine which hold the model together; the snapshot is the first one's.
        shared_device: names, on its node, the device that the engine shares with others; empty if it has it
            alone.
    """

    model_id: str
    monotonic_s: float
    num_waiting: int
    num_running: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generated_tokens: int
    finished: tuple[tuple[FinishReason, int], ...]
    last_step_s: float
    memory: MemorySnapshot
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_parked: int = 0
    num_parked_late: int = 0
    num_parkings: int = 0
    num_deposited: int = 0
    expected_ttft_s: float = 0.0
    decisions: tuple[tuple[str, int], ...] = ()
    first_in_time: int = 0
    first_late: int = 0
    paced_in_time: int = 0
    paced_late: int = 0
    num_waiting_late: int = 0
    oldest_wait_s: float = 0.0
    prompt_token_s: float = 0.0
    order: Order | None = None
    order_age_s: float = 0.0
    host: HostSnapshot | None = None
    num_ranks: int = 1
    shared_device: str = ""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a loaded engine that do not change.

    Attributes:
        max_model_len: tokens of the longest sequence, prompt and output together.
        pool_bytes: physical memory of the elastic pool.
        weight_bytes: memory of the weights, outside the pool.
        tokens_per_chunk, layers_per_group: the KV geometry (T and G).
        shared_device: as in `EngineSnapshot`.
    """

    model_id: str
    device: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    pool_bytes: int
    weight_bytes: int
    tokens_per_chunk: int
    layers_per_group: int
    load_s: float
    shared_device: str = ""
