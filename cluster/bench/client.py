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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from cluster.bench.events import ERROR_CHARS, EventReader
from cluster.bench.summary import Record

_CONNECT_S = 60.0  # hundreds of connections at once queue in the server's backlog
_TOTAL_S = 6 * 3600.0  # vLLM's; a request that waits an hour is a finding, not a fault
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
        proxy = _proxy(target.url)
        post = functools.partial(session.post, target.url, headers=target.headers, proxy=proxy)
        origin = time.perf_counter()

        async def one(call: Call) -> None:
            async with gate:
                record = Record(time.perf_counter() - origin, call.prompt_tokens)
                run.records.append(record)
                run.late_s.append(record.start_s - call.arrival_s)
                await _stream(post, call.body, record, origin)
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
