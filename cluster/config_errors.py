"""What is wrong with a configuration file, in words: every fault, its full path, the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_NO_FRACTION = (
    "there is no fraction to tune; memory.pool_bytes sets the pool, without it it is measured. "
    "Groups that share a GPU: memory.device_share"
)
_ALWAYS_ON = "is always on; remove the key"

# Keys that users of Ray LLM and vLLM bring along, and what to do instead.
UNSUPPORTED = {
    "lora_config": "LoRA adapters are not supported",
    "runtime_env": "is not supported; install packages and set variables on the nodes",
    "deployments": "is not supported; use llm_configs[].deployment_config",
    "log_engine_metrics": _ALWAYS_ON,
    "experimental_configs": "is not supported",
    "callback_config": "is not supported",
    "server_cls": "is not supported",
    "llm_engine": "the engine is Ballonet's own; remove the key",
    "accelerator_config": "is not supported; use accelerator_type and engine_kwargs.device",
    "ingress_cls_config": "is not supported; use ingress",
    "ingress_deployment_config": "is not supported; use ingress.num_replicas and its siblings",
    "bundles": "is not supported; use bundle_per_worker",
    "num_gpus": "is not supported; use placement_group_config.bundle_per_worker or memory.device_share",
    "ray_actor_options": "is not supported; use placement_group_config.bundle_per_worker",
    "placement_group_bundles": "belongs into placement_group_config.bundle_per_worker",
    "request_router_config": "is not supported; requests go where their first token comes soonest",
    "gpu_memory_utilization": _NO_FRACTION,
    "mem_fraction_static": _NO_FRACTION,
    "swap_space": "is not supported; memory.balloon_bytes is the host memory that KV may move to",
    "kv_offloading_size": "is not supported; memory.balloon_bytes is the host memory that KV may move to",
    "scheduling_policy": "is not supported; use engine_kwargs.policy",
    "block_size": "there are no blocks; memory.chunk_bytes is the size of a chunk",
    "enable_chunked_prefill": "is always on; prefill_piece_tokens sets the size of a piece",
    "enable_prefix_caching": "belongs into engine_kwargs",
    "max_prefill_tokens": "belongs into engine_kwargs",
    "max_overtaken": "belongs into engine_kwargs",
    "prefill_spread_steps": "belongs into engine_kwargs",
    "policy": "belongs into engine_kwargs",
    "turn_tokens": "belongs into engine_kwargs",
    "deposit": "belongs into engine_kwargs",
    "on_overload": "belongs into engine_kwargs",
    "feedback_window": "belongs into engine_kwargs",
    "feedback_breaches": "belongs into engine_kwargs",
    "feedback_factor": "belongs into engine_kwargs",
    "feedback_dwell_steps": "belongs into engine_kwargs",
    "balloon_bytes": "belongs into memory",
    "balloon_slab_bytes": "belongs into memory",
    "balloon_share": "belongs into memory",
    "device_share": "belongs into memory",
    "ttft_ms": "belongs into slo",
    "tpot_ms": "belongs into slo",
    "slo": "belongs into llm_configs[], beside engine_kwargs",
    "disable_radix_cache": "is not supported; use engine_kwargs.enable_prefix_caching: false",
    "enable_prompt_tokens_details": _ALWAYS_ON,
    "enable_cache_report": _ALWAYS_ON,
    "enable_sleep_mode": "is not supported; memory.trim_after_s and POST /trim give memory back",
    "kv_cache_memory_bytes": "is not supported; memory.pool_bytes is the size of the pool",
    "pipeline_parallel_size": "is not supported",
    "data_parallel_size": "is not supported; use deployment_config.num_replicas",
    "quantization": "is not supported",
    "kv_cache_dtype": "is not supported; KV has the model's dtype",
    "trust_remote_code": "is not supported; code from a model's repository is never run",
    "enforce_eager": "belongs into engine_kwargs",
    "speculative_config": "is not supported",
}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per fault: path, colon, what is wrong."""
    items = error.errors(include_url=False)
    # A list whose only item is faulty is also reported as too short: one fault, not two.
    culprits = [item for item in items if item["type"] != "too_short" or not item["input"]]
    faults = dict.fromkeys(_fault(item, root) for item in culprits)
    return "\n".join(f"  {fault}" for fault in faults)


def _fault(item: ErrorDetails, root: type[BaseModel]) -> str:
    where, section = _resolve(item["loc"], root)
    path = _path(where) or "the file"
    match item["type"]:
        case "extra_forbidden":
            return f"{path}: {_unknown(str(where[-1]), section)}"
        case "missing":
            return f"{path}: is missing"
        case "model_type" | "model_attributes_type":
            return f"{path}: must be a mapping of keys to values"
        case "too_short":
            return f"{path}: must not be empty"
        case "value_error":
            return f"{path}: {item['msg'].removeprefix('Value error, ')}"
    message = item["msg"].removeprefix("Input ").replace("tuple", "list")
    return f"{path}: {message}, not {item['input']!r}"


def _unknown(key: str, section: type[BaseModel]) -> str:
    if key in UNSUPPORTED:
        return UNSUPPORTED[key]
    known = list(section.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"unknown key; {hint}"


def _resolve(loc: Sequence[int | str], root: type[BaseModel]) -> tuple[list[int | str], type[BaseModel]]:
    """The steps of `loc` that stand in the file, and the section that holds the last of them.

    Below a plain field pydantic goes on with the names of union members, which nobody wrote.
    """
    where: list[int | str] = []
    section: type[BaseModel] | None = root
    holder = root
    for step in loc:
        if section is not None or isinstance(step, int):
            where.append(step)
        if section is not None and isinstance(step, str):
            holder = section
            field = section.model_fields.get(step)
            section = next(_sections(field.annotation), None) if field else None
    return where, holder


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _path(where: Sequence[int | str]) -> str:
    parts = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in where)
    return parts.removeprefix(".")
