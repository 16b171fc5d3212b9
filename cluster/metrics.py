"""Every metric of the cluster: the one table, and what feeds it.

Ray exports each as `ray_<name>` (counters with `_total`) and adds the labels deployment, replica and
application. Suffixes and meanings are vLLM's where a metric of the kind exists there. A row without
a feeder does not belong here: `tests/unit/test_metrics.py` drives the feeders and checks the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from engine.messages import EngineSnapshot, MemorySnapshot
from engine.migration import MigrationResult

_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_ITL_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_E2E_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0)
_TOKENS = (1.0, 10.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2e3, 4e3, 8e3, 16e3, 32e3, 64e3, 128e3, 256e3)
_TICK_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table. `labels` come besides those that Ray Serve adds."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ("model_name",)
    buckets: tuple[float, ...] = ()


def _histogram(name: str, unit: str, text: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name, "histogram", unit, text, buckets=buckets)


REGISTRY: tuple[Metric, ...] = (
    # From the ingress: what clients see.
    _histogram(
        "ballonet_time_to_first_token_seconds", "s", "From a request's arrival to its first token.", _TTFT_S
    ),
    _histogram(
        "ballonet_inter_token_latency_seconds",
        "s",
        "Between two outputs of one stream after the first.",
        _ITL_S,
    ),
    _histogram("ballonet_e2e_request_latency_seconds", "s", "From a request's arrival to its end.", _E2E_S),
    _histogram("ballonet_request_prompt_tokens", "tokens", "Prompt length of ended requests.", _TOKENS),
    _histogram("ballonet_request_generation_tokens", "tokens", "Output length of ended requests.", _TOKENS),
    Metric("ballonet_requests_started", "counter", "requests", "Requests handed to an engine."),
    Metric(
        "ballonet_request_success",
        "counter",
        "requests",
        "Ended requests by finish reason: stop, length, cancelled or error.",
        ("model_name", "finished_reason"),
    ),
    Metric(
        "ballonet_request_rejections",
        "counter",
        "requests",
        "Requests answered with an HTTP error before any token.",
        ("model_name", "status"),
    ),
    # From each TP group: what its engine is doing.
    Metric("ballonet_num_requests_running", "gauge", "requests", "Sequences that compute, or are about to."),
    Metric(
        "ballonet_num_requests_parked",
        "gauge",
        "requests",
        "Sequences whose KV is in the balloon on the host while others have their turn.",
    ),
    Metric("ballonet_num_requests_waiting", "gauge", "requests", "Sequences in the engine's queue."),
    Metric(
        "ballonet_kv_cache_usage_perc",
        "gauge",
        "1",
        "Share of the pool's chunks with KV of live sequences, 0 to 1. Cached prefixes do not count: they "
        "are given up when a request needs their memory.",
    ),
    Metric("ballonet_kv_cache_tokens", "gauge", "tokens", "Tokens whose KV live sequences hold."),
    Metric("ballonet_prefix_cache_queries", "counter", "tokens", "Prompt tokens looked up in the cache."),
    Metric("ballonet_prefix_cache_hits", "counter", "tokens", "Prompt tokens found in the prefix cache."),
    Metric(
        "ballonet_memory_bytes",
        "gauge",
        "bytes",
        "Memory by owner. The pool's: kv (live), kv_cached, activations, guard, retiring, warm (free and "
        "mapped), free (the rest, physical or not). Outside it: weights, graphs, workspace. On the host: "
        "balloon.",
        ("model_name", "owner"),
    ),
    Metric("ballonet_pool_created_bytes", "gauge", "bytes", "The pool's memory with physical backing."),
    Metric(
        "ballonet_pool_limit_bytes",
        "gauge",
        "bytes",
        "What the pool may come to: as configured, or by the controller's order where groups share a device.",
    ),
    Metric(
        "ballonet_driver_calls",
        "counter",
        "calls",
        "Create, map, unmap and release calls of the driver: at_once in the engine's thread, beside the "
        "steps in the mapping thread.",
        ("model_name", "made"),
    ),
    Metric("ballonet_prompt_tokens", "counter", "tokens", "Prompt tokens computed."),
    Metric("ballonet_generation_tokens", "counter", "tokens", "Tokens generated."),
    Metric(
        "ballonet_num_preemptions", "counter", "preemptions", "Sequences whose KV was dropped to make room."
    ),
    Metric(
        "ballonet_scheduler_decisions",
        "counter",
        "decisions",
        "What was decided about who computes: park_for_prompt, park_for_turn, park_for_growth, return, "
        "recompute, shed, refuse, fetch_prefix, migrate_in; and of the room for new prompts in the balloon, "
        "deflate and inflate.",
        ("model_name", "decision"),
    ),
    Metric(
        "ballonet_balloon_bytes",
        "gauge",
        "bytes",
        "Host memory for KV: used, cached (of it, for prompts that begin alike alone), physical (there is so "
        "much), logical (new prompts may send others there).",
        ("model_name", "state"),
    ),
    Metric(
        "ballonet_balloon_copied_bytes",
        "counter",
        "bytes",
        "KV copied between the device and the balloon, out and in.",
        ("model_name", "direction"),
    ),
    Metric(
        "ballonet_migrations",
        "counter",
        "requests",
        "Parked requests that were to move to another group, by what became of it: migrated, not_movable, "
        "refused (by the other group) or failed.",
        ("model_name", "outcome"),
    ),
    Metric("ballonet_migrated_bytes", "counter", "bytes", "KV of requests that moved to another group."),
    _histogram(
        "ballonet_migration_seconds", "s", "From the order until a request had left its group.", _TICK_S
    ),
    Metric("ballonet_deposited_tokens", "gauge", "tokens", "Tokens held back: ahead of their clients' pace."),
    Metric(
        "ballonet_expected_ttft_seconds",
        "gauge",
        "s",
        "How long a new request would wait for its first token, by the newest rate of prompts.",
    ),
    Metric("ballonet_engine_steps", "counter", "steps", "Forward passes."),
    Metric("ballonet_engine_step_seconds", "gauge", "s", "Duration of the newest forward pass."),
    # From the controller.
    Metric(
        "ballonet_controller_groups", "gauge", "groups", "Groups that answered the controller's last look."
    ),
    Metric("ballonet_controller_tick_failures", "counter", "ticks", "Looks at a model's groups that failed."),
    Metric(
        "ballonet_controller_epoch", "gauge", "1", "Of the controller: one more with each of its starts.", ()
    ),
    Metric(
        "ballonet_controller_decisions",
        "counter",
        "decisions",
        "Levers that the controller moved: balloon, pool, weight and retention, _up or _down, "
        "ask_for_replicas, give_replicas_up and migrate; and why.",
        ("action", "reason"),
    ),
    Metric(
        "ballonet_controller_orders",
        "counter",
        "orders",
        "Orders by what became of them: applied, deferred, stale, conflict or unanswered.",
        ("model_name", "outcome"),
    ),
    Metric(
        "ballonet_controller_balloon_bytes",
        "gauge",
        "bytes",
        "Host memory of a group's balloon: ordered, there, and needed by the controller's reckoning.",
        ("model_name", "group", "state"),
    ),
    Metric(
        "ballonet_controller_pool_bytes",
        "gauge",
        "bytes",
        "A group's pool on a shared device: ordered, there, and needed by the controller's reckoning.",
        ("model_name", "group", "state"),
    ),
    Metric("ballonet_controller_wanted_replicas", "gauge", "groups", "Groups that a model should have."),
    Metric("ballonet_controller_decide_seconds", "histogram", "s", "Duration of one decision.", (), _TICK_S),
    Metric(
        "ballonet_controller_tick_seconds",
        "histogram",
        "s",
        "Duration of one look at all groups.",
        (),
        _TICK_S,
    ),
)


class MetricBackend(Protocol):
    """Takes the values. `labels` holds exactly the metric's labels."""

    def inc(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None: ...


class RayBackend:
    """`ray.serve.metrics`, to be used inside a replica."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {}

    def inc(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._metric(metric).inc(value, tags=dict(labels))

    def set(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._metric(metric).set(value, tags=dict(labels))

    def observe(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        self._metric(metric).observe(value, tags=dict(labels))

    def _metric(self, row: Metric) -> Any:
        if row.name not in self._metrics:
            self._metrics[row.name] = _ray_metric(row)
        return self._metrics[row.name]


def _ray_metric(row: Metric) -> Any:
    from ray.serve import metrics  # those who only read the table need no ray

    text = f"{row.help} Unit: {row.unit}."
    if row.kind == "histogram":
        return metrics.Histogram(row.name, text, boundaries=list(row.buckets), tag_keys=row.labels)
    kind = metrics.Counter if row.kind == "counter" else metrics.Gauge
    return kind(row.name, text, tag_keys=row.labels)


_BY_NAME = {row.name: row for row in REGISTRY}


class Feeder:
    """Sends values of the table's rows."""

    def __init__(self, backend: MetricBackend) -> None:
        self._backend = backend

    def send(self, name: str, value: float, **labels: str) -> None:
        row = _BY_NAME[f"ballonet_{name}"]
        if row.kind == "histogram":
            self._backend.observe(row, value, labels)
        elif row.kind == "gauge":
            self._backend.set(row, value, labels)
        elif value > 0:  # Ray's counters refuse to be increased by nothing
            self._backend.inc(row, value, labels)


class IngressMetrics(Feeder):
    """A `cluster.streaming.RequestObserver` that counts."""

    def request_started(self, model_id: str) -> None:
        self.send("requests_started", 1, model_name=model_id)

    def first_token(self, model_id: str, seconds: float) -> None:
        self.send("time_to_first_token_seconds", seconds, model_name=model_id)

    def inter_token(self, model_id: str, seconds: float, num_tokens: int) -> None:
        # One sample per output, however many tokens it carries: the gap is what the client sees.
        self.send("inter_token_latency_seconds", seconds, model_name=model_id)

    def request_finished(
        self, model_id: str, finish_reason: str, seconds: float, prompt_tokens: int, output_tokens: int
    ) -> None:
        self.send("request_success", 1, model_name=model_id, finished_reason=finish_reason)
        self.send("e2e_request_latency_seconds", seconds, model_name=model_id)
        self.send("request_prompt_tokens", prompt_tokens, model_name=model_id)
        self.send("request_generation_tokens", output_tokens, model_name=model_id)

    def request_rejected(self, model_id: str, status: int) -> None:
        self.send("request_rejections", 1, model_name=model_id, status=str(status))


@dataclass(slots=True)
class _Totals:
    """Counters as they were last exported; an engine's own start from 0 with it."""

    seen: dict[str, int] = field(default_factory=dict)

    def grown(self, name: str, total: int) -> int:
        before = self.seen.get(name, 0)
        self.seen[name] = total
        return total - before


class GroupMetrics(Feeder):
    """Exports one engine's snapshots."""

    def __init__(self, backend: MetricBackend) -> None:
        super().__init__(backend)
        self._totals = _Totals()

    def export(self, snapshot: EngineSnapshot) -> None:
        """Gauges as they are, counters by what they grew since the last export."""
        model, memory = snapshot.model_id, snapshot.memory
        gauges: dict[str, float] = {
            "num_requests_running": snapshot.num_running,
            "num_requests_waiting": snapshot.num_waiting,
            "num_requests_parked": snapshot.num_parked,
            "deposited_tokens": snapshot.num_deposited,
            "expected_ttft_seconds": snapshot.expected_ttft_s,
            "kv_cache_usage_perc": memory.kv / memory.total if memory.total else 0.0,
            "kv_cache_tokens": memory.kv_tokens,
            "pool_created_bytes": memory.created * memory.chunk_bytes,
            "pool_limit_bytes": memory.limit * memory.chunk_bytes,
            "engine_step_seconds": snapshot.last_step_s,
        }
        counters = {
            "prefix_cache_queries": snapshot.prefix_queries,
            "prefix_cache_hits": snapshot.prefix_hits,
            "prompt_tokens": snapshot.prompt_tokens,
            "generation_tokens": snapshot.generated_tokens,
            "num_preemptions": snapshot.num_preemptions,
            "engine_steps": snapshot.num_steps,
        }
        for name, value in gauges.items():
            self.send(name, value, model_name=model)
        for name, total in counters.items():
            self.send(name, self._totals.grown(name, total), model_name=model)
        for made, total in (("at_once", memory.driver_calls), ("beside", memory.driver_calls_beside)):
            grown = self._totals.grown(f"driver_calls_{made}", total)
            self.send("driver_calls", grown, model_name=model, made=made)
        for owner, num_bytes in memory_by_owner(memory).items():
            self.send("memory_bytes", num_bytes, model_name=model, owner=owner)
        self._export_balloon(snapshot)

    def migrated(self, model_id: str, result: MigrationResult) -> None:
        """A request was to move to another group."""
        self.send("migrations", 1, model_name=model_id, outcome=result.outcome)
        self.send("migrated_bytes", result.num_bytes, model_name=model_id)
        if result.outcome == "migrated":
            self.send("migration_seconds", result.seconds, model_name=model_id)

    def _export_balloon(self, snapshot: EngineSnapshot) -> None:
        model, memory = snapshot.model_id, snapshot.memory
        for decision, total in snapshot.decisions:
            grown = self._totals.grown(f"decision {decision}", total)
            self.send("scheduler_decisions", grown, model_name=model, decision=decision)
        states = (
            ("used", memory.balloon),
            ("cached", memory.balloon_cached),
            ("physical", memory.balloon_physical),
            ("logical", memory.balloon_logical),
        )
        for state, chunks in states:
            self.send("balloon_bytes", chunks * memory.chunk_bytes, model_name=model, state=state)
        for direction, total in (("out", memory.copied_out_bytes), ("in", memory.copied_in_bytes)):
            grown = self._totals.grown(f"copied {direction}", total)
            self.send("balloon_copied_bytes", grown, model_name=model, direction=direction)


def memory_by_owner(memory: MemorySnapshot) -> dict[str, int]:
    """Bytes by owner: the pool's, each once, then those outside it."""
    pool = {owner: chunks * memory.chunk_bytes for owner, chunks in pool_by_owner(memory).items()}
    return pool | {
        "weights": memory.weight_bytes,
        "graphs": memory.graph_bytes,
        "workspace": memory.workspace_bytes,
        "balloon": memory.balloon * memory.chunk_bytes,
    }


def pool_by_owner(memory: MemorySnapshot) -> dict[str, int]:
    """The pool's chunks by owner, each chunk once: `warm` is taken out of `free`."""
    return {
        "kv": memory.kv,
        "kv_cached": memory.cached,
        "activations": memory.activation,
        "guard": memory.guard,
        "retiring": memory.retiring,
        "warm": memory.warm,
        "free": memory.free - memory.warm,
    }
