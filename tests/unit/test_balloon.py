"""The balloon: growth in the background, refusals, orders, and every host chunk accounted for."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConservationError, DriverError
from engine.memory.balloon import Balloon
from engine.memory.slabs import PlainSlabs, Slab
from engine.simulated import NullSlabs, VirtualClock

CHUNK = 4096
SLAB = 4
MAX = 10  # so the third slab is a half one
PLENTY = 1 << 40


class SlabsOnDemand:
    """Makes a slab each time it is let to, or refuses; written down with its size."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.freed: list[int] = []
        self.threads: set[int] = set()
        self.may_make = threading.Semaphore(0)
        self.refuses = False
        self._slabs = NullSlabs()

    def make(self, nbytes: int) -> Slab:
        self.sizes.append(nbytes)
        self.threads.add(threading.get_ident())
        self.may_make.acquire()
        if self.refuses:
            raise DriverError("cudaHostRegister", "out of memory")
        return FreedSlab(self._slabs.make(nbytes).address, self.freed)


class FreedSlab:
    def __init__(self, address: int, freed: list[int]) -> None:
        self.address = address
        self._freed = freed

    def free(self) -> None:
        self._freed.append(self.address)


def until(is_true: Callable[[], bool]) -> None:
    """Wait for the background thread."""
    give_up = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < give_up
        time.sleep(0.001)


def grown(balloon: Balloon, num_physical: int) -> None:
    """Do what steps do until so many chunks exist."""

    def is_grown() -> bool:
        balloon.grow_ahead()
        balloon.check()
        return balloon.num_physical >= num_physical

    until(is_grown)


@pytest.fixture
def slabs() -> SlabsOnDemand:
    return SlabsOnDemand()


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def balloon(slabs: SlabsOnDemand, clock: VirtualClock) -> Iterator[Balloon]:
    made = Balloon(slabs, CHUNK, MAX, SLAB, lambda: PLENTY, clock)
    yield made
    made.check()
    slabs.may_make.release(100)
    made.close()


def full(balloon: Balloon, slabs: SlabsOnDemand) -> list[int]:
    """All chunks of a balloon, taken."""
    slabs.may_make.release(3)
    until(lambda: balloon.take(MAX) is not None)
    return list(range(MAX))


def test_nothing_waits_for_a_slab(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    assert (balloon.num_physical, balloon.num_logical, balloon.num_free) == (0, MAX, MAX)
    assert balloon.take(2) is None
    balloon.grow_ahead()
    assert (balloon.num_physical, balloon.num_free) == (0, MAX), "the maker is still waiting"
    slabs.may_make.release()
    until(lambda: (balloon.take(2) or []) == [0, 1])
    assert (balloon.num_physical, balloon.num_used, balloon.num_free) == (SLAB, 2, MAX - 2)
    assert threading.get_ident() not in slabs.threads


def test_growth_comes_before_it_is_needed(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    balloon.grow_ahead()
    slabs.may_make.release()
    grown(balloon, SLAB)
    assert slabs.sizes == [SLAB * CHUNK]
    assert balloon.take(2) is not None
    balloon.grow_ahead()
    assert slabs.sizes == [SLAB * CHUNK], "half a slab is free"
    assert balloon.take(1) is not None
    balloon.grow_ahead()
    until(lambda: len(slabs.sizes) == 2)
    slabs.may_make.release()
    grown(balloon, 2 * SLAB)
    assert len(slabs.threads) == 1


def test_growth_goes_on_until_the_largest_wish_is_met(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    slabs.may_make.release(3)
    assert balloon.take(MAX) is None
    grown(balloon, MAX)
    assert slabs.sizes == [4 * CHUNK, 4 * CHUNK, 2 * CHUNK], "no more than there may be"
    assert balloon.take(MAX) == list(range(MAX))
    assert balloon.take(1) is None
    assert balloon.take(0) == []
    balloon.grow_ahead()
    assert len(slabs.sizes) == 3


def test_a_wish_that_can_never_be_met_makes_no_memory(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    assert balloon.take(MAX + 1) is None
    balloon.set_logical(3)
    assert balloon.take(4) is None
    assert slabs.sizes == []


def test_chunks_of_a_call_are_neighbours(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    full(balloon, slabs)
    balloon.put_back([6, 7, 8, 9])
    balloon.put_back([2, 3, 4])
    assert balloon.take(3) == [2, 3, 4]
    assert balloon.take(2) == [6, 7]


def test_addresses_are_those_of_the_slabs() -> None:
    balloon = Balloon(PlainSlabs(), CHUNK, MAX, SLAB, lambda: PLENTY)
    balloon.take(MAX)
    grown(balloon, MAX)
    addresses = [balloon.address_of(chunk) for chunk in range(MAX)]
    assert len(set(addresses)) == MAX
    for chunk in (1, 2, 3, 5, 6, 7, 9):
        assert addresses[chunk] == addresses[chunk - 1] + CHUNK
    assert {address % CHUNK for address in addresses} == {0}
    with pytest.raises(KeyError):
        balloon.address_of(3 * SLAB)
    balloon.close()


def test_deflating_below_what_is_taken_drops_nothing(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    full(balloon, slabs)
    balloon.put_back([9])
    balloon.set_logical(4)
    assert (balloon.num_logical, balloon.num_used, balloon.num_free) == (4, 9, 0)
    assert balloon.take(1) is None
    assert balloon.take(0) == []
    balloon.put_back([0, 1, 2, 3, 4, 5])
    assert (balloon.num_used, balloon.num_free) == (3, 1)
    assert balloon.take(2) is None
    assert balloon.take(1) == [0]
    balloon.set_logical(5)
    assert balloon.take(1) == [1]


def test_orders_stay_within_what_there_may_ever_be(balloon: Balloon) -> None:
    balloon.set_logical(-3)
    assert (balloon.num_logical, balloon.num_free) == (0, 0)
    balloon.set_logical(1000 * MAX)
    assert (balloon.num_logical, balloon.num_free) == (MAX, MAX)


def test_no_slab_is_made_beyond_the_order(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    balloon.set_logical(SLAB)
    slabs.may_make.release(3)
    grown(balloon, SLAB)
    assert balloon.take(SLAB) is not None
    balloon.grow_ahead()
    assert len(slabs.sizes) == 1, "none of its chunks could be taken"
    balloon.set_logical(SLAB + 1)
    grown(balloon, 2 * SLAB)


def test_a_refused_slab_is_a_value(
    balloon: Balloon, slabs: SlabsOnDemand, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    slabs.may_make.release()
    grown(balloon, SLAB)
    slabs.refuses = True
    slabs.may_make.release(10)
    assert balloon.take(SLAB + 1) is None
    until(lambda: balloon.take(SLAB + 1) is None and balloon.max_chunks == SLAB)
    assert (balloon.num_free, balloon.num_logical) == (SLAB, MAX)
    assert balloon.take(SLAB) == [0, 1, 2, 3], "what there is can be used"
    clock.advance(29.0)
    balloon.grow_ahead()
    assert len(slabs.sizes) == 2, "not asked again yet"
    clock.advance(1.0)
    balloon.grow_ahead()
    until(lambda: len(slabs.sizes) == 3)

    def is_asked_again() -> bool:  # so the refusal before that has been heard of
        clock.advance(30.0)
        return balloon.take(1) is None and len(slabs.sizes) >= 4

    until(is_asked_again)
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "ulimit -l" in warning.getMessage()
    assert "memory.balloon_bytes" in warning.getMessage()
    assert "cudaHostRegister failed: out of memory" in warning.getMessage()


def test_refused_memory_comes_back(
    balloon: Balloon, slabs: SlabsOnDemand, clock: VirtualClock, caplog: pytest.LogCaptureFixture
) -> None:
    slabs.refuses = True
    slabs.may_make.release()
    assert balloon.take(1) is None
    until(lambda: balloon.take(1) is None and balloon.max_chunks == 0)
    assert balloon.num_free == 0
    slabs.refuses = False
    slabs.may_make.release(2)
    clock.advance(30.0)
    balloon.grow_ahead()
    assert balloon.num_free == 0, "not before a slab has been made"
    until(lambda: balloon.take(2) is not None)
    assert (balloon.max_chunks, balloon.num_free) == (MAX, MAX - 2)
    until(lambda: balloon.take(SLAB) is not None)
    assert len(caplog.records) == 1


def test_the_host_keeps_its_margin(clock: VirtualClock, caplog: pytest.LogCaptureFixture) -> None:
    rooms = [SLAB * CHUNK, SLAB * CHUNK - 1]
    balloon = Balloon(NullSlabs(), CHUNK, MAX, SLAB, lambda: rooms.pop(0), clock)
    grown(balloon, SLAB)
    assert balloon.take(SLAB + 1) is None
    until(lambda: balloon.take(SLAB + 1) is None and balloon.max_chunks == SLAB)
    assert f"{SLAB * CHUNK} bytes are wanted, and the host can spare {SLAB * CHUNK - 1}" in caplog.text
    balloon.close()


def test_a_bug_in_a_maker_costs_the_balloon_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def make(self, nbytes: int) -> Slab:
            raise ZeroDivisionError("a bug")

    balloon = Balloon(Broken(), CHUNK, MAX, SLAB, lambda: PLENTY)
    until(lambda: balloon.take(1) is None and balloon.max_chunks == 0)
    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text
    balloon.close()


def test_what_is_not_taken_cannot_be_put_back(balloon: Balloon, slabs: SlabsOnDemand) -> None:
    slabs.may_make.release()
    grown(balloon, SLAB)
    assert balloon.take(2) == [0, 1]
    for wrong in ([2], [0, 2], [0, 0], [SLAB]):
        with pytest.raises(ConservationError, match="not all taken"):
            balloon.put_back(wrong)
    assert balloon.num_used == 2
    balloon.put_back(iter([1, 0]))
    assert balloon.num_used == 0


@pytest.mark.parametrize("damage", ["lost", "twice", "in two states", "unknown"])
def test_check_finds_what_is_wrong(damage: str) -> None:
    balloon = Balloon(NullSlabs(), CHUNK, MAX, SLAB, lambda: PLENTY)
    grown(balloon, SLAB)
    assert balloon.take(1) == [0]
    free = balloon._free
    balloon._free = {
        "lost": free[1:],
        "twice": [*free, free[0]],
        "in two states": [*free, 0],
        "unknown": [SLAB, *free[1:]],
    }[damage]
    with pytest.raises(ConservationError, match="host chunks"):
        balloon.check()


def test_close_waits_for_the_slab_that_is_being_made(slabs: SlabsOnDemand) -> None:
    balloon = Balloon(slabs, CHUNK, MAX, SLAB, lambda: PLENTY)
    slabs.may_make.release()
    grown(balloon, SLAB)
    balloon.take(SLAB + 1)
    until(lambda: len(slabs.sizes) == 2)
    timer = threading.Timer(0.05, slabs.may_make.release)
    timer.start()
    balloon.close()
    assert len(slabs.freed) == len(slabs.sizes) == 2
    balloon.check()
    assert (balloon.num_physical, balloon.num_free, balloon.take(1)) == (0, 0, None)
    balloon.close()
    balloon.grow_ahead()
    assert len(slabs.freed) == 2
    timer.join()


def test_a_dropped_balloon_goes_away_by_itself() -> None:
    balloon = Balloon(PlainSlabs(), CHUNK, MAX, SLAB, lambda: PLENTY)
    grown(balloon, SLAB)
    slab, worker = weakref.ref(balloon._slabs[0].slab), next(iter(balloon._worker._threads))  # type: ignore[attr-defined]
    del balloon
    gc.collect()
    assert slab() is None
    worker.join(timeout=20)
    assert not worker.is_alive()


Operation = tuple[str, int]
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["take", "put back", "order", "slab", "refusal", "time"]), st.integers(0, MAX + 2)
    ),
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(OPERATIONS)
def test_every_chunk_is_accounted_for(operations: list[Operation]) -> None:
    """Whatever is asked and whenever slabs arrive: no chunk is taken twice, and none beyond the order."""
    slabs, clock = SlabsOnDemand(), VirtualClock()
    balloon = Balloon(slabs, CHUNK, MAX, SLAB, lambda: PLENTY, clock)
    taken: list[int] = []
    for what, count in operations:
        if what == "take":
            chunks = balloon.take(count)
            if chunks is not None:
                assert len(chunks) == count
                taken += chunks
                assert not chunks or len(taken) <= balloon.num_logical
        elif what == "put back":
            balloon.put_back(taken[:count])
            del taken[:count]
        elif what == "order":
            balloon.set_logical(count)
        elif what == "time":
            clock.advance(10.0 * count)
        else:
            slabs.refuses = what == "refusal"
            slabs.may_make.release()
            balloon.grow_ahead()
        balloon.check()
        assert balloon.num_used == len(taken) == len(set(taken)) <= balloon.num_physical <= MAX
        assert balloon.num_free == max(0, min(balloon.num_logical, balloon.max_chunks) - len(taken))
    slabs.refuses = False
    slabs.may_make.release(100)
    balloon.put_back(taken)
    balloon.set_logical(MAX)

    def has_all() -> bool:
        clock.advance(30.0)
        return balloon.take(MAX) is not None

    until(has_all)
    balloon.close()
    assert len(slabs.freed) == 3
