"""The first rank's side of a TP group: wraps what an engine is built from, so that all ranks do the same."""

from __future__ import annotations

from engine.memory.copies import Copies
from engine.memory.kv_stream import KvTransport
from engine.memory.pool import MemoryPool
from engine.memory.slabs import SlabMaker
from engine.memory.vmm import VirtualMemory
from engine.model.runner import ModelRunner
from engine.tp.followers import Followers
from engine.tp.group_runner import GroupRunner
from engine.tp.migration import MirroredTransport
from engine.tp.mirrors import MirroredCopies, MirroredMemory, MirroredSlabs
from engine.tp.orders import Ranges
from engine.tp.place import RankPlace
from engine.tp.wire import accept

_LOAD_S = 3600.0  # for weights: a large model over a slow disk


class Leader:
    """The other ranks, from their arrival on.

    Args:
        place: of the first rank.

    Raises:
        EngineDeadError: somebody did not come, or ended.
        BallonetError: why a rank could not start.
    """

    def __init__(self, place: RankPlace) -> None:
        links = accept(place, ("plan", "slabs"))
        self._slab_links = links["slabs"]
        self._followers = Followers(links["plan"])
        self._followers.answers()  # each has read the model's configuration

    def wait_until_ready(self) -> int:
        """The chunks of the rank with the least room, once all have loaded."""
        return min(map(int, self._followers.answers(timeout_s=_LOAD_S)))

    def memory(self, own: VirtualMemory) -> VirtualMemory:
        """The driver of all ranks."""
        return MirroredMemory(own, self._followers)

    def copies(self, own: Copies) -> Copies:
        """The links of all ranks to their host."""
        return MirroredCopies(own, self._followers)

    def slabs(self, own: SlabMaker) -> SlabMaker:
        """Makes host memory for all ranks."""
        return MirroredSlabs(own, self._slab_links, self._followers)

    def transport(self, own: KvTransport, host: str) -> KvTransport:
        """Moves KV of all ranks to other engines and from there."""
        return MirroredTransport(own, host, self._followers)

    def runner(self, own: ModelRunner, pool: MemoryPool) -> GroupRunner:
        """Runs plans on all ranks, which are told here where the pool is."""
        arena, kv = pool.arena.tensor, pool.kv
        self._followers.send(
            "see",
            Ranges(
                (arena.address, arena.num_rows),
                tuple((tensor.address, tensor.num_rows) for tensor in kv.tensors),
                kv.rows_per_slot,
            ),
        )
        return GroupRunner(own, self._followers)

    def free_bytes(self) -> int:
        """What is free on the device with the least."""
        return min(map(int, self._followers.ask("free bytes")))

    def release_unused(self) -> None:
        """Have ranks give back what libraries keep for later."""
        self._followers.send("release unused")
