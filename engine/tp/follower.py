"""A rank that follows: holds its share of the model and of the memory, and does what the first rank does.

It decides nothing. It ends when the first rank does, or with an error that the first rank hears of: then the
group is made anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from engine.config import EngineConfig
from engine.device import free_bytes, make_driver, make_link
from engine.errors import BallonetError, EngineDeadError
from engine.memory.arena import StepBuffers
from engine.memory.kv_geometry import KvViews
from engine.model.graphs import GraphShape, cuda_graph_recorder
from engine.model.loader import read_model
from engine.model.rank_group import RankGroup
from engine.model.runner import Launch, ModelRunner, Words
from engine.tp.executor import MemoryExecutor
from engine.tp.followers import Kind
from engine.tp.migration import TransferService
from engine.tp.order_loop import OrderLoop
from engine.tp.orders import LAYER_DONE, Ranges
from engine.tp.place import RankPlace
from engine.tp.share import GRAPH_BYTES, load_share
from engine.tp.slab_service import SlabService
from engine.tp.wire import Link, connect, pack

logger = logging.getLogger(__name__)

_SPIN_S = 0.05  # longer than most steps: a rank that serves stays awake, one that idles sleeps


def follow(config: EngineConfig, place: RankPlace, group_class: type[RankGroup] = RankGroup) -> None:
    """Be a rank until the first one ends.

    Raises:
        BallonetError: this rank cannot go on. The first one has been told.
    """
    plan, slabs = connect(place, "plan"), connect(place, "slabs")
    try:
        follower = Follower(config, place, plan, slabs, group_class)
        follower.serve()
    except Exception as error:
        logger.exception("rank %d ends", place.rank)
        told = error if isinstance(error, BallonetError) else f"{type(error).__name__}: {error}"
        try:
            plan.send(pack((Kind.FAILED, told)))
        except EngineDeadError:  # it is gone, which may be why
            return
        raise


class Follower:
    """One rank's share of an engine.

    Args:
        plan, slabs: to the first rank.
        group_class: the collectives.
    """

    def __init__(
        self,
        config: EngineConfig,
        place: RankPlace,
        plan: Link,
        slabs: Link,
        group_class: type[RankGroup] = RankGroup,
    ) -> None:
        self._config = config
        self._plan = plan
        facts = read_model(config, place.rank)
        self._report(Kind.ANSWER, None)
        self._device = facts.device
        self._share = load_share(config, facts, place, group_class)
        graph_bytes = GRAPH_BYTES if self._share.shapes else 0
        self._vm, num_chunks = make_driver(
            facts.device, self._share.geometry.chunk_bytes, config.memory, graph_bytes
        )
        copies, maker = make_link(facts.device, self._vm.chunk_bytes)
        self._memory = MemoryExecutor(self._vm, copies, self._report, self._wait_for_run)
        self._transfers = TransferService(
            place.rank, self._memory.addresses, self._vm.chunk_bytes, self._report
        )
        self._slabs = SlabService(maker, slabs, self._memory.addresses)
        self._runner: ModelRunner | None = None
        self._record = cuda_graph_recorder(facts.device) if facts.device.type == "cuda" else None
        self._num_runs = 0
        self._running: deque[tuple[int, torch.cuda.Event]] = deque()
        orders = {
            **self._memory.orders,
            **self._transfers.orders,
            "free": self._slabs.free,
            "see": self._see,
            "run": self._run,
            "capture": self._capture,
            "free bytes": self._free_bytes,
            "release unused": self._release_unused,
        }
        spin_s = _SPIN_S if facts.device.type == "cuda" else 0.0  # a CPU rank needs its cores to compute
        self._loop = OrderLoop(plan, orders, self._is_idle, self._report_ended, spin_s)
        self._report(Kind.ANSWER, num_chunks)  # that this device has room for

    @torch.inference_mode()
    def serve(self) -> None:
        """Do what is ordered, until the first rank is gone."""
        self._loop.serve()
        self._synchronize()

    def _report(self, *content: object) -> None:
        self._plan.send(pack(content))

    def _is_idle(self) -> bool:
        return self._memory.is_idle and self._transfers.is_idle

    def _report_ended(self) -> None:
        self._memory.report()
        self._transfers.report()

    def _see(self, ranges: Ranges) -> None:
        """Make views of the first rank's pool, and what runs over them."""
        share, limits, dtype = self._share, self._config.scheduler, self._share.model.facts.dtype
        arena, *groups = self._views([ranges.arena, *ranges.groups])
        kv = KvViews(share.geometry, ranges.rows_per_slot, [one.view(dtype) for one in groups])
        kv.layer_views[0][0].zero_()  # the guard row, as the first rank does
        self._runner = ModelRunner(
            share.model.decoder,
            _Arena(StepBuffers(share.specs, lambda: arena)),
            kv,
            self._device,
            torch.zeros(limits.max_num_seqs + 1, dtype=torch.int64, device=self._device),
            limits.largest_step,
            limits.max_num_seqs,
            share.ranks,
        )

    def _views(self, ranges: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        packed = np.array([address for address, _ in ranges], np.uint64).tobytes()
        ours = self._memory.addresses.translate(packed)
        return [self._vm.view(address, size) for address, (_, size) in zip(ours, ranges, strict=True)]

    def _run(self, words: Words, written: bytes, is_hooked: bool) -> None:
        runner, step = self._runner, Launch.of_words(words)
        assert runner is not None
        runner.inputs.load(step.layout, written)
        runner.launch(step, _Hook(self._loop) if is_hooked else None)
        self._num_runs += 1
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._running.append((self._num_runs, event))

    def _capture(self, shapes: list[GraphShape]) -> None:
        assert self._runner is not None
        assert self._record is not None
        self._runner.capture(shapes, self._record)

    def _wait_for_run(self, number: int) -> None:
        while self._running and self._running[0][0] <= number:
            self._running.popleft()[1].synchronize()

    def _free_bytes(self) -> int:
        return free_bytes(self._device)

    def _release_unused(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Arena:
    """The first rank knows what is backed."""

    def __init__(self, buffers: StepBuffers) -> None:
        self.buffers = buffers.buffers

    def is_backed(self, num_tokens: int, num_rows: int) -> bool:
        return True


class _Hook:
    """Between two layers the first rank orders copies."""

    def __init__(self, loop: OrderLoop) -> None:
        self._loop = loop

    def before(self, layer: int) -> None:
        self._loop.until(LAYER_DONE)

    def after(self, layer: int) -> None:
        self._loop.until(LAYER_DONE)
