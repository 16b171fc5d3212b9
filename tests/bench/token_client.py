"""Reads token streams over HTTP as cheaply as a client can, and prints what it saw as one JSON line.

    python -m tests.bench.token_client URL --streams 128 --requests 128 --tokens 100

Imports nothing heavy: each measurement starts this process anew. A token is a word that begins with `word`,
however many of them come in one event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

_TOKEN = b"word"
_END = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer: seconds to the first token and to the end, tokens, events with tokens."""

    ttft_s: float
    total_s: float
    num_tokens: int
    num_events: int


async def stream(url: str, num_tokens: int) -> Stream:
    """One request on a connection of its own, timed from the moment it is sent."""
    parts = urlsplit(url)
    body = json.dumps({"model": "bench", "prompt": [1], "max_tokens": num_tokens, "stream": True}).encode()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    started, first_s, found, events, text, tail = time.perf_counter(), 0.0, 0, 0, b"", b""
    writer.write(head.encode() + body)
    while data := await reader.read(1 << 18):
        text = tail + data
        # A word may be cut in two: what could be its beginning is looked at with the next piece.
        cut = max(len(text) - len(_END), 0)
        found += text.count(_TOKEN, 0, cut + len(_TOKEN) - 1)
        events += text.count(b"data: {", 0, cut + 6)
        if found and not first_s:
            first_s = time.perf_counter() - started
        tail = text[cut:]
        if tail.find(_END) >= 0 or text.find(_END) >= 0:
            break
    writer.close()
    if found != num_tokens:
        raise RuntimeError(f"{found} of {num_tokens} tokens; the answer ends with {text[-500:]!r}")
    return Stream(first_s, time.perf_counter() - started, found, events)


async def load(url: str, num_streams: int, num_requests: int, num_tokens: int) -> dict[str, object]:
    """So many requests, so many of them at a time."""
    gate = asyncio.Semaphore(num_streams)

    async def one() -> Stream:
        async with gate:
            return await stream(url, num_tokens)

    started = time.perf_counter()
    streams = await asyncio.gather(*(one() for _ in range(num_requests)))
    wall_s = time.perf_counter() - started
    ttft = sorted(one.ttft_s for one in streams)
    return {
        "ttft_p50_ms": ttft[len(ttft) // 2] * 1e3,
        "ttft_p99_ms": ttft[int(len(ttft) * 0.99)] * 1e3,
        "tokens_per_s": num_requests * num_tokens / wall_s,
        "events_per_s": sum(one.num_events for one in streams) / wall_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(load(args.url, args.streams, args.requests, args.tokens))))


if __name__ == "__main__":
    main()
