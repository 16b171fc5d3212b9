"""A fleet coarsely: a group is queues, a rate and two memories. A thousand times cheaper than `requests`.

The controller's policy is the real one, and so are the calibration, sizes and arrivals; what an engine does
with them is summed up. A group computes prompts first, as far as next tokens allow; what fits its device
decodes; up to what the balloon has room for takes turns; the rest waits. Within a tick all requests fare
alike, so shares of kept promises are those of crowds: right about what memory and rates allow, blind to
single long prompts, to prefix caches and to the scheduler's finer choices. Requests are dealt out by how
many are open and by the controller's weights.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator

from cluster.planner.demand import Asked
from cluster.planner.figures import Recorder, Tally
from cluster.planner.fleet import Fleet, SimulatedGroup
from cluster.planner.plan import ModelPlan, Plan
from cluster.planner.run import Outcome
from cluster.planner.steering import Steering
from engine.control import Order
from engine.messages import EngineSnapshot, MemorySnapshot
from engine.simulation import GIB, pool_bytes
from engine.step_times import StepWork

_USABLE = 0.9  # of the pool, for KV (as `cluster.policy_facts`)
_LEARN = 0.02  # of an average, with each request
_SAMPLE_TOKENS = 2048
_LEAST_PROMPTS = 0.1  # of the time, for prompts, however late next tokens are


class FluidGroup:
    """One group.

    Attributes:
        queue: requests for which there is no memory yet.
        backlog: tokens of prompts that are to be computed.
        there: requests that have their KV, on the device or in the balloon.
    """

    def __init__(
        self, name: str, model: ModelPlan, node_id: str, now: float, plan: Plan, tally: Tally
    ) -> None:
        self.name, self.model, self.node_id = name, model, node_id
        self._tally = tally
        self._geometry = model.shape.geometry
        self._pool = pool_bytes(model.config, model.calibration) // self._geometry.chunk_bytes
        self._slab = max(1, model.config.memory.balloon_slab_bytes // self._geometry.chunk_bytes)
        self.limit = plan.balloon_bytes(model) // self._geometry.chunk_bytes
        self._has_balloon = self.limit > 0
        self.queue = self.backlog = self.there = self.physical = 0.0
        self._prompt, self._output = 1000.0, 200.0
        self._token_s = self._prompt_token_s()
        self.order: Order | None = None
        self._counts = [0.0] * 4  # first in time and late, pace in time and late
        self._wait_s = 0.0
        self._now = now
        self.snapshot: EngineSnapshot = self._snapshot()

    @property
    def num_open(self) -> int:
        return int(self.queue + self.there + self.backlog / self._prompt + 0.999)

    @property
    def weight(self) -> float:
        """The controller's."""
        return self.order.admission_weight if self.order is not None else 1.0

    def apply(self, order: Order, now: float) -> None:
        self.order = order
        self.limit = order.balloon_logical_bytes // self._geometry.chunk_bytes

    def step(self, now: float, passed_s: float, requests: list[Asked]) -> None:
        """Let time pass in which these came."""
        for one in requests:
            self._prompt += _LEARN * (one.request.prompt_tokens - self._prompt)
            self._output += _LEARN * (one.request.output_tokens - self._output)
        self._grow(len(requests), passed_s)
        self.queue += len(requests)
        admitted = max(0.0, min(self.queue, self._room()))
        self.queue -= admitted
        self.backlog += admitted * self._prompt
        first_s, pace_s = self._compute(passed_s)
        self._judge(len(requests), first_s, pace_s)
        self._now = now
        self.snapshot = self._snapshot()

    @property
    def _request(self) -> float:
        """Chunks of a request's KV, on average over its life."""
        return max(1.0, float(self._geometry.chunks_for(int(self._prompt + self._output / 2))))

    @property
    def _on_device(self) -> float:
        return min(self.model.config.scheduler.max_num_seqs, _USABLE * self._pool / self._request)

    def _room(self) -> float:
        """Requests that may start."""
        held = self.there + self.backlog / self._prompt
        return self._on_device + min(self.physical, self.limit) / self._request - held

    def _parked(self) -> float:
        return max(0.0, min(self.there - self._on_device, self.physical / self._request))

    def _grow(self, came: float, passed_s: float) -> None:
        """The balloon: made as it is needed, slab by slab; what an order takes goes once nobody is in it."""
        if not self._has_balloon:
            return
        used, pin_s = self._parked() * self._request, self.model.calibration.pin_s_per_gib
        made = passed_s / max(1e-9, pin_s) * GIB / self._geometry.chunk_bytes
        wanted = min(self.limit, used + (self.queue + came) * self._request)
        if self.physical > self.limit:
            self.physical = max(used, float(self.limit))
        elif wanted > self.physical:
            self.physical = min(wanted, self.physical + made)

    def _compute(self, passed_s: float) -> tuple[float, float]:
        """Prompts and decodes of that time; seconds to a first token, and between next ones."""
        batch = min(self.there, self._on_device)
        context = self._prompt + self._output / 2
        steps = self.model.calibration.steps
        decode_s = steps.step_s(StepWork(0, max(1, round(batch)), int(max(1.0, batch) * context), 0.0))
        turns = self.there / batch if batch > 1e-9 else 1.0
        allowed = max(_LEAST_PROMPTS, 1 - decode_s * turns / self.model.tpot_slo_s)
        wanted = self.backlog * self._token_s / passed_s
        share = min(1.0, wanted, allowed if self.there > 0.5 else 1.0)
        computed = min(self.backlog, share * passed_s / self._token_s)
        tokens = batch * passed_s * (1 - share) / decode_s
        done = min(self.there, tokens / self._output)
        behind = self.backlog + self._prompt
        self.backlog -= computed
        self.there += computed / self._prompt - done
        pace = allowed if self.there > 0.5 else 1.0
        # What waits for memory waits until as many have gone.
        waits_s = self.queue / (done / passed_s) if self.queue > 0 and done > 0 else 0.0
        self._wait_s = waits_s + self.backlog * self._token_s / pace
        first_s = waits_s + min(behind, self.backlog + self._prompt) * self._token_s / pace + decode_s
        self._tally.output_tokens += done * self._output
        return first_s, decode_s * turns / max(1e-3, 1 - share) if share < 1 else decode_s * turns

    def _judge(self, came: float, first_s: float, pace_s: float) -> None:
        if not came:
            return
        tally, first, pace = self._tally, first_s <= self.model.ttft_slo_s, pace_s <= self.model.tpot_slo_s
        tally.ended += came
        tally.first_kept += came * first
        tally.pace_kept += came * pace
        tally.both_kept += came * (first and pace)
        tally.prompt_tokens += came * self._prompt
        tally.ttft_s.add(first_s, came)
        tally.tpot_s.add(pace_s, came)
        for place, kept in enumerate((first, not first, pace, not pace)):
            self._counts[place] += came * kept

    def _prompt_token_s(self) -> float:
        """Of a long prompt, all told."""
        work = StepWork(_SAMPLE_TOKENS, 0, 0, _SAMPLE_TOKENS**2 / 2)
        return self.model.calibration.steps.step_s(work) / _SAMPLE_TOKENS

    def _snapshot(self) -> EngineSnapshot:
        """What the controller is told of it."""
        running, parked = min(self.there, self._on_device), self._parked()
        waiting = self.queue + self.backlog / self._prompt
        kv = int(min(self._pool, running * self._request))
        late = self.queue if self._wait_s > self.model.ttft_slo_s else 0.0
        memory = MemorySnapshot(
            self._geometry.chunk_bytes, self._pool, self._pool - kv, kv, 0, 0, 0, 0, 0, 0, 0, 0,
            balloon=int(parked * self._request), balloon_logical=self.limit,
            balloon_physical=int(self.physical),
            balloon_limit=self.limit, balloon_slab=self._slab if self._has_balloon else 0,
        )  # fmt: skip
        first, first_late, pace, pace_late = map(int, self._counts)
        return EngineSnapshot(
            self.model.model_id, self._now, int(waiting), int(running + 0.5), 0, 0, 0, 0, (), 0.0, memory,
            num_parked=int(parked), expected_ttft_s=self._wait_s, first_in_time=first, first_late=first_late,
            paced_in_time=pace, paced_late=pace_late, num_waiting_late=int(late), order=self.order,
        )  # fmt: skip


class FluidLevel:
    """One run."""

    def __init__(self, plan: Plan, sample_s: float) -> None:
        self._plan = plan
        self._sample_s = sample_s
        self.tallies = {model.model_id: Tally() for model in plan.models}
        self.recorder = Recorder(self.tallies)
        self.steering = Steering(plan.policy, plan.host_bytes)
        self.fleet = Fleet(plan, self._make)

    def run(self, asked: Iterator[Asked], told: Callable[[float], None], lasts_s: float) -> Outcome:
        """As `RequestLevel.run`; a tick of the controller is a step."""
        tick_s, sample_s = self._plan.tick_s, self._sample_s
        arrivals = itertools.chain(asked, [None])
        arrival, now = next(arrivals), 0.0
        while now < lasts_s:
            now += tick_s
            came: dict[str, list[Asked]] = {model.model_id: [] for model in self._plan.models}
            while arrival is not None and arrival.at_s < now:
                came[self._plan.models[arrival.model].model_id].append(arrival)
                arrival = next(arrivals)
            self.fleet.settle(now)
            for model_id, requests in came.items():
                self._deal(model_id, requests, now)
            self.steering.tick(self.fleet, now)
            self.fleet.scale(now)
            if now >= sample_s:
                self.recorder.take(self.fleet, now)
                sample_s += self._sample_s
            told(now)
        return Outcome(self.tallies, self.recorder, self.steering, self.fleet, now)

    def _make(self, name: str, model: ModelPlan, node_id: str, now: float) -> SimulatedGroup:
        return FluidGroup(name, model, node_id, now, self._plan, self.tallies[model.model_id])

    def _deal(self, model_id: str, requests: list[Asked], now: float) -> None:
        tally, groups = self.tallies[model_id], self.fleet.of(model_id)
        tally.asked += len(requests)
        hands: dict[str, list[Asked]] = {group.name: [] for group in groups}
        line = [((group.num_open + 1) / _weight(group), at) for at, group in enumerate(groups)]
        heapq.heapify(line)
        for one in requests:
            if not line:
                tally.refuse("no group")
                continue
            cost, at = line[0]
            hands[groups[at].name].append(one)
            heapq.heapreplace(line, (cost + 1 / _weight(groups[at]), at))
        leaving = (group for group in self.fleet.leaving if group.model.model_id == model_id)
        for group in (*groups, *leaving):
            assert isinstance(group, FluidGroup)
            group.step(now, self._plan.tick_s, hands.get(group.name, []))


def _weight(group: SimulatedGroup) -> float:
    return group.weight if isinstance(group, FluidGroup) else 1.0
