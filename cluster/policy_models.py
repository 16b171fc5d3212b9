"""How many groups each model should have: one more when memory does not help, one fewer when it is idle."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.policy_facts import ENOUGH, Outlook

_ROOMY = 0.5  # of the remaining groups' pools: with less in use, one of them can go
_QUICK = 0.25  # of the promised time to the first token


class ReplicaConfig(Protocol):
    """The constants that count here; `cluster.policy.PolicyConfig` explains them."""

    @property
    def target(self) -> float: ...

    @property
    def headroom(self) -> float: ...

    @property
    def replica_patience_s(self) -> float: ...

    @property
    def replica_idle_s(self) -> float: ...


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model.

    Attributes:
        num_groups: that answer.
        wanted: groups that it should have.
        late_since, idle_since: when it began to be late though it has all the memory there is for it, and
            when it began to need a group less; infinite if it is not late, or needs them all.
        changed: why `wanted` has just changed; empty if it has not.
    """

    num_groups: int
    wanted: int
    late_since: float = math.inf
    idle_since: float = math.inf
    changed: str = ""


def judge_models(
    groups: Mapping[str, Outlook], before: Mapping[str, ModelState], config: ReplicaConfig, now: float
) -> tuple[dict[str, ModelState], dict[str, int]]:
    """Every model's state, and the groups that each should have."""
    members: dict[str, list[Outlook]] = defaultdict(list)
    for one in groups.values():
        members[one.facts.model_id].append(one)
    models = {
        model_id: _judge(found, before.get(model_id, ModelState(len(found), len(found))), config, now)
        for model_id, found in members.items()
    }
    return models, {model_id: model.wanted for model_id, model in models.items()}


def _judge(members: list[Outlook], before: ModelState, config: ReplicaConfig, now: float) -> ModelState:
    count = len(members)
    late_since, idle_since = before.late_since, before.idle_since
    if count != before.num_groups:
        late_since = idle_since = math.inf  # what was asked for has come, or gone: judge anew
    is_late = _is_late(members, config)
    late_since = min(late_since, now) if is_late else math.inf
    idle_since = min(idle_since, now) if not is_late and _is_idle(members, config) else math.inf
    wanted, why = before.wanted, ""
    if now - late_since >= config.replica_patience_s:
        wanted, why = count + 1, "memory_does_not_help"
    elif now - idle_since >= config.replica_idle_s:
        wanted, why = max(1, count - 1), "idle"
    elif count != before.num_groups:
        wanted = count
    return ModelState(count, wanted, late_since, idle_since, why if wanted != before.wanted else "")


def _is_late(members: list[Outlook], config: ReplicaConfig) -> bool:
    """Whether promises are broken though no group lacks memory that it could yet be given."""
    kept = sum(one.first.kept + one.pace.kept for one in members)
    missed = sum(one.first.missed + one.pace.missed for one in members)
    waits = any(one.facts.num_waiting_late for one in members)
    is_late = waits or (kept + missed >= ENOUGH and kept / (kept + missed) < config.target)
    has_grown = all(one.levers.size.direction != 1 or _is_used(one) for one in members)
    return is_late and has_grown


def _is_used(one: Outlook) -> bool:
    """Whether what a group was given is there: until then it may still help."""
    return (
        one.facts.physical + one.facts.slab > one.levers.size.value or one.facts.held < one.facts.physical / 2
    )


def _is_idle(members: list[Outlook], config: ReplicaConfig) -> bool:
    """Whether a group less could do it; of a single one, whether it does by itself."""
    pools = sum(one.facts.pool for one in members) * max(1, len(members) - 1) / len(members)
    used = sum(one.facts.num_open * one.sequence_bytes for one in members)
    quick = all(one.facts.expected_ttft_s <= _QUICK * one.facts.ttft_slo_s for one in members)
    kept = all(min(one.first.share, one.pace.share) >= config.target for one in members)
    return quick and kept and used <= _ROOMY * pools
