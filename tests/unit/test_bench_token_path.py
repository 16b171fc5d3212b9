"""What the token client counts, however its bytes are cut; and the engine whose tokens are arithmetic."""

from __future__ import annotations

import asyncio

import pytest

from cluster.token_inbox import TokenInbox
from engine.config import EngineConfig, ModelSource
from engine.messages import GenerateRequest, SamplingParams
from tests.bench import token_client
from tests.bench.token_servers import GeneratedEngine, event

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def _stream(body: bytes, size: int, num_tokens: int) -> token_client.Stream:
    """What the client makes of a server that sends `size` bytes at a time."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for start in range(0, len(body), size):
            writer.write(body[start : start + size])
            await writer.drain()
            await asyncio.sleep(0)
        writer.close()

    async def run() -> token_client.Stream:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await token_client.stream(f"http://127.0.0.1:{port}/v1/completions", num_tokens)

    return asyncio.run(run())


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_tokens_and_events_are_counted_once(size: int) -> None:
    coalesced = event(1, None).replace(b" word1", b" word1 word2 word3")
    body = HEAD + coalesced + event(4, None) + event(5, "length") + b"data: [DONE]\n\n"
    seen = _stream(body, size, 5)
    assert (seen.num_tokens, seen.num_events) == (5, 3)
    assert 0 < seen.ttft_s <= seen.total_s


def test_an_answer_that_is_cut_short_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="1 of 5 tokens; the answer ends with"):
        _stream(HEAD + event(1, None), 10_000, 5)


def test_the_engine_sends_what_was_asked_for() -> None:
    async def run() -> list[int]:
        engine = GeneratedEngine(EngineConfig(ModelSource("bench", "step:0.01")))
        inbox = TokenInbox("127.0.0.1")
        streams = [inbox.open(name) for name in "ab"]
        calls = [
            asyncio.create_task(
                engine.generate(GenerateRequest(name, (1,), SamplingParams(max_tokens=20)), stream.reply_to)
            )
            for name, stream in zip("ab", streams, strict=True)
        ]
        counts = []
        async with asyncio.timeout(20):
            for stream in streams:
                deltas = [await stream.get()]
                while deltas[-1].finish_reason is None:
                    deltas.append(await stream.get())
                counts.append(sum(len(delta.token_ids) for delta in deltas))
            await asyncio.gather(*calls)
        assert (await engine.snapshot()).num_running == 0
        await engine.shutdown()
        inbox.close()
        return counts

    assert asyncio.run(run()) == [20, 20]
