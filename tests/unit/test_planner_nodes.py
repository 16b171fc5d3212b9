"""Where simulated groups run: whole GPUs, parts of one, and several of one node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from cluster.planner.hardware import GPUS
from cluster.planner.nodes import Nodes, Place
from cluster.planner.plan import ModelPlan, Replicas
from engine.calibration import Calibration, StepRates
from engine.config import Device, EngineConfig, MemoryConfig, ModelSource

CONFIG = EngineConfig(ModelSource("m", str(Path("nowhere"))), device="cuda")
STEPS = Calibration(StepRates(1.0, 1.0, 1.0, 1.0), 1.0, 1.0, 1.0)


def _model(share: float = 1.0, num_ranks: int = 1, device: Device = "cuda") -> ModelPlan:
    config = replace(
        CONFIG, memory=MemoryConfig(device_share=share), tensor_parallel_size=num_ranks, device=device
    )
    return ModelPlan("m", config, cast(Any, None), STEPS, Replicas(1, 1, 1))


def test_parts_of_a_gpu_lie_together_and_ranks_on_one_node() -> None:
    nodes = Nodes(gpus_per_node=4)
    first, second, third = nodes.take(_model(0.6)), nodes.take(_model(0.4)), nodes.take(_model(0.6))
    assert (first, second) == (Place("node0", (0,), 0.6), Place("node0", (0,), 0.4))
    assert third == Place("node0", (1,), 0.6)
    assert first.shared_gpu == second.shared_gpu == "GPU-0"
    assert nodes.take(_model(num_ranks=2)) == Place("node0", (2, 3))
    assert nodes.take(_model(num_ranks=2)) == Place("node1", (0, 1))
    assert nodes.take(_model()).shared_gpu == ""
    assert (len(nodes), nodes.most_gpus) == (2, 7)


def test_what_is_given_back_is_used_again() -> None:
    nodes = Nodes(gpus_per_node=1)
    places = [nodes.take(_model()) for _ in range(2)]
    assert [place.node_id for place in places] == ["node0", "node1"]
    nodes.give_back(places[0])
    assert nodes.take(_model()) == places[0]
    assert nodes.most_gpus == 2


def test_engines_on_cpus_share_a_node_and_take_no_gpu() -> None:
    nodes = Nodes(gpus_per_node=8)
    assert nodes.take(_model(device="cpu")) == nodes.take(_model(device="cpu")) == Place("node0")
    assert nodes.most_gpus == 0


def test_every_known_gpu_says_where_its_figures_are_from() -> None:
    for gpu in GPUS.values():
        assert "measured" in gpu.source or "data sheet" in gpu.source
