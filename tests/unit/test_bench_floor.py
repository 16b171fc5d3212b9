"""Which models the floor is counted for: another kind is refused, not counted wrong."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.bench.floor import CEILINGS, ModelShape
from cluster.bench.workload import BenchError
from tests.bench.models import LLAMA_8B


def test_the_memory_ceiling_is_above_what_kernels_have_reached() -> None:
    """Decode attention read 3.07 TB/s, which is more than a device copy does."""
    assert CEILINGS["h100"].bytes_per_s > 3.07e12


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"kv_lora_rank": 512},
        {"num_local_experts": 8},
        {"n_routed_experts": 64},
        {"sliding_window": 4096},
        {"sliding_window": 4096, "use_sliding_window": True},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"hidden_act": "gelu_new"},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_a_model_of_another_shape_is_refused_by_its_field(fields: dict[str, Any]) -> None:
    with pytest.raises(BenchError, match=f"has {next(iter(fields))}: leave --model-config out"):
        ModelShape.from_config(LLAMA_8B | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"quantization_config": None, "sliding_window": None, "num_experts": 0},
        {"sliding_window": 131072, "use_sliding_window": False},
        {"layer_types": ["full_attention"] * 32, "hidden_act": "silu"},
    ],
    ids=["null", "window-unused", "all-full"],
)
def test_fields_that_say_nothing_else_are_no_reason(fields: dict[str, Any]) -> None:
    assert ModelShape.from_config(LLAMA_8B | fields) == ModelShape.from_config(LLAMA_8B)


@pytest.mark.parametrize("value", ["many", [4096], None, 0, 1.5, True], ids=repr)
def test_a_size_that_is_none_is_named(value: object) -> None:
    with pytest.raises(BenchError, match="hidden_size of the model's configuration is"):
        ModelShape.from_config(LLAMA_8B | {"hidden_size": value})


def test_sizes_that_may_be_left_out_follow_from_the_others() -> None:
    config = {name: value for name, value in LLAMA_8B.items() if name != "num_key_value_heads"}
    shape = ModelShape.from_config(config | {"head_dim": None})
    assert (shape.kv_heads, shape.head_dim) == (32, 128)
