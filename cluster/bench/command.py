"""The command line of `ballonet bench`: option names are those of `vllm bench serve`.

Light to import: the HTTP client is loaded when the command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.bench.named import workload_names
from cluster.bench.workload import OptionError

_LOAD, _DATA, _PROMPTS, _OUTPUT = "Load", "Dataset", "Requests", "Results"


def _option(text: str, panel: str, *names: str, **more: object) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(*names, help=text, rich_help_panel=panel, **more)  # type: ignore[arg-type]
    return option


_Str = str | None
BaseUrl = Annotated[str | None, _option("Of the server, without /v1.", "Server")]
Host = Annotated[str, _option("Used with --port where there is no --base-url.", "Server")]
Port = Annotated[int, _option("Of the server.", "Server")]
Model = Annotated[_Str, _option("Its id; without it the server's first.", "Server")]
ServedName = Annotated[_Str, _option("Sent as the model, if it differs.", "Server")]
Backend = Annotated[
    str,
    _option("openai or vllm (completions), or openai-chat, timed without its role's event.", "Server"),
]
Endpoint = Annotated[_Str, _option("Path, where the backend's own does not fit.", "Server")]
ApiKey = Annotated[_Str, _option("Sent as a bearer token.", "Server", envvar="OPENAI_API_KEY")]
Header = Annotated[list[str] | None, _option("KEY=VALUE; repeat it for further ones.", "Server")]
ReadyCheck = Annotated[int, _option("Seconds to wait for it; 0 is one try.", "Server")]
Named = Annotated[_Str, _option(f"Instead of a dataset: {', '.join(workload_names())}.", _DATA)]
DatasetName = Annotated[str, _option("random, sharegpt, burstgpt, azure or mooncake.", _DATA)]
DatasetPath = Annotated[Path | None, _option("The dataset's file.", _DATA)]
Tokenizer = Annotated[
    _Str,
    _option("Counts sharegpt (else 4 characters are a token) and answers that have no usage.", _DATA),
]
NumPrompts = Annotated[int, _option("Requests to send; of a trace the first, or all of fewer.", _DATA)]
Seed = Annotated[int, _option("Of prompts, lengths and arrivals.", _DATA)]
InputLen = Annotated[int, _option("Tokens of a random prompt.", _DATA, "--random-input-len", "--input-len")]
OutputLen = Annotated[
    int, _option("Tokens to generate for it.", _DATA, "--random-output-len", "--output-len")
]
RangeRatio = Annotated[float, _option("Lengths vary by that share, both ways.", _DATA)]
PrefixLen = Annotated[int, _option("Tokens that all prompts share, before the random ones.", _DATA)]
ShareGptLen = Annotated[int | None, _option("Instead of the length of sharegpt's answers.", _DATA)]
VocabSize = Annotated[int, _option("Random token ids lie below it.", _DATA)]
Rate = Annotated[float | None, _option("Requests/s, or inf. A trace keeps its own times without it.", _LOAD)]
Burstiness = Annotated[
    float, _option("1 is Poisson, less comes in bursts, more is steadier; of a finite rate.", _LOAD)
]
SelfTimed = Annotated[
    bool | None, _option("Keep a trace's own times, or not.", _LOAD, "--self-timed/--no-self-timed")
]
MaxConcurrency = Annotated[int | None, _option("Requests open at once.", _LOAD)]
Warmups = Annotated[int, _option("Requests before the measurement, with prompts of their own.", _LOAD)]
IgnoreEos = Annotated[
    bool | None,
    _option("Generate the full length; on, but for sharegpt.", _PROMPTS, "--ignore-eos/--no-ignore-eos"),
]
Temperature = Annotated[float | None, _option("0 is greedy; without it the server's own.", _PROMPTS)]
ExtraBody = Annotated[_Str, _option("A JSON object of further fields of each request.", _PROMPTS)]
Goodput = Annotated[list[str] | None, _option("Objectives in ms: ttft:200 tpot:50 e2el:5000.", _OUTPUT)]
More = Annotated[list[str] | None, typer.Argument(hidden=True)]
Metrics = Annotated[str, _option("Of ttft, tpot, itl, e2el: which to print.", _OUTPUT)]
Percentiles = Annotated[str, _option("Such as 50,90,99.", _OUTPUT)]
SaveResult = Annotated[bool, _option("Write a JSON file.", _OUTPUT, "--save-result")]
SaveDetailed = Annotated[bool, _option("With every request's times.", _OUTPUT, "--save-detailed")]
AppendResult = Annotated[bool, _option("Add a line to the JSON file.", _OUTPUT, "--append-result")]
Label = Annotated[_Str, _option("Of the run, in the file and first in its name.", _OUTPUT)]
Rival = Annotated[Path | None, _option("A result file, ours or vLLM's, to compare with.", _OUTPUT)]
ResultDir = Annotated[Path, _option("Where.", _OUTPUT)]
ResultFilename = Annotated[_Str, _option("Under which name.", _OUTPUT)]
Metadata = Annotated[list[str] | None, _option("KEY=VALUE ... to keep under metadata.", _OUTPUT)]
DisableTqdm = Annotated[bool, _option("No progress bar.", _OUTPUT, "--disable-tqdm")]
ModelConfig = Annotated[
    Path | None, _option("Its config.json, for the ceiling of the run; with --gpu.", _OUTPUT)
]
Gpu = Annotated[_Str, _option("Whose ceiling: h100.", _OUTPUT)]


def bench(  # noqa: PLR0913 - a benchmark's options are its arguments
    ctx: typer.Context,
    more: More = None,
    base_url: BaseUrl = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model: Model = None,
    served_model_name: ServedName = None,
    backend: Backend = "openai",
    endpoint: Endpoint = None,
    api_key: ApiKey = None,
    header: Header = None,
    ready_check_timeout_sec: ReadyCheck = 0,
    workload: Named = None,
    dataset_name: DatasetName = "random",
    dataset_path: DatasetPath = None,
    tokenizer: Tokenizer = None,
    num_prompts: NumPrompts = 1000,
    seed: Seed = 0,
    random_input_len: InputLen = 1024,
    random_output_len: OutputLen = 128,
    random_range_ratio: RangeRatio = 0.0,
    random_prefix_len: PrefixLen = 0,
    sharegpt_output_len: ShareGptLen = None,
    vocab_size: VocabSize = 32_000,
    request_rate: Rate = None,
    burstiness: Burstiness = 1.0,
    self_timed: SelfTimed = None,
    max_concurrency: MaxConcurrency = None,
    num_warmups: Warmups = 0,
    ignore_eos: IgnoreEos = None,
    temperature: Temperature = None,
    extra_body: ExtraBody = None,
    goodput: Goodput = None,
    percentile_metrics: Metrics = "ttft,tpot,itl",
    metric_percentiles: Percentiles = "99",
    save_result: SaveResult = False,
    save_detailed: SaveDetailed = False,
    append_result: AppendResult = False,
    label: Label = None,
    rival: Rival = None,
    result_dir: ResultDir = Path("."),
    result_filename: ResultFilename = None,
    metadata: Metadata = None,
    disable_tqdm: DisableTqdm = False,
    model_config: ModelConfig = None,
    gpu: Gpu = None,
) -> int:
    """Measure a running server as its clients see it; options as in `vllm bench serve`."""
    options = dict(locals())  # the parameters, before anything else has a name here
    from cluster.bench.options import Options
    from cluster.bench.run import run

    del options["ctx"]
    _sort_in(options.pop("more") or [], options)
    url = options.pop("base_url")
    address = f"http://{options.pop('host')}:{options.pop('port')}"
    options["given"] = frozenset(name for name in options if _is_written(ctx, name))
    given = {name: value for name, value in options.items() if value is not None}
    return run(Options(base_url=url or address, **given), typer.echo)


def _is_written(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _sort_in(more: Sequence[str], options: dict[str, Any]) -> None:
    """Give arguments to the options before them: vLLM's take several values, and here the first alone.

    Raises:
        OptionError: one that belongs to no option, or to either of two.
    """
    for word in more:
        takes = ("metadata", "header") if "=" in word else ("goodput",)
        given = [name for name in takes if options[name]]
        if not given:
            raise OptionError(f"{word!r} belongs to no option")
        if len(given) > 1:
            raise OptionError(f"{word!r} may belong to --header or --metadata: repeat the option before each")
        options[given[0]] = [*options[given[0]], word]
