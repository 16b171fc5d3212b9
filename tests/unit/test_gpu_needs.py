"""GPUs that a file asks for against those that nodes have, and the device of a model that leaves it open."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import launch
from cluster.config import ServeFile, validate
from cluster.gpu_needs import device_of, shortage
from engine.errors import ConfigError


def _llm(name: str, tensor_parallel_size: int = 1, device: str = "cuda", **sections: Any) -> dict[str, Any]:
    kwargs = {"device": device, "tensor_parallel_size": tensor_parallel_size}
    return {"model_loading_config": {"model_id": name}, "engine_kwargs": kwargs, **sections}


def _file(*llms: dict[str, Any]) -> ServeFile:
    application = {"import_path": "cluster.app:build", "args": {"llm_configs": list(llms)}}
    return validate(ServeFile, {"applications": [application]})


TWO = _file(
    _llm("large", 2),
    _llm("small", deployment_config={"autoscaling_config": {"min_replicas": 2, "max_replicas": 9}}),
)


@pytest.mark.parametrize("nodes", [[4], [2, 1, 1], [0, 2, 2], [3, 1]])
def test_nodes_that_suffice(nodes: list[float]) -> None:
    assert shortage(TWO, nodes) == ""


@pytest.mark.parametrize(
    ("nodes", "there", "lacks"),
    [
        ([], "none", "1 of large, 2 of small"),
        ([0.0, 0.0], "none", "1 of large, 2 of small"),
        ([3], "3", "1 of small"),
        ([1, 1, 1, 1], "1 + 1 + 1 + 1", "1 of large"),  # enough in all, but a group's ranks share a node
    ],
)
def test_what_is_lacking_is_named(nodes: list[float], there: str, lacks: str) -> None:
    asked = "GPUs asked for: large 2 on one node, small 2 x 1"
    assert shortage(TWO, nodes) == f"{asked}; there: {there}; no room for {lacks}"


def test_a_gpu_can_be_shared() -> None:
    half = {"placement_group_config": {"bundle_per_worker": {"CPU": 1, "GPU": 0.5}}}
    assert shortage(_file(_llm("a", **half), _llm("b", **half)), [1]) == ""
    assert "1 of b" in shortage(_file(_llm("a", **half), _llm("b", **half)), [0.5])


def test_a_model_that_may_go_down_to_none_needs_room_for_one() -> None:
    to_none = {"deployment_config": {"autoscaling_config": {"min_replicas": 0, "max_replicas": 2}}}
    assert "1 of a" in shortage(_file(_llm("a", **to_none)), [])


def test_models_of_the_cpu_need_none() -> None:
    assert shortage(_file(_llm("a", device="cpu"), _llm("b", device="auto")), []) == ""


@pytest.mark.parametrize(
    ("beside", "has_gpus", "device"),
    [
        ({}, True, "cuda"),
        ({}, False, "cpu"),
        ({"accelerator_type": "L4"}, False, "cuda"),
        ({"placement_group_config": {"bundle_per_worker": {"GPU": 1}}}, False, "cuda"),
        ({"placement_group_config": {"bundle_per_worker": {"CPU": 1}}}, False, "cpu"),
    ],
)
def test_auto_waits_for_gpus_that_are_asked_for(beside: dict[str, Any], has_gpus: bool, device: str) -> None:
    args = _file(_llm("a", device="auto", **beside)).applications[0].args
    assert device_of(args.llm_configs[0], args, has_gpus) == device


def test_auto_follows_another_model_of_the_application() -> None:
    args = (
        _file(_llm("a", device="auto"), _llm("b", device="cuda"), _llm("c", device="cpu"))
        .applications[0]
        .args
    )
    assert [device_of(llm, args, False) for llm in args.llm_configs] == ["cuda", "cuda", "cpu"]


def test_a_machine_without_the_gpus_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "node_gpus", lambda: [1.0])
    launch.require_gpus(_file(_llm("one")))
    with pytest.raises(
        ConfigError, match=r"one 2 on one node; there: 1; no room for 1 of one; lower num_repl"
    ):
        launch.require_gpus(_file(_llm("one", 2)))
