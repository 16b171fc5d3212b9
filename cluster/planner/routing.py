"""Which group a simulated request goes to: the ranking that serves, and what a router knows for it."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.bench.workload import PlannedRequest
from cluster.planner.fleet import SimulatedGroup
from cluster.prefix_record import PrefixRecord, chain_of, home_of
from cluster.ranking import Ask, load_of, rank_groups, routing_stats
from cluster.router import SentTokens
from engine.messages import EngineSnapshot


@dataclass
class Router:
    """One ingress replica's view of one model's groups (`cluster.router` over Serve)."""

    dice: random.Random
    record: PrefixRecord[str] = field(default_factory=PrefixRecord)
    sent: SentTokens = field(default_factory=SentTokens)
    in_flight: Counter[str] = field(default_factory=Counter)
    stats: dict[str, dict[str, float]] = field(default_factory=dict)
    pushed_s: dict[str, float] = field(default_factory=dict)
    _told: dict[str, EngineSnapshot] = field(default_factory=dict)

    def told(self, group: SimulatedGroup, now: float) -> None:
        """A group has pushed its facts."""
        name, snapshot = group.name, group.snapshot
        self.pushed_s[name] = now
        if self._told.get(name) is not snapshot:
            self._told[name] = snapshot
            self.stats[name] = routing_stats(snapshot, group.model.ttft_slo_s)
            self.record.limit(name, self.stats[name]["capacity_tokens"])

    def choose(self, groups: Sequence[SimulatedGroup], prompt: Sequence[int], now: float) -> int:
        """The group that a prompt is sent to."""
        names = [group.name for group in groups]
        chain = chain_of(prompt, "") if len(groups) > 1 else []
        cached = [min(len(prompt), self.record.cached_tokens(name, chain)) for name in names]
        loads = [
            load_of(
                self.stats.get(name, {}),
                self.in_flight[name],
                self.sent.since(name, self.pushed_s.get(name, 0.0)),
                now - self.pushed_s.get(name, -1e9),
            )
            for name in names
        ]
        home = home_of(chain[0], names) if chain else None
        best = rank_groups(loads, Ask(len(prompt), cached, home=home), self.dice)[0]
        self.record.sent(names[best], chain)
        self.sent.send(names[best], len(prompt) - cached[best], now)
        self.in_flight[names[best]] += 1
        return best

    def ended(self, name: str) -> None:
        """A request has left a group."""
        self.in_flight[name] -= 1
        self.sent.complete(name)


class Labels:
    """Token ids of prompts: equal stretches are equal, and others differ from their first token on."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._next = itertools.count(2)

    def tokens(self, request: PlannedRequest) -> tuple[int, ...]:
        """A prompt. A stretch that nobody shares is not remembered."""
        tokens = array("q")
        for label, length in request.parts or (("", request.prompt_tokens),):
            number = self._number(label) if label.startswith("block ") else next(self._next)
            tokens.append(number)
            tokens.extend(array("q", (1,)) * (length - 1))
        return tuple(tokens)

    def _number(self, label: str) -> int:
        if label not in self._numbers:
            self._numbers[label] = next(self._next)
        return self._numbers[label]
