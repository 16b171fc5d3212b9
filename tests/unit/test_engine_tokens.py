"""The engine says what transformers says, token for token, however the work is cut up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.build import build_engine
from engine.config import MIB, EngineConfig, MemoryConfig, ModelSource, SchedulerConfig
from engine.core import Engine
from engine.messages import GenerateRequest, SamplingParams
from tests.fakes import Collected

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

NUM_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three laws of thermodynamics are",
    "Water boils at a temperature of",
    "List five animals that live in the ocean:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "In 1969, the first human",
    "To make a good cup of coffee, you should",
    "Q: What is 7 times 8?\nA:",
    "Shakespeare wrote many plays, among them",
    "The difference between a virus and a bacterium is",
    "import numpy as np\n\nx = np.",
    "She opened the door slowly and",
    "Photosynthesis is the process by which",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nTell me a joke.<|im_end|>\n<|im_start|>assistant\n",
    "The history of computing begins with " + "the abacus, the slide rule and " * 12 + "then",
    "A" * 40,
)


@pytest.fixture(scope="module")
def prompts(demo_model_path: Path) -> list[tuple[int, ...]]:
    tokenizer = AutoTokenizer.from_pretrained(str(demo_model_path.parent), gguf_file=demo_model_path.name)
    return [tuple(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(demo_model_path: Path, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What the engine says to all prompts at once, once transformers has agreed to every token.

    One pass of transformers over prompt and answer shows its greedy choice after each of the answer's
    tokens; that all of them are the answer's next token is, by induction, what generating greedily
    would say. It takes a tenth of the time of generating.
    """
    answers = Run(demo_model_path).together(prompts)
    model = AutoModelForCausalLM.from_pretrained(
        str(demo_model_path.parent), gguf_file=demo_model_path.name, dtype=torch.float32
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        assert _choices(model, prompt, answer) == answer
    assert _generated(model, prompts[0], 16) == answers[0][:16]
    return answers


@torch.inference_mode()
def _choices(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
    logits = model(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return tuple(logits.argmax(-1).tolist())


def _generated(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    said = model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
    return tuple(said[0, len(prompt) :].tolist())


class Run:
    """An engine on the demo model, driven by hand."""

    def __init__(self, path: Path, memory: MemoryConfig | None = None, piece: int | None = None) -> None:
        self._deltas = Collected()
        self._is_static = memory is not None and memory.mode == "static"
        scheduler = SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=512, prefill_piece_tokens=piece)
        config = EngineConfig(
            ModelSource("demo", str(path), dtype="float32"),
            memory or MemoryConfig(pool_bytes=256 * MIB),
            scheduler,
            max_model_len=512,
        )
        self.engine: Engine = build_engine(config, self._deltas.take)

    def together(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Greedy tokens of all prompts, submitted at once."""
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        self._deltas.clear()
        for index, prompt in enumerate(prompts):
            self.engine.submit(GenerateRequest(str(index), prompt, sampling))
        while self.engine.step():
            pass
        memory = self.engine.snapshot.memory
        held = memory.kv if self._is_static else 0  # its slots are backed for good
        assert memory.free + held + memory.cached + memory.activation + memory.guard == memory.total
        return [self._deltas[str(index)].token_ids for index in range(len(prompts))]


def test_alone(
    demo_model_path: Path, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> None:
    run = Run(demo_model_path)
    for prompt, tokens in list(zip(prompts, expected, strict=True))[::4]:  # all of them take a minute
        assert run.together([prompt]) == [tokens]


@pytest.mark.parametrize(
    ("mode", "piece"), [("elastic", 16), ("elastic", 64), ("virtual", None), ("static", 16)]
)
def test_all_together_in_any_pieces_and_mode(
    demo_model_path: Path,
    prompts: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
    mode: str,
    piece: int | None,
) -> None:
    run = Run(demo_model_path, MemoryConfig(mode=mode, pool_bytes=256 * MIB), piece)  # type: ignore[arg-type]
    assert run.together(prompts) == expected


def test_a_pool_too_small_for_all(
    demo_model_path: Path, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> None:
    run = Run(demo_model_path, MemoryConfig(pool_bytes=40 * MIB, chunk_bytes=MIB // 16))
    assert run.together(prompts) == expected
    assert run.engine.snapshot.num_preemptions > 0
