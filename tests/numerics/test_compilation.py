"""Nothing is compiled anew when batch sizes and lengths change: a compilation is seconds in a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton import knobs

from kernels import triton_backend
from tests.numerics.cases import int32

T, KV_HEADS, QUERY_HEADS, DIM = 64, 2, 8, 64


def attend(device: torch.device, num_decodes: int, context: int, pieces: list[int]) -> None:
    """A step as the engine makes one: metadata in slices of one buffer, at any alignment."""
    num_tokens = num_decodes + sum(pieces)
    num_sequences = num_decodes + len(pieces)
    rows_each = -(-context // T)
    kv = torch.zeros(num_sequences * rows_each, 2, T, KV_HEADS, DIM, dtype=torch.bfloat16, device=device)
    qkv = torch.zeros(num_tokens, (QUERY_HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device=device)
    q, k, v = (x.view(num_tokens, -1, DIM) for x in torch.split(qkv, [512, 128, 128], dim=1))
    out = torch.empty(num_tokens, QUERY_HEADS, DIM, dtype=torch.bfloat16, device=device)
    first_rows = torch.arange(num_sequences, device=device) * rows_each
    lens = int32([context] * num_sequences, device)
    shared_rows, shared_lens = torch.zeros_like(first_rows), torch.zeros_like(lens)
    table = torch.zeros(8, DIM // 2, device=device)
    norm = torch.ones(DIM, dtype=torch.bfloat16, device=device)
    positions = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)[1:]
    triton_backend.rotary_and_kv_write(q, k, v, table, table, positions, kv, positions, norm, norm, 1e-5)
    n = num_decodes
    workspace = torch.empty(triton_backend.decode_workspace_floats(QUERY_HEADS, KV_HEADS, DIM), device=device)
    triton_backend.decode_plan(kv, lens[:n], workspace)
    places = first_rows[:n], shared_rows[:n], shared_lens[:n]
    triton_backend.decode_attention(q[:n], kv, *places, lens[:n], 0.1, workspace, out[:n])
    if pieces:
        starts = int32([0, *torch.tensor(pieces).cumsum(0).tolist()], device)
        places = first_rows[n:], shared_rows[n:], shared_lens[n:]
        triton_backend.prefill_attention(q[n:], kv, starts, *places, lens[n:], max(pieces), 0.1, out[n:])
    width = QUERY_HEADS * DIM
    hidden, weight = out.flatten(1), torch.ones(width, dtype=torch.bfloat16, device=device)
    triton_backend.rms_norm(hidden, weight, 1e-5, hidden)
    triton_backend.add_rms_norm(hidden, hidden.clone(), weight, 1e-5, hidden)
    triton_backend.silu_and_mul(hidden, torch.empty_like(hidden[:, : width // 2]))


@pytest.mark.gpu
def test_other_sizes_reuse_what_is_compiled(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        knobs.runtime, "jit_post_compile_hook", lambda **found: compiled.append(str(found["repr"]))
    )
    attend(device, 2, 300, [40])
    assert compiled
    compiled.clear()
    for num_decodes, context, pieces in [
        (1, 1, []),
        (1, 16, [1]),
        (3, 700, [1, 17]),
        (33, 9000, [500, 16, 3]),
    ]:
        attend(device, num_decodes, context, pieces)
    assert not compiled


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
# Registers the sampling kernels spill, over all their variants: they wait for memory, not for these.
MOST_SPILLS = {"_peak_kernel": 80, "_draw_kernel": 80, "_prefill_kernel": 8}
# Those of a decode's layers, where a start costs as much as the work. The rest begin in the plain way.
DEPENDENT = {
    *("_plan_kernel", "_decode_kernel", "_join_kernel", "_rotary_kv_write_kernel"),
    *("_norm_kernel", "_silu_and_mul_kernel", "_one_row_kernel", "_few_rows_kernel"),
}
EXPECTED = DEPENDENT | {
    *("_prefill_kernel", "_peak_kernel", "search_kernel", "_draw_kernel", "_adjust_kernel"),
    "_copy_words_kernel",
}


def _assembly(tmp_path: Path, gpu: str) -> dict[str, dict[str, int]]:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    program = [sys.executable, "-m", "tests.numerics.kernel_assembly", str(tmp_path), gpu]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, int]] = json.loads(run.stdout)
    return found


def test_every_kernel_of_a_model_fits_a_gpu_with_less_shared_memory(tmp_path: Path) -> None:
    found = _assembly(tmp_path, "l4")
    assert set(found) == EXPECTED
    assert not any(kernel["is_dependent"] for kernel in found.values())  # that GPU cannot


def test_every_kernel_of_a_model_compiles_for_hopper(tmp_path: Path) -> None:
    found = _assembly(tmp_path, "h100")
    assert set(found) == EXPECTED
    for name, kernel in found.items():
        assert kernel["spills"] <= MOST_SPILLS.get(name, 0), (name, kernel)
    for name in ("_decode_kernel", "_prefill_kernel", "_few_rows_kernel"):
        assert found[name]["async_copies"] > 0, f"{name} waits for each tile before it asks for the next"
    assert {name for name, kernel in found.items() if kernel["is_dependent"]} == DEPENDENT
    for name in DEPENDENT:
        assert found[name]["waits"], f"a program of {name} can end before the kernels ahead of it"
