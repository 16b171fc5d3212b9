"""How long a step's plan takes from the first rank to another one, and a call that all ranks answer.

The step is a real one: index tensors of so many decodes as `StepInputs` packs them, sent as a run is,
received, unpickled, and copied to where the rank uploads from. Both clocks are the machine's monotonic one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pickle import PickleBuffer
from statistics import median, quantiles
from typing import Any

import torch

from engine.messages import Piece, StepPlan
from engine.model.inputs import StepInputs
from engine.model.runner import Launch, Words
from engine.tp.followers import Followers
from engine.tp.order_loop import OrderLoop
from engine.tp.place import RankPlace
from engine.tp.wire import accept, connect
from kernels.backend import for_device
from tests.bench.machine import machine

_ROUNDS = 2000
_WARM = 200
_PAUSE_S = 0.002  # between two steps: the first rank schedules, the other one has nothing to do


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decodes", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--spin-s", type=float, default=0.05, help="as a rank on a GPU; 0 goes to sleep")
    args = parser.parse_args()
    print(json.dumps({"bench": "rank_wire", **measure(args.decodes, args.ranks, args.spin_s), **machine()}))


def measure(decodes: int, ranks: int, spin_s: float) -> dict[str, Any]:
    """Microseconds from the send to the loaded plan, on the slowest rank, and of a round of answers."""
    places = [RankPlace(rank, ranks, tempfile.mkdtemp()) for rank in range(ranks)]
    places = [RankPlace(place.rank, ranks, places[0].directory) for place in places]
    spawn = multiprocessing.get_context("spawn")
    others = [
        spawn.Process(target=_follow, args=(place, decodes, spin_s), daemon=True) for place in places[1:]
    ]
    for process in others:
        process.start()
    followers = Followers(accept(places[0], ["plan"])["plan"])
    inputs = _inputs(decodes)
    pieces = tuple(Piece(f"r{seat}", seat, seat, 1000 + seat, (seat,), True) for seat in range(decodes))
    layout = inputs.write(StepPlan(1, pieces, decodes))
    one_way, there_and_back = [], []
    for _ in range(_WARM + _ROUNDS):
        _be_busy()
        begun = time.monotonic_ns()
        followers.send("run", Launch(layout).words(), PickleBuffer(inputs.written(layout)), False)
        one_way.append((max(followers.answers()) - begun) / 1e3)
        begun = time.monotonic_ns()
        followers.ask("map")
        there_and_back.append((time.monotonic_ns() - begun) / 1e3)
    followers.close()
    return {
        "decodes": decodes,
        "ranks": ranks,
        "spin_s": spin_s,
        "step_bytes": layout.nbytes,
        "plan_us": _spread(one_way[_WARM:]),
        "answers_us": _spread(there_and_back[_WARM:]),
    }


def _follow(place: RankPlace, decodes: int, spin_s: float) -> None:
    link, inputs = connect(place, "plan"), _inputs(decodes)

    def run(words: Words, written: bytes, is_hooked: bool) -> int:
        inputs.load(Launch.of_words(words).layout, written)
        return time.monotonic_ns()

    OrderLoop(link, {"run": run, "map": lambda: None}, lambda: True, lambda: None, spin_s).serve()


def _inputs(decodes: int) -> StepInputs:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return StepInputs(device, _Slots(), max(512, decodes), decodes, for_device(device))


def _be_busy() -> None:
    until = time.monotonic() + _PAUSE_S
    while time.monotonic() < until:
        pass


class _Slots:
    def first_row(self, slot: int) -> int:
        return 1 + 64 * slot


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": round(median(values), 1), "p99": round(quantiles(values, n=100)[98], 1)}


if __name__ == "__main__":
    main()
