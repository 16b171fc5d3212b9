"""What the kernels must compute, in float64: one sequence and one head at a time, plain formulas.

Shares no code with the package on purpose.
"""

from __future__ import annotations

import math

import torch


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of one sequence's newest tokens over its whole context.

    Args:
        q: (queries, query_heads, head_dim), the queries of the last tokens.
        k, v: (context, kv_heads, head_dim).
    """
    q, k, v = q.double().cpu(), k.double(), v.double()
    queries, query_heads, _ = q.shape
    group = query_heads // k.shape[1]
    out = torch.empty_like(q)
    for head in range(query_heads):
        for index in range(queries):
            visible = k.shape[0] - queries + index + 1
            scores = k[:visible, head // group] @ q[index, head] * scale
            weights = torch.exp(scores - scores.max())
            out[index, head] = (weights / weights.sum()) @ v[:visible, head // group]
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double().cpu(), weight.double().cpu()
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """x (tokens, heads, head_dim) turned as complex numbers by position * theta^(-2i / head_dim)."""
    x = x.double().cpu()
    half = x.shape[-1] // 2
    turned = torch.empty_like(x)
    for i in range(half):
        angle = positions.double().cpu() * theta ** (-i / half)
        number = torch.complex(x[..., i], x[..., i + half])
        rotated = number * torch.polar(torch.ones_like(angle), angle)[:, None]
        turned[..., i], turned[..., i + half] = rotated.real, rotated.imag
    return turned


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.double().cpu().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def default_scale(head_dim: int) -> float:
    return 1 / math.sqrt(head_dim)
