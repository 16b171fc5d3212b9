"""`ballonet simulate --calibrate`: the file's models measured on this machine, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cluster.config import ServeFile, to_engine_config
from cluster.planner.calibration_file import write_calibrations
from engine.config import Device
from engine.errors import ConfigError


def calibrate(file: ServeFile, path: Path, say: Callable[[str], None]) -> None:
    """Measure and write.

    Raises:
        ConfigError, ModelLoadError: an engine does not start here.
    """
    from engine.measuring import has_gpu, measure  # loads torch

    auto: Device = "cuda" if has_gpu() else "cpu"
    found = {}
    for application in file.applications:
        for llm in application.args.llm_configs:
            wanted = llm.engine_kwargs.device
            config = to_engine_config(llm, auto if wanted == "auto" else wanted)
            if config.tensor_parallel_size > 1:
                raise ConfigError(
                    f"{llm.model_id}: --calibrate measures engines on one device, and this one has "
                    f"{config.tensor_parallel_size}: leave it to --gpu, or write its figures by hand"
                )
            say(f"{llm.model_id}: loading")
            found[llm.model_id] = measure(config, _teller(say, llm.model_id))
    write_calibrations(path, found)
    say(f"wrote {path}")


def _teller(say: Callable[[str], None], model_id: str) -> Callable[[str], None]:
    return lambda text: say(f"{model_id}: {text}")
