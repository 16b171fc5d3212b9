"""What driver calls cost: from Python, in C, and by the thread beside a busy interpreter.

Each figure is taken from C and from Python in turn, medians of the rounds. `beside` is the time from handing
64 moves over until the thread that goes on computing in pure Python sees that they are done: by the mapping
thread, and by a Python thread that makes the same calls. Its ceiling is what these calls take by themselves.
On a GPU also how long kernels and graphs take to launch while the thread maps. The last line is JSON.

    python -m tests.bench.mapping --device cpu
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.memory.driver import ChunkDriver
from engine.memory.vmm import Move
from tests.bench.machine import machine

CHUNKS = 512
MOVES = 64
SMALL = 4  # chunks of a batch that a step waits for
ROUNDS = 9
SLICE = range(300)  # of pure Python work between two looks: some 10 µs
LAUNCHES = 4000

Figures = dict[str, float]


def make_driver(device: str, use_native: bool) -> ChunkDriver:
    """The device's driver, over chunks of the size that engines use."""
    if device == "cpu":
        from engine.memory.host_vmm import HostVirtualMemory

        return HostVirtualMemory(512 << 10, CHUNKS, use_native)
    from engine.memory.cuda_vmm import CudaVirtualMemory

    return CudaVirtualMemory(torch.device("cuda", 0), 2 << 20, 0, use_native)


def timed_us(work: Callable[[], object], count: int) -> float:
    """Microseconds of one of `count` things."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e6 / count


class Bench:
    """One driver, its chunks, and two places for each of them."""

    def __init__(self, device: str, use_native: bool) -> None:
        self.device = device
        self.vm = make_driver(device, use_native)
        self.is_native = use_native
        size = self.vm.chunk_bytes
        base = self.vm.reserve(2 * CHUNKS)  # type: ignore[attr-defined]
        self.here = [base + index * size for index in range(CHUNKS)]
        self.there = [base + (CHUNKS + index) * size for index in range(CHUNKS)]

    def calls_us(self) -> Figures:
        """Each call on every chunk, in one batch."""
        handles: list[int] = []
        vm = self.vm
        return {
            "create": timed_us(lambda: handles.extend(vm.create(CHUNKS)), CHUNKS),
            "map": timed_us(lambda: vm.map(self.here, handles), CHUNKS),
            "unmap": timed_us(lambda: vm.unmap(self.here), CHUNKS),
            "release": timed_us(lambda: vm.release(handles), CHUNKS),
        }

    def moves_us(self) -> float:
        """Microseconds a move, by itself: the calls, and nobody beside them."""
        handles = self.vm.create(MOVES)
        self.vm.map(self.here[:MOVES], handles)
        moves = self.moves(handles)
        taken = timed_us(lambda: self.vm.collect(self.vm.submit(moves)), MOVES)
        self.clear(self.there[:MOVES], handles)
        return taken

    def moves(self, handles: Sequence[int]) -> list[Move]:
        """Each chunk from one of its places to the other."""
        return [Move(*move) for move in zip(handles, self.here, self.there, strict=False)]

    def clear(self, places: Sequence[int], handles: Sequence[int]) -> None:
        assert self.vm.unmap(places) == len(places)
        assert self.vm.release(handles) == len(handles)

    def beside_ms(self) -> tuple[float, float]:
        """Milliseconds until the busy thread sees its moves done, and its own loss of speed, 1 for none."""
        handles = self.vm.create(MOVES)
        self.vm.map(self.here[:MOVES], handles)
        alone = slices_per_s(until=time.perf_counter() + 0.05)
        hand_over = self.hand_over if self.is_native else self.hand_to_python_thread
        started = time.perf_counter()
        is_done = hand_over(self.moves(handles))
        count = 0
        while not is_done():
            sum(SLICE)
            count += 1
        taken = time.perf_counter() - started
        self.clear(self.there[:MOVES], handles)
        return taken * 1e3, count / taken / alone

    def hand_over(self, moves: Sequence[Move]) -> Callable[[], bool]:
        """To the mapping thread."""
        ticket = self.vm.submit(moves)

        def is_done() -> bool:
            done = self.vm.is_done(ticket)
            if done:
                self.vm.collect(ticket)
            return done

        return is_done

    def hand_to_python_thread(self, moves: Sequence[Move]) -> Callable[[], bool]:
        """To a Python thread that waits for work, and maps a chunk at a time."""
        ended = threading.Event()
        work: queue.SimpleQueue[Move] = queue.SimpleQueue()

        def serve() -> None:
            if self.device == "cuda":
                torch.zeros(1, device="cuda")  # makes the context current in this thread
            for _ in moves:
                self.vm.collect(self.vm.submit([work.get()]))
            ended.set()

        threading.Thread(target=serve).start()
        for move in moves:
            work.put(move)
        return ended.is_set

    def small_us(self) -> float:
        """Microseconds until a small batch has been mapped at once, while another Python thread is busy."""
        handles = self.vm.create(SMALL)
        stop = threading.Event()
        busy = threading.Thread(target=slices_per_s, kwargs={"stop": stop})
        busy.start()
        taken = []
        for _ in range(20):
            taken.append(timed_us(lambda: self.vm.map(self.here[:SMALL], handles), 1))
            self.vm.unmap(self.here[:SMALL])
        stop.set()
        busy.join()
        self.vm.release(handles)
        return statistics.mean(taken)


def slices_per_s(until: float = float("inf"), stop: threading.Event | None = None) -> float:
    """How fast pure Python runs, until a time or an event."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() < until and not (stop and stop.is_set()):
        sum(SLICE)
        count += 1
    return count / (time.perf_counter() - started)


def launch_us(bench: Bench, maps: bool) -> Figures:
    """Microseconds to launch a small kernel, and a graph of 32 of them, while the thread maps or idles."""
    x = torch.zeros(1024, device="cuda")
    x.add_(1)  # loaded before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(32):
            x.add_(1)
    handles = bench.vm.create(CHUNKS)
    bench.vm.map(bench.here, handles)
    figures: Figures = {}
    for name, launch in (("kernel", lambda: x.add_(1)), ("graph", graph.replay)):
        ticket, taken = None, []
        for index in range(LAUNCHES):
            if maps and (ticket is None or bench.vm.is_done(ticket)):
                if ticket is not None:
                    bench.vm.collect(ticket)
                    bench.here, bench.there = bench.there, bench.here
                ticket = bench.vm.submit(bench.moves(handles))
            taken.append(timed_us(launch, 1))
            if index % 100 == 99:
                torch.cuda.synchronize()  # the queue of launches stays short
        if ticket is not None:
            bench.vm.collect(ticket)
            bench.here, bench.there = bench.there, bench.here
        cuts = statistics.quantiles(taken, n=100)
        figures |= {f"{name}_p50": cuts[49], f"{name}_p99": cuts[98], f"{name}_max": max(taken)}
    bench.clear(bench.here, handles)
    return figures


def medians(rounds: Sequence[Figures]) -> Figures:
    """The median of each figure, to a thousandth."""
    return {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}


def one_round(bench: Bench) -> Figures:
    """Every figure that both ways have."""
    beside_ms, speed = bench.beside_ms()
    return bench.calls_us() | {
        "move": bench.moves_us(),
        "small": bench.small_us(),
        "beside_ms": beside_ms,
        "interpreter": speed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    benches = {"C": Bench(device, True), "Python": Bench(device, False)}
    rounds: dict[str, list[Figures]] = {name: [] for name in benches}
    for index in range(ROUNDS + 1):
        for name, bench in benches.items():
            figures = one_round(bench)
            if index:  # the first round warms up
                rounds[name].append(figures)
    result: dict[str, Any] = {name: medians(figures) for name, figures in rounds.items()}
    print(f"{'microseconds a chunk':44s}{'C':>12s}{'Python':>12s}")
    for name, label in (
        ("create", "create"),
        ("map", "map, with access"),
        ("unmap", "unmap"),
        ("release", "release"),
        ("move", f"move, {MOVES} submitted and waited for"),
        ("small", f"{SMALL} maps at once beside a busy thread, in all"),
        ("beside_ms", f"{MOVES} moves beside a busy thread, ms in all"),
        ("interpreter", "speed of that thread, of what it has alone"),
    ):
        print(f"{label:44s}{result['C'][name]:12.2f}{result['Python'][name]:12.2f}")
    if device == "cuda":
        launches = {
            name: medians([launch_us(benches["C"], maps)]) for name, maps in (("idle", False), ("maps", True))
        }
        for name, figures in launches.items():
            print(f"launches while the thread {name}, us: {figures}")
        result["launch_us"] = launches
    floor_ms = result["C"]["move"] * MOVES / 1e3
    line = {
        "bench": "mapping",
        "device": device,
        "figure": {name: result[name] for name in result if name != "Python"},
        "ceiling": {"what": f"{MOVES} moves by themselves", "beside_ms": floor_ms},
        "share": floor_ms / result["C"]["beside_ms"],
        "rival": {"name": "Python threads", **result["Python"]},
    }
    print(json.dumps({**line, **machine()}))
    for bench in benches.values():
        bench.vm.close()


if __name__ == "__main__":
    main()
