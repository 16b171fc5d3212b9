"""Copies of rows between slots and the balloon."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.memory.copies import Copies, Direction, Ticket
from engine.memory.host_rows import HostRow, HostRows
from engine.memory.kv_cache import KvCache


class RowCopies:
    """The link, in terms of rows.

    Args:
        kv: the slots' address ranges.
        host: rows in the balloon.
        copies: the link itself.
    """

    def __init__(self, kv: KvCache, host: HostRows, copies: Copies) -> None:
        self._kv = kv
        self._host = host
        self._copies = copies

    def submit(
        self,
        direction: Direction,
        slot: int,
        numbers: Sequence[int],
        rows: Sequence[HostRow],
        after_steps: bool,
        groups: Iterable[int] | None = None,
    ) -> Ticket:
        """Copy rows of a slot to or from the balloon, group after group, as they lie in address space on the
        device: then neighbours are copied as one.

        Args:
            numbers: of rows, counted from the slot's first.
            rows: in the balloon, one for each of these.
            after_steps: begin when every step that has been launched has finished on the device.
            groups: layer groups; all without it.
        """
        first, device, host = self._kv.first_row(slot), [], []
        for group in range(len(self._kv.tensors)) if groups is None else groups:
            tensor = self._kv.tensors[group]
            device += [tensor.address_of(first + number) for number in numbers]
            host += [self._host.balloon.address_of(row.chunks[group]) for row in rows]
        targets, sources = (host, device) if direction is Direction.OUT else (device, host)
        return self._copies.submit(direction, targets, sources, after_steps)
