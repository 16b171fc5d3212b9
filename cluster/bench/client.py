"""The load generator: sends a workload to an OpenAI-compatible server and notes when tokens come.

One event loop, one connection a request in flight, bodies encoded before the clock starts: at 9,000
deltas a second the client must cost a fraction of a core, or it measures itself. How late requests were
sent tells whether it kept up.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import signal
import time
import urllib.parse
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from cluster.bench.events import ERROR_CHARS, EventReader
from cluster.bench.summary import Record
from cluster.bench.workload import BenchError

_CONNECT_S = 60.0  # hundreds of connections at once queue in the server's backlog
_TOTAL_S = 6 * 3600.0  # vLLM's; a request that waits an hour is a finding, not a fault
_FILES = 65_535


NextBody = Callable[[bytes, Record], bytes]


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
    """A request ready to be sent, or one that an earlier answer makes ready.

    Attributes:
        body: encoded; empty where `follows` is set.
        follows: place of the call whose answer it waits for; that call comes first.
        think_s: seconds from the end of that answer until this one is sent.
        next_body: makes its body from that call's body and record; raises BenchError if the record has
            not what it takes.
    """

    arrival_s: float
    prompt_tokens: int
    body: bytes = b""
    follows: int | None = None
    think_s: float = 0.0
    next_body: NextBody | None = None


@dataclass(slots=True)
class Run:
    """What a run left behind.

    Attributes:
        records: of the calls that were sent, in order; and of those that will not be, because the turn
            before them failed.
        places: of those calls among all.
        late_s: how late each was sent; with a limit on concurrency that includes waiting for it.
        interrupted: whether Ctrl-C ended it.
    """

    records: list[Record] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    duration_s: float = 0.0
    interrupted: bool = False

    def begin(self, place: int, call: Call, now_s: float, due_s: float) -> Record:
        """The record of a call that is sent, or given up, now."""
        record = Record(now_s, call.prompt_tokens)
        self.records.append(record)
        self.places.append(place)
        self.late_s.append(now_s - due_s)
        return record


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
        proxy = _proxy(target.url)
        post = functools.partial(session.post, target.url, headers=target.headers, proxy=proxy)
        origin = time.perf_counter()

        async def send(place: int, body: bytes, due_s: float) -> Record:
            async with gate:
                record = run.begin(place, calls[place], time.perf_counter() - origin, due_s)
                await _stream(post, body, record, origin)
                on_end(record)
                return record

        with _interrupts_set(stop):
            sessions = _Sessions(calls, send, run, on_end, origin)
            everything = asyncio.ensure_future(sessions.at_their_times())
            interrupt = asyncio.ensure_future(stop.wait())
            await asyncio.wait((everything, interrupt), return_when=asyncio.FIRST_COMPLETED)
        run.interrupted = not everything.done()
        run.duration_s = time.perf_counter() - origin
        for task in (everything, interrupt):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await everything
    return run


class _Sessions:
    """Sends each call when its time has come, and those that follow one when its answer has ended.

    Args:
        send: (place, body, when it was due) -> its record, at the end of its answer.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        send: Callable[[int, bytes, float], Awaitable[Record]],
        run: Run,
        on_end: Callable[[Record], None],
        origin: float,
    ) -> None:
        self._calls, self._send, self._run, self._on_end, self._origin = calls, send, run, on_end, origin
        self._followers: dict[int, list[int]] = {}
        for place, call in enumerate(calls):
            if call.follows is not None:
                self._followers.setdefault(call.follows, []).append(place)

    async def at_their_times(self) -> None:
        """To the end of the last answer."""
        async with asyncio.TaskGroup() as group:
            for place, call in enumerate(self._calls):
                if call.follows is None:
                    await self._sleep_until(call.arrival_s)
                    group.create_task(self._turn(place, call.body, call.arrival_s))

    async def _turn(self, place: int, body: bytes, due_s: float) -> None:
        record = await self._send(place, body, due_s)
        later = self._followers.get(place, ())
        await asyncio.gather(*(self._next_turn(follower, body, record) for follower in later))

    async def _next_turn(self, place: int, body: bytes, earlier: Record) -> None:
        call = self._calls[place]
        due_s = earlier.end_s + call.think_s
        try:
            if earlier.error is not None:
                raise BenchError(earlier.error)
            body = call.next_body(body, earlier) if call.next_body else call.body
        except BenchError as error:
            self._give_up(place, f"not sent, for the turn before it failed: {error}")
            return
        await self._sleep_until(due_s)
        await self._turn(place, body, due_s)

    def _give_up(self, place: int, error: str) -> None:
        """A turn that cannot be sent has failed, and all behind it."""
        now_s = time.perf_counter() - self._origin
        record = self._run.begin(place, self._calls[place], now_s, now_s)
        record.error, record.end_s = error, now_s
        self._on_end(record)
        for follower in self._followers.get(place, ()):
            self._give_up(follower, error)

    async def _sleep_until(self, due_s: float) -> None:
        wait_s = self._origin + due_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)


async def _stream(post: Callable[..., Any], body: bytes, record: Record, origin: float) -> None:
    """One request from sending to its end, written into `record` as it goes."""
    try:
        async with post(data=body) as response:
            if response.status != 200:
                record.error = await _refusal(response)
                return
            reader = EventReader(record, response.content_type)
            async for chunk in response.content.iter_any():
                reader.feed(chunk, time.perf_counter() - origin)
            reader.close()
    except (TimeoutError, aiohttp.ClientError, OSError, orjson.JSONDecodeError) as error:
        record.error = _named(error)
    except Exception as error:
        # Servers send what no list foresees; one odd answer must not take the others' figures along.
        record.error = f"the answer cannot be read: {_named(error)}"
    finally:
        if record.error is not None:
            record.end_s = time.perf_counter() - origin


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def _refusal(response: aiohttp.ClientResponse) -> str:
    """The status and the server's own words: its message if it has one, else all of its text."""
    text = (await response.text(errors="replace")).strip()
    with contextlib.suppress(orjson.JSONDecodeError):
        body = orjson.loads(text)
        error = body.get("error") if isinstance(body, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        text = message if isinstance(message, str) else text
    return f"HTTP {response.status} {response.reason}: {text[:ERROR_CHARS]}"


def _proxy(url: str) -> str | None:
    """The environment's proxy for it, as for every other request of the command.

    Looked up once: aiohttp's own `trust_env` asks a thread for it, and another for a password, before each
    request, and so delays what is measured.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(parts.scheme) or proxies.get("all")


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
