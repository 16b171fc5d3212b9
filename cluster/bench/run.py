"""From options to a finished run: builds the workload, sends it, prints and saves what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from tqdm import tqdm

from cluster.bench import client, floor, report
from cluster.bench.options import Checked, Options, check, make_workload
from cluster.bench.summary import Record, Summary, summarise
from cluster.bench.workload import BenchError, Workload
from cluster.client import Client

_INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended
_KEPT_UP_S = 0.05  # later than this, and the figures are the client's as much as the server's


def run(options: Options, say: Callable[[str], None]) -> int:
    """Run the benchmark; `say` prints a line. Returns the exit status: 1 if nothing succeeded.

    Raises:
        BenchError: an option that cannot be, a file that cannot be read, a server that does not answer.
    """
    checked = check(options)
    workload = make_workload(options)
    bound = _floor(options, workload)
    model = options.model or _first_model(options.server, checked.headers)
    if options.model is None:
        say(f"--model is not given: benchmarking {model}, the server's first")
    calls = _calls(options, checked, workload, model)
    target = client.Target(checked.url, checked.headers)
    _try_first(target, calls, options, say)
    say(f"Starting main benchmark run: {len(calls)} requests to {checked.url}")
    rate = "the trace's own times" if workload.request_rate is None else workload.request_rate
    say(f"Traffic request rate: {rate}")
    say(f"Maximum request concurrency: {options.max_concurrency}")
    done = _send(target, calls, options)
    summary = summarise(done.records, done.duration_s, checked.objectives_ms, checked.percentiles)
    _say_troubles(done, summary, options, len(calls), say)
    settings = _settings(options, checked, workload, model)
    say(report.block(summary, settings))
    if options.save_result or options.save_detailed:
        path = report.result_path(options.result_dir, options.result_filename, settings)
        report.save(path, settings, summary, done.records, options.save_detailed, checked.metadata)
        say(f"saved to {path}")
    figure = report.figures(summary) | {"max_send_delay_s": round(max(done.late_s, default=0.0), 4)}
    machine = report.machine(bound.ceiling.name if bound else None, ("ballonet", "aiohttp"))
    about = {"model": model, "url": checked.url, **checked.metadata, **machine}
    say(report.result_line("serve", workload.name, figure, bound, None, about))
    if done.interrupted:
        return _INTERRUPTED
    return 0 if summary.completed else 1


def _send(target: client.Target, calls: Sequence[client.Call], options: Options) -> client.Run:
    with tqdm(total=len(calls), disable=options.disable_tqdm, file=sys.stderr) as bar:

        def count(_: Record) -> None:
            bar.update()

        return client.send_all(target, calls, options.max_concurrency, count)


def _settings(options: Options, checked: Checked, workload: Workload, model: str) -> report.Settings:
    return report.Settings(
        options.backend,
        model,
        workload.name,
        workload.request_rate,
        options.max_concurrency,
        checked.objectives_ms,
        checked.metrics,
    )


def _floor(options: Options, workload: Workload) -> floor.Floor | None:
    if options.model_config is None:
        return None
    return floor.floor_of(
        workload, floor.read_shape(options.model_config), floor.CEILINGS[options.gpu or "h100"]
    )


def _first_model(server: str, headers: Mapping[str, str]) -> str:
    try:
        return Client(server, headers=headers).models()[0]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchError(f"{server}/v1/models names no model: give --model") from error


def _calls(options: Options, checked: Checked, workload: Workload, model: str) -> list[client.Call]:
    """Bodies, encoded now so that the run itself only sends."""
    ignore_eos = options.dataset_name != "sharegpt" if options.ignore_eos is None else options.ignore_eos
    common: dict[str, Any] = {
        "model": options.served_model_name or model,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        common["ignore_eos"] = True
    common |= checked.extra_body
    chat = checked.url.endswith("/chat/completions")
    calls = []
    for request in workload.requests:
        body = dict(common, max_tokens=request.output_tokens)
        if chat:
            body["messages"] = [{"role": "user", "content": workload.words(request)}]
        else:
            body["prompt"] = request.text or workload.token_ids(request)
        calls.append(client.Call(request.arrival_s, request.prompt_tokens, orjson.dumps(body)))
    return calls


def _try_first(
    target: client.Target, calls: Sequence[client.Call], options: Options, say: Callable[[str], None]
) -> None:
    """One request alone, as vLLM does, and the warm-ups: a wrong URL is found here, not 1,000 times."""
    say("Starting initial single prompt test run...")
    probes = [client.Call(0.0, call.prompt_tokens, call.body) for call in calls]
    first = client.send_all(target, probes[:1])
    if first.interrupted:
        raise KeyboardInterrupt
    if (error := first.records[0].error) is not None:
        raise BenchError(f"the test request to {target.url} failed: {error}")
    if options.num_warmups > 0:
        say(f"Warming up with {options.num_warmups} requests...")
        repeated = [probes[index % len(probes)] for index in range(options.num_warmups)]
        client.send_all(target, repeated, options.max_concurrency)


def _say_troubles(
    done: client.Run, summary: Summary, options: Options, planned: int, say: Callable[[str], None]
) -> None:
    """What a reader of the figures must know first."""
    if summary.failed:
        kinds = sorted({record.error for record in done.records if record.error})
        say(f"{summary.failed} of {planned} requests failed; the first said: {summary.first_error}")
        for kind in [kind for kind in kinds if kind != summary.first_error][:9]:
            say(f"  and another: {kind}")
    if done.interrupted:
        unsent = planned - len(done.records)
        say(f"interrupted: {summary.interrupted} requests open, {unsent} not sent; figures without them")
    late_s = max(done.late_s, default=0.0)
    if options.max_concurrency is None and late_s > _KEPT_UP_S:
        say(f"requests were sent up to {1e3 * late_s:.0f} ms late: the client's processor is busy")
