"""A network that can be cut, as a TCP proxy: connections stay open, and nothing comes through."""

from __future__ import annotations

import asyncio
from collections import Counter


class CutProxy:
    """Carries bytes between whoever connects to `address` and a server, until it is cut.

    While it is, bytes are held, also those of new connections, as where packets are dropped and sent again.

    Args:
        target: the server, as ZMQ writes it.

    Attributes:
        address: likewise.
        closed: ends that `client` and `server` have closed, cut or not.
    """

    def __init__(self, target: str) -> None:
        self.address = ""
        self.closed: Counter[str] = Counter()
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = host, int(port)
        self._whole = asyncio.Event()
        self._whole.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, at `address`."""
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """Nothing comes through from now on."""
        self._whole.clear()

    def heal(self) -> None:
        """What was held goes on, and what is new."""
        self._whole.set()

    def close(self) -> None:
        """Stop listening, and drop all connections."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()

    async def _carry(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(*self._target)
        for name, reader, writer in (("client", client, to_server), ("server", server, to_client)):
            task = asyncio.create_task(self._pump(name, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: asyncio.Queue[bytes] = asyncio.Queue()
        forward = asyncio.create_task(self._forward(held, writer))
        try:
            while data := await _read(reader):
                held.put_nowait(data)
            self.closed[name] += 1
            held.put_nowait(b"")
            await forward
        finally:
            forward.cancel()

    async def _forward(self, held: asyncio.Queue[bytes], writer: asyncio.StreamWriter) -> None:
        try:
            while data := await held.get():
                await self._whole.wait()
                writer.write(data)
            await self._whole.wait()  # the end of a connection does not come through a cut either
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(1 << 16)
    except ConnectionError:
        return b""
