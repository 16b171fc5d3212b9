"""What TP groups and the controller say to one another: frozen, and cheap to pickle."""

from __future__ import annotations

from dataclasses import dataclass

from engine.control import Order, OrderAnswer
from engine.messages import EngineSnapshot


@dataclass(frozen=True, slots=True)
class GroupReport:
    """One group as the controller sees it.

    Attributes:
        group_id: of the Serve replica; a group that is built anew has a new one.
        num_ranks: engines of the group, all on the node of its first.
        ttft_slo_s: what its model promises.
        snapshot: of rank 0; None if the engine does not answer.
        wanted_replicas: as it was told last; 0 if it was not.
    """

    group_id: str
    model_id: str
    num_ranks: int
    ttft_slo_s: float
    snapshot: EngineSnapshot | None
    wanted_replicas: int = 0


@dataclass(frozen=True, slots=True)
class MigrationOrder:
    """Move the parked request whose client has waited longest, of those that can move.

    Attributes:
        epoch, revision: a number as an order's; one that is not higher than the last is done already.
        group_id: where to; another group of the same model.
        min_stay_s: one that came by a migration stays so long.
    """

    epoch: int
    revision: int
    group_id: str
    min_stay_s: float


@dataclass(frozen=True, slots=True)
class Instruction:
    """What the controller wants of one group.

    Attributes:
        group_id: who is meant.
        order: for its engines.
        wanted_replicas: groups that its model should have, for Serve's autoscaler.
        migration: begun once; whether it came about, the next reports tell.
    """

    group_id: str
    order: Order
    wanted_replicas: int
    migration: MigrationOrder | None = None


@dataclass(frozen=True, slots=True)
class InstructionAnswer:
    """What became of an order; None if the engine does not answer."""

    group_id: str
    answer: OrderAnswer | None
