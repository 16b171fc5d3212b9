"""How many GPUs a file needs before every model has its first groups, and whether some nodes have them.

Whoever says `cuda` is believed: Ray builds an application as soon as its head is up, and on Kubernetes, or
with an autoscaler, GPU nodes join later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cluster.config import LLMConfig, ServeFile, ServingArgs
from engine.config import Device


def says_cuda(llm: LLMConfig) -> bool:
    """Whether the model's section leaves no doubt that it is for GPUs."""
    wanted = llm.engine_kwargs.device
    if wanted != "auto":
        return wanted == "cuda"
    placement = llm.placement_group_config
    in_bundle = placement is not None and placement.bundle_per_worker.get("GPU", 0) > 0
    return llm.accelerator_type is not None or in_bundle


def device_of(llm: LLMConfig, args: ServingArgs, cluster_has_gpus: bool) -> Device:
    """Where the model's engines run. `auto` is cuda where the cluster has GPUs, and where it will have them,
    because this model or another one of the application asks for some.
    """
    wanted = llm.engine_kwargs.device
    if wanted != "auto":
        return wanted
    return "cuda" if cluster_has_gpus or any(map(says_cuda, args.llm_configs)) else "cpu"


def shortage(file: ServeFile, node_gpus: Sequence[float]) -> str:
    """What `node_gpus`, those of each node, lack for every model's fewest groups; empty if nothing.

    The ranks of a group share a node. The largest groups are placed first, each where fewest GPUs stay over.
    """
    needs = [need for application in file.applications for need in _needs(application.args)]
    free, unplaced = list(node_gpus), []
    for size, llm in sorted(needs, key=lambda need: -need[0]):
        fitting = [node for node, gpus in enumerate(free) if gpus >= size]
        if fitting:
            free[min(fitting, key=lambda node: free[node])] -= size
        else:
            unplaced.append(llm.model_id)
    if not unplaced:
        return ""
    asked = ", ".join(_in_words(need for need in needs if need[1] is llm) for llm in _distinct(needs))
    there = " + ".join(f"{gpus:g}" for gpus in node_gpus if gpus) or "none"
    return f"GPUs asked for: {asked}; there: {there}; no room for {_counted(unplaced)}"


def _needs(args: ServingArgs) -> Iterable[tuple[float, LLMConfig]]:
    """The GPUs of each group that has to be there for the application to be up, of one node each."""
    for llm in args.llm_configs:
        if device_of(llm, args, cluster_has_gpus=False) != "cuda":
            continue
        placement = llm.placement_group_config
        rank = placement.bundle_per_worker.get("GPU", 0.0) if placement is not None else 1.0
        if rank:
            for _ in range(_least_groups(llm)):
                yield rank * llm.engine_kwargs.tensor_parallel_size, llm


def _distinct(needs: Sequence[tuple[float, LLMConfig]]) -> list[LLMConfig]:
    return list({id(llm): llm for _, llm in needs}.values())


def _in_words(needs: Iterable[tuple[float, LLMConfig]]) -> str:
    found = list(needs)
    size, llm = found[0]
    on_one_node = " on one node" if size > 1 else ""
    return f"{llm.model_id} {f'{len(found)} x ' if len(found) > 1 else ''}{size:g}{on_one_node}"


def _counted(model_ids: Sequence[str]) -> str:
    return ", ".join(
        f"{count} of {model_id}"
        for model_id in dict.fromkeys(model_ids)
        if (count := model_ids.count(model_id))
    )


def _least_groups(llm: LLMConfig) -> int:
    """Copies that Serve starts whatever the load; of a model that may go down to none, one."""
    options = llm.deployment_config
    if options.autoscaling_config is not None:
        return max(1, options.autoscaling_config.min_replicas or 1)
    return options.num_replicas if isinstance(options.num_replicas, int) else 1
