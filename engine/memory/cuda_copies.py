"""Copies between a CUDA device and pinned host memory, on streams of their own beside the steps'.

Only streams, events and tickets are here; the driver is called by `cuda_vmm.issue_copies`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from engine.errors import DriverError
from engine.memory import native
from engine.memory.copies import Direction, Ticket, merge
from engine.memory.cuda_vmm import issue_copies


class CudaCopies:
    """Implements `Copies`: a stream for each direction, which the device's two copy engines serve at once.

    A stream holds about a thousand pieces; a submit that goes beyond waits for the first of them, so it is
    better to submit no more than some hundred chunks behind a step.

    Args:
        device: the CUDA device, with its context current in the thread that submits.
        chunk_bytes: size of a chunk.
        use_native: issue the copies of a submit in one call, if the helper can be built.
    """

    def __init__(self, device: torch.device, chunk_bytes: int, use_native: bool = True) -> None:
        self.chunk_bytes = chunk_bytes
        self._device = device
        self._library = native.load() if use_native else None
        self._streams = {way: torch.cuda.Stream(device) for way in Direction}  # type: ignore[no-untyped-call]
        self._bytes = dict.fromkeys(Direction, 0)

    def bytes_moved(self, direction: Direction) -> int:
        return self._bytes[direction]

    def submit(
        self, direction: Direction, targets: Sequence[int], sources: Sequence[int], after_steps: bool
    ) -> Ticket:
        stream = self._streams[direction]
        if after_steps:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        error: DriverError | None = None
        try:
            pieces = list(merge(targets, sources, self.chunk_bytes))
            issue_copies(direction, pieces, stream.cuda_stream, self._library)
        except DriverError as refused:
            error = refused
        self._bytes[direction] += len(targets) * self.chunk_bytes
        return _CudaTicket(stream.record_event(), error)

    def hold_steps(self, ticket: Ticket) -> None:
        if isinstance(ticket, _CudaTicket):
            torch.cuda.current_stream(self._device).wait_event(ticket.event)

    def keep(self, *owners: object) -> None:
        # Called by whichever thread the collector runs in: it waits for the device, and for no thread.
        weakref.finalize(self, _drain, list(self._streams.values()), owners).atexit = False

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


def _drain(streams: list[torch.cuda.Stream], owners: tuple[object, ...]) -> None:
    """Wait for what is under way; `owners` live until then."""
    for stream in streams:
        stream.synchronize()


class _CudaTicket:
    """Done with its event, refused or not: the copies before the refused one are under way until then."""

    def __init__(self, event: torch.cuda.Event, error: DriverError | None) -> None:
        self.event = event
        self._error = error

    @property
    def is_done(self) -> bool:
        try:
            return bool(self.event.query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:  # the context is dead, and this is how one hears of it
            self._error = DriverError("cudaEventQuery", str(error))
            return True

    def wait(self) -> None:
        try:
            self.event.synchronize()
        except RuntimeError as error:
            self._error = DriverError("cudaEventSynchronize", str(error))
        if self._error is not None:
            raise self._error
