"""Our attention kernels and the rivals', each made ready to run on a case.

A rival is whatever can be imported: FlashAttention-3 and the Triton kernel of vLLM 0.26.0, the Triton
kernels of SGLang 0.5.23. Each is called as its own engine calls it, with what that engine prepares once a
step prepared before: FlashAttention-3's tile schedule, SGLang's number of splits, our decode plan.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels import backend
from tests.bench.attention_cases import Case

Launch = Callable[[], torch.Tensor]
Builder = Callable[[Case], Launch]
PAGE = 16  # tokens: vLLM's default; SGLang addresses single tokens inside the same pages
_VLLM_SEGMENTS = 16  # NUM_PAR_SOFTMAX_SEGMENTS of its attention backend
_VLLM_2D_GRID = 128  # MIN_LAUNCH_GRID_SIZE_2D: with fewer programs it splits the context
_SGLANG_SPLITS = 8  # default of --triton-attention-num-kv-splits
_SGLANG_SCHEDULE = 256  # its scheduling kernel covers that many sequences


def ours(case: Case) -> Launch:
    """This repository's kernels for the case's device."""
    kernels = backend.for_device(case.device)
    kv, places = case.pool
    heads, out = case.problem.heads, torch.empty_like(case.q)
    if not case.problem.is_decode:
        return lambda: kernels.prefill_attention(
            case.q, kv, case.starts, *places, case.lens, case.problem.queries, heads.scale, out
        )
    floats = kernels.decode_workspace_floats(heads.query, heads.kv, heads.dim)
    workspace = torch.empty(floats, dtype=torch.float32, device=case.device)
    kernels.decode_plan(kv, case.lens, workspace)
    return lambda: kernels.decode_attention(case.q, kv, *places, case.lens, heads.scale, workspace, out)


def flash_attention_3(case: Case, page: int) -> Launch:
    """FlashAttention-3 as vLLM builds it, over a paged cache."""
    from vllm.vllm_flash_attn import (  # type: ignore[import-not-found]
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    problem, heads, out = case.problem, case.problem.heads, torch.empty_like(case.q)
    k, v, table = case.pages(page)
    schedule = get_scheduler_metadata(
        batch_size=problem.batch,
        max_seqlen_q=problem.queries,
        max_seqlen_k=problem.context,
        num_heads_q=heads.query,
        num_heads_kv=heads.kv,
        headdim=heads.dim,
        cache_seqlens=case.lens,
        qkv_dtype=case.q.dtype,
        cu_seqlens_q=case.starts,
        page_size=page,
        causal=True,
    )

    def launch() -> torch.Tensor:
        flash_attn_varlen_func(
            q=case.q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=case.starts,
            max_seqlen_q=problem.queries,
            seqused_k=case.lens,
            max_seqlen_k=problem.context,
            softmax_scale=heads.scale,
            causal=True,
            block_table=table,
            scheduler_metadata=schedule,
            fa_version=3,
        )
        return out

    return launch


def vllm_triton(case: Case) -> Launch:
    """vLLM's unified attention; few sequences in decode split the context, as in its backend."""
    from vllm.v1.attention.ops.triton_unified_attention import (  # type: ignore[import-not-found]
        unified_attention,
    )

    problem, heads, out = case.problem, case.problem.heads, torch.empty_like(case.q)
    k, v, table = case.pages(PAGE)
    threshold = _VLLM_2D_GRID // heads.kv
    segments = (threshold, heads.query, _VLLM_SEGMENTS)
    partial_out = torch.empty(*segments, heads.dim, dtype=torch.float32, device=case.device)
    partial_max, partial_sum = torch.empty(2, *segments, dtype=torch.float32, device=case.device)
    descale = torch.ones(1, device=case.device).expand(problem.batch, heads.kv)

    def launch() -> torch.Tensor:
        unified_attention(
            q=case.q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=case.starts,
            max_seqlen_q=problem.queries,
            seqused_k=case.lens,
            max_seqlen_k=problem.context,
            softmax_scale=heads.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=descale,
            v_descale=descale,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=_VLLM_SEGMENTS,
            softmax_segm_output=partial_out,
            softmax_segm_max=partial_max,
            softmax_segm_expsum=partial_sum,
        )
        return out

    return launch


def sglang_triton(case: Case) -> Launch:
    """SGLang's extend attention for prompts, its decode attention for single tokens."""
    return _sglang_decode(case) if case.problem.is_decode else _sglang_extend(case)


def _flat(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches as SGLang has them: (tokens, kv heads, dim)."""
    k, v, _ = case.pages(PAGE)
    return k.flatten(0, 1), v.flatten(0, 1)


def _indptr(case: Case, count: int) -> torch.Tensor:
    return torch.arange(case.problem.batch + 1, dtype=torch.int32, device=case.device) * count


def _sglang_extend(case: Case) -> Launch:
    from sglang.kernels.ops.attention.extend_attention import (  # type: ignore[import-not-found]
        extend_attention_fwd,
    )

    problem, out = case.problem, torch.empty_like(case.q)
    k, v = _flat(case)
    new_k = case.k[:, problem.cached :].flatten(0, 1).contiguous()
    new_v = case.v[:, problem.cached :].flatten(0, 1).contiguous()
    prefix_places, prefix_starts = case.token_places(problem.cached, PAGE), _indptr(case, problem.cached)

    def launch() -> torch.Tensor:
        extend_attention_fwd(
            case.q,
            new_k,
            new_v,
            out,
            k,
            v,
            case.starts,
            prefix_starts,
            prefix_places,
            None,
            True,
            None,
            problem.queries,
            1.0,
            1.0,
            sm_scale=problem.heads.scale,
        )
        return out

    return launch


def _sglang_decode(case: Case) -> Launch:
    from sglang.kernels.ops.attention.decode_attention import (  # type: ignore[import-not-found]
        decode_attention_fwd,
    )
    from sglang.kernels.ops.attention.metadata import (  # type: ignore[import-not-found]
        get_num_kv_splits_triton,
    )

    problem, heads, out = case.problem, case.problem.heads, torch.empty_like(case.q)
    k, v = _flat(case)
    places, starts = case.token_places(problem.context, PAGE), _indptr(case, problem.context)
    parts = (problem.batch, heads.query, _SGLANG_SPLITS)
    partial_out = torch.empty(*parts, heads.dim, dtype=torch.float32, device=case.device)
    partial_lse = torch.empty(parts, dtype=torch.float32, device=case.device)
    splits = torch.empty(problem.batch, dtype=torch.int32, device=case.device)
    get_num_kv_splits_triton[(1,)](
        splits,
        case.lens,
        problem.batch,
        1,
        heads.query,
        heads.kv,
        _SGLANG_SPLITS,
        _num_multiprocessors(case.device),
        MAX_NUM_SEQ=max(_SGLANG_SCHEDULE, problem.batch),
        uneven_batch_ptr=None,
    )

    def launch() -> torch.Tensor:
        decode_attention_fwd(
            case.q,
            k,
            v,
            out,
            starts,
            places,
            partial_out,
            partial_lse,
            splits,
            _SGLANG_SPLITS,
            heads.scale,
            1.0,
            1.0,
        )
        return out

    return launch


def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


RIVALS: dict[str, Builder] = {
    "fa3 page 16": partial(flash_attention_3, page=16),
    "fa3 page 128": partial(flash_attention_3, page=128),
    "vllm triton": vllm_triton,
    "sglang triton": sglang_triton,
}
