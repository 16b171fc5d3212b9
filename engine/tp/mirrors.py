"""The first rank's drivers, whose every call is made on all ranks.

Memory above them is planned once, by the first rank, in its own addresses and handles; each rank translates
them into its own. A call succeeds on all ranks or has no effect on any: what some did and one refused is
undone, so that the books of the first rank are true of all. Where even that is refused the group ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.errors import DriverError, EngineDeadError
from engine.memory.copies import Copies, Direction, Ticket
from engine.memory.slabs import Slab, SlabMaker
from engine.memory.vmm import Move, Moved, Outcome, VirtualMemory
from engine.tp.followers import Followers
from engine.tp.settling import NO_HANDLE, bring, worst
from engine.tp.wire import Link, pack


class MirroredMemory:
    """Implements `VirtualMemory` on all ranks.

    Args:
        own: the first rank's driver.
        followers: the others.
    """

    def __init__(self, own: VirtualMemory, followers: Followers) -> None:
        self._own = own
        self._followers = followers
        self.chunk_bytes = own.chunk_bytes
        self._handle_at: dict[int, int] = {}
        self._moves: dict[int, tuple[int, Sequence[Move]]] = {}

    @property
    def num_calls(self) -> int:
        return self._own.num_calls

    @property
    def num_calls_beside(self) -> int:
        return self._own.num_calls_beside

    def enter(self) -> None:
        self._own.enter()  # a follower serves in the thread that it was made in

    def reserve(self, num_chunks: int) -> int:
        address = self._own.reserve(num_chunks)
        self._followers.send("reserve", address, num_chunks)
        return address

    def create(self, count: int) -> list[int]:
        made = self._own.create(count)
        if not made:
            return made
        least = min(self._followers.ask("create", made), default=len(made))
        if least < len(made):
            self.release(made[least:])
        return made[:least]

    def map(self, addresses: Sequence[int], handles: Sequence[int]) -> None:
        self._followers.send("map", self._pack(addresses), self._pack(handles))
        refusal: DriverError | None = None
        try:
            self._own.map(addresses, handles)
        except DriverError as error:
            refusal = error
        answers = self._followers.answers()
        refused = [index for index, answer in enumerate(answers) if answer is not None]
        if refusal is None and not refused:
            self._handle_at.update(zip(addresses, handles, strict=True))
            return
        done = [index for index in range(len(answers)) if index not in refused]
        self._followers.send_to(done, "unmap", self._pack(addresses), 0)
        undone = self._followers.answers(done)
        if refusal is None:
            refusal = DriverError(*answers[refused[0]])
            undone.append(self._own.unmap(addresses))
        if any(count < len(addresses) for count in undone):
            raise EngineDeadError(f"ranks disagree on what is mapped, after a refusal: {refusal}")
        raise refusal

    def unmap(self, addresses: Sequence[int]) -> int:
        self._followers.send("unmap", self._pack(addresses), self._followers.num_finished)
        counts = [self._own.unmap(addresses), *self._followers.answers()]
        least = int(min(counts))
        if max(counts) > least:
            self._map_again(addresses, counts, least)
        for address in addresses[:least]:
            self._handle_at.pop(address, None)
        return least

    def release(self, handles: Sequence[int]) -> int:
        self._followers.send("release", self._pack(handles))
        counts = {self._own.release(handles), *self._followers.answers()}
        if len(counts) > 1:
            raise EngineDeadError("ranks disagree on which chunks there are, after a refused release")
        done: int = counts.pop()
        return done

    def submit(self, moves: Sequence[Move]) -> int:
        ticket = self._followers.new_ticket()
        columns = (
            [NO_HANDLE if one.handle is None else one.handle for one in moves],
            [one.source or 0 for one in moves],
            [one.target or 0 for one in moves],
        )
        self._followers.send("move", ticket, *map(self._pack, columns), self._followers.num_finished)
        self._moves[ticket] = self._own.submit(moves), moves
        return ticket

    def is_done(self, ticket: int) -> bool:
        if not self._own.is_done(self._moves[ticket][0]):
            return False
        self._followers.listen()
        return self._followers.have_moved(ticket)

    def collect(self, ticket: int) -> list[Moved]:
        own_ticket, moves = self._moves.pop(ticket)
        found = self._own.collect(own_ticket)
        done = [Outcome.DONE] * len(moves)
        ended = [[moved.outcome for moved in found], *(one or done for one in self._followers.moved(ticket))]
        common = [worst(outcomes) for outcomes in zip(*ended, strict=True)]
        handles = self._pack([NO_HANDLE if moved.handle is None else moved.handle for moved in found])
        if all(one == common for one in ended):
            self._followers.send("moved", ticket, handles, None)
        else:
            self._followers.send("moved", ticket, handles, common)
            found = self._settle(moves, found, common)
        for move, moved in zip(moves, found, strict=True):
            if move.source and moved.outcome is not Outcome.STAYED:
                self._handle_at.pop(move.source, None)
            if move.target and moved.handle is not None and moved.outcome is Outcome.DONE:
                self._handle_at[move.target] = moved.handle
        return found

    def view(self, address: int, num_chunks: int) -> torch.Tensor:
        return self._own.view(address, num_chunks)

    def close(self) -> None:
        self._followers.close()
        self._own.close()

    def _settle(
        self, moves: Sequence[Move], found: Sequence[Moved], common: Sequence[Outcome]
    ) -> list[Moved]:
        """Bring the first rank to what the one that got least far has done, as all others are."""
        settled = [
            bring(self._own, move, moved, outcome)
            for move, moved, outcome in zip(moves, found, common, strict=True)
        ]
        if not all(self._followers.answers()) or None in settled:
            raise EngineDeadError("ranks disagree on what is mapped, after a move that one of them refused")
        return [moved for moved in settled if moved is not None]

    def _map_again(self, addresses: Sequence[int], counts: Sequence[int], least: int) -> None:
        """One rank would not unmap a place, and the others have: it stays everywhere."""
        for rank, count in enumerate(counts):
            places = addresses[least:count]
            handles = [self._handle_at[address] for address in places]
            if rank == 0 and places:
                self._own.map(places, handles)
            elif places:
                self._followers.send_to([rank - 1], "map", self._pack(places), self._pack(handles))
                refused = self._followers.answers([rank - 1])[0]
                if refused is not None:
                    raise EngineDeadError(f"ranks disagree on what is mapped: {DriverError(*refused)}")

    @staticmethod
    def _pack(words: Sequence[int]) -> bytes:
        return np.array(words, np.uint64).tobytes()


class MirroredCopies:
    """Implements `Copies` on all ranks: a ticket has ended when it has on each of them."""

    def __init__(self, own: Copies, followers: Followers) -> None:
        self._own = own
        self._followers = followers
        self.chunk_bytes = own.chunk_bytes

    def bytes_moved(self, direction: Direction) -> int:
        return self._own.bytes_moved(direction)

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> Ticket:
        ticket = self._followers.new_ticket()
        packed = [np.array(addresses, np.uint64).tobytes() for addresses in (targets, sources)]
        self._followers.send("copy", ticket, direction, *packed, after_steps)
        return MirroredTicket(
            self._own.submit(direction, targets, sources, after_steps), ticket, self._followers
        )

    def hold_steps(self, ticket: Ticket) -> None:
        if isinstance(ticket, MirroredTicket):
            self._followers.send("hold", ticket.number)
            self._own.hold_steps(ticket.own)

    def keep(self, *owners: object) -> None:
        self._own.keep(*owners)

    def close(self) -> None:
        self._own.close()


class MirroredTicket:
    """What ends on each rank by itself. Implements `Ticket`."""

    def __init__(self, own: Ticket, number: int, followers: Followers) -> None:
        self.own = own
        self.number = number
        self._followers = followers
        self._has_ended = False
        self._error: DriverError | None = None

    @property
    def is_done(self) -> bool:
        if not self._has_ended and self.own.is_done:
            self._followers.listen()
            if self._followers.have_copied(self.number):
                self._end()
        return self._has_ended

    def wait(self) -> None:
        if not self._has_ended:
            self._end()
        if self._error is not None:
            raise self._error

    def _end(self) -> None:
        try:
            self.own.wait()
        except DriverError as error:
            self._error = error
        self._error = self._followers.copied(self.number) or self._error
        self._has_ended = True


class MirroredSlabs:
    """Implements `SlabMaker` on all ranks.

    Args:
        own: makes those of the first rank.
        links: to the others, for the thread that makes slabs alone.
        followers: the same ranks; a slab is given back in the order of what uses it.
    """

    def __init__(self, own: SlabMaker, links: Sequence[Link], followers: Followers) -> None:
        self._own = own
        self._links = links
        self._followers = followers

    def make(self, nbytes: int) -> Slab:
        for link in self._links:
            link.send(pack(("make", nbytes)))
        slab, refusal = None, None
        try:
            slab = self._own.make(nbytes)
        except DriverError as error:
            refusal = error
        for link in self._links:
            refused = link.receive()[0]
            if refused is not None and refusal is None:
                refusal = DriverError(*refused)
        address = slab.address if slab is not None and refusal is None else None
        for link in self._links:
            link.send(pack(("keep", address)))
            link.receive()
        if slab is not None and refusal is None:
            return _MirroredSlab(slab, self._followers)
        if slab is not None:
            slab.free()
        raise refusal or DriverError("a slab", "nobody has made it")


class _MirroredSlab:
    def __init__(self, own: Slab, followers: Followers) -> None:
        self._own = own
        self._followers = followers
        self.address = own.address

    def free(self) -> None:
        if self._followers.close.alive:
            self._followers.send("free", self.address)
        self._own.free()
