"""A fleet request by request: the real engine loop, scheduler and pool of every group, and the real router.

Each engine lives by a clock of its own. Whatever happens between groups happens at a time: a request comes,
groups push what routers know of them, the controller looks. Until then every engine that has work steps on,
the one furthest behind first. A step that is under way when a request comes ends first, as on a device.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cluster.planner.demand import Asked
from cluster.planner.figures import Recorder, Tally
from cluster.planner.fleet import Fleet, SimulatedGroup
from cluster.planner.nodes import Place
from cluster.planner.plan import ModelPlan, Plan
from cluster.planner.routing import Labels, Router
from cluster.planner.run import Outcome
from cluster.planner.steering import Steering
from engine.control import Order
from engine.errors import OverloadedError, RequestError
from engine.messages import EngineSnapshot, GenerateRequest, SamplingParams, TokenDelta
from engine.simulation import Gpu, SimulatedEngine

PUSH_S = 0.5  # as `cluster.app` has Serve ask
_LOOK_S = 1e-3  # an engine that has work and can do nothing just now looks again so soon
_DRAIN_S = 600.0  # after the last request; what has not ended then never does


@dataclass(slots=True)
class _Open:
    """A request on its way, as its client sees it."""

    model: int
    group: RequestGroup
    router: int
    asked_s: float
    num_prompt: int
    first_s: float = 0.0
    last_s: float = 0.0
    num_tokens: int = 0
    gap_s: float = 0.0


class RequestGroup:
    """A group with a real engine in virtual time. Ranks are replicas of the first one."""

    def __init__(
        self,
        name: str,
        model: ModelPlan,
        place: Place,
        make: Callable[[Callable[[Sequence[TokenDelta]], None]], SimulatedEngine],
        publish: Callable[[RequestGroup, Sequence[TokenDelta]], None],
    ) -> None:
        self.name, self.model, self.place = name, model, place
        self.engine = make(lambda deltas: publish(self, deltas))
        self.num_open = 0
        self.is_scheduled = False  # among those that step

    @property
    def snapshot(self) -> EngineSnapshot:
        return self.engine.snapshot

    def apply(self, order: Order, now: float) -> None:
        self.engine.apply(order)

    @property
    def calm_until_s(self) -> float:
        """Until then nobody needs to look at it, unless a request comes."""
        return self.engine.calm_until_s

    def step(self, until_s: float) -> int:
        """A step, or a moment of waiting, or all steps until then if they decide nothing; their number."""
        if leapt := self.engine.leap(until_s):
            return leapt
        if self.engine.clock() < until_s and not self.engine.step():
            self.engine.clock.advance(_LOOK_S)
        return 1


class Simulation:
    """One run.

    Args:
        sample_s: between two points of the curves.
        leaps: whether steps in which nothing is decided are taken together (`engine.leaping`).

    Attributes:
        num_steps, num_turns: of all engines, and how often one was called for them.
    """

    def __init__(self, plan: Plan, sample_s: float, leaps: bool = True) -> None:
        self._plan, self._leaps = plan, leaps
        self._gpus: dict[tuple[str, str], Gpu] = {}  # those that are shared, by node and name
        self._sample_s = sample_s
        self.tallies = {model.model_id: Tally() for model in plan.models}
        self._tally_of = list(self.tallies.values())
        self.recorder = Recorder(self.tallies)
        self.steering = Steering(plan.policy, plan.host_bytes)
        self.fleet = Fleet(plan, self._make)
        self._routers = [
            [Router(random.Random(f"{plan.seed}/{model.model_id}/{at}")) for at in range(plan.num_routers)]
            for model in plan.models
        ]
        self._labels = Labels()
        self._open: dict[str, _Open] = {}
        self._busy: list[tuple[float, int, RequestGroup]] = []
        self._order = itertools.count()
        self._names = itertools.count()
        self.num_steps = self.num_turns = 0

    def run(self, asked: Iterator[Asked], told: Callable[[float], None], lasts_s: float) -> Outcome:
        """All requests, and what is left of them afterwards.

        Args:
            told: hears of the virtual time, for whoever waits.
        """
        marks = self._marks()
        arrivals = itertools.chain(asked, [None])
        arrival = next(arrivals)
        mark_s, mark = next(marks)
        while arrival is not None or (self._open and mark_s < lasts_s + _DRAIN_S) or mark_s <= lasts_s:
            if arrival is not None and arrival.at_s <= mark_s:
                self._advance(arrival.at_s)
                self._arrive(arrival)
                arrival = next(arrivals)
                continue
            self._catch_up(mark_s)
            mark(mark_s)
            told(mark_s)
            mark_s, mark = next(marks)
        for one in self._open.values():
            self._tally_of[one.model].refuse("unfinished")
        return Outcome(self.tallies, self.recorder, self.steering, self.fleet, mark_s)

    def _make(self, name: str, model: ModelPlan, place: Place, now: float) -> SimulatedGroup:
        group = RequestGroup(name, model, place, partial(self._engine, model, place), self._published)
        group.engine.clock.advance_to(now)
        return group

    def _engine(
        self, model: ModelPlan, place: Place, publish: Callable[[Sequence[TokenDelta]], None]
    ) -> SimulatedEngine:
        shared, memory = place.shared_gpu, model.config.memory
        return SimulatedEngine(
            replace(
                model.config, memory=replace(memory, map_ahead_tokens=0)
            ),  # mapping takes no virtual time
            model.shape,
            model.calibration,
            publish,
            self._plan.balloon_bytes(model),
            lambda: self._room(place.node_id),
            is_filled=model.config.device == "cuda" and memory.balloon_bytes is not None,
            gpu=self._gpus.setdefault((place.node_id, shared), Gpu(shared)) if shared else None,
            leaps=self._leaps and not shared,  # steps of several engines take turns on a GPU
        )

    def _room(self, node_id: str) -> int:
        host = self.fleet.host_of(node_id)
        return host.available_bytes - host.total_bytes // 8  # `engine.memory.host_memory.room_bytes`

    def _marks(self) -> Iterator[tuple[float, Callable[[float], None]]]:
        """What happens at regular times, in order; at one time the push comes first."""
        periods = ((PUSH_S, self._push), (self._plan.tick_s, self._tick), (self._sample_s, self._sample))
        queue = [(0.0, place) for place in range(len(periods))]
        while True:
            at_s, place = heapq.heappop(queue)
            yield at_s, periods[place][1]
            heapq.heappush(queue, (at_s + periods[place][0], place))

    def _advance(self, until_s: float) -> None:
        """Every engine that has work comes to that time."""
        busy = self._busy
        while busy and busy[0][0] < until_s:
            _, number, group = heapq.heappop(busy)
            self._step(group, until_s)
            if group.num_open:
                heapq.heappush(busy, (group.calm_until_s, number, group))
            else:
                group.is_scheduled = False

    def _bring(self, group: RequestGroup, until_s: float) -> None:
        """A group comes to that time, where it was left behind because nothing happens."""
        while group.num_open and group.engine.clock() < until_s:
            self._step(group, until_s)

    def _step(self, group: RequestGroup, until_s: float) -> None:
        self.num_steps += group.step(until_s)
        self.num_turns += 1

    def _catch_up(self, until_s: float) -> None:
        """The same, and those too in which nothing happens meanwhile."""
        self._advance(until_s)
        for group in (*self.fleet.groups, *self.fleet.leaving):
            assert isinstance(group, RequestGroup)
            self._bring(group, until_s)

    def _arrive(self, asked: Asked) -> None:
        model = self._plan.models[asked.model]
        tally, now = self._tally_of[asked.model], asked.at_s
        tally.asked += 1
        groups = self.fleet.of(model.model_id)
        if not groups:
            tally.refuse("no group")
            return
        prompt = self._labels.tokens(asked.request)
        number = next(self._names)
        router = number % self._plan.num_routers
        group = groups[self._routers[asked.model][router].choose(groups, prompt, now)]
        assert isinstance(group, RequestGroup)
        name = str(number)
        self._bring(group, now)
        group.engine.clock.advance_to(now)
        try:
            group.engine.submit(
                GenerateRequest(
                    name, prompt, SamplingParams(max_tokens=asked.request.output_tokens, ignore_eos=True)
                )
            )
        except (OverloadedError, RequestError) as error:
            tally.refuse("overloaded" if isinstance(error, OverloadedError) else "too long")
            self._routers[asked.model][router].ended(group.name)
            return
        self._open[name] = _Open(asked.model, group, router, now, len(prompt))
        group.num_open += 1
        if not group.is_scheduled:
            group.is_scheduled = True
            heapq.heappush(self._busy, (group.engine.clock(), next(self._order), group))

    def _published(self, group: RequestGroup, deltas: Sequence[TokenDelta]) -> None:
        now = group.engine.clock()
        for delta in deltas:
            one = self._open[delta.request_id]
            if delta.token_ids:
                if one.num_tokens:
                    one.gap_s = max(one.gap_s, group.engine.gap_s or now - one.last_s)
                else:
                    one.first_s = now
                one.last_s = now
                one.num_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._end(one, delta)

    def _end(self, one: _Open, delta: TokenDelta) -> None:
        del self._open[delta.request_id]
        one.group.num_open -= 1
        self._routers[one.model][one.router].ended(one.group.name)
        tally, model = self._tally_of[one.model], self._plan.models[one.model]
        if delta.finish_reason == "error":
            tally.refuse("failed")
            return
        ttft_s = one.first_s - one.asked_s
        tpot_s = (one.last_s - one.first_s) / (one.num_tokens - 1) if one.num_tokens > 1 else 0.0
        first, pace = ttft_s <= model.ttft_slo_s, tpot_s <= model.tpot_slo_s
        tally.ended += 1
        tally.first_kept += first
        tally.pace_kept += pace
        tally.both_kept += first and pace
        tally.output_tokens += one.num_tokens
        tally.prompt_tokens += one.num_prompt
        tally.cached_tokens += delta.num_cached_tokens
        tally.ttft_s.add(ttft_s)
        if one.num_tokens > 1:
            tally.tpot_s.add(tpot_s)
            tally.gap_s.add(one.gap_s)

    def _push(self, now: float) -> None:
        """All groups tell their routers; idle engines take in what was left for them."""
        self.fleet.settle(now)
        for group in (*self.fleet.groups, *self.fleet.leaving):
            assert isinstance(group, RequestGroup)
            if not group.is_scheduled:
                group.engine.clock.advance_to(now)
                if not group.engine.is_at_rest:
                    group.engine.step()
        for place, model in enumerate(self._plan.models):
            for group in self.fleet.of(model.model_id):
                for router in self._routers[place]:
                    router.told(group, now)

    def _tick(self, now: float) -> None:
        self.steering.tick(self.fleet, now)
        self.fleet.scale(now)

    def _sample(self, now: float) -> None:
        if now > 0:
            self.recorder.take(self.fleet, now)
