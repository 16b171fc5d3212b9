"""Feeds the controller's rows of `cluster.metrics`."""

from __future__ import annotations

from cluster.metrics import Feeder
from cluster.policy import Decision, State


class ControllerMetrics(Feeder):
    """What only the controller knows."""

    def looked(self, model_id: str, num_groups: int) -> None:
        """`num_groups` groups of a model answered."""
        self.send("controller_groups", num_groups, model_name=model_id)

    def failed(self, model_id: str) -> None:
        """A look at a model's groups failed."""
        self.send("controller_tick_failures", 1, model_name=model_id)

    def decided(self, decision: Decision, state: State, seconds: float) -> None:
        """A decision was made, after which that is its state."""
        self.send("controller_epoch", state.epoch)
        self.send("controller_decide_seconds", seconds)
        for one in decision.actions:
            self.send("controller_decisions", 1, action=one.action, reason=one.reason)
        for model_id, count in decision.replicas.items():
            self.send("controller_wanted_replicas", count, model_name=model_id)
        for group_id, group in state.groups.items():
            facts, levers = group.facts, group.levers
            labels = {"model_name": facts.model_id, "group": group_id}
            sizes = {"ordered": levers.size.value, "there": facts.physical, "needed": group.need}
            for name, size in sizes.items():
                self.send("controller_balloon_bytes", size, **labels, state=name)
            if levers.pool.value:
                sizes = {"ordered": levers.pool.value, "there": facts.pool_held, "needed": group.pool_need}
                for name, size in sizes.items():
                    self.send("controller_pool_bytes", size, **labels, state=name)

    def ordered(self, model_id: str, outcome: str) -> None:
        """A group has answered an order, or has not."""
        self.send("controller_orders", 1, model_name=model_id, outcome=outcome)

    def ticked(self, seconds: float) -> None:
        """All models were looked at once."""
        self.send("controller_tick_seconds", seconds)
