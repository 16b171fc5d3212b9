"""The table of metrics: its form, and that every row is really fed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from cluster.controller_metrics import ControllerMetrics
from cluster.metrics import (
    REGISTRY,
    GroupMetrics,
    IngressMetrics,
    Metric,
    memory_by_owner,
    pool_by_owner,
)
from cluster.policy import Action, PolicyConfig, State, decide
from cluster.reports import GroupReport
from engine.control import HostSnapshot
from engine.migration import MigrationResult
from tests.unit.samples import MEMORY, RecordingBackend, snapshot

RESERVED = {"deployment", "replica", "application", "route"}  # Ray Serve adds these itself


def _drive(backend: RecordingBackend) -> None:
    ingress = IngressMetrics(backend)
    ingress.request_started("a")
    ingress.first_token("a", 0.1)
    ingress.inter_token("a", 0.02, 3)
    ingress.request_finished("a", "stop", 1.0, 12, 34)
    ingress.request_rejected("", 429)
    group = GroupMetrics(backend)
    group.export(snapshot("a"))
    group.migrated("a", MigrationResult("migrated", "", "r", 1 << 20, 0.1))
    controller = ControllerMetrics(backend)
    controller.looked("a", 1)
    controller.failed("a")
    controller.ticked(0.01)
    controller.ordered("a", "applied")
    shared = replace(snapshot("a"), host=HostSnapshot("node", 1 << 40, 1 << 40), shared_device="GPU-0")
    reports = [GroupReport(name, "a", 1, 2.0, shared) for name in ("g", "h")]
    decision, state = decide(reports, State(1), PolicyConfig(), 0.0)
    controller.decided(replace(decision, actions=(Action("g", "balloon_up", "need"),)), state, 0.001)


def test_every_row_is_fed_with_its_kind_and_its_labels() -> None:
    backend = RecordingBackend()
    _drive(backend)
    assert {metric.name for _, metric, _, _ in backend.calls} == {row.name for row in REGISTRY}
    for kind, metric, value, labels in backend.calls:
        assert kind == metric.kind
        assert set(labels) == set(metric.labels)
        assert value >= 0


@pytest.mark.parametrize("row", REGISTRY, ids=lambda row: row.name)
def test_form(row: Metric) -> None:
    assert re.fullmatch(r"ballonet_[a-z0-9_]+", row.name)
    assert not row.name.endswith("_total")  # Ray appends it to counters
    assert row.help
    assert not RESERVED & set(row.labels)
    assert bool(row.buckets) == (row.kind == "histogram")
    assert list(row.buckets) == sorted(set(row.buckets))
    assert all(boundary > 0 for boundary in row.buckets)


def test_names_are_unique() -> None:
    names = [row.name for row in REGISTRY]
    assert len(set(names)) == len(names)


def test_counters_grow_by_what_the_engine_counted() -> None:
    backend = RecordingBackend()
    group = GroupMetrics(backend)
    for scale in (1, 3, 3):
        group.export(snapshot("a", scale))
    assert backend.values("ballonet_generation_tokens") == [200, 400]
    assert backend.total("ballonet_num_preemptions") == 6
    assert backend.values("ballonet_prefix_cache_queries") == [300, 600]
    assert backend.values("ballonet_prefix_cache_hits") == [100, 200]


def test_decisions_and_the_balloon_are_told() -> None:
    backend = RecordingBackend()
    group = GroupMetrics(backend)
    for scale in (1, 3):
        group.export(snapshot("a", scale))
    told = [
        (labels["decision"], value)
        for _, metric, value, labels in backend.calls
        if metric.name == "ballonet_scheduler_decisions"
    ]
    assert told == [("park_for_prompt", 4), ("return", 5), ("park_for_prompt", 8), ("return", 10)]
    sizes = {
        labels["state"]: value
        for _, metric, value, labels in backend.calls
        if metric.name == "ballonet_balloon_bytes"
    }
    assert sizes == {"used": 6 << 20, "cached": 4 << 20, "physical": 30 << 20, "logical": 20 << 20}
    assert backend.values("ballonet_balloon_copied_bytes") == [9 << 20, 5 << 20]
    assert backend.last("ballonet_num_requests_parked") == 2


def test_driver_calls_are_counted_apart() -> None:
    backend = RecordingBackend()
    group = GroupMetrics(backend)
    for _ in range(2):
        group.export(snapshot("a"))
    calls = [
        (labels["made"], value)
        for _, row, value, labels in backend.calls
        if row.name == "ballonet_driver_calls"
    ]
    assert calls == [("at_once", 90), ("beside", 40)]


def test_every_chunk_has_one_owner() -> None:
    owners = pool_by_owner(MEMORY)
    assert sum(owners.values()) == MEMORY.total
    assert (owners["kv"], owners["kv_cached"], owners["warm"], owners["free"]) == (20, 5, 20, 40)


def test_memory_has_every_owner_in_bytes() -> None:
    backend = RecordingBackend()
    group = GroupMetrics(backend)
    group.export(snapshot("a"))
    group.migrated("a", MigrationResult("migrated", "", "r", 1 << 20, 0.1))
    exported = {
        labels["owner"]: value
        for _, row, value, labels in backend.calls
        if row.name == "ballonet_memory_bytes"
    }
    assert exported == memory_by_owner(MEMORY)
    assert sum(exported[owner] for owner in pool_by_owner(MEMORY)) == MEMORY.total * MEMORY.chunk_bytes
    outside = {owner: exported[owner] >> 20 for owner in ("weights", "graphs", "workspace", "balloon")}
    assert outside == {"weights": 7, "graphs": 3, "workspace": 1, "balloon": 6}


def test_usage_is_that_of_live_sequences() -> None:
    backend = RecordingBackend()
    group = GroupMetrics(backend)
    group.export(snapshot("a"))
    group.migrated("a", MigrationResult("migrated", "", "r", 1 << 20, 0.1))
    assert backend.last("ballonet_kv_cache_usage_perc") == 0.2
