"""The demo model says the same with the KV of earlier prompts as without, token for token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.tokenizer import Tokenizer
from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

NUM_TOKENS = 12
CHUNK_BYTES = 32 * 1024  # 21 tokens of one layer: prompts of a sentence have several blocks
SYSTEM = (
    "<|im_start|>system\nYou are a patient teacher who answers in one short sentence, without lists, and "
    "who never invents facts that are unknown to you. If the question is unclear, say so and ask.<|im_end|>\n"
)
QUESTIONS = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName a large animal of the sea.<|im_end|>\n<|im_start|>assistant\n",
)
MORE = "<|im_end|>\n<|im_start|>user\nAnd the next one?<|im_end|>\n<|im_start|>assistant\n"

Prompts = Mapping[str, tuple[int, ...]]


class Run:
    """An engine on the demo model, driven by hand, and everything it said."""

    def __init__(
        self, path: Path, enable_prefix_caching: bool, pool_mib: int = 96, balloon_mib: int = 0
    ) -> None:
        self.deltas = Collected()
        config = EngineConfig(
            ModelSource("demo", str(path), dtype="float32"),
            MemoryConfig(
                pool_bytes=pool_mib * MIB,
                chunk_bytes=CHUNK_BYTES,
                enable_prefix_caching=enable_prefix_caching,
                balloon_bytes=balloon_mib * MIB,
            ),
            SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=128),
            max_model_len=256,
        )
        self.engine = build_engine(config, self.deltas.take)
        self.tokens_per_block = self.engine.info.tokens_per_chunk

    def together(self, prompts: Prompts) -> None:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        for name, prompt in prompts.items():
            self.engine.submit(GenerateRequest(name, prompt, sampling))
        while self.engine.step():
            pass

    def cached(self, prompts: Prompts) -> list[int]:
        return [self.deltas[name].num_cached_tokens for name in prompts]


@pytest.mark.usefixtures("one_thread")
def test_greedy_tokens_do_not_depend_on_what_is_cached(demo_model_path: Path) -> None:
    tokenizer = Tokenizer.load(str(demo_model_path))
    plain, caching = Run(demo_model_path, False), Run(demo_model_path, True)
    per_block, system = caching.tokens_per_block, len(tokenizer.encode(SYSTEM))
    shared = system // per_block * per_block
    assert shared == 2 * per_block, "the case is not what it was meant to be"
    asked = {f"ask{at}": tuple(tokenizer.encode(SYSTEM + text)) for at, text in enumerate(QUESTIONS)}
    plain.together(asked)
    caching.together(asked)
    assert caching.cached(asked) == [0, shared, shared], "the system prompt was computed once, in one batch"

    said = [prompt + plain.deltas[name].token_ids for name, prompt in asked.items()]
    more, middle = tuple(tokenizer.encode(MORE)), shared + per_block // 2
    later = {"fork": said[0][:middle] + more, "again": asked["ask0"], "on": said[2] + more}
    plain.together(later)
    caching.together(later)
    assert caching.cached(later) == [middle, len(asked["ask0"]) - 1, len(said[2]) - 1]
    assert plain.engine.snapshot.prefix_hits == 0
    for name, delta in plain.deltas.items():
        assert caching.deltas[name].token_ids == delta.token_ids, name
        assert len(delta.token_ids) == NUM_TOKENS


@pytest.mark.usefixtures("one_thread")
def test_greedy_tokens_do_not_depend_on_what_went_through_host_memory(demo_model_path: Path) -> None:
    """Others take the memory of conversations on the device; these go on from what the balloon has."""
    tokenizer = Tokenizer.load(str(demo_model_path))
    plain, caching = Run(demo_model_path, False), Run(demo_model_path, True, pool_mib=30, balloon_mib=64)
    asked = {f"ask{at}": tuple(tokenizer.encode(SYSTEM + text)) for at, text in enumerate(QUESTIONS)}
    others = {f"other{at}": tuple(tokenizer.encode(f"Number {at}: {SYSTEM}")) for at in range(8)}
    plain.together(asked)
    caching.together(asked)
    for name, prompt in others.items():
        caching.together({name: prompt})
    said = [prompt + plain.deltas[name].token_ids for name, prompt in asked.items()]
    more = tuple(tokenizer.encode(MORE))
    later = {f"on{at}": tokens + more for at, tokens in enumerate(said)}
    plain.together(later)
    caching.together(later)
    assert dict(caching.engine.snapshot.decisions)["fetch_prefix"] > 0
    assert min(caching.cached(later)) > 2 * caching.tokens_per_block
    for name, delta in plain.deltas.items():
        assert caching.deltas[name].token_ids == delta.token_ids, name
