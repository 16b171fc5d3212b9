"""What the command line shows: the memory pool as a bar, tables and figures. Values in, rich out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.client import Answer
from cluster.config import LLMConfig, ServeFile
from cluster.metrics import pool_by_owner
from engine.messages import EngineSnapshot, MemorySnapshot

_BAR_CELLS = 64
# Shape as well as colour: the bar must read without colours too.
_STYLES = {
    "kv": ("█", "green", "KV live"),
    "kv_cached": ("=", "cyan", "KV cached"),
    "activations": ("▓", "yellow", "activations"),
    "guard": ("#", "magenta", "guard"),
    "retiring": ("~", "red", "retiring"),
    "warm": ("▒", "blue", "warm (free)"),
    "free": ("░", "bright_black", "free"),
}


def pool_picture(snapshot: EngineSnapshot) -> RenderableType:
    """The memory of one engine: a bar of the pool's chunks by owner, a legend with sizes, and the rest."""
    memory = snapshot.memory
    owners = pool_by_owner(memory)
    bar, legend = Text(), []
    for owner, cells in _cells(owners, _BAR_CELLS).items():
        glyph, colour, _ = _STYLES[owner]
        bar.append(glyph * cells, style=colour)
    for owner, chunks in owners.items():
        if chunks:
            glyph, colour, label = _STYLES[owner]
            legend.append(Text.assemble((glyph, colour), f" {label} {size(chunks * memory.chunk_bytes)}"))
    lines = (
        f"{memory.total} chunks of {size(memory.chunk_bytes)}, {size(memory.created * memory.chunk_bytes)} "
        f"physical, {memory.kv_tokens} tokens of KV",
        _outside(memory),
        _shared(snapshot),
        _balloon(snapshot),
        _order(snapshot),
        _hit_rate(snapshot),
        f"{memory.driver_calls} driver calls since start, {memory.driver_calls_beside} more beside the steps",
    )
    head, *rest = [Text(line) for line in lines if line]
    return Group(head, bar, Columns(legend, padding=(0, 2)), *rest)


def _outside(memory: MemorySnapshot) -> str:
    """The memory that is not the pool's."""
    parts = {
        "weights": memory.weight_bytes,
        "CUDA graphs": memory.graph_bytes,
        "workspaces": memory.workspace_bytes,
        "balloon on the host": memory.balloon * memory.chunk_bytes,
    }
    held = [f"{label} {size(num_bytes)}" for label, num_bytes in parts.items() if num_bytes]
    return f"outside the pool: {', '.join(held)}" if held else ""


def _shared(snapshot: EngineSnapshot) -> str:
    """The part of a device that others use as well."""
    memory = snapshot.memory
    if not snapshot.shared_device:
        return ""
    limit, own = size(memory.limit * memory.chunk_bytes), size(memory.configured * memory.chunk_bytes)
    held = size(memory.created * memory.chunk_bytes)
    return f"shares {snapshot.shared_device}: pool up to {limit}, of its own {own}, {held} held"


def _parked(snapshot: EngineSnapshot) -> str:
    return f"{snapshot.num_parked} parked, " if snapshot.memory.balloon_physical else ""


def _balloon(snapshot: EngineSnapshot) -> str:
    """Host memory for KV, and what was decided about it since start."""
    memory = snapshot.memory
    if not memory.balloon_physical:
        return ""
    used, physical = memory.balloon * memory.chunk_bytes, memory.balloon_physical * memory.chunk_bytes
    decisions = ", ".join(f"{name} {count}" for name, count in snapshot.decisions)
    copied = f"{size(memory.copied_out_bytes)} copied out, {size(memory.copied_in_bytes)} back"
    cached = f" ({size(memory.balloon_cached * memory.chunk_bytes)} cached)" if memory.balloon_cached else ""
    told = f"balloon: {size(used)} of {size(physical)}{cached}, {copied}"
    return f"{told} ({decisions})" if decisions else told


def _order(snapshot: EngineSnapshot) -> str:
    """What the controller has said last."""
    if (order := snapshot.order) is None:
        return ""
    pool = "" if order.pool_bytes is None else f"pool up to {size(order.pool_bytes)}, "
    return (
        f"controller: {order.reason}, {snapshot.order_age_s:.0f} s ago (epoch {order.epoch}, revision "
        f"{order.revision}); {pool}balloon up to {size(order.balloon_logical_bytes)}, admission weight "
        f"{order.admission_weight:g}"
    )


def _hit_rate(snapshot: EngineSnapshot) -> str:
    """How much of the prompts the prefix cache had, since start."""
    queries, hits = snapshot.prefix_queries, snapshot.prefix_hits
    return f"prefix cache: {hits} of {queries} prompt tokens found ({hits / queries:.1%})" if queries else ""


def _cells(owners: Mapping[str, int], width: int) -> dict[str, int]:
    """Cells per owner, `width` in all; an owner that has chunks gets at least one."""
    total = sum(owners.values())
    if total == 0:
        return dict.fromkeys(owners, 0)
    cells = {
        owner: max(1, round(width * chunks / total)) if chunks else 0 for owner, chunks in owners.items()
    }
    largest = max(cells, key=lambda owner: cells[owner])
    cells[largest] += width - sum(cells.values())
    return cells


def status_view(models: Mapping[str, Sequence[EngineSnapshot]]) -> RenderableType:
    """Every engine of every model: its load and its pool."""
    parts: list[RenderableType] = []
    nodes = {one.host.node_id for snapshots in models.values() for one in snapshots if one.host is not None}
    for model_id, snapshots in models.items():
        if not snapshots:
            parts.append(Text(f"{model_id}: no engine answers", style="red"))
        for number, snapshot in enumerate(snapshots):
            title = Text(f"{model_id} group {number}{_place(snapshot, len(nodes) > 1)}: ", style="bold")
            title.append(
                f"{snapshot.num_running} running, {_parked(snapshot)}{snapshot.num_waiting} waiting, "
                f"{snapshot.generated_tokens} tokens out, {snapshot.num_preemptions} preempted",
                style="not bold",
            )
            parts += [title, pool_picture(snapshot)]
    return Group(*parts)


def _place(snapshot: EngineSnapshot, tells_node: bool) -> str:
    """How many ranks a group has, and their node: groups of one node share its host memory."""
    ranks = f"{snapshot.num_ranks} ranks, memory of the first" if snapshot.num_ranks > 1 else ""
    node = f"node {snapshot.host.node_id[:8]}" if tells_node and snapshot.host is not None else ""
    told = ", ".join(filter(None, (ranks, node)))
    return f" ({told})" if told else ""


def trimmed_view(models: Mapping[str, Sequence[int | str]]) -> RenderableType:
    """What each engine gave back to its device, or why it did not."""
    lines = [
        Text(f"{model_id} group {number}: {given}", style="red")
        if isinstance(given, str)
        else Text(f"{model_id} group {number}: gave {size(given)} back")
        for model_id, engines in models.items()
        for number, given in enumerate(engines)
    ]
    lines += [
        Text(f"{model_id}: no engine answers", style="red")
        for model_id, engines in models.items()
        if not engines
    ]
    return Group(*lines)


def answer_figures(answer: Answer) -> Text:
    """What the client measured, in one line."""
    cached = f" ({answer.cached_tokens} cached)" if answer.cached_tokens else ""
    return Text(
        f"{answer.prompt_tokens} tokens in{cached}, {answer.completion_tokens} out "
        f"({answer.finish_reason})   TTFT {answer.ttft_s * 1000:.0f} ms   {answer.tokens_per_s:.1f} tokens/s",
        style="cyan",
    )


def file_summary(file: ServeFile) -> Table:
    """The models of a file and the settings people look for first."""
    table = Table(box=None, pad_edge=False)
    for title in ("model", "source", "device", "groups", "pool", "memory mode"):
        table.add_column(title, overflow="fold")
    for application in file.applications:
        for llm in application.args.llm_configs:
            pool = llm.memory.pool_bytes
            table.add_row(
                llm.model_id,
                llm.model_source.replace(str(Path.home()), "~"),
                _device(llm),
                _groups(llm),
                "measured" if pool is None else size(pool),
                llm.memory.mode,
            )
    return table


def _device(llm: LLMConfig) -> str:
    share = llm.device_share
    return llm.engine_kwargs.device if share == 1 else f"{share:g} of {llm.engine_kwargs.device}"


def _groups(llm: LLMConfig) -> str:
    scaling = llm.deployment_config.autoscaling_config
    if scaling is not None:
        return f"{scaling.min_replicas or 1} to {scaling.max_replicas or 'auto'}"
    return str(llm.deployment_config.num_replicas or 1)


def size(num_bytes: float) -> str:
    """Bytes with a binary unit, such as `512 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.1f}".removesuffix(".0") + f" {unit}"
