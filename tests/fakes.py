"""Stand-ins that go in through constructors.

`PatternRunner` is a model whose KV can be checked: it writes each token's own signature into every
layer's keys and values, and before each piece reads back everything the sequence should already
hold. A chunk that was lent away too early, mapped twice or mixed up between sequences shows at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.errors import DriverError
from engine.memory.arena import BufferSpec
from engine.memory.balloon import Balloon
from engine.memory.copies import Copies, Direction, ThreadCopies, Ticket
from engine.memory.host_vmm import HostVirtualMemory
from engine.memory.kv_cache import KvCache
from engine.memory.kv_geometry import KvGeometry
from engine.memory.kv_stream import KvTransport
from engine.memory.layer_wise import Offload
from engine.memory.pool import MemoryPool
from engine.memory.slabs import PlainSlabs
from engine.memory.vmm import VirtualMemory
from engine.messages import PENDING_TOKEN, EngineInfo, Piece, StepPlan, TokenDelta
from engine.model.sampler import Sampled, SampleRow
from engine.scheduler import Scheduler

VOCAB = 997
EOS = 0
CHUNK_BYTES = 4096
GEOMETRY = KvGeometry.choose(4, 2, 8, 4, CHUNK_BYTES)  # 4 layers, 32 tokens a chunk
SPECS = (
    BufferSpec("hidden", 64, torch.float32, "token"),
    BufferSpec("qkv", 96, torch.float32, "token", "attention"),
    BufferSpec("logits", VOCAB, torch.float32, "row", "head"),
)


def next_token(tokens: Sequence[int]) -> int:
    """What the pattern model says after these tokens: a hash of all of them, never EOS."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return 1 + value % (VOCAB - 1)


def answer(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The pattern model's continuation of a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(prompt) :])


class FakeClock:
    """Time that moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


class PatternRunner:
    """Writes signatures to KV, and raises AssertionError if what should be there is not.

    Attributes:
        tokens_of: (request id, count) -> its first tokens; asked for what a request has not computed itself.
        last_tokens: the newest token chosen for each seat, as on a device.
        contexts: what the sequences that sampled in the newest plan consist of, by seat.
        names: the requests in those seats.
    """

    def __init__(self, pool: MemoryPool, tokens_of: Callable[[str, int], Sequence[int]]) -> None:
        self._pool = pool
        self.tokens_of = tokens_of
        self._told: dict[str, list[int]] = {}
        self.plans: list[StepPlan] = []
        self.last_tokens: dict[int, int] = {}
        self.contexts: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}

    def run(self, plan: StepPlan, offload: Offload | None = None) -> torch.Tensor:
        kv = self._pool.kv
        for copy in plan.copies:
            kv.copy_rows(copy.source_row, copy.target_row)
        for buffer in self._pool.arena.buffers(plan.num_tokens, plan.num_rows).values():
            buffer.fill_(float("nan"))  # a chunk that is KV and activation at once would show
        told = [self._tell(piece) for piece in plan.pieces]
        for layer, view in enumerate(kv.layer_views):
            if offload is not None:
                offload.before(layer)
            for piece, tokens in zip(plan.pieces, told, strict=True):
                self._write(kv, layer, view, piece, tokens)
            # Only now: a piece may read what another one of the same step writes.
            for piece in plan.pieces:
                self._verify(kv, layer, view, piece, self._told[piece.request_id])
            if offload is not None:
                offload.after(layer)
        self.plans.append(plan)
        sampling = [piece for piece in plan.pieces if piece.samples]
        self.contexts = {piece.seat: list(self._told[piece.request_id]) for piece in sampling}
        self.names = {piece.seat: piece.request_id for piece in sampling}
        return torch.zeros(plan.num_rows, VOCAB)

    def synchronize(self) -> None:
        pass

    def finished(self, step: int) -> None:
        pass

    def _tell(self, piece: Piece) -> list[int]:
        """The tokens of a piece."""
        told = self._told.setdefault(piece.request_id, [])
        if piece.start > len(told):
            told[:] = self.tokens_of(piece.request_id, piece.start)
            assert PENDING_TOKEN not in told
        del told[piece.start :]
        assert piece.start >= piece.shared_tokens
        tokens = [self.last_tokens[piece.seat] if one == PENDING_TOKEN else one for one in piece.token_ids]
        told.extend(tokens)
        return tokens

    @staticmethod
    def _write(kv: KvCache, layer: int, view: torch.Tensor, piece: Piece, tokens: Sequence[int]) -> None:
        device, per_row = view.device, kv.geometry.tokens_per_chunk
        positions = torch.arange(piece.start, piece.start + len(tokens), device=device)
        rows, offsets = kv.first_row(piece.slot) + positions // per_row, positions % per_row
        signature = torch.tensor(tokens, dtype=torch.float32, device=device)[:, None, None] * 100
        view[rows, 0, offsets] = signature + layer
        view[rows, 1, offsets] = -(signature + layer)

    def _verify(
        self, kv: KvCache, layer: int, view: torch.Tensor, piece: Piece, tokens: Sequence[int]
    ) -> None:
        shared = piece.shared_tokens // kv.geometry.tokens_per_chunk
        first, there = kv.first_row(piece.slot), kv.first_row(piece.shared_slot)
        own = slice(first + shared, first + kv.geometry.rows_for(len(tokens)))
        expected = torch.tensor(tokens, dtype=torch.float32, device=view.device) * 100
        rows = torch.cat([view[there : there + shared], view[own]]) if shared else view[own]
        keys = rows[:, 0].reshape(-1, *view.shape[3:])[: len(tokens)]
        values = rows[:, 1].reshape(-1, *view.shape[3:])[: len(tokens)]
        want = (expected + layer)[:, None, None].expand_as(keys)
        self._compare(keys, want, values, -want)

    def _compare(self, *found_and_wanted: torch.Tensor) -> None:
        keys, wanted_keys, values, wanted_values = found_and_wanted
        assert torch.equal(keys, wanted_keys), "keys are not what was written"
        assert torch.equal(values, wanted_values), "values are not what was written"


class Ready:
    """Results that are handed over once."""

    def __init__(self, results: list[Sampled]) -> None:
        self._results = results

    def wait(self) -> list[Sampled]:
        return self._results


class PatternSampler:
    """Continues every sequence with `next_token`, or reports an error for those named in `broken`."""

    def __init__(self, runner: PatternRunner) -> None:
        self._runner = runner
        self.broken: set[str] = set()

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> Ready:
        assert len(logits) == len(rows)
        return Ready([self._one(row) for row in rows])

    def _one(self, row: SampleRow) -> Sampled:
        context = self._runner.contexts[row.seat]
        if row.history is not None:
            assert [*row.history[0], *row.history[1]] == context, "the sampler is told another history"
        token = next_token(context)
        self._runner.last_tokens[row.seat] = token
        if self._runner.names[row.seat] in self.broken:
            return Sampled(0, error="not finite")
        return Sampled(token)


class Collected(dict[str, TokenDelta]):
    """Everything an engine published, by request; `take` is what it publishes to."""

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        for delta in deltas:
            before = self.get(delta.request_id)
            assert before is None or before.finish_reason is None, "a delta after the end"
            self[delta.request_id] = delta if before is None else before.then(delta)


class HeldTicket:
    """A copy that ends when it is told to, or waited for.

    Attributes:
        targets, sources: addresses of chunks.
        after_steps: as it was submitted.
        has_failed: it ended without having copied anything.
    """

    def __init__(
        self,
        copies: HeldCopies,
        direction: Direction,
        targets: list[int],
        sources: list[int],
        after_steps: bool,
    ) -> None:
        self._copies = copies
        self.direction = direction
        self.targets, self.sources, self.after_steps = targets, sources, after_steps
        self.is_done = self.has_failed = False

    def wait(self) -> None:
        self._copies.end(self)
        if self.has_failed:
            raise DriverError("cudaMemcpyAsync", "refused")


class HeldCopies:
    """Copies that are made at the last moment: when they are told to end, or waited for, in their order.

    Until then targets hold what nobody wrote there, so that whoever reads them too early is seen.

    Attributes:
        submitted: every ticket.
        check: called with a ticket when it is submitted and when it ends.
        fails: whether a ticket that ends fails; asked once.
        is_closed: whether everything has ended for good.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self.submitted: list[HeldTicket] = []
        self.check: Callable[[HeldTicket], None] = lambda ticket: None
        self.fails: Callable[[HeldTicket], bool] = lambda ticket: False
        self.is_closed = False

    @property
    def under_way(self) -> list[HeldTicket]:
        """Those that have not ended, in their order."""
        return [ticket for ticket in self.submitted if not ticket.is_done]

    def hold_steps(self, ticket: Ticket) -> None:
        """Steps here are computed at once: so the copy has to end."""
        if isinstance(ticket, HeldTicket):
            self.end(ticket)

    def keep(self, *owners: object) -> None:
        """They live as long as these copies do."""
        self.owners = owners

    def bytes_moved(self, direction: Direction) -> int:
        return (
            sum(len(one.targets) for one in self.submitted if one.direction is direction) * self.chunk_bytes
        )

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> HeldTicket:
        assert not self.is_closed
        assert len(set(targets)) == len(targets) == len(sources)
        ticket = HeldTicket(self, direction, list(targets), list(sources), after_steps)
        self.check(ticket)
        for target in targets:
            ctypes.memset(target, 0xFF, self.chunk_bytes)  # NaN in every type
        self.submitted.append(ticket)
        return ticket

    def end(self, ticket: HeldTicket | None = None) -> None:
        """End a copy and those before it in its direction; without one, all."""
        for one in self.under_way:
            is_before = ticket is None or one.direction is ticket.direction
            if is_before and (ticket is None or not ticket.is_done):
                self._end(one)

    def close(self) -> None:
        self.end()
        self.is_closed = True

    def _end(self, ticket: HeldTicket) -> None:
        self.check(ticket)
        ticket.is_done, ticket.has_failed = True, self.fails(ticket)
        if not ticket.has_failed:
            for target, source in zip(ticket.targets, ticket.sources, strict=True):
                ctypes.memmove(target, source, self.chunk_bytes)


class Bench:
    """An engine of fakes over real host memory, and what it published.

    Attributes:
        steps_ahead: steps launched before the one that runs has been read, unless a test says otherwise.
    """

    steps_ahead = 0

    def __init__(
        self,
        total_chunks: int = 64,
        memory: MemoryConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        max_model_len: int = 256,
        vm: VirtualMemory | None = None,
        geometry: KvGeometry = GEOMETRY,
        steps_ahead: int | None = None,
        runner: type[PatternRunner] = PatternRunner,
        sampler: type[PatternSampler] = PatternSampler,
        balloon_chunks: int = 0,
        copies: Copies | None = None,
        balloon: Balloon | None = None,
        transport: KvTransport | None = None,
        shared_device: str = "",
    ) -> None:
        scheduler = scheduler or SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)
        memory = memory or MemoryConfig()
        config = EngineConfig(ModelSource("pattern", "nowhere"), memory, scheduler)
        self.mode = memory.mode
        self.vm = vm or HostVirtualMemory(CHUNK_BYTES, total_chunks)
        self.pool = MemoryPool(
            self.vm,
            total_chunks,
            memory.mode,
            geometry,
            SPECS,
            scheduler.max_num_seqs,
            max_model_len,
            scheduler.largest_step,
            torch.float32,
            num_slots=2 * scheduler.max_num_seqs,
            caches_prefixes=memory.enable_prefix_caching,
        )
        if balloon_chunks or balloon:
            self.balloon = balloon or Balloon(PlainSlabs(), CHUNK_BYTES, balloon_chunks, balloon_chunks)
            self.pool.add_balloon(self.balloon, copies or ThreadCopies(CHUNK_BYTES), transport)
        info = EngineInfo(
            "pattern", "cpu", "float32", max_model_len, VOCAB, (EOS,), 0, 0, 32, 1, 0.0, shared_device
        )
        self.clock = clock = FakeClock()
        self.scheduler = Scheduler(scheduler, self.pool, max_model_len, info.eos_token_ids, clock)
        self.runner = runner(self.pool, self._tokens_of)
        self.sampler = sampler(self.runner)
        self.deltas = Collected()
        self.engine = Engine(
            config,
            info,
            self.pool,
            self.scheduler,
            self.runner,
            self.sampler,
            self.deltas.take,
            clock,
            self.steps_ahead if steps_ahead is None else steps_ahead,
        )

    def _tokens_of(self, request_id: str, count: int) -> Sequence[int]:
        seq = self.scheduler.get(request_id)
        assert seq is not None
        return seq.tokens(0, count)

    @property
    def num_held(self) -> int:
        """Host chunks that somebody needs, and that are not only kept to be found."""
        assert self.pool.parking is not None
        return self.balloon.num_used - self.pool.parking.host.num_cached

    def run(self, max_steps: int = 10_000) -> int:
        """Step until there is nothing to do; how many steps that took."""
        for count in range(max_steps):
            if not self.engine.step():
                self.pool.check()
                return count
        raise AssertionError(f"still busy after {max_steps} steps")

    def assert_idle(self) -> None:
        """Nothing runs, nothing waits, and every chunk is free but the arena's, the guard and the cached."""
        now = self.engine.snapshot
        assert (now.num_running, now.num_waiting) == (0, 0)
        self.pool.check()
        memory = self.pool.snapshot()
        assert memory.retiring == memory.kv_tokens == 0
        if self.mode == "static":
            per_slot = self.pool.kv.rows_per_slot * self.pool.kv.geometry.num_groups
            assert memory.kv == self.pool.kv.num_slots * per_slot
            return
        assert memory.kv == 0
        assert memory.free + memory.cached + memory.activation + memory.guard == memory.total
