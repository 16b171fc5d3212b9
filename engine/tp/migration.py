"""KV to and from other engines on all ranks of a group: rank i's chunks go to rank i of the other one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.errors import DriverError
from engine.memory.kv_stream import KvStreams, KvTransport, Transfer
from engine.migration import Door
from engine.tp.addresses import AddressMap
from engine.tp.followers import Followers, Kind
from engine.tp.mirrors import MirroredTicket

Refusal = tuple[str, str]  # call and reason of a DriverError


class MirroredTransport:
    """Implements `KvTransport` on all ranks: a transfer has ended when it has on each of them.

    Args:
        own: the first rank's.
        host: address of the node that all ranks are on.
    """

    def __init__(self, own: KvTransport, host: str, followers: Followers) -> None:
        self._own = own
        self._host = host
        self._followers = followers

    def listen(self, addresses: Sequence[int]) -> tuple[tuple[Door, ...], Transfer]:
        ticket = self._followers.new_ticket()
        answers = self._followers.ask("listen", ticket, self._host, _pack(addresses))
        refused = next((DriverError(*one) for one in answers if not isinstance(one, Door)), None)
        try:
            if refused is not None:
                raise refused
            doors, transfer = self._own.listen(addresses)
        except DriverError:
            self._followers.send("cancel transfer", ticket)
            raise
        return (*doors, *answers), _MirroredTransfer(transfer, ticket, self._followers)

    def send(self, doors: Sequence[Door], addresses: Sequence[int]) -> Transfer:
        ticket = self._followers.new_ticket()
        self._followers.send("deliver", ticket, self._host, tuple(doors), _pack(addresses))
        return _MirroredTransfer(self._own.send(doors[:1], addresses), ticket, self._followers)


class _MirroredTransfer(MirroredTicket):
    """Implements `Transfer`."""

    def __init__(self, own: Transfer, number: int, followers: Followers) -> None:
        super().__init__(own, number, followers)
        self._own_transfer = own

    def cancel(self) -> None:
        if not self.is_done:
            self._own_transfer.cancel()
            self._followers.send("cancel transfer", self.number)


class TransferService:
    """The same on a rank that follows.

    Args:
        rank: of this one: whose door is whose.
        addresses: the first rank's, in terms of this one's.
        chunk_bytes: size of a chunk.
        report: tells the first rank how a transfer ended.
    """

    def __init__(
        self, rank: int, addresses: AddressMap, chunk_bytes: int, report: Callable[..., None]
    ) -> None:
        self._rank = rank
        self._addresses = addresses
        self._chunk_bytes = chunk_bytes
        self._report = report
        self._transfers: dict[int, Transfer] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is left to report."""
        return not self._transfers

    @property
    def orders(self) -> dict[str, Callable[..., object]]:
        """By the names that `MirroredTransport` gives them."""
        return {"listen": self.listen, "deliver": self.deliver, "cancel transfer": self.cancel}

    def listen(self, ticket: int, host: str, addresses: bytes) -> Door | Refusal:
        try:
            doors, transfer = self._streams(host).listen(self._addresses.translate(addresses))
        except DriverError as error:
            return error.call, error.reason
        self._transfers[ticket] = transfer
        return doors[0]

    def deliver(self, ticket: int, host: str, doors: Sequence[Door], addresses: bytes) -> None:
        ours = self._addresses.translate(addresses)
        self._transfers[ticket] = self._streams(host).send([doors[self._rank]], ours)

    def cancel(self, ticket: int) -> None:
        if ticket in self._transfers:
            self._transfers[ticket].cancel()

    def report(self) -> None:
        """Tell the first rank what has ended."""
        for ticket in [ticket for ticket, transfer in self._transfers.items() if transfer.is_done]:
            self._report(Kind.COPIED, ticket, _refusal(self._transfers.pop(ticket)))

    def _streams(self, host: str) -> KvStreams:
        return KvStreams(host, self._chunk_bytes)


def _refusal(transfer: Transfer) -> Refusal | None:
    try:
        transfer.wait()
    except DriverError as error:
        return error.call, error.reason
    return None


def _pack(addresses: Sequence[int]) -> bytes:
    return np.array(addresses, np.uint64).tobytes()
