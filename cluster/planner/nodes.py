"""Where the groups of a plan run: nodes, and their GPUs, as many as it takes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from cluster.planner.plan import ModelPlan

_ROUNDING = 1e-9
_CPU_NODE = "node0"  # of all groups without GPUs


@dataclass(frozen=True, slots=True)
class Place:
    """Of one group.

    Attributes:
        gpus: numbers on the node; none on a CPU.
        share: of each of them.
    """

    node_id: str
    gpus: tuple[int, ...] = ()
    share: float = 1.0

    @property
    def shared_gpu(self) -> str:
        """Names the GPU, on its node, if others may run on it too; empty otherwise."""
        return f"GPU-{self.gpus[0]}" if self.gpus and self.share < 1 else ""


class Nodes:
    """All nodes, each with as many GPUs; there is always one more.

    Attributes:
        most_gpus: that were used at one time.
    """

    def __init__(self, gpus_per_node: int) -> None:
        self._gpus_per_node = gpus_per_node
        self._taken: dict[str, list[float]] = {}
        self.most_gpus = 0

    def __len__(self) -> int:
        return len(self._taken)

    def take(self, model: ModelPlan) -> Place:
        """The first node with room for all ranks (STRICT_PACK), and on it the first GPUs."""
        if model.config.device == "cpu":
            self._taken.setdefault(_CPU_NODE, [])
            return Place(_CPU_NODE)
        share, count = model.config.memory.device_share, model.num_ranks
        for number in itertools.count():
            node_id = f"node{number}"
            taken = self._taken.get(node_id, [0.0] * max(self._gpus_per_node, count))
            fitting = [gpu for gpu, part in enumerate(taken) if part + share <= 1 + _ROUNDING]
            if len(fitting) < count:
                continue
            chosen = tuple(fitting[:count])
            for gpu in chosen:
                taken[gpu] += share
            self._taken[node_id] = taken
            self.most_gpus = max(self.most_gpus, self._num_used)
            return Place(node_id, chosen, share)
        raise AssertionError  # never: nodes do not run out

    def give_back(self, place: Place) -> None:
        """A group has gone."""
        for gpu in place.gpus:
            self._taken[place.node_id][gpu] -= place.share

    @property
    def _num_used(self) -> int:
        return sum(part > _ROUNDING for taken in self._taken.values() for part in taken)
