"""The YAML file: what is accepted, what it becomes, and what is said about mistakes."""

from __future__ import annotations

import copy
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from cluster import config_source, ray_service_check
from cluster.config import (
    EngineKwargs,
    MemorySection,
    ServeFile,
    ServingArgs,
    SloSection,
    load,
    to_engine_config,
    validate,
)
from cluster.config_ingress import IngressSection
from cluster.config_values import Section, parse_bytes
from engine.config import EngineConfig, MemoryConfig, ModelSource, SchedulerConfig, SloConfig
from engine.errors import ConfigError

DEPLOY = Path(__file__).parents[2] / "deploy"
MINIMAL: dict[str, Any] = {"llm_configs": [{"model_loading_config": {"model_id": "org/model"}}]}


def _args(**llm: Any) -> dict[str, Any]:
    args = copy.deepcopy(MINIMAL)
    args["llm_configs"][0] |= llm
    return args


def _faults(section: type, data: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(section, data)
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_files_are_valid(path: Path) -> None:
    file, notes = ray_service_check.check(path)
    assert file.applications
    assert notes == []
    # `serve deploy` must take the same file, and KubeRay hands the text inside a manifest to the same door.
    assert ServeDeploySchema.model_validate(config_source.read(path).data).applications


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.yaml")), ids=lambda path: path.name)
def test_settings_in_comments_are_valid_too(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("BALLONET_API_KEYS", "BALLONET_ADMIN_API_KEYS"):
        monkeypatch.setenv(variable, "key")
    text, num_settings = re.subn(r"^( +)# (\w+: )", r"\1\2", path.read_text(), flags=re.MULTILINE)
    (tmp_path / "file.yaml").write_text(text)
    assert load(tmp_path / "file.yaml").applications
    expected = {"one-node.yaml": 13, "cluster.yaml": 9, "kuberay.yaml": 3, "shared-gpu.yaml": 1}
    assert num_settings == expected.get(path.name, 0)


def test_defaults_are_the_engines_own() -> None:
    llm = validate(ServingArgs, MINIMAL).llm_configs[0]
    assert to_engine_config(llm, "cpu") == EngineConfig(ModelSource("org/model", "org/model"))


SCHEDULER: dict[str, Any] = {
    "max_num_seqs": 3,
    "max_num_batched_tokens": 64,
    "prefill_piece_tokens": 32,
    "prefill_spread_steps": 2,
    "max_prefill_tokens": 128,
    "max_overtaken": 0,
    "max_num_queued_reqs": 5,
    "policy": "fcfs",
    "turn_tokens": 16,
    "min_retained_chunks": 8,
    "layer_wise": False,
    "deposit": False,
    "on_overload": "shed",
    "feedback_window": 7,
    "feedback_breaches": 4,
    "feedback_factor": 1.5,
    "feedback_dwell_steps": 10,
}


def test_every_engine_field_arrives() -> None:
    kwargs = SCHEDULER | {
        "max_model_len": 100,
        "enable_prefix_caching": False,
        "dtype": "float16",
        "load_format": "dummy",
        "seed": 9,
        "num_threads": 2,
        "step_timeout_s": 60,
    }
    memory = {
        "mode": "virtual",
        "pool_bytes": "1GiB",
        "chunk_bytes": "64KiB",
        "layers_per_group": 2,
        "margin_bytes": 7,
        "map_ahead_tokens": 0,
        "trim_after_s": 60,
        "balloon_bytes": "64GiB",
        "balloon_slab_bytes": "1GiB",
    }
    slo = {"ttft_ms": 500, "tpot_ms": 25.5}
    loading = {"model_id": "m", "model_source": "a/b", "tokenizer_source": "c/d"}
    llm = _args(model_loading_config=loading, engine_kwargs=kwargs, memory=memory, slo=slo)
    engine = to_engine_config(validate(ServingArgs, llm).llm_configs[0], "cuda")
    assert engine.model == ModelSource("m", "a/b", "c/d", "dummy", "float16", 9)
    assert (engine.device, engine.max_model_len, engine.num_threads) == ("cuda", 100, 2)
    assert engine.step_timeout_s == 60.0
    assert engine.scheduler == SchedulerConfig(**SCHEDULER)
    assert set(SCHEDULER) == {field.name for field in fields(SchedulerConfig)}
    assert [name for name, value in SCHEDULER.items() if value == getattr(SchedulerConfig(), name)] == []
    assert (engine.memory.mode, engine.memory.pool_bytes, engine.memory.chunk_bytes) == (
        "virtual",
        2**30,
        2**16,
    )
    assert (engine.memory.layers_per_group, engine.memory.margin_bytes) == (2, 7)
    assert not engine.memory.enable_prefix_caching
    assert (engine.memory.map_ahead_tokens, engine.memory.trim_after_s) == (0, 60.0)
    assert (engine.memory.balloon_bytes, engine.memory.balloon_slab_bytes) == (64 * 2**30, 2**30)
    assert engine.slo == SloConfig(500.0, 25.5)


@pytest.mark.parametrize(
    ("sections", "config"),
    [
        ((EngineKwargs,), SchedulerConfig),
        ((MemorySection, EngineKwargs), MemoryConfig),  # prefix caching is where vLLM has it
        ((SloSection,), SloConfig),
    ],
    ids=["scheduler", "memory", "slo"],
)
def test_every_engine_field_has_a_key(sections: tuple[type[Section], ...], config: type) -> None:
    keys = {key for section in sections for key in section.model_fields}
    assert [field.name for field in fields(config) if field.name not in keys] == []


def test_trimming_can_be_off() -> None:
    assert MemoryConfig().trim_after_s is not None
    args = validate(ServingArgs, _args(memory={"trim_after_s": None}))
    assert to_engine_config(args.llm_configs[0], "cpu").memory.trim_after_s is None


def test_the_balloon_can_be_off_or_left_to_the_engine() -> None:
    for written, size in ((0, 0), ("0", 0), ("0GiB", 0), (None, None)):
        args = validate(ServingArgs, _args(memory={"balloon_bytes": written}))
        assert to_engine_config(args.llm_configs[0], "cuda").memory.balloon_bytes == size


def test_each_model_has_objectives_of_its_own() -> None:
    args = _args(slo={"ttft_ms": 300})
    args["llm_configs"] += [{"model_loading_config": {"model_id": "other"}}]
    first, second = (to_engine_config(llm, "cpu").slo for llm in validate(ServingArgs, args).llm_configs)
    assert first == SloConfig(ttft_ms=300.0)
    assert second == SloConfig() != first


def test_a_dumped_file_is_the_same_file() -> None:
    args = validate(ServingArgs, _args(memory={"pool_bytes": "1MiB"}))
    assert validate(ServingArgs, args.model_dump(mode="json")) == args


def test_all_faults_are_named_at_once() -> None:
    faults = _faults(
        ServingArgs,
        {
            "llm_configs": [
                {
                    "model_loading_config": {},
                    "engine_kwargs": {"max_num_sequences": 1, "dtype": "int4", "max_model_len": "long"},
                    "memory": {"pool_bytes": "1 potato"},
                }
            ],
            "ingres": {},
        },
    )
    assert faults == [
        "llm_configs[0].model_loading_config.model_id: is missing",
        "llm_configs[0].engine_kwargs.max_model_len: should be a valid integer, not 'long'",
        "llm_configs[0].engine_kwargs.dtype: "
        "should be 'auto', 'float32', 'bfloat16' or 'float16', not 'int4'",
        "llm_configs[0].engine_kwargs.max_num_sequences: unknown key; did you mean max_num_seqs?",
        "llm_configs[0].memory.pool_bytes: '1 potato' is no size; "
        "write bytes, or a number with KiB, MiB, GiB or TiB",
        "ingres: unknown key; did you mean ingress?",
    ]


@pytest.mark.parametrize(
    ("llm", "fault"),
    [
        ({"lora_config": {}}, "lora_config: LoRA adapters are not supported"),
        ({"engine_kwargs": {"gpu_memory_utilization": 0.9}}, "there is no fraction to tune"),
        (
            {"engine_kwargs": {"num_gpus": 0.5}},
            "use placement_group_config.bundle_per_worker or memory.device",
        ),
        ({"memory": {"device_share": 1.5}}, "device_share: should be less than or equal to 1, not 1.5"),
        ({"memory": {"device_share": 0}}, "device_share: should be greater than 0, not 0"),
        (
            {"memory": {"device_share": 0.5, "mode": "static"}},
            "set mode to elastic, or leave device_share out",
        ),
        (
            {"memory": {"device_share": 0.5}, "engine_kwargs": {"tensor_parallel_size": 2}},
            "the ranks of a group have their devices alone",
        ),
        (
            {
                "engine_kwargs": {"tensor_parallel_size": 2},
                "placement_group_config": {"bundle_per_worker": {"GPU": 0.5}},
            },
            "reserves 0.5 GPU for a rank",
        ),
        ({"placement_group_config": {"bundle_per_worker": {"GPU": 1.5}}}, "reserves 1.5 GPU for a rank"),
        (
            {"memory": {"device_share": 0.6}, "placement_group_config": {"bundle_per_worker": {"GPU": 0.4}}},
            "others may be placed on the rest",
        ),
        (
            {
                "engine_kwargs": {"tensor_parallel_size": 2},
                "placement_group_config": {"bundle_per_worker": {"GPU": 1}, "strategy": "SPREAD"},
            },
            "have to share a node",
        ),
        ({"engine_kwargs": {"max_num_seqs": 4096}}, "every running sequence needs one token a step"),
        ({"engine_kwargs": {"max_num_seqs": True}}, "should be a valid integer, not True"),
        ({"memory": {"chunk_bytes": 1000}}, "must be a multiple of 4096"),
        ({"memory": {"pool_bytes": 0}}, "pool_bytes must be positive"),
        ({"memory": {"mode": "paged"}}, "should be 'elastic', 'virtual' or 'static', not 'paged'"),
        ({"memory": {"trim_after_s": -1}}, "trim_after_s: should be greater than or equal to 0, not -1"),
        ({"memory": {"trim_after_s": "5m"}}, "trim_after_s: should be a valid number, not '5m'"),
        ({"memory": {"map_ahead_tokens": -1}}, "map_ahead_tokens: should be greater than or equal to 0"),
        ({"memory": {"map_ahead_tokens": 0.5}}, "map_ahead_tokens: should be a valid integer"),
        ({"memory": {"enable_prefix_caching": True}}, "enable_prefix_caching: belongs into engine_kwargs"),
        ({"engine_kwargs": {"enable_prefix_caching": "yes"}}, "should be a valid boolean, not 'yes'"),
        ({"engine_kwargs": {"max_prefill_tokens": 8}}, "(8) must be at least max_num_batched_tokens (2048)"),
        ({"engine_kwargs": {"step_timeout_s": 0}}, "step_timeout_s: should be greater than 0, not 0"),
        ({"memory": {"balloon_bytes": -1}}, "memory.balloon_bytes must be at least 0, not -1"),
        ({"memory": {"balloon_bytes": "off"}}, "memory.balloon_bytes: 'off' is no size; write bytes"),
        ({"memory": {"balloon_slab_bytes": 0}}, "memory.balloon_slab_bytes must be positive, not 0"),
        ({"memory": {"turn_tokens": 8}}, "memory.turn_tokens: belongs into engine_kwargs"),
        ({"engine_kwargs": {"balloon_bytes": "1GiB"}}, "engine_kwargs.balloon_bytes: belongs into memory"),
        ({"engine_kwargs": {"swap_space": 4}}, "memory.balloon_bytes is the host memory that KV may move to"),
        ({"engine_kwargs": {"scheduling_policy": "priority"}}, "use engine_kwargs.policy"),
        ({"engine_kwargs": {"policy": "edf"}}, "policy: should be 'slo' or 'fcfs', not 'edf'"),
        ({"engine_kwargs": {"on_overload": "drop"}}, "should be 'queue' or 'shed', not 'drop'"),
        ({"engine_kwargs": {"turn_tokens": 0}}, "turn_tokens: should be greater than 0, not 0"),
        ({"engine_kwargs": {"deposit": "yes"}}, "deposit: should be a valid boolean, not 'yes'"),
        ({"engine_kwargs": {"tpot_ms": 50}}, "engine_kwargs.tpot_ms: belongs into slo"),
        ({"slo": {"ttft": 500}}, "slo.ttft: unknown key; did you mean ttft_ms?"),
        ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms: should be greater than 0, not 0"),
        ({"slo": {"ttft_ms": "2s"}}, "slo.ttft_ms: should be a valid number, not '2s'"),
        ({"slo": {"tpot_ms": float("inf")}}, "slo.tpot_ms: should be a finite number, not inf"),
        ({"slo": {"tpot_ms": float("nan")}}, "slo.tpot_ms: should be a finite number, not nan"),
        ({"slo": 500}, "slo: must be a mapping of keys to values"),
        ({"engine_kwargs": {"enable_prompt_tokens_details": True}}, "is always on; remove the key"),
        (
            {"model_loading_config": {"model_id": "m", "model_source": "$NO_SUCH_VAR/m"}},
            "NO_SUCH_VAR is not set",
        ),
        ({"deployment_config": {"num_replicas": 2, "autoscaling_config": {}}}, "exclude each other"),
        ({"placement_group_config": {"bundles": []}}, "bundles: is not supported; use bundle_per_worker"),
    ],
)
def test_a_fault_says_what_to_do(llm: dict[str, Any], fault: str) -> None:
    assert any(fault in line for line in _faults(ServingArgs, _args(**llm)))


def test_one_model_id_once() -> None:
    args = {"llm_configs": MINIMAL["llm_configs"] * 2}
    assert "org/model appears more than once" in _faults(ServingArgs, args)[0]


def test_another_import_path_is_refused() -> None:
    application = {"import_path": "ray.serve.llm:build_openai_app", "args": MINIMAL}
    faults = _faults(ServeFile, {"applications": [application]})
    assert faults == [
        "applications[0].import_path: should be 'cluster.app:build', not 'ray.serve.llm:build_openai_app'"
    ]


@pytest.mark.parametrize("content", ["", "[]", "a: [", "applications: []", "\x00"])
def test_files_that_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"file\.yaml"):
        load(path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_paths_are_expanded_and_hub_ids_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def source(written: str) -> str:
        loading = {"model_id": "m", "model_source": written}
        return validate(ServingArgs, _args(model_loading_config=loading)).llm_configs[0].model_source

    assert source("$MODELS/a.gguf") == f"{tmp_path}/a.gguf"
    assert source("~/a.gguf") == str(Path.home() / "a.gguf")
    assert source("here") == str(tmp_path / "here")
    assert source("org/model") == "org/model"


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"api_keys": ["one"], "api_keys_env": "KEYS"}
    assert (
        "the environment variable KEYS holds no key" in _faults(IngressSection, {"api_keys_env": "KEYS"})[0]
    )
    monkeypatch.setenv("KEYS", "two, three,")
    assert validate(IngressSection, section).all_api_keys() == ("one", "two", "three")


def test_admin_keys_are_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN", "root")
    section = validate(IngressSection, {"api_keys": ["one"], "admin_api_keys_env": "ADMIN"})
    assert (section.all_api_keys(), section.all_admin_api_keys()) == (("one",), ("root",))
    monkeypatch.setenv("ADMIN", " ,")
    faults = _faults(IngressSection, {"api_keys": ["one"], "admin_api_keys_env": "ADMIN"})
    assert "admin_api_keys_env: the environment variable ADMIN holds no key" in faults[0]


def test_a_key_is_not_empty() -> None:
    """An empty one would open the server to everybody who sends an empty token."""
    for name in ("api_keys", "admin_api_keys"):
        assert f"{name}[0]: " in _faults(IngressSection, {name: [""]})[0]


def test_salting_by_key_needs_keys() -> None:
    """Without any, all requests would have the same salt and share what they were not to share."""
    faults = _faults(IngressSection, {"prefix_cache_salt": "api_key"})
    assert "there are no keys: set api_keys or api_keys_env" in faults[0]
    assert "should be 'none' or 'api_key'" in _faults(IngressSection, {"prefix_cache_salt": "user"})[0]
    section = validate(IngressSection, {"prefix_cache_salt": "api_key", "api_keys": ["one"]})
    assert section.prefix_cache_salt == "api_key"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1GiB", 2**30),
        ("512 MiB", 2**29),
        ("2GB", 2 * 10**9),
        ("1.5KiB", 1536),
        ("64k", 64_000),
        ("7", 7),
        (7, 7),
    ],
)
def test_sizes(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1 PiB", "-1", "1e9", None, True, 1.5])
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)


def test_the_controller_can_be_off_and_its_constants_set() -> None:
    off = validate(ServingArgs, _args() | {"controller": {"enabled": False}})
    assert off.controller.policy() is None
    written = {"host_memory_bytes": "64GiB", "dwell_s": 20.0, "target": 0.9}
    policy = validate(ServingArgs, _args() | {"controller": written}).controller.policy()
    assert policy is not None
    assert (policy.host_memory_bytes, policy.dwell_s, policy.target) == (64 * 2**30, 20.0, 0.9)
    with pytest.raises(ConfigError, match="controller.target"):
        validate(ServingArgs, _args() | {"controller": {"target": 2.0}})


def test_an_engine_starts_with_the_part_of_the_host_that_it_is_told() -> None:
    llm = validate(ServingArgs, _args()).llm_configs[0]
    assert to_engine_config(llm, "cpu").memory.balloon_share == MemoryConfig().balloon_share
    assert to_engine_config(llm, "cpu", 0.125).memory.balloon_share == 0.125
    llm = validate(ServingArgs, _args(memory={"balloon_share": 0.25})).llm_configs[0]
    assert to_engine_config(llm, "cpu", 0.125).memory.balloon_share == 0.25


def test_a_part_of_a_gpu_is_a_part_of_its_memory() -> None:
    by_ray = _args(placement_group_config={"bundle_per_worker": {"CPU": 1, "GPU": 0.4}})
    by_memory = _args(memory={"device_share": 0.4})
    for args in (by_ray, by_memory):
        (llm,) = validate(ServingArgs, args).llm_configs
        assert llm.device_share == to_engine_config(llm, "cuda").memory.device_share == 0.4
    (alone,) = validate(ServingArgs, MINIMAL).llm_configs
    assert to_engine_config(alone, "cuda").memory.device_share == 1.0


def test_parts_of_a_cpu_add_up_to_one_at_most() -> None:
    def part(model_id: str, share: float, replicas: int = 1) -> dict[str, Any]:
        return {
            "model_loading_config": {"model_id": model_id},
            "engine_kwargs": {"device": "cpu"},
            "memory": {"device_share": share},
            "deployment_config": {"num_replicas": replicas},
        }

    assert validate(ServingArgs, {"llm_configs": [part("a", 0.3), part("b", 0.7)]})
    (fault,) = _faults(ServingArgs, {"llm_configs": [part("a", 0.3), part("b", 0.4, replicas=2)]})
    assert "device_share of a, b adds up to 1.1 with all replicas" in fault
