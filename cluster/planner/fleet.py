"""The groups of a plan, on their nodes: which there are, which start, and which leave."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.planner.nodes import Nodes, Place
from cluster.planner.plan import ModelPlan, Plan, Replicas
from cluster.reports import GroupReport
from engine.control import HostSnapshot, Order
from engine.messages import EngineSnapshot, MemorySnapshot


class SimulatedGroup(Protocol):
    """One group."""

    name: str
    place: Place
    model: ModelPlan

    @property
    def snapshot(self) -> EngineSnapshot:
        """Of its first rank."""

    @property
    def num_open(self) -> int:
        """Requests that it has not answered yet."""

    def apply(self, order: Order, now: float) -> None:
        """Follow the controller."""


MakeGroup = Callable[[str, ModelPlan, Place, float], SimulatedGroup]  # name, model, place, now


@dataclass(slots=True)
class _Starting:
    ready_s: float
    name: str
    model: ModelPlan
    place: Place


class Fleet:
    """All groups.

    Attributes:
        nodes: where they are.
        leaving: those that finish what they have.

    Args:
        make: one group.
    """

    def __init__(self, plan: Plan, make: MakeGroup) -> None:
        self.plan = plan
        self._make = make
        self._numbers = {model.model_id: itertools.count() for model in plan.models}
        self.nodes = Nodes(plan.gpus_per_node)
        self._starting: list[_Starting] = []
        self._groups: dict[str, list[SimulatedGroup]] = {model.model_id: [] for model in plan.models}
        self.leaving: list[SimulatedGroup] = []
        self.wanted: dict[str, int] = {}  # as the controller said last
        self._scaling = {model.model_id: Scaling(model.replicas) for model in plan.models}
        for model in plan.models:
            for _ in range(model.replicas.first):
                self._start(model, 0.0, ready_s=0.0)
        self.settle(0.0)

    @property
    def groups(self) -> list[SimulatedGroup]:
        """Those that can be sent to."""
        return [group for groups in self._groups.values() for group in groups]

    def of(self, model_id: str) -> list[SimulatedGroup]:
        """The same of one model."""
        return self._groups[model_id]

    def num_starting(self, model_id: str) -> int:
        return sum(one.model.model_id == model_id for one in self._starting)

    def settle(self, now: float) -> None:
        """Groups that have loaded begin, those that leave and have finished are gone."""
        for one in [one for one in self._starting if one.ready_s <= now]:
            self._starting.remove(one)
            self.of(one.model.model_id).append(self._make(one.name, one.model, one.place, now))
        for group in [group for group in self.leaving if not group.num_open]:
            self.leaving.remove(group)
            self.nodes.give_back(group.place)

    def scale(self, now: float) -> None:
        """As Serve's autoscaler does, by the controller's wish or its own rule."""
        for model in self.plan.models:
            groups = self.of(model.model_id)
            num_open = sum(group.num_open for group in groups)
            wish = self.wanted.get(model.model_id) if self.plan.policy is not None else None
            there = len(groups) + self.num_starting(model.model_id)
            target = self._scaling[model.model_id].target(there, wish, num_open, now)
            for _ in range(target - there):
                self._start(model, now, now + model.calibration.load_s)
            for group in sorted(groups, key=lambda one: one.num_open)[: max(0, there - target)]:
                groups.remove(group)
                self.leaving.append(group)

    def held(self) -> Counter[str]:
        """Bytes of host memory that balloons hold, by node."""
        return self._by_node(lambda memory: memory.balloon_physical)

    def used(self) -> Counter[str]:
        """The same of KV that requests have there."""
        return self._by_node(lambda memory: memory.balloon - memory.balloon_cached)

    def _by_node(self, num_chunks: Callable[[MemorySnapshot], int]) -> Counter[str]:
        found: Counter[str] = Counter()
        for group in (*self.groups, *self.leaving):
            memory = group.snapshot.memory
            nbytes = num_chunks(memory) * memory.chunk_bytes * group.model.num_ranks
            found[group.place.node_id] += nbytes
        return found

    def host_of(self, node_id: str) -> HostSnapshot:
        """A node's memory, as its engines see it."""
        total = self.plan.host_bytes
        return HostSnapshot(node_id, total, max(0, total - self.held()[node_id]))

    def reports(self) -> list[GroupReport]:
        """What the controller is told."""
        held, total = self.held(), self.plan.host_bytes
        return [
            GroupReport(
                group.name,
                group.model.model_id,
                group.model.num_ranks,
                group.model.ttft_slo_s,
                replace(
                    group.snapshot,
                    host=HostSnapshot(group.place.node_id, total, max(0, total - held[group.place.node_id])),
                ),
                self.wanted.get(group.model.model_id, 0),
            )
            for group in self.groups
        ]

    def _start(self, model: ModelPlan, now: float, ready_s: float) -> None:
        name = f"{model.model_id}#{next(self._numbers[model.model_id])}"
        self._starting.append(_Starting(ready_s, name, model, self.nodes.take(model)))


class Scaling:
    """Serve's rule for one model: a wish counts once it has lasted, as Serve's delays say."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._direction, self._since_s = 0, 0.0

    def target(self, there: int, wish: int | None, num_open: int, now: float) -> int:
        """Groups that there should be.

        Args:
            there: that are, or start.
            wish: the controller's; None leaves it to requests per group, as `cluster.scaling` does.
        """
        limits = self._replicas
        if wish is None or wish < 1 or not num_open:
            wish = -(-num_open // max(1, int(limits.ongoing)))
        wanted = min(limits.most, max(limits.least, wish))
        direction = (wanted > there) - (wanted < there)
        if direction != self._direction:
            self._direction, self._since_s = direction, now
        delay_s = limits.upscale_s if direction > 0 else limits.downscale_s
        return wanted if direction and now - self._since_s >= delay_s else there
