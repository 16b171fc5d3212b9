"""The physical chunks of one device: who has them, and when they may be touched again.

Invariant: free + owned + retiring == total, checked by `check`. Chunks are made on first need and
kept; `trim` gives the free ones back. A chunk can be mapped at several places (prefix sharing): it
is owned while one live reference is left.

A range that drops a chunk may still be read by steps in flight, so the reference first goes to
limbo with the newest step's number. When that step has finished, a shared chunk is unmapped there,
and a chunk that nobody else holds becomes free but stays mapped: *warm*. A new sequence in the same
slot takes warm chunks over without a driver call; anybody else may steal them for one unmap. A free
chunk can also be sent ahead to where it will be needed (`send_ahead`): it is free all the while, and
warm there once the mapping thread is done. Those that are there, or on their way, for a sequence that
is about to grow are *held*: others take them last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from engine.errors import ConservationError
from engine.memory.budget import Budget
from engine.memory.deliveries import Deliveries, Delivery
from engine.memory.vmm import Moved, Outcome, VirtualMemory
from engine.memory.warm_chunks import Place, WarmChunks


class ChunkPool:
    """All chunks of one device. Not thread-safe: memory state has one writer, the engine loop.

    Args:
        vm: the driver.
        total: the budget in chunks.
    """

    def __init__(self, vm: VirtualMemory, total: int) -> None:
        self.vm = vm
        self.budget = Budget(total)
        self._handles: dict[int, int] = {}
        self._next_id = 0
        self._idle: list[int] = []
        self._warm = WarmChunks()
        self._sent = Deliveries(vm)
        self._owner: dict[int, str] = {}
        self._live: Counter[int] = Counter()
        self._limbo: Counter[int] = Counter()
        # The newest step that may read them -> place -> chunk: a place holds at most one reference in limbo.
        self._dropped: dict[int, dict[Place, int]] = {}
        self._by_owner: Counter[str] = Counter()
        self._num_retiring = 0
        self._launched = 0
        self._completed = 0

    @property
    def total(self) -> int:
        """Chunks that there are or may yet be made."""
        return self.budget.total

    @property
    def num_free(self) -> int:
        """Chunks that `take` could give out now; negative while more are owned than the limit allows."""
        return self.num_unowned - self.budget.num_excess

    @property
    def num_unowned(self) -> int:
        """Chunks in the state `free`, those included that are beyond the limit and go back."""
        return self.budget.num_unmade + len(self._idle) + len(self._warm) + len(self._sent)

    @property
    def num_warm(self) -> int:
        """Free chunks that are still mapped where they were last used, or mapped ahead."""
        return len(self._warm)

    @property
    def num_unmapped(self) -> int:
        """Free chunks that are mapped nowhere, those not made yet included."""
        return self.budget.num_unmade + len(self._idle)

    @property
    def num_sent(self) -> int:
        """Free chunks on their way to where they will be needed."""
        return len(self._sent)

    @property
    def num_spare(self) -> int:
        """Free chunks that no sequence is about to need: neither held nor on their way to be."""
        return self.num_free - self._warm.num_held - self._sent.num_held

    @property
    def num_retiring(self) -> int:
        """Chunks without an owner that steps in flight may still read."""
        return self._num_retiring

    @property
    def completed(self) -> int:
        """The newest step that has finished."""
        return self._completed

    @property
    def num_created(self) -> int:
        """Chunks with physical memory behind them."""
        return len(self._handles) + self._sent.num_made

    @property
    def num_refused(self) -> int:
        """Chunks that the driver would not make, out of the budget until `ask_again`."""
        return self.budget.num_refused

    def num_owned(self, owner: str) -> int:
        """Chunks under one owner's label; a shared chunk counts once."""
        return self._by_owner[owner]

    def handle(self, chunk: int) -> int:
        """The driver's handle of a chunk."""
        return self._handles[chunk]

    def take(self, count: int, owner: str) -> list[int] | None:
        """`count` unmapped chunks for `owner`, or None if there are not enough.

        Order: chunks that exist unmapped, new ones, warm ones as `WarmChunks` orders them, those sent
        ahead. If the driver refuses to make a chunk, the budget shrinks to what exists until
        `ask_again`, and the shortage is reported like any other.
        """
        if count > max(0, self.num_free):
            return None
        if len(self._idle) < count and self.budget.num_unmade:
            self._create(min(count - len(self._idle), self.budget.num_unmade))
        self._steal(count - len(self._idle))
        if len(self._idle) < count and self._sent:
            self.receive(wait=True)
            self._steal(count - len(self._idle))
        if len(self._idle) < count:
            return None
        taken = [self._idle.pop() for _ in range(count)]
        for chunk in taken:
            self._own(chunk, owner)
        return taken

    def put_back(self, chunks: Iterable[int]) -> None:
        """Return chunks from `take` that were never mapped."""
        for chunk in chunks:
            self._disown(chunk)
            self._idle.append(chunk)

    def map(self, places: Sequence[Place], chunks: Sequence[int]) -> None:
        """Map a chunk at each place, all in one driver call.

        Raises:
            DriverError: nothing of it is mapped.
        """
        addresses = [tensor.address_of(row) for tensor, row in places]
        self.vm.map(addresses, [self._handles[chunk] for chunk in chunks])
        for (tensor, row), chunk in zip(places, chunks, strict=True):
            tensor.mapped(row, chunk)

    def can_adopt(self, chunk: int) -> bool:
        """Whether the one place that maps an ownerless chunk could own it again.

        True for a retiring chunk too: what that place writes next is ordered behind the steps that
        still read it, on the same stream.
        """
        return chunk in self._warm or (not self._live[chunk] and self._limbo[chunk] == 1)

    def adopt(self, chunk: int, owner: str, place: Place) -> None:
        """Own a chunk again at the place where it is mapped; no driver call."""
        if chunk in self._warm:
            self._warm.pop(chunk)
        else:
            for places in self._dropped.values():
                places.pop(place, None)
            self._limbo[chunk] = 0
            self._num_retiring -= 1
        self._own(chunk, owner)

    def share(self, chunk: int) -> None:
        """One more live reference to an owned chunk, mapped at one more place."""
        if not self._live[chunk]:
            raise ConservationError(f"chunk {chunk} has no owner to share it")
        self._live[chunk] += 1

    def drop(self, chunk: int, place: Place, read_until: int | None = None) -> None:
        """Give up one live reference. The place is cleared or kept warm by the next `settle` that may.

        Args:
            read_until: the newest step that reads the place; None is the newest launched.
        """
        self._live[chunk] -= 1
        self._limbo[chunk] += 1
        if not self._live[chunk]:
            self._by_owner[self._owner[chunk]] -= 1
            self._num_retiring += 1
        step = self._launched if read_until is None else read_until
        self._dropped.setdefault(step, {})[place] = chunk

    def launched(self, step: int) -> None:
        """A step that may read every chunk owned now is about to run."""
        self._launched = step

    def finished(self, step: int) -> None:
        """That step, and every one before it, has finished on the device."""
        self._completed = max(self._completed, step)
        self.settle()

    def settle(self) -> None:
        """Take every dropped reference out of limbo that no step in flight can read any more."""
        shared: list[tuple[Place, int]] = []
        for step in sorted(step for step in self._dropped if step <= self._completed):
            # A slot's rows are dropped in rising order, and its first are worth most to who comes next.
            for place, chunk in reversed(self._dropped.pop(step).items()):
                self._limbo[chunk] -= 1
                if self._live[chunk] or self._limbo[chunk]:
                    shared.append((place, chunk))
                else:
                    self._owner.pop(chunk, None)
                    del self._live[chunk], self._limbo[chunk]
                    self._num_retiring -= 1
                    self._warm.add(chunk, place)
        for place, chunk in shared[self._unmap([place for place, _ in shared]) :]:
            self._back_to_limbo(place, chunk)

    def _back_to_limbo(self, place: Place, chunk: int) -> None:
        """The driver would not unmap a place: the next settling tries again."""
        places = [place]
        if chunk in self._warm:  # mapped at two places, so not yet anybody's to take
            places.append(self._warm.pop(chunk))
            self._num_retiring += 1
        for one in places:
            self._limbo[chunk] += 1
            self._dropped.setdefault(self._completed, {})[one] = chunk

    def hold(self, chunks: Collection[int]) -> None:
        """Take these last while they are free: they are mapped where a sequence is about to grow."""
        self._warm.hold(chunks)

    def send_ahead(self, targets: Sequence[Place], is_held: bool = False) -> None:
        """Let the mapping thread bring free chunks to empty places, as many as there are spare ones.

        They stay free: whoever needs them more urgently takes them back.

        Args:
            is_held: as by `hold`, until that names others.
        """
        sent = []
        for target in targets if not self.budget.num_excess else ():
            one = self._next_to_send(target, is_held)
            if one is None:
                break
            sent.append(one)
        if sent:
            self._sent.send(sent, self._handles)

    def receive(self, wait: bool = False) -> None:
        """Take in what the mapping thread has done; with `wait`, all that it was given."""
        for one, moved in self._sent.receive(wait):
            self._arrived(one, moved)

    def ask_again(self) -> None:
        """Count chunks that the driver once refused as obtainable again: its memory may be back."""
        self.budget.ask_again()

    def resize(self, total: int) -> None:
        """Another budget, no smaller than what has been made."""
        self.budget.resize(total)

    def create_all(self) -> None:
        """Make every chunk of the budget now."""
        self._create(self.budget.num_unmade)

    def trim(self) -> int:
        """Give every free chunk back to the system; how many chunks that were."""
        self.receive(wait=True)
        self._steal(len(self._warm))
        return self._release(len(self._idle))

    def give_back(self) -> int:
        """Give free chunks back to the system that are beyond the limit; how many chunks that were."""
        count = self.budget.num_excess
        self._steal(count - len(self._idle))
        if len(self._idle) < count and self._sent:
            self.receive(wait=True)
            self._steal(count - len(self._idle))
        return self._release(min(count, len(self._idle)))

    def check(self) -> None:
        """Raise ConservationError unless every chunk is in exactly one state."""
        owned = {chunk for chunk, count in self._live.items() if count > 0}
        retiring = {chunk for chunk, count in self._limbo.items() if count > 0} - owned
        sent = [one.chunk for one in self._sent]
        sets = [
            owned,
            retiring,
            set(self._idle),
            self._warm.chunks(),
            {one for one in sent if one is not None},
        ]
        seen = set().union(*sets)
        if sum(map(len, sets)) != len(seen) or seen != set(self._handles):
            raise ConservationError(
                f"chunks in two states or in none: {[len(s) for s in sets]} of {len(self._handles)}"
            )
        num_unmade = self.budget.num_unmade
        if len(seen) + sent.count(None) + num_unmade != self.total:
            raise ConservationError(f"{len(seen)} chunks + {num_unmade} not made != {self.total}")
        if len(retiring) != self._num_retiring or len(owned) != self._by_owner.total():
            raise ConservationError("the counts of owned or retiring chunks are off")
        if len(sent) != len(self._sent):
            raise ConservationError("the count of chunks sent ahead is off")

    def _create(self, count: int) -> None:
        handles = self.vm.create(count)
        for handle in handles:
            self._idle.append(self._new(handle))
        self.budget.made(len(handles))
        if len(handles) < count:
            self.budget.refuse()

    def _release(self, count: int) -> int:
        released = self.vm.release([self._handles[chunk] for chunk in self._idle[:count]])
        for chunk in self._idle[:released]:
            del self._handles[chunk]
        del self._idle[:released]
        self.budget.unmade(released)
        return released

    def _new(self, handle: int) -> int:
        chunk = self._next_id
        self._handles[chunk] = handle
        self._next_id += 1
        return chunk

    def _steal(self, count: int) -> None:
        """Unmap warm chunks, in their order."""
        if count <= 0:
            return
        stolen = self._warm.first(count)
        for chunk, _ in stolen[: self._unmap([place for _, place in stolen])]:
            self._warm.pop(chunk)
            self._idle.append(chunk)

    def _unmap(self, places: Sequence[Place]) -> int:
        """Unmap in one driver call, up to a place that the driver refuses; how many it were."""
        if not places:
            return 0
        count = self.vm.unmap([tensor.address_of(row) for tensor, row in places])
        for tensor, row in places[:count]:
            tensor.unmapped(row)
        return count

    def _next_to_send(self, target: Place, is_held: bool) -> Delivery | None:
        if self._idle:
            return Delivery(self._idle.pop(), None, target, is_held)
        if self.budget.num_unmade:
            self.budget.made(1)
            return Delivery(None, None, target, is_held)
        stolen = self._warm.pop_spare()
        if stolen is None:
            return None
        chunk, source = stolen
        source[0].unmapped(source[1])
        source[0].awaits(source[1])
        return Delivery(chunk, source, target, is_held)

    def _arrived(self, one: Delivery, moved: Moved) -> None:
        source, (tensor, row) = one.source, one.target
        tensor.unmapped(row)
        if source is not None:
            source[0].unmapped(source[1])
        if moved.handle is None:
            self.budget.unmade(1)
            self.budget.refuse()
            return
        chunk = self._new(moved.handle) if one.chunk is None else one.chunk
        if moved.outcome is Outcome.DONE:
            tensor.mapped(row, chunk)
            self._warm.add(chunk, one.target, one.is_held)
        elif moved.outcome is Outcome.STAYED and source is not None:
            source[0].mapped(source[1], chunk)
            self._warm.add(chunk, source)
        else:
            self._idle.append(chunk)

    def _own(self, chunk: int, owner: str) -> None:
        self._live[chunk] = 1
        self._owner[chunk] = owner
        self._by_owner[owner] += 1

    def _disown(self, chunk: int) -> None:
        self._by_owner[self._owner.pop(chunk)] -= 1
        del self._live[chunk]
