"""A sum over the ranks with the residual's addition and the norm after it: through one another's memory, and
by NCCL with our norm kernel behind it. Both in CUDA graphs, as in a step; microseconds of one sum.

The floor is the link's: a rank gets the parts of all others at 450 GB/s.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.model.graphs import cuda_graph_recorder
from engine.model.rank_group import RankGroup
from engine.model.sums import Collective, OneRank, Place, Summing, Sums
from kernels.backend import for_device
from tests.bench.machine import machine

_WIDTH = 4096
_EPS = 1e-5
_SUMS = 64  # of a step of Llama-3.1-8B
_ROUNDS = 20
_LINK_BYTES_PER_S = 450e9  # NVLink 4, one direction


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 2048, 4096])
    parser.add_argument("--hide", action="store_true", help="each process sees its own GPU alone")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_be_a_rank, args=(rank, args, Path(folder) / "store", theirs))
            for rank in range(args.ranks)
        ]
        for process in processes:
            process.start()
        found = ours.recv()
        for process in processes:
            process.join()
    print(json.dumps({"bench": "rank_sums", "ranks": args.ranks, "rows": found, **machine()}))


def _be_a_rank(rank: int, args: argparse.Namespace, store: Path, answer: Any) -> None:
    if args.hide:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    device = torch.device("cuda", 0 if args.hide else rank)
    torch.cuda.set_device(device)
    found = measure(RankGroup(rank, args.ranks, store, device), device, args.rows)
    if rank == 0:
        answer.send(found)
    torch.cuda.synchronize()
    os._exit(0)


@torch.inference_mode()
def measure(ranks: RankGroup, device: torch.device, rows: list[int]) -> dict[int, dict[str, Any]]:
    """By number of rows; every rank measures, at the same time."""
    from engine.model.peers import find_peers

    kernels = for_device(device)
    peers = find_peers(ranks, device, Place, max(rows), _WIDTH, torch.bfloat16)
    found = {}
    for count in rows:
        summing = Summing(kernels, _EPS, ranks, peers)
        ways: dict[str, Sums] = {
            "norm alone": OneRank(kernels, _EPS),
            "nccl": Collective(kernels, _EPS, ranks),
        }
        if peers is not None and count <= peers.max_tokens:
            ways["peers"] = summing.of(count)
        results = {name: _time(way, ranks, device, count) for name, way in ways.items()}
        line: dict[str, Any] = {name: us for name, (us, _) in results.items()}
        if "peers" in results:
            line["differs by"] = (results["peers"][1] - results["nccl"][1]).abs().max().item()
        nbytes = count * _WIDTH * 2
        line["floor"] = round(nbytes * (ranks.size - 1) / _LINK_BYTES_PER_S * 1e6, 2)
        found[count] = line
    return found


def _time(way: Sums, ranks: RankGroup, device: torch.device, rows: int) -> tuple[float, torch.Tensor]:
    """Microseconds of a sum, and the residual after one."""
    torch.manual_seed(ranks.rank)
    given = torch.randn(rows, _WIDTH, device=device, dtype=torch.bfloat16)
    hidden, residual = torch.zeros_like(given), torch.zeros_like(given)
    norm = torch.ones(_WIDTH, device=device, dtype=torch.bfloat16)

    def step() -> None:
        for number in range(_SUMS):
            way.add(Place(1 + number % 2), hidden, residual, norm)

    hidden.copy_(given)
    way.add(Place.ATTENTION, hidden, residual, norm)
    after = residual.clone()
    replay = cuda_graph_recorder(device)(step)
    times = []
    for _ in range(_ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        ranks.sum(torch.zeros(1, device=device))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / _SUMS)
    return round(median(times), 2), after


if __name__ == "__main__":
    main()
