"""The `ballonet` command: arguments in, exit status out. Everything it does lives elsewhere.

Modules that import Ray are imported inside the commands that need it: `check`, `chat` and `status`
answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from cluster import cli_render, config, ray_service_check
from cluster.bench import command
from cluster.bench.workload import OptionError
from cluster.client import Client, ClientError
from cluster.planner import command as planning
from cluster.serve_settings import prefer_fast_front
from engine.errors import BallonetError
from engine.messages import EngineSnapshot

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
_console = Console(highlight=False)

ServeFilePath = Annotated[
    Path, typer.Argument(metavar="FILE", help="A Ray Serve config file, or a RayService with one inside.")
]
Url = Annotated[str, typer.Option(help="Address of the server.")]
ApiKey = Annotated[str | None, typer.Option(envvar="BALLONET_API_KEY", help="Sent as a bearer token.")]
DEFAULT_URL = "http://127.0.0.1:8000"
_FIRST_SAMPLE_S = 0.03  # eight tokens on a GPU take 80 ms
_LONGEST_SAMPLE_S = 1.0  # looking costs the server time too
_BAD_OPTION = 2  # as for the options that the command line itself refuses
_INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended


@app.command()
def serve(
    path: ServeFilePath,
    ask: Annotated[str | None, typer.Option(help="Ask this, print the answer and stop.")] = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster, such as auto; without it one starts here.")
    ] = None,
    verbose: Annotated[bool, typer.Option(help="Show the logs of Ray and of all replicas.")] = False,
) -> None:
    """Deploy every application of FILE and stay until Ctrl-C."""
    with _errors_end_it():
        file = config.load(path)
        if address is None:
            prefer_fast_front(file.http_options.host, file.http_options.port)
        from cluster import launch  # takes seconds: Ray, which reads its environment now

        if address is None:
            launch.require_models(file)
            launch.require_port(file)
        _step("starting Ray" if address is None else f"connecting to Ray at {address}")
        # Ray puts a SIGTERM handler of its own in place, so ours comes after it.
        with launch.ray_running(address, verbose), _sigterm_interrupts():
            if address is None:
                launch.require_gpus(file)
            _step("deploying; the first start of a model takes longest")
            with launch.deployed(file, _step, removes=address is not None) as url:
                _step(f"ready at {url}/v1")
                _console.print(cli_render.file_summary(file))
                client = _client_of(file, url)
                if ask is None:
                    _stay(client)
                else:
                    _ask_once(client, file.applications[0].args.llm_configs[0].model_id, ask)
                _step("stopping")


@app.command()
def check(path: ServeFilePath) -> None:
    """Validate FILE and print what it asks for."""
    with _errors_end_it():
        file, notes = ray_service_check.check(path)
        _console.print(cli_render.file_summary(file))
        for note in notes:
            _console.print(f"note: {note}", style="yellow", markup=False)
        _console.print(f"{path} is valid.", style="green")


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Its id; without it the server's first.")] = None,
    api_key: ApiKey = None,
    once: Annotated[str | None, typer.Option(help="Ask this one thing and leave.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="0 repeats itself.")] = None,
) -> None:
    """Talk to a running server."""
    with _errors_end_it():
        client = Client(url, api_key)
        model = model or client.models()[0]
        messages: list[dict[str, str]] = []
        for prompt in [once] if once is not None else _prompts(model):
            messages.append({"role": "user", "content": prompt})
            answer = client.chat(
                model, messages, _print_piece, max_tokens=max_tokens, temperature=temperature
            )
            _console.print()
            _console.print(cli_render.answer_figures(answer))
            messages.append({"role": "assistant", "content": answer.text})


@app.command()
def status(url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the engines of a running server and their memory pools."""
    with _errors_end_it():
        _console.print(cli_render.status_view(Client(url, api_key).status()))


@app.command()
def trim(
    url: Url = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="Only the engines of this one.")] = None,
    drop_cache: Annotated[
        bool, typer.Option("--drop-cache", help="Give up the prefix cache, and its memory, as well.")
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="BALLONET_ADMIN_API_KEY", help="One of the server's admin keys.")
    ] = None,
) -> None:
    """Have the engines of a running server give memory they do not use back to their devices.

    They take it again when they need it; requests go on. Only the chunks that are free at this moment
    are given back.
    """
    with _errors_end_it():
        given = Client(url, api_key).trim(model, drop_cache=drop_cache)
        _console.print(cli_render.trimmed_view(given))
        if any(not engines or not all(isinstance(one, int) for one in engines) for engines in given.values()):
            raise typer.Exit(1)


@app.command()
@functools.wraps(command.bench)
def bench(**options: Any) -> None:
    """The options and their help are `cluster.bench.command`'s."""
    with _errors_end_it():
        raise typer.Exit(command.bench(**options))


@app.command()
@functools.wraps(planning.simulate)
def simulate(**options: Any) -> None:
    """The options and their help are `cluster.planner.command`'s."""
    with _errors_end_it():
        raise typer.Exit(planning.simulate(**options))


@app.command()
def version() -> None:
    """Print the version."""
    try:
        _console.print(importlib.metadata.version("ballonet"))
    except importlib.metadata.PackageNotFoundError:
        _console.print("not installed: run from a source tree")


def main() -> None:
    """Entry point of the console script."""
    app()


def _stay(client: Client) -> None:
    """Until Ctrl-C or SIGTERM, which are the ways to end a server and no failure."""
    _console.print(cli_render.status_view(client.status()))
    _console.print("Ctrl-C stops the server.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            signal.pause()  # an Event's wait breaks its own lock when two signals come at once


def _ask_once(client: Client, model: str, prompt: str) -> None:
    _console.print(f"\n> {prompt}", style="bold")
    with _fullest_pool(client, model) as fullest:
        # Greedy: whoever runs a demonstration twice expects the same answer.
        answer = client.chat(model, [{"role": "user", "content": prompt}], _print_piece, temperature=0)
    _console.print("\n")
    _console.print(cli_render.answer_figures(answer))
    if fullest:
        _console.print("\nThe memory pool while it answered:", style="bold")
        _console.print(cli_render.pool_picture(fullest[-1]))
    _console.print("\nThe memory pool afterwards:", style="bold")
    _console.print(cli_render.status_view(client.status()))


@contextlib.contextmanager
def _fullest_pool(client: Client, model: str) -> Iterator[list[EngineSnapshot]]:
    """Samples /status beside the block; the last snapshot of the list holds the most KV."""
    seen: list[EngineSnapshot] = []
    stop = threading.Event()

    def sample() -> None:
        pause_s = _FIRST_SAMPLE_S
        # A server that refuses here fails the answer too, which says so better.
        with contextlib.suppress(ClientError):
            while not stop.wait(pause_s):
                pause_s = min(2 * pause_s, _LONGEST_SAMPLE_S)
                for snapshot in client.status()[model]:
                    if not seen or snapshot.memory.kv > seen[-1].memory.kv:
                        seen.append(snapshot)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def _client_of(file: config.ServeFile, url: str) -> Client:
    """A client of the file's first application, with a key if it asks for one."""
    application = file.applications[0]
    keys = application.args.ingress.all_api_keys()
    return Client(url + application.route_prefix.rstrip("/"), keys[0] if keys else None)


def _prompts(model: str) -> Iterator[str]:
    _console.print(f"{model}: Ctrl-D ends the conversation.", style="dim")
    while True:
        try:
            prompt = _console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            _console.print()
            return
        if prompt:
            yield prompt


def _print_piece(text: str) -> None:
    _console.print(text, end="", markup=False, soft_wrap=True)


_STARTED_S = time.monotonic()


def _step(text: str) -> None:
    _console.print(f"[{time.monotonic() - _STARTED_S:5.1f} s] {text}", style="dim", markup=False)


@contextlib.contextmanager
def _errors_end_it() -> Iterator[None]:
    """Errors that Ballonet raises on purpose are messages to the user; others are bugs and show all."""
    try:
        yield
    except BallonetError as error:
        _console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(_BAD_OPTION if isinstance(error, OptionError) else 1) from error
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the command like Ctrl-C, so that what was deployed is removed."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
