"""Attention cases of many sequences behind one prefix: every layout holds it once."""

from __future__ import annotations

import pytest
import torch

from tests.bench import attention_kernels, gpu_kernels
from tests.bench.attention_cases import TOKENS_PER_ROW, Case, Heads, Problem

SMALL = Heads(query=4, kv=2, dim=16)
SHARED = Problem(3, 1, 2 * TOKENS_PER_ROW + 31, SMALL, shared=2 * TOKENS_PER_ROW)
PROMPTS = Problem(2, 5, TOKENS_PER_ROW + 11, SMALL, shared=TOKENS_PER_ROW)


@pytest.fixture(params=[SHARED, PROMPTS], ids=lambda problem: problem.name)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param, torch.device("cpu"), torch.float32)


def test_sequences_begin_alike_and_go_on_on_their_own(case: Case) -> None:
    shared = case.problem.shared
    for tokens in (case.k, case.v):
        assert torch.equal(tokens[0, :shared], tokens[1, :shared])
        assert not torch.isclose(tokens[0, shared:], tokens[1, shared:]).all()


def test_our_pool_holds_the_prefix_once(case: Case) -> None:
    problem = case.problem
    q = case.q.double().view(problem.batch, problem.queries, SMALL.query, SMALL.dim).transpose(1, 2)
    k, v = (t.double().repeat_interleave(2, dim=2).transpose(1, 2) for t in (case.k, case.v))
    seen = torch.arange(problem.context)[None] <= torch.arange(problem.queries)[:, None] + problem.cached
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=SMALL.scale)
    expected = out.transpose(1, 2).reshape(case.q.shape)
    assert gpu_kernels.relative_error(attention_kernels.ours(case)(), expected) < 1e-5
    assert case.pool[0].shape[0] == problem.shared // TOKENS_PER_ROW + problem.batch


def test_pages_hold_the_prefix_once(case: Case) -> None:
    k, v, table = case.pages(16)
    for cache, plain in ((k, case.k), (v, case.v)):
        torch.testing.assert_close(cache[table.long()].flatten(1, 2), plain)
    shared = case.problem.shared // 16
    assert torch.equal(table[0, :shared], table[1, :shared])
    assert len(table.unique()) == k.shape[0] < table.numel()


def test_its_bytes_count_once_and_its_name_says_so() -> None:
    own = SHARED.context - SHARED.shared
    assert SHARED.kv_bytes == (SHARED.shared + 3 * own) * 2 * 16 * 2 * 2
    assert SHARED.name == "decode 3 x (256 shared + 32)"
    assert PROMPTS.name == "prefill 2 x 5 + (128 shared + 11)"


def test_both_cases_of_256_sequences_are_measured() -> None:
    names = [problem.name for problem in gpu_kernels.problems("decode")]
    assert names[-2:] == ["decode 256 x 4224", "decode 256 x (4096 shared + 128)"]


def test_what_does_not_fill_rows_is_refused() -> None:
    case = Case(Problem(2, 1, 63, SMALL, shared=32), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="no whole number of rows of 128"):
        _ = case.pool
