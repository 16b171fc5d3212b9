"""A limit on what one pool holds of a device that others use as well, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable

from engine.memory.chunks import ChunkPool

_ASK_AGAIN_STEPS = 256  # a few seconds: another process may have given device memory back
_ASK_OTHERS_STEPS = 8  # where others are known to give some back just now; asking in vain takes 11 us


class PoolLimit:
    """Shrinks and grows a pool while it is used.

    Args:
        chunks: of the pool.
        vacate: lets go of what no sequence needs: the arena's idle tail, cached prefixes, and so on, as much
            as `chunks.num_free` is below 0.
        is_elastic: whether chunks are made and given back at all once the pool is there.
    """

    def __init__(self, chunks: ChunkPool, vacate: Callable[[], None], is_elastic: bool) -> None:
        self._chunks = chunks
        self._vacate = vacate
        self.is_elastic = is_elastic
        self._num_steps = 0

    @property
    def lacks_its_own(self) -> bool:
        """Whether a limit, or others who have not given memory back yet, keep it below what is configured.

        Whoever does not fit then is not too large: it waits.
        """
        budget = self._chunks.budget
        return budget.limit is not None and budget.total - budget.num_excess < budget.configured

    @property
    def overage_bytes(self) -> int:
        """Memory that is held beyond the limit; it goes back as steps and sequences let go of it."""
        return self._chunks.budget.num_excess * self._chunks.vm.chunk_bytes

    def restrict(self, num_bytes: int | None) -> None:
        """Hold that much at most, however much is configured; None is what is configured.

        What no sequence needs goes back at once. More may be made from the next step on, as far as the
        driver has it.
        """
        self._chunks.budget.restrict(None if num_bytes is None else num_bytes // self._chunks.vm.chunk_bytes)
        self.keep()

    def begin_step(self) -> None:
        """A step is about to be drafted: keep the limit, and now and then ask for what was refused."""
        every = _ASK_OTHERS_STEPS if self.lacks_its_own else _ASK_AGAIN_STEPS
        if self._num_steps % every == 0:
            self._chunks.ask_again()
        self._num_steps += 1
        self.keep()

    def keep(self) -> None:
        """Give back what is held beyond the limit and needed by no sequence.

        While more is needed than the limit allows there is less than no room: sequences have to leave, as
        with any shortage.
        """
        if self._chunks.budget.num_excess:
            self._chunks.settle()
            self._vacate()
            self._chunks.settle()
            self._chunks.give_back()
