"""What the controller and an engine say to one another: frozen, free of torch and of ray, like `messages`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError

OrderOutcome = Literal["applied", "deferred", "stale", "conflict"]


@dataclass(frozen=True, slots=True)
class Order:
    """All levers of one engine, as the controller wants them. A later order replaces an earlier one wholly.

    Attributes:
        epoch: of the controller's incarnation; the higher one is obeyed.
        revision: counts up within an epoch.
        balloon_logical_bytes: of host memory that each rank may use.
        balloon_physical_bytes: that each rank may hold; what is more goes back slab by slab.
        retention: times `min_retained_chunks` of the configuration: below 1, parked sequences rather leave
            layer groups on the device.
        admission_weight: above 0 and at most 1: the largest share of a step for prompts, and the router's
            weight of the group.
        reason: in a few words, for those who look.
        pool_bytes: of its device that each rank's pool may hold, more or less than it is configured to: what
            is more in use goes back as soon as it can. None is what is configured.
    """

    epoch: int
    revision: int
    balloon_logical_bytes: int
    balloon_physical_bytes: int
    retention: float = 1.0
    admission_weight: float = 1.0
    reason: str = ""
    pool_bytes: int | None = None

    def __post_init__(self) -> None:
        sizes = self.balloon_logical_bytes, self.balloon_physical_bytes, self.pool_bytes or 0
        if min(*sizes, self.retention) < 0:
            raise ConfigError(f"an order's sizes must be at least 0: {self}")
        if not 0 < self.admission_weight <= 1:
            raise ConfigError(f"admission_weight must be above 0 and at most 1: {self}")

    @property
    def levers(self) -> tuple[int, int, float, float, int | None]:
        """What is ordered, whoever did it, when and why."""
        sizes = self.balloon_logical_bytes, self.balloon_physical_bytes
        return *sizes, self.retention, self.admission_weight, self.pool_bytes


@dataclass(frozen=True, slots=True)
class OrderAnswer:
    """What became of an order.

    Attributes:
        outcome: `applied`: it holds. `deferred`: it holds but for `overage_bytes` of host memory and
            `device_overage_bytes` of the device's, which are in use and go back as soon as they can. `stale`:
            a later one is obeyed. `conflict`: another one came under the same number, or the engine has no
            such lever. After the last two nothing has changed.
        epoch, revision: of the order that is obeyed; -1 if there is none.
    """

    outcome: OrderOutcome
    epoch: int
    revision: int
    overage_bytes: int = 0
    device_overage_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostSnapshot:
    """The machine an engine runs on, as its process sees it.

    Attributes:
        node_id: engines with the same one share the memory.
        total_bytes, available_bytes: under the tightest limit; what could still be given out of it.
    """

    node_id: str
    total_bytes: int
    available_bytes: int
