"""Who should have how much of a node's host memory, and of a device that several groups share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

from cluster.memory_shares import Claim, divide
from cluster.policy_facts import Outlook

_SAME = 0.05  # what a node has available changes by less all the time

Groups = Mapping[str, Outlook]


class MemoryConfig(Protocol):
    """The constants that count here; `cluster.policy.PolicyConfig` explains them."""

    @property
    def host_memory_bytes(self) -> int | None: ...

    @property
    def reserve(self) -> float: ...

    @property
    def floor(self) -> float: ...

    @property
    def headroom(self) -> float: ...

    @property
    def dead_band(self) -> float: ...

    @property
    def dwell_s(self) -> float: ...

    @property
    def device_dwell_s(self) -> float: ...


def divide_hosts(
    groups: Groups, before: Mapping[str, int], config: MemoryConfig, now: float
) -> tuple[dict[str, Outlook], dict[str, int]]:
    """The balloons of every node's groups, moved; and what there is for them on each node.

    Args:
        before: what there was on each node: small changes move nobody.
    """
    nodes: dict[str, dict[str, Outlook]] = defaultdict(dict)
    for group_id, one in groups.items():
        nodes[one.facts.node_id][group_id] = one
    moved: dict[str, Outlook] = {}
    budgets: dict[str, int] = {}
    for node_id, members in nodes.items():
        budgets[node_id] = _budget(members, before.get(node_id), config)
        moved |= _divide_node(members, budgets[node_id], config, now)
    return moved, budgets


def _budget(members: Groups, before: int | None, config: MemoryConfig) -> int:
    """Bytes for balloons on a node: what is available, and what they have, less the reserve."""
    held = sum(one.facts.physical for one in members.values())
    host = next(iter(members.values())).facts
    budget = config.host_memory_bytes
    if budget is None:
        budget = max(0, host.host_available + held - int(config.reserve * host.host_total))
    return before if before is not None and abs(budget - before) < _SAME * before else budget


def _divide_node(members: Groups, budget: int, config: MemoryConfig, now: float) -> dict[str, Outlook]:
    """The balloons of a node's groups, moved."""
    elastic = {group_id: one for group_id, one in members.items() if one.facts.slab}
    claims = [
        Claim(
            group_id,
            int(one.levers.size.value),
            one.facts.physical,
            int(one.need * config.headroom),
            one.facts.slab,
            one.levers.size.may_move(1, now, config.dwell_s),
            one.levers.size.may_move(-1, now, config.dwell_s),
        )
        for group_id, one in elastic.items()
    ]
    if not claims:
        return dict(members)
    floor = int(config.floor * budget / len(claims))
    sizes = divide(claims, budget, floor, int(config.dead_band * budget / len(claims)))
    return dict(members) | {
        group_id: one.with_size(
            sizes[group_id],
            now,
            _why(sizes[group_id], one.levers.size.value, one.need * config.headroom),
        )
        for group_id, one in elastic.items()
    }


def divide_devices(groups: Groups, config: MemoryConfig, now: float) -> dict[str, Outlook]:
    """The limits of pools that share a device, moved. A group that has its device alone has none."""
    devices: dict[tuple[str, str], dict[str, Outlook]] = defaultdict(dict)
    for group_id, one in groups.items():
        if one.facts.device:
            devices[one.facts.node_id, one.facts.device][group_id] = one
    moved = dict(groups)
    for members in devices.values():
        if len(members) > 1 or any(one.levers.pool.value for one in members.values()):
            moved |= _divide_device(members, config, now)
    return moved


def _divide_device(members: Groups, config: MemoryConfig, now: float) -> dict[str, Outlook]:
    """What each brings at its start is divided. So the part of one that has gone is free for its successor,
    and whatever fits a group's own part can be given to it, whoever else is there.
    """
    budget = sum(one.facts.pool_own for one in members.values())
    claims = [_claim(group_id, one, config, now) for group_id, one in members.items()]
    is_urgent = any(claim.least > claim.current for claim in claims)
    if is_urgent:  # somebody waits who cannot start at all
        claims = [_claim(group_id, one, config, now, is_urgent=True) for group_id, one in members.items()]
    floor = int(config.floor * budget / len(claims))
    sizes = divide(claims, budget, floor, int(config.dead_band * budget / len(claims)))
    return {
        group_id: one.with_pool(
            sizes[group_id], now, _why(sizes[group_id], one.pool_lever.value, one.pool_need * config.headroom)
        )
        for group_id, one in members.items()
    }


def _claim(group_id: str, one: Outlook, config: MemoryConfig, now: float, is_urgent: bool = False) -> Claim:
    facts, lever = one.facts, one.pool_lever
    return Claim(
        group_id,
        int(lever.value),
        max(facts.pool_held, facts.pool_limit),  # until a lower limit is obeyed, it may still be used up
        int(one.pool_need * config.headroom),
        facts.chunk,
        lever.may_move(1, now, config.device_dwell_s),
        is_urgent or lever.may_move(-1, now, config.device_dwell_s),
        min(facts.pool_floor, facts.pool_own),
        facts.pool_own,
    )


def _why(size: int, before: float, wanted: float) -> str:
    if size < before:
        return "others_need"
    return "need" if wanted > before else "unused"
