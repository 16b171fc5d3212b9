"""A program that compiles the Hopper prefill kernel without a GPU and prints what became of it, as JSON.

`python -m tests.numerics.prefill_assembly HEAD_DIM QUERY_HEADS KV_HEADS T`, without TRITON_INTERPRET: one
line with the counts of wgmma (HGMMA), of TMA loads (UTMALDG) and of local memory accesses, which are
spilled registers (LDL, STL).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.prefill_hopper import LAUNCH_OPTIONS, Variant, variant_for
from kernels.prefill_hopper_kernel import prefill_kernel

INSTRUCTIONS = ("HGMMA", "UTMALDG", "LDL", "STL")


def main(head_dim: int, query_heads: int, kv_heads: int, tokens_per_row: int) -> None:
    variant = variant_for(torch.bfloat16, query_heads, head_dim, tokens_per_row, kv_heads)
    assert variant is not None
    listing = disassemble(compile_for_hopper(variant))
    print(json.dumps({name: len(re.findall(rf"\b{name}\b", listing)) for name in INSTRUCTIONS}))


def compile_for_hopper(variant: Variant) -> bytes:
    """The machine code for sm_90."""
    names = prefill_kernel.arg_names
    first = names.index("HEADS")
    types = [
        descriptor(variant.q_box),
        descriptor(variant.kv_box),
        "*bf16",
        "*i32",
        "*i64",
        "*i64",
        "*i32",
        "*i32",
        "*i32",
    ]
    types += ["fp32", "i32", "i32", "i32", "i32", "i32"] + ["constexpr"] * (len(names) - first)
    constants = {(first + index,): value for index, value in enumerate(variant.constants())}
    aligned = {(names.index("out_ptr"),): [["tt.divisibility", 16]]}
    source = GluonASTSource(prefill_kernel, dict(zip(names, types, strict=True)), constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH_OPTIONS)
    return bytes(compiled.asm["cubin"])


def descriptor(box: tuple[int, ...]) -> str:
    layout = gl.NVMMASharedLayout.get_default_for(list(box), gl.bfloat16)
    return f"tensordesc<bf16{list(box)},{layout!r}>"


def disassemble(machine_code: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(machine_code)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
