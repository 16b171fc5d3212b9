"""What a benchmark may set on an engine, ours or vLLM: read from the command line, once for all of them.

What is not set is each engine's own default: prefix caching is on in both; ours runs 256 sequences and
computes 8,192 tokens a step, vLLM 0.26.0 in process 1,024 and 16,384.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from engine.config import MIB, EngineConfig, Mode

MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of one engine; None is its default.

    Attributes:
        mode: of our memory; vLLM has one.
        max_prefill_tokens: of a step that no decode waits for. For vLLM tokens of any step.
        kv_gib: memory of the KV cache; of ours, which has one pool, of KV and activations together.
        prefill_spread_steps: ours alone.
    """

    mode: Mode | None = None
    prefix_caching: bool | None = None
    max_prefill_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_gib: float | None = None
    prefill_spread_steps: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> EngineOptions:
        """Those that `add_arguments` has read."""
        return cls(
            args.mode,
            args.prefix_caching,
            args.max_prefill_tokens,
            args.max_model_len,
            args.max_num_seqs,
            args.kv_gib,
            args.prefill_spread_steps,
        )

    def words(self) -> list[str]:
        """The command line that gives these again."""
        words: list[str] = []
        for name, value in asdict(self).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is not None:
                words += [f"--{flag}", str(value)]
        return words

    def told(self) -> dict[str, Any]:
        """Those that are set, for a result."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def vllm_arguments(self) -> dict[str, Any]:
        """The same as arguments of vLLM's `LLM`."""
        named = {
            "enable_prefix_caching": self.prefix_caching,
            "max_num_batched_tokens": self.max_prefill_tokens,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": None if self.kv_gib is None else int(self.kv_gib * 2**30),
        }
        return {name: value for name, value in named.items() if value is not None}

    def applied_to(self, config: EngineConfig) -> EngineConfig:
        """Our engine's configuration with these in it.

        Raises:
            ConfigError: one that cannot be.
        """
        memory, scheduler = config.memory, config.scheduler
        if self.mode is not None:
            memory = replace(memory, mode=self.mode)
        if self.prefix_caching is not None:
            memory = replace(memory, enable_prefix_caching=self.prefix_caching)
        if self.kv_gib is not None:
            memory = replace(memory, pool_bytes=int(self.kv_gib * 1024) * MIB)
        step = scheduler.max_num_batched_tokens
        scheduler = replace(
            scheduler,
            max_num_seqs=self.max_num_seqs or scheduler.max_num_seqs,
            max_num_batched_tokens=min(step, self.max_prefill_tokens or step),
            max_prefill_tokens=self.max_prefill_tokens,
            prefill_spread_steps=self.prefill_spread_steps or scheduler.prefill_spread_steps,
        )
        max_model_len = self.max_model_len or config.max_model_len
        return replace(config, memory=memory, scheduler=scheduler, max_model_len=max_model_len)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `EngineOptions`."""
    group = parser.add_argument_group("engine", "without one each engine's own default")
    group.add_argument("--mode", choices=MODES, help="of our memory")
    group.add_argument("--prefix-caching", action=argparse.BooleanOptionalAction)
    group.add_argument("--max-prefill-tokens", type=int, help="of a step without decodes (vLLM: of any)")
    group.add_argument("--max-model-len", type=int)
    group.add_argument("--max-num-seqs", type=int)
    group.add_argument("--prefill-spread-steps", type=int, help="ours alone; 1 fills every step")
    group.add_argument("--kv-gib", type=float, help="for KV; of ours for KV and activations")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> EngineOptions:
    """The options as given; exit status 2 for a number that cannot be."""
    for name in ("max_prefill_tokens", "max_model_len", "max_num_seqs", "kv_gib", "prefill_spread_steps"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    return EngineOptions.of(args)
