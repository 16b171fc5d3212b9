"""The workloads that have a name, once: the command, the engines in process and every rival get the same
token ids at the same times.

A name says what is in it; `mixed-load` and what names cannot hold stand beside their numbers here. Random
prompts of any count, lengths and rate have a name too.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.bench.workload import BenchError, PlannedRequest, RandomPlan, Workload, arrival_times

_LLAMA_VOCAB = 128_000  # of 128,256: the rest are control tokens
_DEMO_VOCAB = 49_152  # SmolLM2
_ANSWERED = 8  # of the tokens that a chat's turn adds, one in so many is generated
_RANDOM = re.compile(r"(demo-)?random-(\d+)x(\d+)\+(\d+)(?:-poisson(\d+(?:\.\d+)?))?")


class _Plan(Protocol):
    def workload(self, name: str) -> Workload: ...


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """Chats that all start at once: a turn is sent when the answer before it has ended.

    Attributes:
        turn_tokens: what each turn adds to its chat, fresh and generated tokens together.
    """

    num_chats: int
    num_turns: int
    turn_tokens: int
    seed: int
    vocab_size: int

    def workload(self, name: str) -> Workload:
        """All first turns, then all second ones, and so on."""
        output = self.turn_tokens // _ANSWERED
        fresh = self.turn_tokens - output
        requests = [
            PlannedRequest(
                arrival_s=0.0,
                prompt_tokens=turn * self.turn_tokens + fresh,
                output_tokens=output,
                parts=((f"chat {chat} turn {turn}", fresh),),
                follows=(turn - 1) * self.num_chats + chat if turn else None,
            )
            for turn in range(self.num_turns)
            for chat in range(self.num_chats)
        ]
        return Workload(name, tuple(requests), self.seed, self.vocab_size)


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """Prompts and answers of all lengths, a Poisson process of them.

    Attributes:
        input_lens, output_lens: shortest and longest; every doubling between is equally likely.
        request_rate: requests/s.
    """

    num_prompts: int
    input_lens: tuple[int, int]
    output_lens: tuple[int, int]
    request_rate: float
    seed: int
    vocab_size: int

    def workload(self, name: str) -> Workload:
        """The plan with its dice thrown."""
        dice = random.Random(f"{self.seed}/lengths")
        requests = []
        for index, arrival_s in enumerate(arrival_times(self.num_prompts, self.request_rate, 1.0, self.seed)):
            fresh = _log_uniform(dice, self.input_lens)
            output = _log_uniform(dice, self.output_lens)
            requests.append(PlannedRequest(arrival_s, fresh, output, ((f"request {index}", fresh),)))
        return Workload(name, tuple(requests), self.seed, self.vocab_size, self.request_rate)


def _log_uniform(dice: random.Random, lengths: tuple[int, int]) -> int:
    shortest, longest = lengths
    return min(longest, round(math.exp(dice.uniform(math.log(shortest), math.log(longest)))))


_NAMED: Mapping[str, _Plan] = {
    "8b-256x512+256": RandomPlan(256, 512, 256, seed=1, vocab_size=_LLAMA_VOCAB),
    "single-512+256": RandomPlan(1, 512, 256, seed=2, vocab_size=_LLAMA_VOCAB),
    "long-6x126000+128": RandomPlan(6, 126_000, 128, seed=3, vocab_size=_LLAMA_VOCAB),
    "capped-120x8000+512-poisson3": RandomPlan(
        120, 8_000, 512, request_rate=3.0, seed=4, vocab_size=_LLAMA_VOCAB, kv_gib=20.0
    ),
    "warm-up-32x512+16": RandomPlan(32, 512, 16, seed=5, vocab_size=_LLAMA_VOCAB),
    # Prompt and answer make 131,328 tokens: the model must take more than 128k.
    "long-4x131072+256": RandomPlan(4, 131_072, 256, seed=9, vocab_size=_LLAMA_VOCAB),
    "long-4x124000+256": RandomPlan(4, 124_000, 256, seed=16, vocab_size=_LLAMA_VOCAB),
    "growth-256x100+500": RandomPlan(256, 100, 500, seed=10, vocab_size=_LLAMA_VOCAB),
    "shared-256x4096+128+64": RandomPlan(256, 128, 64, prefix_len=4096, seed=11, vocab_size=_LLAMA_VOCAB),
    "chats-64x10x1024": ChatPlan(64, 10, 1024, seed=12, vocab_size=_LLAMA_VOCAB),
    # Ten minutes. By its floor an 8B model computes for half of them on an H100 (300 s), beside its decode
    # steps: busy, and no queue that only grows.
    "mixed-load": MixedPlan(6_000, (16, 16_384), (1, 1_024), 10.0, seed=13, vocab_size=_LLAMA_VOCAB),
    "demo-8x64+32": RandomPlan(8, 64, 32, seed=6, vocab_size=_DEMO_VOCAB),
    "demo-single-64+32": RandomPlan(1, 64, 32, seed=7, vocab_size=_DEMO_VOCAB),
    "demo-12x64+32-poisson2": RandomPlan(12, 64, 32, request_rate=2.0, seed=8, vocab_size=_DEMO_VOCAB),
    "demo-shared-8x128+16+8": RandomPlan(8, 16, 8, prefix_len=128, seed=14, vocab_size=_DEMO_VOCAB),
    "demo-chats-4x3x96": ChatPlan(4, 3, 96, seed=15, vocab_size=_DEMO_VOCAB),
}


def workload_names() -> Sequence[str]:
    """Every named workload.

    `RxI+O` is R requests of I tokens in and O out, `RxS+I+O` the same behind S tokens that all share,
    `CxTxN` C chats of T turns that add N tokens each, one in eight of them generated.
    """
    return list(_NAMED)


def named_workload(name: str) -> Workload:
    """A workload by name; `random-RxI+O` and `random-RxI+O-poissonQ` are R random prompts, Q a second.

    Raises:
        BenchError: there is none of that name.
    """
    if name in _NAMED:
        return _NAMED[name].workload(name)
    if match := _RANDOM.fullmatch(name):
        return _random_plan(name, *match.groups()).workload(name)
    raise BenchError(
        f"no workload is called {name!r}; there are {', '.join(_NAMED)}, random-RxI+O and "
        "random-RxI+O-poissonQ (demo-random-... for the demo model)"
    )


def _random_plan(name: str, demo: str | None, count: str, fresh: str, output: str, rate: str) -> RandomPlan:
    """Its seed is of its name: two loads of one process share no prompt that could be cached."""
    vocab_size = _DEMO_VOCAB if demo else _LLAMA_VOCAB
    seed, requests_s = zlib.crc32(name.encode()), float(rate) if rate else math.inf
    return RandomPlan(
        int(count), int(fresh), int(output), request_rate=requests_s, seed=seed, vocab_size=vocab_size
    )
