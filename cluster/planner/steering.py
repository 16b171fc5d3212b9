"""The controller of a simulated fleet: the real `decide`, on its own clock, with what it did counted."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from cluster.planner.fleet import Fleet
from cluster.policy import Action, PolicyConfig, State, decide, recovered


class Steering:
    """Looks, decides and gives orders, as `cluster.controller` does over Ray.

    Attributes:
        actions: what was decided, as (model, action, reason).
        num_orders: that were new to a group.
        reversals: moves of a lever the other way within its dwell time.
        decide_s: processor time of each call.
    """

    def __init__(self, policy: PolicyConfig | None, host_bytes: int) -> None:
        # A node's total counts, not what was taken of it: nothing else lives there.
        self._policy = policy and replace(
            policy, host_memory_bytes=policy.host_memory_bytes or int(host_bytes * (1 - policy.reserve))
        )
        self._state: State | None = None
        self._moved: dict[tuple[str, str], tuple[int, float]] = {}
        self.actions: Counter[tuple[str, str, str]] = Counter()
        self.num_orders = self.reversals = 0
        self.decide_s: list[float] = []

    def tick(self, fleet: Fleet, now: float) -> None:
        """One look at all groups, and what follows from it."""
        if self._policy is None:
            return
        reports = fleet.reports()
        if self._state is None:
            self._state = recovered(reports, self._policy, now)
        started = time.thread_time()
        decision, self._state = decide(reports, self._state, self._policy, now)
        self.decide_s.append(time.thread_time() - started)
        groups = {group.name: group for group in fleet.groups}
        for instruction in decision.instructions:
            group = groups[instruction.group_id]
            self.num_orders += group.snapshot.order != instruction.order
            group.apply(instruction.order, now)
            fleet.wanted[group.model.model_id] = instruction.wanted_replicas
        for action in decision.actions:
            if action.action == "migrate":
                continue  # not simulated (`Plan.not_simulated`)
            group_of = groups.get(action.subject)
            model_id = group_of.model.model_id if group_of else action.subject
            self.actions[model_id, action.action, action.reason] += 1
            self._watch(action, now, self._policy)

    def _watch(self, action: Action, now: float, policy: PolicyConfig) -> None:
        lever, _, way = action.action.rpartition("_")
        if not lever or way not in ("up", "down"):
            return
        direction = 1 if way == "up" else -1
        before = self._moved.get((action.subject, lever))
        if before is not None and before[0] != direction and now - before[1] < policy.dwell_s:
            self.reversals += 1
        self._moved[action.subject, lever] = direction, now
