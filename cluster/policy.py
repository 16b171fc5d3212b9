"""What the controller decides, as a pure function of what the groups told: `decide`.

Three time scales, and who acts on each: an engine's own feedback halves and doubles its room within a
fraction of a second (`engine.feedback`); this moves memory between groups and weighs groups of a model within
seconds; Serve's autoscaler starts groups within minutes, when this says that memory does not help any more.

Every lever has a dwell time, within which it does not go back the way it came.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.policy_facts import Facts, Levers, Outlook, facts_of, look
from cluster.policy_memory import divide_devices, divide_hosts
from cluster.policy_migration import DWELL_S, MigrationState, plan_migrations
from cluster.policy_models import ModelState, judge_models
from cluster.reports import GroupReport, Instruction, MigrationOrder
from engine.control import Order
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The constants of the policy.

    Attributes:
        host_memory_bytes: of each node, for all balloons on it; None is what the node has, less the reserve.
        reserve: share of a node's memory that no balloon takes: an engine makes no slab beyond seven eighths.
        floor: share of an equal part that each group keeps, so that one that wakes up can park somebody.
        headroom: times what a group needs just now is what it is given: the next requests come before the
            next order has been carried out, which takes seconds of pinning.
        need_half_life_s: a need that has gone counts half after so long: gaps of a few seconds between bursts
            take nobody's memory away.
        dead_band: share of an equal part; moves of less are not made.
        dwell_s: a lever does not go back within; several times what a slab takes to change hands (0.2 s).
        device_dwell_s, device_half_life_s: `dwell_s` and `need_half_life_s` of pools that share a device.
            Their chunks change hands at 25 GiB/s: who was given memory has used it two or three looks later.
        target: share of promises to be kept. Below it a group counts as late.
        patience_s: lateness of next tokens that lasts so long is no burst, and beyond the engine's means.
        least_weight: admission weights do not go below; a group with less would hardly be heard of again.
        recovery: times `dwell_s` before a weight goes up again: the load may still be too much.
        replica_patience_s: a model that is late so long, though memory cannot help, needs more groups.
            Long enough for memory to have been moved and used.
        compute_patience_s: the same where first and next tokens are late alike, which no memory helps: long
            enough for a group to be judged by its newest promises.
        replica_idle_s: a model that could do with a group less for so long gives it up: a start takes
            minutes.
        forget_s: a group that does not answer for so long has gone, and its memory with it.
    """

    host_memory_bytes: int | None = None
    reserve: float = 0.125
    floor: float = 0.1
    headroom: float = 1.25
    need_half_life_s: float = 5.0
    dead_band: float = 0.1
    dwell_s: float = 10.0
    device_dwell_s: float = 3.0
    device_half_life_s: float = 2.0
    target: float = 0.95
    patience_s: float = 5.0
    least_weight: float = 0.25
    recovery: float = 4.0
    replica_patience_s: float = 30.0
    compute_patience_s: float = 10.0
    replica_idle_s: float = 300.0
    forget_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("reserve", "floor", "dead_band", "target", "least_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"controller.{name} must be between 0 and 1, not {getattr(self, name)}")
        if (
            self.least_weight == 0
            or self.headroom < 1
            or min(self.need_half_life_s, self.device_half_life_s) <= 0
        ):
            raise ConfigError("controller: least_weight, headroom - 1 and half lives must be above 0")


@dataclass(frozen=True, slots=True)
class State:
    """What the policy remembers. A new controller takes it from the groups' answers: `recovered`.

    Attributes:
        epoch, revision: of the newest order.
        orders: the newest one of each group; those it has not heard of are said again.
        budgets: bytes of each node, so that small changes of what is available move nobody.
    """

    epoch: int
    revision: int = 0
    groups: Mapping[str, Outlook] = field(default_factory=dict)
    orders: Mapping[str, Order] = field(default_factory=dict)
    budgets: Mapping[str, int] = field(default_factory=dict)
    models: Mapping[str, ModelState] = field(default_factory=dict)
    migrations: MigrationState = field(default_factory=MigrationState)


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that was decided, for those who count."""

    subject: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done.

    Attributes:
        instructions: for groups whose orders are new, or that have not heard of them.
        weights: of each group, for the router.
        replicas: groups that each model should have.
        actions: what has changed, and why.
    """

    instructions: tuple[Instruction, ...]
    weights: Mapping[str, float]
    replicas: Mapping[str, int]
    actions: tuple[Action, ...]


def recovered(reports: Sequence[GroupReport], config: PolicyConfig, now: float) -> State:
    """The state of a controller that has just started: a higher epoch than any that a group has heard of, and
    each group's levers where they are. None moves before a dwell time has passed.
    """
    orders = {
        report.group_id: report.snapshot.order
        for report in reports
        if report.snapshot is not None and report.snapshot.order is not None
    }
    epoch = 1 + max((order.epoch for order in orders.values()), default=0)
    groups = {}
    for report in reports:
        if (facts := facts_of(report)) is not None and facts.group_id in orders:
            levers = Levers.of_order(orders[facts.group_id], facts.num_ranks, now)
            groups[facts.group_id] = Outlook(facts, levers, levers.size.value / config.headroom, now)
    return State(epoch, groups=groups)


def decide(
    reports: Sequence[GroupReport], state: State, config: PolicyConfig, now: float
) -> tuple[Decision, State]:
    """Orders for the groups, and advice for the router and the autoscaler.

    Args:
        reports: of all groups that answer; one whose engine does not is counted for a while as it was.
        state: as the last call returned it, or `recovered`.
        now: seconds that never go back.

    Returns:
        What is to be done, and the state for the next call.
    """
    groups = _look_at(reports, state, config, now)
    moved, budgets = divide_hosts(groups, state.budgets, config, now)
    moved = divide_devices(moved, config, now)
    models, replicas = judge_models(moved, state.models, config, now)
    pairs, migrations = plan_migrations(moved, state.migrations, config, now)
    for members in _by(moved, lambda facts: facts.model_id).values():
        moved |= _weigh(members, config, now)
    moved = {group_id: _retain(one, config, now) for group_id, one in moved.items()}
    orders, revision = _orders(moved, state)
    leaving = {
        source: MigrationOrder(state.epoch, revision := revision + 1, target, DWELL_S)
        for source, target in pairs.items()
    }
    instructions = tuple(
        Instruction(one.group_id, orders[one.group_id], replicas[one.model_id], leaving.get(one.group_id))
        for one in reports
        if one.snapshot is not None
        and (
            one.group_id in leaving
            or (one.snapshot.order, one.wanted_replicas) != (orders[one.group_id], replicas[one.model_id])
        )
    )
    actions = [action for group_id, one in moved.items() for action in _changes(group_id, groups, one)]
    actions += [
        Action(model_id, "ask_for_replicas" if model.wanted > model.num_groups else "give_replicas_up", why)
        for model_id, model in models.items()
        if (why := model.changed)
    ]
    actions += [Action(source, "migrate", "parked_late") for source in leaving]
    weights = {group_id: one.levers.weight.value for group_id, one in moved.items()}
    done = Decision(instructions, weights, replicas, tuple(actions))
    return done, State(state.epoch, revision, moved, orders, budgets, models, migrations)


def _look_at(
    reports: Sequence[GroupReport], state: State, config: PolicyConfig, now: float
) -> dict[str, Outlook]:
    """Every group as it is now, after what is remembered of it."""
    groups = {group_id: one for group_id, one in state.groups.items() if now - one.seen_s <= config.forget_s}
    half_lives = config.need_half_life_s, config.device_half_life_s
    for report in reports:
        facts = facts_of(report)
        if facts is not None:
            groups[facts.group_id] = look(facts, groups.get(facts.group_id), half_lives, now)
    return groups


def _weigh(members: Mapping[str, Outlook], config: PolicyConfig, now: float) -> dict[str, Outlook]:
    """Groups of one model: those whose next tokens are late, while others' are not, get fewer prompts."""
    late = {group_id for group_id, one in members.items() if one.pace.share < config.target}
    weighed = {}
    for group_id, one in members.items():
        weight, since = one.levers.weight, one.pace_late_since
        since = min(since, now) if group_id in late else math.inf
        if since != one.pace_late_since:
            one = replace(one, pace_late_since=since)
        if now - since >= config.patience_s and len(late) < len(members):
            one = one.with_lever(
                "weight", max(config.least_weight, weight.value / 2), now, config.dwell_s, "pace_late"
            )
        elif since == math.inf and weight.value < 1:
            recovery_s = config.recovery * config.dwell_s
            one = one.with_lever("weight", min(1.0, weight.value * 2), now, recovery_s, "pace_kept")
        weighed[group_id] = one
    return weighed


def _retain(one: Outlook, config: PolicyConfig, now: float) -> Outlook:
    """Parked sequences leave wholly while somebody waits for memory. Where nobody does, and next tokens are
    late, less of them leaves, and less has to come back.
    """
    is_calm = one.facts.num_waiting == 0 and one.facts.num_parked > 0 and one.first.share >= config.target
    wanted = 0.25 if is_calm and one.pace.share < config.target else 1.0
    return one.with_lever(
        "retention", wanted, now, config.dwell_s, "pace_late" if wanted < 1 else "prompts_wait"
    )


def _orders(groups: Mapping[str, Outlook], state: State) -> tuple[dict[str, Order], int]:
    """The newest order of each group: the last one, unless a lever has moved since."""
    orders, revision = {}, state.revision
    for group_id, one in groups.items():
        size = int(one.levers.size.value) // one.facts.num_ranks
        order = state.orders.get(group_id)
        limit = int(one.levers.pool.value) // one.facts.num_ranks or None
        levers = size, size, one.levers.retention.value, one.levers.weight.value, limit
        if order is None or order.levers != levers:
            revision += 1
            order = Order(state.epoch, revision, *levers[:4], one.reason, levers[4])
        orders[group_id] = order
    return orders, revision


def _changes(group_id: str, before: Mapping[str, Outlook], now: Outlook) -> list[Action]:
    was = before[group_id].levers
    if now.levers is was and not now.facts.device:
        return []
    pairs = (
        ("balloon", was.size, now.levers.size),
        ("pool", before[group_id].pool_lever, now.pool_lever),
        ("weight", was.weight, now.levers.weight),
        ("retention", was.retention, now.levers.retention),
    )
    return [
        Action(group_id, f"{name}_{'up' if new.value > old.value else 'down'}", now.why.get(name, ""))
        for name, old, new in pairs
        if new.value != old.value
    ]


def _by(groups: Mapping[str, Outlook], key: Callable[[Facts], str]) -> dict[str, dict[str, Outlook]]:
    found: dict[str, dict[str, Outlook]] = defaultdict(dict)
    for group_id, one in groups.items():
        found[key(one.facts)][group_id] = one
    return found
