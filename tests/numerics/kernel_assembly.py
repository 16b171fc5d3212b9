"""A program that compiles every kernel of a model without a GPU, and prints what became of each.

`python -m tests.numerics.kernel_assembly CONFIG_DIR [GPU]`, without TRITON_INTERPRET: one line of JSON,
kernel name -> `spills`, accesses to local memory (LDL, STL), which are spilled registers; `async_copies`,
loads that run on while others are computed with (LDGSTS); `is_dependent`, whether it may start before the
kernel ahead has ended; `waits`, whether every program of it waits for that before it ends. The launchers
are the engine's own, called as its warm-up calls them; only the driver below them is made up. A kernel that
wants more shared memory than the GPU has is an error, as on the GPU. (The Hopper prefill kernel wants
tensors on a GPU: `prefill_assembly` compiles that one.)
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import kernels.checks

# Compute capability, shared memory of a block, multiprocessors.
GPUS = {"h100": (90, 232_448, 132), "l4": (89, 101_376, 58)}


class NoGpu:
    """A driver for a GPU that is not there: it keeps what is loaded, and runs nothing."""

    def __init__(self, capability: int, shared_bytes: int, multiprocessors: int) -> None:
        self._capability = capability
        self._properties = {"max_shared_mem": shared_bytes, "multiprocessor_count": multiprocessors}
        self.loaded: list[tuple[str, bytes]] = []
        self.dependents: set[str] = set()
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self._properties

    def load_binary(self, name: str, code: bytes, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded.append((name, code))
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        if metadata.launch_pdl:
            self.dependents.add(metadata.name)
        return lambda *_: None


def main(config_dir: str, gpu: str = "h100") -> None:
    _, shared_bytes, multiprocessors = GPUS[gpu]
    driver = NoGpu(*GPUS[gpu])
    triton.runtime.driver.set_active(driver)
    kernels.checks.require_launchable = kernels.checks.require_reachable = lambda name, tensor: None
    # Imported only now: they take the checks above by name.
    from engine.config import EngineConfig, ModelSource
    from engine.memory.kv_geometry import KvGeometry
    from engine.model import warm_up
    from engine.model.loader import ModelFacts, read_model
    from kernels import decode_plan, dependent_launch, kv_tile, sampling, triton_backend
    from tests.numerics.prefill_assembly import disassemble

    kv_tile._shared_bytes = lambda device: shared_bytes
    decode_plan._num_sms = lambda device: multiprocessors
    sampling._part = lambda device: sampling._PART
    dependent_launch._capability = lambda device: divmod(GPUS[gpu][0], 10)
    found = read_model(EngineConfig(ModelSource("model", config_dir, load_format="dummy")))
    facts = ModelFacts(found.shard, triton_backend, torch.device("cpu"), torch.bfloat16, 256)
    config = facts.config
    geometry = KvGeometry.choose(config.num_layers, config.num_kv_heads, config.head_dim, 2, 2 << 20)
    for work in warm_up.works(facts, geometry):
        work()
    found_in: dict[str, dict[str, Any]] = {}
    for name, code in driver.loaded:
        text = disassemble(code)
        seen = found_in.setdefault(
            name,
            {"spills": 0, "async_copies": 0, "is_dependent": name in driver.dependents, "waits": True},
        )
        seen["spills"] += len(re.findall(r"\b(?:LDL|STL)\b", text))
        seen["async_copies"] += len(re.findall(r"\bLDGSTS\b", text))
        seen["waits"] &= "ACQBULK" in re.split(r"\bEXIT\b", text)[0]
    print(json.dumps(found_in))


if __name__ == "__main__":
    main(*sys.argv[1:])
