"""How the controller divides a device among the groups on it: the same promises as for host memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.memory_shares import Claim, divide, fair_shares
from cluster.policy import Decision, PolicyConfig, State, decide, recovered
from cluster.reports import GroupReport
from engine.control import HostSnapshot
from engine.messages import EngineSnapshot
from tests.unit.samples import MEMORY, snapshot

MIB, OWN = 1 << 20, 500
CONFIG = PolicyConfig()
HOST = HostSnapshot("node", 1 << 40, 1 << 40)
SHARES = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 2000), st.integers(1, 5)), min_size=1, max_size=8
).map(
    lambda rows: [
        Claim(f"g{at}", 0, 0, want, 1, least=least, weight=weight)
        for at, (least, want, weight) in enumerate(rows)
    ]
)


@settings(deadline=None)
@given(SHARES, st.integers(0, 3000))
def test_shares_keep_to_the_budget_and_to_what_nobody_can_do_without(
    claims: list[Claim], budget: int
) -> None:
    shares = fair_shares(claims, budget, 0)
    assert sum(shares.values()) <= budget
    if sum(claim.least for claim in claims) <= budget:
        assert all(shares[claim.group_id] >= claim.least for claim in claims)
    poorer = [claim for claim in claims if shares[claim.group_id] < claim.want]
    for claim in poorer:  # nobody has more, but for rounding, whom its least did not entitle to it
        for other in claims:
            if shares[other.group_id] > other.least:
                assert shares[claim.group_id] >= shares[other.group_id] - len(claims)


def test_what_nobody_wants_is_divided_by_weight() -> None:
    claims = [Claim("x", 0, 0, 100, 1, weight=3), Claim("y", 0, 0, 100, 1, weight=1)]
    assert fair_shares(claims, 1000, 0) == {"x": 700, "y": 300}


def test_whoever_cannot_start_without_gets_it_at_once_however_little_it_is() -> None:
    claims = [Claim("x", 10, 10, 15, 1, may_grow=False, least=15), Claim("y", 990, 990, 5000, 1)]
    assert divide(claims, 1000, 0, 100) == {"x": 10, "y": 985}
    claims = [claims[0], replace(claims[1], current=985, physical=985)]
    assert divide(claims, 1000, 0, 100) == {"x": 15, "y": 985}


class Device:
    """Groups on one GPU. What a group holds follows its limit down as slowly as `settle` tells."""

    def __init__(self, *names: str, gpu: str = "GPU-0", config: PolicyConfig = CONFIG) -> None:
        self.config = config
        self.now = 0.0
        self.state: State | None = None
        self.reports: dict[str, GroupReport] = {}
        self.actions: list[tuple[float, str, str]] = []
        self.unheard: dict[str, EngineSnapshot] = {}
        for name in names:
            self.add(name, gpu)

    def add(self, name: str, gpu: str = "GPU-0", own: int = OWN, **facts: object) -> None:
        memory = replace(
            MEMORY, total=own, kv=0, created=20, limit=own, configured=own, floor=20, balloon=0,
            balloon_cached=0, balloon_limit=0, balloon_physical=0, balloon_slab=0,
        )  # fmt: skip
        quiet = {"num_running": 0, "num_waiting": 0, "num_parked": 0} | facts
        now = replace(snapshot(name), memory=memory, host=HOST, shared_device=gpu, **quiet)  # type: ignore[arg-type]
        self.reports[name] = GroupReport(name, name, 1, 2.0, now)

    def now_of(self, name: str) -> EngineSnapshot:
        found = self.reports[name].snapshot
        assert found is not None
        return found

    def load(self, name: str, running: int, waiting: int, kv: int, floor: int = 20) -> None:
        now = self.now_of(name)
        memory = replace(now.memory, kv=kv, floor=floor)
        now = replace(now, num_running=running, num_waiting=waiting, memory=memory)
        self.reports[name] = replace(self.reports[name], snapshot=now)

    def tick(self, is_heard: bool = True, settle: int = 10_000) -> Decision:
        """A second. Orders reach the engines, or get lost; `settle`: chunks that each gives back at most."""
        self.now += 1.0
        reports = list(self.reports.values())
        state = self.state or recovered(reports, self.config, self.now)
        decision, self.state = decide(reports, state, self.config, self.now)
        for one in decision.instructions if is_heard else ():
            now = self.now_of(one.group_id)
            limit = now.memory.configured if one.order.pool_bytes is None else one.order.pool_bytes // MIB
            now = replace(now, order=one.order, memory=replace(now.memory, limit=limit))
            self.reports[one.group_id] = replace(
                self.reports[one.group_id], snapshot=now, wanted_replicas=one.wanted_replicas
            )
        for name in self.reports:
            now = self.now_of(name)
            held, limit = now.memory.created, now.memory.limit
            held = max(limit, held - settle) if held > limit else limit  # it uses all that it may
            memory = replace(now.memory, created=held, total=max(limit, held))
            self.reports[name] = replace(self.reports[name], snapshot=replace(now, memory=memory))
        self.actions += [(self.now, one.subject, one.action) for one in decision.actions]
        return decision

    @property
    def limits(self) -> Mapping[str, int]:
        return {name: self.now_of(name).memory.limit for name in self.reports}

    @property
    def held(self) -> int:
        return sum(self.now_of(name).memory.created for name in self.reports)


def test_memory_goes_to_who_needs_it_and_comes_back() -> None:
    device = Device("x", "y")
    device.load("x", 40, 40, 450)
    for _ in range(6):
        device.tick()
    assert device.limits["x"] > 1.8 * OWN
    assert 20 <= device.limits["y"] < 0.2 * OWN
    device.load("x", 0, 0, 0)
    device.load("y", 4, 40, 40)
    for _ in range(8):
        device.tick()
    assert device.limits["y"] > OWN
    device.load("y", 0, 0, 0)
    for _ in range(60):
        device.tick()
    assert all(abs(limit - OWN) <= 0.25 * OWN for limit in device.limits.values())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 60), st.integers(0, 60), st.booleans(), st.integers(0, 200), st.integers(20, 500)
        ),
        max_size=40,
    )
)
def test_nobody_is_promised_what_others_may_still_hold(loads: list[tuple[int, int, bool, int, int]]) -> None:
    """Orders get lost, and memory comes back slowly: the device is never over-committed."""
    device = Device("x", "y")
    for x, y, is_heard, settle, floor in loads:
        device.load("x", min(x, 8), x, min(8 * x, 400), floor)
        device.load("y", min(y, 8), y, min(8 * y, 400))
        device.tick(is_heard, settle)
        assert device.held <= 2 * OWN
        newest = device.state.orders if device.state else {}
        assert sum(order.pool_bytes or 0 for order in newest.values()) <= 2 * OWN * MIB


def test_a_lever_does_not_go_back_within_its_dwell_time_unless_somebody_cannot_start() -> None:
    device = Device("x", "y")
    for second in range(60):
        busy, idle = ("x", "y") if second % 2 else ("y", "x")
        device.load(busy, 8, 60, 200)
        device.load(idle, 0, 0, 0)
        device.tick()
    newest: dict[str, tuple[str, float]] = {}
    for now, group, action in device.actions:
        if action.startswith("pool"):
            before = newest.get(group)
            assert before is None or before[0] == action or now - before[1] >= CONFIG.device_dwell_s
            newest[group] = action, now


def test_a_group_whose_request_does_not_fit_gets_room_for_it_whoever_is_busy() -> None:
    device = Device("x", "y")
    device.load("x", 60, 600, 480)
    for _ in range(6):
        device.tick()
    device.load("y", 0, 1, 0, floor=480)
    for _ in range(3):
        device.tick()
    assert device.limits["y"] >= 480


def test_a_group_that_has_its_device_alone_has_no_limit() -> None:
    device = Device("x", gpu="GPU-0")
    device.add("y", gpu="GPU-1")
    device.add("z", gpu="")
    device.load("x", 40, 40, 450)
    orders = [one.order.pool_bytes for _ in range(5) for one in device.tick().instructions]
    assert orders
    assert set(orders) == {None}


def test_the_same_gpu_of_another_node_is_another() -> None:
    device = Device("x", "y")
    now = device.now_of("y")
    elsewhere = replace(now, host=HostSnapshot("other", 1 << 40, 1 << 40))
    device.reports["y"] = replace(device.reports["y"], snapshot=elsewhere)
    assert {one.order.pool_bytes for one in device.tick().instructions} == {None}


def test_what_was_lent_is_taken_back_from_the_one_who_is_left_for_the_others_successor() -> None:
    device = Device("x", "y")
    device.load("x", 40, 40, 450)
    for _ in range(6):
        device.tick()
    assert device.limits["x"] > 1.8 * OWN
    del device.reports["y"]
    for _ in range(int(CONFIG.forget_s) + 3):
        device.tick()
    assert device.limits == {"x": OWN}
    device.add("y2")
    device.load("x", 0, 0, 0)
    for _ in range(3):
        device.tick()
    assert sum(device.limits.values()) <= 2 * OWN


def test_unequal_parts_are_come_back_to() -> None:
    device = Device("x")
    device.add("y", own=200)
    device.load("y", 30, 30, 190)
    for _ in range(8):
        device.tick()
    assert device.limits["y"] > 400
    device.load("y", 0, 0, 0)
    for _ in range(60):
        device.tick()
    assert device.limits["x"] > 400 > 300 > device.limits["y"]


def test_late_first_tokens_in_a_full_pool_ask_for_more_than_was_reckoned() -> None:
    """Requests that grow longer than those before: by their mean size all would fit."""
    calm, late = Device("x", "y"), Device("x", "y")
    for device in (calm, late):
        device.load("x", 10, 0, 450)
    now = late.now_of("x")
    late.reports["x"] = replace(late.reports["x"], snapshot=replace(now, num_waiting_late=1))
    for _ in range(4):
        calm.tick()
        late.tick()
    assert late.limits["x"] > calm.limits["x"]


def test_a_restart_keeps_limits() -> None:
    device = Device("x", "y")
    device.load("x", 40, 40, 450)
    for _ in range(6):
        device.tick()
    limits = dict(device.limits)
    device.state = None
    decision = device.tick()
    assert {one.order.epoch for one in decision.instructions} == {2}
    assert device.limits == limits
