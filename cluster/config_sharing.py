"""Which part of a device and its host an engine has, and what cannot be: values in, ValueError out."""

from __future__ import annotations

from collections.abc import Sequence

_ROUNDING = 1e-9
_LARGEST_BALLOON = 0.5  # of a node's host memory, for one balloon that nobody has spoken to


def device_share(share: float | None, reserved_gpu: float | None) -> float:
    """The part of a device that an engine starts with: as said, else what Ray reserves, if that is a part.

    Args:
        share: `memory.device_share`.
        reserved_gpu: of a rank's bundle; None where nobody has said.
    """
    if share is not None:
        return share
    return reserved_gpu if reserved_gpu is not None and 0 < reserved_gpu < 1 else 1.0


def balloon_share(most_ranks: int, gpus_per_node: float, least_share: float) -> float:
    """Of a node's host memory, for each engine's balloon until the controller has spoken: an equal part for
    as many engines as may come to one node. Engines start one after another, and each takes its part of what
    the others have left.

    Args:
        most_ranks: engines of all models that there may be.
        gpus_per_node: of the largest node; 0 if there are none.
        least_share: of a GPU, that an engine has.
    """
    there = gpus_per_node / least_share
    return min(_LARGEST_BALLOON, 1 / max(1.0, min(most_ranks, there) if there else most_ranks))


def check_reserved(share: float | None, reserved_gpu: float | None, tensor_parallel_size: int) -> None:
    """Ray keeps the parts of a GPU from adding up to more than one; the memory has to follow them.

    Raises:
        ValueError: it cannot.
    """
    gpu = reserved_gpu or 0.0
    if gpu > 1 or (0 < gpu < 1 and tensor_parallel_size > 1):
        raise ValueError(
            f"placement_group_config.bundle_per_worker reserves {gpu:g} GPU for a rank: a rank has one, or a "
            "part of one if tensor_parallel_size is 1"
        )
    if gpu and share is not None and share > gpu:
        raise ValueError(
            f"memory.device_share is {share:g}, and placement_group_config.bundle_per_worker reserves "
            f"{gpu:g} of one, so that others may be placed on the rest: reserve as much, or leave it out"
        )


def check_cpu_parts(parts: Sequence[tuple[str, float]]) -> None:
    """Nobody places CPU engines by their parts: those of all models may come to one node.

    Args:
        parts: (model id, part of its engines together) of models that share.

    Raises:
        ValueError: that is more than there is.
    """
    total = sum(part for _, part in parts)
    if total > 1 + _ROUNDING:
        names = ", ".join(name for name, _ in parts)
        raise ValueError(
            f"llm_configs: memory.device_share of {names} adds up to {total:g} with all replicas, and a "
            "device has 1"
        )
