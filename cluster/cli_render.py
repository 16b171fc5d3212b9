"""What the command line shows: the memory pool as a bar, tables and figures. Values in, rich out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.client import Answer
from cluster.config import LLMConfig, ServeFile
from cluster.metrics import pool_states
from engine.messages import EngineSnapshot

_BAR_CELLS = 64
# Shape as well as colour: the bar must read without colours too.
_STYLES = {
    "kv": ("█", "green", "KV cache"),
    "activation": ("▓", "yellow", "activations"),
    "guard": ("#", "magenta", "guard"),
    "retiring": ("~", "red", "retiring"),
    "warm": ("▒", "blue", "warm (free)"),
    "free": ("░", "bright_black", "free"),
}


def pool_picture(snapshot: EngineSnapshot) -> RenderableType:
    """The pool of one engine: a bar of its chunks by state, and a legend with sizes."""
    memory = snapshot.memory
    states = pool_states(snapshot)
    bar, legend = Text(), Text()
    for state, cells in _cells(states, _BAR_CELLS).items():
        glyph, colour, _ = _STYLES[state]
        bar.append(glyph * cells, style=colour)
    for state, chunks in states.items():
        if chunks:
            glyph, colour, label = _STYLES[state]
            legend.append(f"{glyph} ", style=colour)
            legend.append(f"{label} {size(chunks * memory.chunk_bytes)}  ")
    head = Text(
        f"{memory.total} chunks of {size(memory.chunk_bytes)}, {memory.kv_tokens} tokens of KV, "
        f"{memory.driver_calls} driver calls since start"
    )
    return Group(head, bar, legend)


def _cells(states: Mapping[str, int], width: int) -> dict[str, int]:
    """Cells per state, `width` in all; a state that has chunks gets at least one."""
    total = sum(states.values())
    if total == 0:
        return dict.fromkeys(states, 0)
    cells = {
        state: max(1, round(width * chunks / total)) if chunks else 0 for state, chunks in states.items()
    }
    largest = max(cells, key=lambda state: cells[state])
    cells[largest] += width - sum(cells.values())
    return cells


def status_view(models: Mapping[str, Sequence[EngineSnapshot]]) -> RenderableType:
    """Every engine of every model: its load and its pool."""
    parts: list[RenderableType] = []
    for model_id, snapshots in models.items():
        if not snapshots:
            parts.append(Text(f"{model_id}: no engine answers", style="red"))
        for number, snapshot in enumerate(snapshots):
            title = Text(f"{model_id} group {number}: ", style="bold")
            title.append(
                f"{snapshot.num_running} running, {snapshot.num_waiting} waiting, "
                f"{snapshot.generated_tokens} tokens out, {snapshot.num_preemptions} preempted",
                style="not bold",
            )
            parts += [title, pool_picture(snapshot)]
    return Group(*parts)


def answer_figures(answer: Answer) -> Text:
    """What the client measured, in one line."""
    return Text(
        f"{answer.prompt_tokens} tokens in, {answer.completion_tokens} out ({answer.finish_reason})   "
        f"TTFT {answer.ttft_s * 1000:.0f} ms   {answer.tokens_per_s:.1f} tokens/s",
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
                llm.engine_kwargs.device,
                _groups(llm),
                "measured" if pool is None else size(pool),
                llm.memory.mode,
            )
    return table


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
