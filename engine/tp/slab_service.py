"""Slabs of the balloon on a rank that follows, made in a thread of their own: pinning takes seconds."""

from __future__ import annotations

import contextlib
import threading

from engine.errors import DriverError, EngineDeadError
from engine.memory.slabs import Slab, SlabMaker
from engine.tp.addresses import AddressMap
from engine.tp.wire import Link, pack


class SlabService:
    """Makes a slab whenever the first rank makes one.

    Args:
        maker: of this rank.
        link: to the first rank's thread that makes slabs.
        addresses: learns where slabs are.
    """

    def __init__(self, maker: SlabMaker, link: Link, addresses: AddressMap) -> None:
        self._maker = maker
        self._link = link
        self._addresses = addresses
        self._slabs: dict[int, Slab] = {}
        threading.Thread(target=self._serve, name="ballonet-slabs", daemon=True).start()

    def free(self, address: int) -> None:
        """Give back the slab that is at that address on the first rank. Called by the thread that copies."""
        self._addresses.remove(address)
        self._slabs.pop(address).free()

    def _serve(self) -> None:
        with contextlib.suppress(EngineDeadError):  # the first rank is gone, and the main thread hears of it
            while True:
                _, nbytes = self._link.receive()
                slab, refusal = self._make(nbytes)
                self._link.send(pack((refusal,)))
                _, address = self._link.receive()
                if slab is not None and address is not None:
                    self._slabs[address] = slab
                    self._addresses.add(address, nbytes, slab.address)
                elif slab is not None:
                    slab.free()
                self._link.send(pack((None,)))

    def _make(self, nbytes: int) -> tuple[Slab | None, tuple[str, str] | None]:
        try:
            return self._maker.make(nbytes), None
        except DriverError as error:
            return None, (error.call, error.reason)
