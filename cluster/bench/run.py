"""From options to a finished run: builds the workload, sends it, prints and saves what came of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tqdm import tqdm

from cluster.bench import client, floor, report, results
from cluster.bench.calls import make_calls
from cluster.bench.datasets import make_workload, token_counter
from cluster.bench.options import Checked, Options, check, told
from cluster.bench.sessions import History, fits, histories_to_try
from cluster.bench.summary import Record, Summary, summarise
from cluster.bench.traces import CountTokens
from cluster.bench.workload import BenchError, OptionError, PlannedRequest, Workload
from cluster.client import Client
from engine.errors import BallonetError

Say = Callable[[str], None]
_KEPT_UP_S = 0.05  # later than this, and the figures are the client's as much as the server's
_RETRY_S = 1.0


class _Server(NamedTuple):
    """What the test request found out.

    Attributes:
        model: the id to ask for.
        history: how sessions go on; None where there are none.
    """

    model: str
    history: History | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """All that is known before the first request."""

    options: Options
    checked: Checked
    workload: Workload
    shape: floor.ModelShape | None
    rival: Mapping[str, Any] | None
    count_tokens: CountTokens | None

    @property
    def target(self) -> client.Target:
        return client.Target(self.checked.url, self.checked.headers)

    def calls(self, requests: Sequence[PlannedRequest], server: _Server) -> list[client.Call]:
        return make_calls(self.options, self.checked, self.workload, requests, server.model, server.history)

    def settings(self, server: _Server) -> report.Settings:
        return report.Settings(
            self.options.backend,
            server.model,
            self.workload.name,
            self.workload.request_rate,
            self.options.max_concurrency,
            self.checked.objectives_ms,
            self.checked.metrics,
        )


def run(options: Options, say: Say) -> int:
    """Run the benchmark; `say` prints a line.

    Returns:
        The exit status: 0 only if every request succeeded and what was to be saved is.

    Raises:
        OptionError: an option that cannot be, a file that cannot be read; nothing was sent.
        BenchError, ClientError: a server that does not answer.
        KeyboardInterrupt: Ctrl-C; if it came amid the run, what was measured until then has been told.
    """
    plan = _plan(options)
    say("Starting initial single prompt test run...")
    server = _when_ready(lambda: _try_first(plan), options.ready_check_timeout_sec)
    if options.model is None:
        say(f"--model is not given: benchmarking {server.model}, the server's first")
    if server.history is not None:
        say(f"Sessions go on with their answers as {server.history.replace('_', ' ')}")
    _warm_up(plan, server, say)
    calls = plan.calls(plan.workload.requests, server)
    _announce(plan, say)
    done = _send(plan.target, calls, options)
    counts = _count_missing(done.records, plan.count_tokens, say)
    summary = summarise(done.records, done.duration_s, plan.checked.objectives_ms, plan.checked.percentiles)
    _say_troubles(done, summary, options, len(calls), say)
    say(report.block(summary, plan.settings(server)))
    line = _result(plan, server, done, report.figures(summary) | counts)
    for text in results.comparison_lines(line["rival"]) if line["rival"] else ():
        say(text)
    saved = not options.saves or _save(plan, server, line, done.records, say)
    say(json.dumps(line, allow_nan=False))
    if done.interrupted:
        raise KeyboardInterrupt
    return 0 if saved and summary.completed and not summary.failed else 1


def _plan(options: Options) -> _Plan:
    try:
        checked = check(options)
        shape = None if options.model_config is None else floor.read_shape(options.model_config)
        rival = None if options.rival is None else results.read_rival(options.rival)
        counter = token_counter(options.tokenizer)
        return _Plan(options, checked, make_workload(options), shape, rival, counter)
    except BallonetError as error:
        raise OptionError(str(error)) from error


def _announce(plan: _Plan, say: Say) -> None:
    count, asked = len(plan.workload.requests), plan.options.num_prompts
    if plan.options.workload is None and count < asked:
        say(f"{plan.options.dataset_path} has only {count} requests that can be used, not {asked}")
    say(f"Starting main benchmark run: {count} requests to {plan.checked.url}")
    rate = plan.workload.request_rate
    say(f"Traffic request rate: {'the own times of the trace' if rate is None else rate}")
    say(f"Maximum request concurrency: {plan.options.max_concurrency}")


def _when_ready(attempt: Callable[[], _Server], limit_s: float) -> _Server:
    """What `attempt` returns, tried once a second until it fails after the limit."""
    give_up = time.monotonic() + limit_s
    while True:
        try:
            return attempt()
        except BallonetError:
            if time.monotonic() + _RETRY_S > give_up:
                raise
            time.sleep(_RETRY_S)


def _try_first(plan: _Plan) -> _Server:
    """What one request alone finds out: a wrong URL is found here, not 1,000 times.

    vLLM 0.26 sends such a request only with --ready-check-timeout-sec.
    """
    model = plan.options.model or _first_model(plan.options.server, plan.checked.headers)
    error: str | None = None
    for history in histories_to_try(plan.workload, plan.checked.is_chat):
        server = _Server(model, history)
        first = client.send_all(plan.target, plan.calls(plan.workload.probes(1), server))
        if first.interrupted:
            raise KeyboardInterrupt
        error = first.records[0].error
        if error is None and fits(history, first.records[0]):
            return server
    raise BenchError(f"the test request to {plan.checked.url} failed: {error}")


def _first_model(server: str, headers: Mapping[str, str]) -> str:
    try:
        return Client(server, headers=headers).models()[0]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BenchError(f"{server}/v1/models names no model: give --model") from error


def _warm_up(plan: _Plan, server: _Server, say: Say) -> None:
    count = plan.options.num_warmups
    if count == 0:
        return
    say(f"Warming up with {count} requests...")
    # The test request was the first probe: a cache may hold it.
    probes = plan.workload.probes(count + 1)[1:]
    done = client.send_all(plan.target, plan.calls(probes, server), plan.options.max_concurrency)
    if done.interrupted:
        raise KeyboardInterrupt


def _send(target: client.Target, calls: Sequence[client.Call], options: Options) -> client.Run:
    with tqdm(total=len(calls), disable=options.disable_tqdm, file=sys.stderr) as bar:

        def count(_: Record) -> None:
            bar.update()

        return client.send_all(target, calls, options.max_concurrency, count)


def _count_missing(records: Sequence[Record], count_tokens: CountTokens | None, say: Say) -> dict[str, Any]:
    """Settle the output tokens that the server did not count, and say so."""
    missing = [record for record in records if record.succeeded and not record.counted]
    if not missing:
        return {"requests_without_usage": 0, "counted_instead_by": None}
    if count_tokens is not None:
        for record in missing:
            record.output_tokens = max(1, count_tokens("".join(record.pieces)))
    counted_by = "deltas" if count_tokens is None else "tokenizer"
    remedy = "; a delta may hold several tokens, so give --tokenizer" if count_tokens is None else ""
    say(f"{len(missing)} answers came without `usage`: their tokens are counted by {counted_by}{remedy}")
    return {"requests_without_usage": len(missing), "counted_instead_by": counted_by}


def _result(plan: _Plan, server: _Server, done: client.Run, figure: dict[str, Any]) -> dict[str, Any]:
    """The result line, which says what was run, on what, and how far it is from its ceiling."""
    figure["max_send_delay_s"] = round(max(done.late_s, default=0.0), 4)
    ceiling = floor.CEILINGS[plan.options.gpu] if plan.options.gpu else None
    machine = report.machine(ceiling.name if ceiling else None, ("ballonet", "aiohttp"))
    if (version := _server_version(plan.options.server, plan.checked.headers)) is not None:
        machine["versions"]["server"] = version
    options = told(plan.options, plan.checked, plan.workload) | {"history": server.history}
    about = {"model": server.model, "url": plan.checked.url, "options": options}
    about |= {"metadata": dict(plan.checked.metadata), **machine}
    rival = None if plan.rival is None else results.compare(figure, plan.rival, options)
    return report.result("serve", plan.workload.name, figure, _floor(plan, done, ceiling), rival, about)


def _floor(plan: _Plan, done: client.Run, ceiling: floor.Ceiling | None) -> floor.Floor | None:
    """Of the work that was done, which is what `duration` measures: answers may end early, fail, or stop.

    Arrivals are the planned ones. When a request was sent depends on the server where concurrency is
    limited: a floor over those times would grow with the server's slowness.
    """
    ended = zip(done.places, done.records, done.late_s, strict=True)
    good = sorted(
        ((place, record, late_s) for place, record, late_s in ended if record.succeeded), key=_place
    )
    if plan.shape is None or ceiling is None or not good:
        return None
    workload = plan.workload.only([place for place, _, _ in good])
    requests = tuple(
        replace(
            planned,
            arrival_s=record.start_s - late_s,
            prompt_tokens=record.prompt_tokens,
            output_tokens=max(1, record.output_tokens),
        )
        for planned, (_, record, late_s) in zip(workload.requests, good, strict=True)
    )
    return floor.floor_of(replace(workload, requests=requests), plan.shape, ceiling)


def _place(entry: tuple[int, Record, float]) -> int:
    return entry[0]


def _server_version(server: str, headers: Mapping[str, str]) -> str | None:
    """What `/version` answers; None from a server that has none."""
    try:
        return Client(server, headers=headers).version()
    except (BallonetError, ValueError, KeyError, TypeError):
        return None


def _save(plan: _Plan, server: _Server, line: Mapping[str, Any], records: Sequence[Record], say: Say) -> bool:
    """Whether it could be: the result line comes after this, and must come."""
    options, settings = plan.options, plan.settings(server)
    path = results.result_path(options.result_dir, options.result_filename, options.label, settings)
    content = results.content(line, settings, records if options.save_detailed else None)
    try:
        results.save(path, content, options.append_result)
    except OSError as error:
        say(f"error: the result cannot be saved to {path}: {error}")
        return False
    say(f"saved to {path}")
    return True


def _say_troubles(done: client.Run, summary: Summary, options: Options, planned: int, say: Say) -> None:
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
