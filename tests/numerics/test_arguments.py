"""Launchers name the argument that is wrong, before anything runs; the door picks by device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton import knobs

from kernels import reference, triton_backend
from kernels.backend import for_device

T, HEADS, KV_HEADS, DIM, TOKENS = 16, 4, 2, 32, 3

Make = Callable[[torch.device], dict[str, Any]]


def tensor(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.zeros(*shape, device=device)


def indices(device: torch.device, length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(length, dtype=dtype, device=device)


def rotary_and_kv_write(device: torch.device) -> dict[str, Any]:
    return {
        "q": tensor(device, TOKENS, HEADS, DIM),
        "k": tensor(device, TOKENS, KV_HEADS, DIM),
        "v": tensor(device, TOKENS, KV_HEADS, DIM),
        "cos": tensor(device, 8, DIM // 2),
        "sin": tensor(device, 8, DIM // 2),
        "positions": indices(device, TOKENS, torch.int64),
        "kv": tensor(device, 4, 2, T, KV_HEADS, DIM),
        "first_rows": indices(device, TOKENS, torch.int64),
        "q_norm": tensor(device, DIM),
        "k_norm": tensor(device, DIM),
        "eps": 1e-5,
    }


def workspace(device: torch.device) -> torch.Tensor:
    return tensor(device, triton_backend.decode_workspace_floats(HEADS, KV_HEADS, DIM))


def decode_plan(device: torch.device) -> dict[str, Any]:
    return {
        "kv": tensor(device, 4, 2, T, KV_HEADS, DIM),
        "context_lens": indices(device, TOKENS, torch.int32),
        "workspace": workspace(device),
    }


def decode_attention(device: torch.device) -> dict[str, Any]:
    return {
        "q": tensor(device, TOKENS, HEADS, DIM),
        "kv": tensor(device, 4, 2, T, KV_HEADS, DIM),
        "first_rows": indices(device, TOKENS, torch.int64),
        "shared_first_rows": indices(device, TOKENS, torch.int64),
        "shared_lens": torch.zeros(TOKENS, dtype=torch.int32, device=device),
        "context_lens": indices(device, TOKENS, torch.int32),
        "scale": 1.0,
        "workspace": workspace(device),
        "out": tensor(device, TOKENS, HEADS, DIM),
    }


def prefill_attention(device: torch.device) -> dict[str, Any]:
    arguments = decode_attention(device)
    del arguments["workspace"]
    starts = torch.arange(TOKENS + 1, dtype=torch.int32, device=device)
    return {**arguments, "query_starts": starts, "max_query_len": 1}


def rms_norm(device: torch.device) -> dict[str, Any]:
    return {
        "x": tensor(device, TOKENS, 64),
        "weight": tensor(device, 64),
        "eps": 1e-5,
        "out": tensor(device, TOKENS, 64),
    }


def add_rms_norm(device: torch.device) -> dict[str, Any]:
    return {**rms_norm(device), "residual": tensor(device, TOKENS, 64)}


def silu_and_mul(device: torch.device) -> dict[str, Any]:
    return {"gate_up": tensor(device, TOKENS, 128), "out": tensor(device, TOKENS, 64)}


def half(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def int32(x: torch.Tensor) -> torch.Tensor:
    return x.int()


def int64(x: torch.Tensor) -> torch.Tensor:
    return x.long()


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:-1]


def narrower(x: torch.Tensor) -> torch.Tensor:
    return x[..., :-2]


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten()


def spread(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def few(x: torch.Tensor) -> torch.Tensor:
    return x[:8]


def column(x: torch.Tensor) -> torch.Tensor:
    return x[:, None]


def fewer_heads(x: torch.Tensor) -> torch.Tensor:
    return x[:, : HEADS - 1]


CASES: list[tuple[Make, str, Callable[[Any], Any]]] = [
    *((rotary_and_kv_write, "q", fault) for fault in (flat, spread)),
    *((rotary_and_kv_write, name, fault) for name in ("k", "v") for fault in (half, narrower, spread, flat)),
    *(
        (rotary_and_kv_write, name, fault)
        for name in ("cos", "sin")
        for fault in (half, flat, narrower, spread)
    ),
    *((rotary_and_kv_write, "kv", fault) for fault in (half, flat, narrower, spread)),
    *((rotary_and_kv_write, name, fault) for name in ("q_norm", "k_norm") for fault in (shorter, spread)),
    *(
        (rotary_and_kv_write, name, fault)
        for name in ("first_rows", "positions")
        for fault in (int32, shorter, spread)
    ),
    *((decode_plan, "kv", fault) for fault in (flat, spread)),
    *((decode_plan, "context_lens", fault) for fault in (int64, spread)),
    *((decode_plan, "workspace", fault) for fault in (half, few, spread, column)),
    *((decode_attention, "workspace", fault) for fault in (half, shorter, spread, column)),
    *((decode_attention, "q", fault) for fault in (flat, spread, fewer_heads)),
    *((decode_attention, "kv", fault) for fault in (half, flat, narrower, spread)),
    *((decode_attention, "first_rows", fault) for fault in (int32, shorter, spread)),
    *((decode_attention, "shared_first_rows", fault) for fault in (int32, shorter, spread)),
    *((decode_attention, "shared_lens", fault) for fault in (int64, shorter, spread)),
    *((decode_attention, "context_lens", fault) for fault in (int64, shorter, spread)),
    *((decode_attention, "out", fault) for fault in (half, shorter, narrower, spread)),
    *((prefill_attention, "q", fault) for fault in (flat, spread, fewer_heads)),
    *((prefill_attention, "kv", fault) for fault in (half, flat, narrower, spread)),
    *((prefill_attention, "first_rows", fault) for fault in (int32, spread)),
    *((prefill_attention, "shared_first_rows", fault) for fault in (int32, shorter, spread)),
    *((prefill_attention, "shared_lens", fault) for fault in (int64, shorter, spread)),
    *((prefill_attention, "context_lens", fault) for fault in (int64, shorter, spread)),
    *((prefill_attention, "query_starts", fault) for fault in (int64, shorter, spread)),
    *((prefill_attention, "out", fault) for fault in (half, shorter, narrower, spread)),
    (prefill_attention, "max_query_len", lambda _: 0),
    *((make, "x", fault) for make in (rms_norm, add_rms_norm) for fault in (flat, spread)),
    *((make, "weight", fault) for make in (rms_norm, add_rms_norm) for fault in (shorter, spread)),
    *((make, "out", fault) for make in (rms_norm, add_rms_norm) for fault in (half, shorter, spread)),
    *((add_rms_norm, "residual", fault) for fault in (half, shorter, spread)),
    *((silu_and_mul, "gate_up", fault) for fault in (shorter, narrower, spread)),
    *((silu_and_mul, "out", fault) for fault in (flat, half, spread)),
]


def case_id(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("make", "name", "fault"), CASES, ids=case_id)
def test_the_wrong_argument_is_named(
    make: Make, name: str, fault: Callable[[Any], Any], device: torch.device
) -> None:
    launch = getattr(triton_backend, make.__name__)
    arguments = make(device)
    launch(**arguments)  # right before it is made wrong
    arguments[name] = fault(arguments[name])
    with pytest.raises(ValueError, match=rf"^{name} must be "):
        launch(**arguments)


@pytest.mark.parametrize(
    "make",
    [
        rotary_and_kv_write,
        decode_plan,
        decode_attention,
        prefill_attention,
        rms_norm,
        add_rms_norm,
        silu_and_mul,
    ],
)
def test_a_cpu_tensor_needs_the_interpreter(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="must be a CUDA tensor"):
        getattr(triton_backend, make.__name__)(**make(torch.device("cpu")))


def test_the_door_picks_by_device() -> None:
    assert for_device(torch.device("cuda", 3)) is triton_backend
    assert for_device(torch.device("cpu")) is reference
