"""The command line of `ballonet simulate`. Light to import: what it runs is loaded when it runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster import config
from cluster.bench.workload import OptionError
from cluster.config_values import parse_bytes

_LOAD, _MACHINES, _OUTPUT = "Load", "Machines", "Results"


def _option(text: str, panel: str, *names: str, **more: object) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=text, rich_help_panel=panel, **more)  # type: ignore[arg-type]
    return option


File = Annotated[Path, typer.Argument(metavar="FILE", help="A Ray Serve config file, as for `serve`.")]
Trace = Annotated[
    list[str] | None,
    _option(
        "[MODEL=]TRACE, once a model. A file (Azure LLM inference, BurstGPT, Mooncake), or what to draw "
        "a load from: poisson:rate=4,in=1000,out=200 (requests/s, mean tokens), or day: the same with "
        "swing=0.7 (day over night), peak=14 (hour), bursts=2 (an hour).",
        _LOAD,
    ),
]
Hours = Annotated[float | None, _option("To simulate; without it all of a trace.", _LOAD, min=1e-4)]
FromHour = Annotated[float, _option("Hour of the load to begin at.", _LOAD, min=0.0)]
Seed = Annotated[int, _option("Of all that is drawn.", _LOAD)]
Groups = Annotated[
    int | None, _option("Groups of each model, instead of the file's replicas.", _MACHINES, min=1)
]
GpuName = Annotated[str | None, _option("h100, h200 or a10g, instead of accelerator_type.", _MACHINES)]
PerNode = Annotated[int, _option("GPUs of a node.", _MACHINES, min=1)]
HostMemory = Annotated[str | None, _option("Of a node, such as 512GiB.", _MACHINES)]
Figures = Annotated[
    Path | None, _option("Measured figures, by model: what --calibrate wrote.", _MACHINES, "--calibration")
]
LoadSeconds = Annotated[float | None, _option("That a new group loads.", _MACHINES, "--load-s", min=0.0)]
Calibrate = Annotated[
    Path | None,
    _option("Measure the file's models on this machine, write the figures there, and stop.", _MACHINES),
]
Compare = Annotated[
    str | None,
    _option(
        "static: the same without a controller, beside it; copies then follow open requests, as Serve does.",
        _OUTPUT,
    ),
]
Out = Annotated[Path | None, _option("Folder for summary.json and curves.csv.", _OUTPUT)]
Picture = Annotated[
    Path | None, _option("Curves as a .png, .svg or .pdf; needs matplotlib, the extra `plan`.", _OUTPUT)
]


def simulate(
    path: File,
    trace: Trace = None,
    hours: Hours = None,
    from_hour: FromHour = 0.0,
    groups: Groups = None,
    gpu: GpuName = None,
    gpus_per_node: PerNode = 8,
    host_memory: HostMemory = None,
    calibration: Figures = None,
    load_s: LoadSeconds = None,
    calibrate: Calibrate = None,
    compare: Compare = None,
    out: Out = None,
    picture: Picture = None,
    seed: Seed = 0,
) -> int:
    """Serve a load with what FILE would deploy, in virtual time: no GPU, no Ray.

    Router, schedulers, memory pools and the controller are those that serve.

    Steps and copies only take time: as measured (--calibrate, --calibration), or as known of a GPU (--gpu).
    """
    file = config.load(path)
    from cluster.planner import calibrating, running  # brings torch

    console = Console(stderr=True, highlight=False)
    if calibrate is not None:
        calibrating.calibrate(file, calibrate, lambda text: console.print(text, style="dim", markup=False))
        return 0
    if not trace:
        raise OptionError("--trace is missing: a file, or a load such as poisson:rate=4,in=1000,out=200")
    wishes = running.Wishes(
        path,
        tuple(trace),
        hours=hours,
        from_hour=from_hour,
        groups=groups,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        host_bytes=_bytes("--host-memory", host_memory),
        calibration=calibration,
        load_s=load_s,
        compare=_one_of("--compare", compare, ("static",)),
        out=out,
        picture=checked_picture(picture),
        seed=seed,
    )
    running.run(file, wishes, console, Console(highlight=False))
    return 0


def _bytes(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise OptionError(f"{name} {text}: {error}") from error


def checked_picture(path: Path | None) -> Path | None:
    """The same path. Raises OptionError, before anything is simulated, if no picture can be drawn there."""
    if path is None:
        return None
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise OptionError(f"--picture {path}: must end with .png, .svg or .pdf")
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--picture needs matplotlib, which is not installed: pip install 'ballonet[plan]'")
    return path


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> Any:
    if value is not None and value not in known:
        raise OptionError(f"{name} must be {' or '.join(known)}, not {value!r}")
    return value
