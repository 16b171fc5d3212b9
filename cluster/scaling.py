"""What Ray Serve's autoscaler is told: the controller's wish, or Serve's own rule while there is none.

The wish comes with each group's own statistics (`TpGroup.record_autoscaling_stats`), so Serve's delays,
limits and smoothing of `autoscaling_config` hold for it as for any other policy.
"""

from __future__ import annotations

from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext

WANTED = "wanted_replicas"


def wanted_replicas(ctx: AutoscalingContext) -> tuple[int | float, dict[str, Any]]:
    """Ray Serve's plug (`AutoscalingPolicy.policy_function`): replicas, and the policy's state, here none."""
    by_replica = (ctx.aggregated_metrics or {}).get(WANTED) or {}
    wishes = [wish for wish in by_replica.values() if wish >= 1]
    if not wishes or ctx.current_num_replicas == 0 or ctx.total_num_requests == 0:  # it alone goes down to 0
        own: tuple[int | float, dict[str, Any]] = replica_queue_length_autoscaling_policy(ctx)
        return own
    return round(max(wishes)), {}
