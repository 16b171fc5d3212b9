"""The load generator: sends a workload to an OpenAI-compatible server and notes when tokens come.

One event loop, one connection a request in flight, bodies encoded before the clock starts: at 9,000
deltas a second the client must cost a fraction of a core, or it measures itself. How late requests were
sent tells whether it kept up.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from cluster.bench.summary import Record

_CONNECT_S = 60.0  # hundreds of connections at once queue in the server's backlog
_TOTAL_S = 6 * 3600.0  # vLLM's; a request that waits an hour is a finding, not a fault
_ERROR_CHARS = 300
_FILES = 65_535


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: of the endpoint itself.
        headers: sent with each request, the key among them.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """A request ready to be sent."""

    arrival_s: float
    prompt_tokens: int
    body: bytes


@dataclass(slots=True)
class Run:
    """What a run left behind.

    Attributes:
        records: of the calls that were sent, in order.
        late_s: how late each was sent; with a limit on concurrency that includes waiting for it.
        interrupted: whether Ctrl-C ended it.
    """

    records: list[Record] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    interrupted: bool = False


def send_all(
    target: Target,
    calls: Sequence[Call],
    max_concurrency: int | None = None,
    on_end: Callable[[Record], None] = lambda record: None,
) -> Run:
    """Send every call at its time and wait for all streams to end. Ctrl-C ends the waiting."""
    _raise_file_limit()
    return asyncio.run(_send_all(target, calls, max_concurrency, on_end))


async def _send_all(
    target: Target,
    calls: Sequence[Call],
    max_concurrency: int | None,
    on_end: Callable[[Record], None],
) -> Run:
    run = Run()
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
    stop = asyncio.Event()
    async with _session() as session:
        origin = time.perf_counter()

        async def one(call: Call) -> None:
            async with gate:
                record = Record(time.perf_counter() - origin, call.prompt_tokens)
                run.records.append(record)
                run.late_s.append(record.start_s - call.arrival_s)
                await _stream(session, target, call.body, record, origin)
                on_end(record)

        with _interrupts_set(stop):
            everything = asyncio.ensure_future(_at_their_times(calls, one, origin))
            interrupt = asyncio.ensure_future(stop.wait())
            await asyncio.wait((everything, interrupt), return_when=asyncio.FIRST_COMPLETED)
        run.interrupted = not everything.done()
        run.duration_s = time.perf_counter() - origin
        for task in (everything, interrupt):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await everything
    return run


async def _at_their_times(calls: Sequence[Call], one: Callable[[Call], Any], origin: float) -> None:
    async with asyncio.TaskGroup() as group:
        for call in calls:
            wait_s = origin + call.arrival_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            group.create_task(one(call))


async def _stream(
    session: aiohttp.ClientSession, target: Target, body: bytes, record: Record, origin: float
) -> None:
    """One request from sending to its end, written into `record` as it goes."""
    try:
        async with session.post(target.url, data=body, headers=target.headers) as response:
            if response.status != 200:
                record.error = await _refusal(response)
                return
            reader = _EventReader(record)
            async for chunk in response.content.iter_any():
                reader.feed(chunk, time.perf_counter() - origin)
            reader.close()
    except (TimeoutError, aiohttp.ClientError, OSError, orjson.JSONDecodeError) as error:
        record.error = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    finally:
        if record.error is not None:
            record.end_s = time.perf_counter() - origin


class _EventReader:
    """Server-sent events of one stream into its record. One `data:` line an event, as OpenAI sends them."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._rest = b""
        self._usage: int | None = None
        self._done = False

    def feed(self, chunk: bytes, now_s: float) -> None:
        """Bytes as they came, at that time."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            self._line(line, now_s)

    def close(self) -> None:
        """The stream has ended: settle the counts, or say what is missing."""
        self._line(self._rest, self._record.end_s)
        record = self._record
        if self._usage is not None:
            record.output_tokens = self._usage
        else:
            record.output_tokens = len(record.delta_times_s)
        if record.error is not None:
            return
        if not self._done:
            record.error = f"the stream broke off after {len(record.delta_times_s)} deltas"
        elif not record.delta_times_s and not record.output_tokens:
            record.error = "the stream ended without a token"
        else:
            # All text may be held back to the end, such as bytes that form no character.
            record.delta_times_s = record.delta_times_s or [record.end_s]
            record.finished = True

    def _line(self, line: bytes, now_s: float) -> None:
        if not line.startswith(b"data:"):
            return  # blank lines between events, comments that keep a connection open
        data = line[5:].strip()
        if data == b"[DONE]":
            self._done = True
        elif data:
            self._event(orjson.loads(data), now_s)

    def _event(self, event: Any, now_s: float) -> None:
        record = self._record
        if not isinstance(event, dict):
            record.error = f"the stream has an event that is no object: {str(event)[:_ERROR_CHARS]}"
            return
        if error := event.get("error"):
            message = error.get("message", error) if isinstance(error, dict) else error
            record.error = f"the stream ended with an error: {str(message)[:_ERROR_CHARS]}"
        if usage := event.get("usage"):
            self._usage = usage.get("completion_tokens", self._usage)
            record.prompt_tokens = usage.get("prompt_tokens") or record.prompt_tokens
        for choice in (event.get("choices") or ())[:1]:
            ends = choice.get("finish_reason") is not None
            if _has_token(choice, ends):
                record.delta_times_s.append(now_s)
                record.end_s = now_s
            if ends:
                self._done = True
                record.end_s = now_s


def _has_token(choice: dict[str, Any], ends: bool) -> bool:
    """Whether an event carries tokens: text, or the middle of a character that shows no text yet."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or not ends
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The status and the server's own words."""
    text = (await response.text(errors="replace")).strip()
    with contextlib.suppress(orjson.JSONDecodeError, AttributeError, TypeError):
        body = orjson.loads(text)
        text = body["error"]["message"] if "error" in body else text
    return f"HTTP {response.status} {response.reason}: {text[:_ERROR_CHARS]}"


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, limit_per_host=0),
        timeout=aiohttp.ClientTimeout(total=_TOTAL_S, sock_connect=_CONNECT_S),
        read_bufsize=2**20,
    )


@contextlib.contextmanager
def _interrupts_set(stop: asyncio.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`; the next one is the usual one."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    with contextlib.suppress(ValueError, RuntimeError):  # only the main thread hears signals
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)


def _raise_file_limit() -> None:
    """Each open stream is a file; 1,024 is the usual soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
