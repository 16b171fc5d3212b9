"""Which group sends a parked request to which other one of its model. Pure; part of `cluster.policy.decide`.

The policy pairs groups; which request goes, the source's engine chooses when the order comes: the one whose
client has waited longest, of those that can move. It knows each one's deadline to the millisecond, while what
is known here is a tick old.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from cluster.policy_facts import Outlook

PATIENCE_S = 2.0  # lateness that lasts so long does not pass with the next turn, which takes about a second
INTERVAL_S = 2.0  # between two migrations of one group, so that the next report tells of the last one
DWELL_S = 30.0  # a group that sent receives nobody for so long, and vice versa; a request stays as long
# Of the target's pool, with the request: engines begin to copy ahead what they will park at 0.75.
ROOMY = 0.7
GROWTH = 1.5  # times what a sequence holds: it goes on growing where it goes


class MigrationConfig(Protocol):
    """The constants that count here; `cluster.policy.PolicyConfig` explains them."""

    @property
    def target(self) -> float: ...


@dataclass(frozen=True, slots=True)
class MigrationState:
    """What the policy remembers, by group.

    Attributes:
        late_since: when parked requests began to be late; groups where none is are missing.
        sent_s, received_s: the last migration.
    """

    late_since: Mapping[str, float] = field(default_factory=dict)
    sent_s: Mapping[str, float] = field(default_factory=dict)
    received_s: Mapping[str, float] = field(default_factory=dict)


def plan_migrations(
    groups: Mapping[str, Outlook], before: MigrationState, config: MigrationConfig, now: float
) -> tuple[dict[str, str], MigrationState]:
    """Source and target of each migration to begin now, one at most of each group, and the state.

    A group sends while parked requests of its are late, and have been for a while: their clients wait for
    tokens, and it cannot bring all of them back in time. A group receives that keeps its promises, has nobody
    parked or waiting, and would have room to spare with one request more. The latest source goes first.
    """
    late_since = {
        group_id: before.late_since.get(group_id, now)
        for group_id, one in groups.items()
        if one.facts.num_parked_late
    }
    sources = [
        one
        for group_id, one in groups.items()
        if now - late_since.get(group_id, math.inf) >= PATIENCE_S and _may_send(group_id, before, now)
    ]
    free: dict[str, list[Outlook]] = defaultdict(list)
    for group_id, one in groups.items():
        if group_id not in late_since and _is_calm(one, config) and _may_receive(group_id, before, now):
            free[one.facts.model_id].append(one)
    pairs: dict[str, str] = {}
    for source in sorted(sources, key=lambda one: (late_since[one.facts.group_id], one.facts.group_id)):
        fitting = [one for one in free[source.facts.model_id] if _fits(source, one)]
        if fitting:
            chosen = max(fitting, key=lambda one: _preference(source, one))
            free[source.facts.model_id].remove(chosen)
            pairs[source.facts.group_id] = chosen.facts.group_id
    sent_s = {**before.sent_s, **dict.fromkeys(pairs, now)}
    received_s = {**before.received_s, **dict.fromkeys(pairs.values(), now)}
    return pairs, MigrationState(late_since, _recent(sent_s, now), _recent(received_s, now))


def _may_send(group_id: str, before: MigrationState, now: float) -> bool:
    is_rested = now - before.sent_s.get(group_id, -math.inf) >= INTERVAL_S
    return is_rested and now - before.received_s.get(group_id, -math.inf) >= DWELL_S


def _may_receive(group_id: str, before: MigrationState, now: float) -> bool:
    is_rested = now - before.received_s.get(group_id, -math.inf) >= INTERVAL_S
    return is_rested and now - before.sent_s.get(group_id, -math.inf) >= DWELL_S


def _is_calm(one: Outlook, config: MigrationConfig) -> bool:
    """Whether a group has time: nobody waits or is parked, and promises are kept."""
    kept = min(one.first.share, one.pace.share) >= config.target
    return kept and one.facts.num_waiting == one.facts.num_parked == 0 and one.facts.slab > 0


def _fits(source: Outlook, target: Outlook) -> bool:
    """Whether a request of one group would have room in the other, in its balloon and on its device."""
    ours, theirs = source.facts, target.facts
    size = GROWTH * source.sequence_bytes
    in_balloon = theirs.held + size <= min(theirs.limit, target.levers.size.value)
    is_roomy = theirs.kv + size <= ROOMY * theirs.pool
    return theirs.num_ranks == ours.num_ranks and in_balloon and is_roomy


def _preference(source: Outlook, target: Outlook) -> tuple[bool, float, str]:
    """The same node, where bytes go through memory; then the one with most room."""
    facts = target.facts
    return facts.node_id == source.facts.node_id, -facts.kv / max(1, facts.pool), facts.group_id


def _recent(times: Mapping[str, float], now: float) -> dict[str, float]:
    return {group_id: one for group_id, one in times.items() if now - one < DWELL_S}
