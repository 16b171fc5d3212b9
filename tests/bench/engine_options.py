"""What a benchmark may set on an engine, ours or vLLM: read from the command line, once for all of them.

What is not set is each engine's own default: prefix caching is on in both; ours runs 256 sequences and
computes 8,192 tokens a step, vLLM 0.26.0 in process 1,024 and 16,384. The promises to clients always are:
every run is judged by them, and ours is told them.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_args

from engine.config import MIB, EngineConfig, Mode, Policy, SloConfig

MODES: tuple[Mode, ...] = get_args(Mode)
POLICIES: tuple[Policy, ...] = get_args(Policy)
# Options that vLLM has nothing for.
OURS = ("mode", "prefill_spread_steps", "balloon_gib", "policy", "deposit", "turn_tokens", "layer_wise")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Settings of one engine; None is its default.

    Attributes:
        mode: of our memory; vLLM has one.
        max_prefill_tokens: of a step that no decode waits for. For vLLM tokens of any step.
        kv_gib: memory of the KV cache; of ours, which has one pool, of KV and activations together.
        prefill_spread_steps: ours alone.
        balloon_gib: host memory of ours; 0 is none. On a GPU what is given is filled before anything is
            measured, and what is not given grows as it is needed.
        policy, deposit, turn_tokens, layer_wise: of our scheduler.
        ttft_slo_ms, tpot_slo_ms: the promises that every engine is judged by; ours is told them.
    """

    mode: Mode | None = None
    prefix_caching: bool | None = None
    max_prefill_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    kv_gib: float | None = None
    prefill_spread_steps: int | None = None
    balloon_gib: float | None = None
    policy: Policy | None = None
    deposit: bool | None = None
    turn_tokens: int | None = None
    layer_wise: bool | None = None
    ttft_slo_ms: float = 2000.0
    tpot_slo_ms: float = 150.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> EngineOptions:
        """Those that `add_arguments` has read."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def objectives_ms(self) -> dict[str, float]:
        """The promises under the names of `cluster.bench.summary`."""
        return {"ttft": self.ttft_slo_ms, "tpot": self.tpot_slo_ms}

    def words(self) -> list[str]:
        """The command line that gives these again."""
        words: list[str] = []
        for name, value in asdict(self).items():
            if value is False:
                words.append(f"--no-{flag(name)[2:]}")
            elif value is not None:
                words += [flag(name)] if value is True else [flag(name), str(value)]
        return words

    def told(self) -> dict[str, Any]:
        """Those that are set, for a result."""
        return _given(asdict(self))

    def of_any_engine(self) -> EngineOptions:
        """These without what is ours alone: what a rival gets."""
        nothing: dict[str, Any] = dict.fromkeys(OURS)
        return replace(self, **nothing)

    def vllm_arguments(self) -> dict[str, Any]:
        """The same as arguments of vLLM's `LLM`."""
        named = {
            "enable_prefix_caching": self.prefix_caching,
            "max_num_batched_tokens": self.max_prefill_tokens,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "kv_cache_memory_bytes": None if self.kv_gib is None else int(self.kv_gib * 2**30),
        }
        return _given(named)

    def applied_to(self, config: EngineConfig) -> EngineConfig:
        """Our engine's configuration with these in it.

        Raises:
            ConfigError: one that cannot be.
        """
        step = config.scheduler.max_num_batched_tokens
        memory = {
            "mode": self.mode,
            "enable_prefix_caching": self.prefix_caching,
            "pool_bytes": _whole_mib(self.kv_gib),
            "balloon_bytes": _whole_mib(self.balloon_gib),
        }
        scheduler = {
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": min(step, self.max_prefill_tokens or step),
            "max_prefill_tokens": self.max_prefill_tokens,
            "prefill_spread_steps": self.prefill_spread_steps,
            "policy": self.policy,
            "deposit": self.deposit,
            "turn_tokens": self.turn_tokens,
            "layer_wise": self.layer_wise,
        }
        return replace(
            config,
            memory=replace(config.memory, **_given(memory)),
            scheduler=replace(config.scheduler, **_given(scheduler)),
            slo=SloConfig(self.ttft_slo_ms, self.tpot_slo_ms),
            max_model_len=self.max_model_len or config.max_model_len,
        )


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _whole_mib(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 1024) * MIB


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
    group.add_argument("--balloon-gib", type=float, help="host memory of ours, filled first; 0 is none")
    group.add_argument("--policy", choices=POLICIES, help="of our scheduler")
    group.add_argument("--deposit", action=argparse.BooleanOptionalAction, help="ours alone")
    group.add_argument("--turn-tokens", type=int, help="ours alone")
    group.add_argument("--layer-wise", action=argparse.BooleanOptionalAction, help="ours alone")
    promises = parser.add_argument_group("promises", "what every engine is judged by, and ours is told")
    promises.add_argument("--ttft-slo-ms", type=float, default=EngineOptions().ttft_slo_ms)
    promises.add_argument("--tpot-slo-ms", type=float, default=EngineOptions().tpot_slo_ms)


_POSITIVE = (
    *("max_prefill_tokens", "max_model_len", "max_num_seqs", "kv_gib", "prefill_spread_steps", "turn_tokens"),
    *("ttft_slo_ms", "tpot_slo_ms"),
)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> EngineOptions:
    """The options as given; exit status 2 for a number that cannot be."""
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{flag(name)} must be above 0, not {value}")
    if args.balloon_gib is not None and not 0 <= args.balloon_gib < math.inf:
        parser.error(f"--balloon-gib must be at least 0, not {args.balloon_gib}")
    return EngineOptions.of(args)


def flag(name: str) -> str:
    """An option's name as it is written on the command line."""
    return f"--{name.replace('_', '-')}"
