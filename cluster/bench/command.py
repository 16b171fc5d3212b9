"""The command line of `ballonet bench`: option names are those of `vllm bench serve`.

Light to import: the HTTP client is loaded when the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.bench.workload import BenchError, workload_names

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
Backend = Annotated[str, _option("openai (completions), openai-chat, or vllm.", "Server")]
Endpoint = Annotated[_Str, _option("Path, where the backend's own does not fit.", "Server")]
ApiKey = Annotated[_Str, _option("Sent as a bearer token.", "Server", envvar="OPENAI_API_KEY")]
Header = Annotated[list[str] | None, _option("KEY=VALUE, more than once if need be.", "Server")]
Named = Annotated[_Str, _option(f"Instead of a dataset: {', '.join(workload_names())}.", _DATA)]
DatasetName = Annotated[str, _option("random, sharegpt, burstgpt, azure or mooncake.", _DATA)]
DatasetPath = Annotated[Path | None, _option("The dataset's file.", _DATA)]
Tokenizer = Annotated[_Str, _option("Counts sharegpt's tokens; without it 4 characters are one.", _DATA)]
NumPrompts = Annotated[int, _option("Requests to send; of a trace the first.", _DATA)]
Seed = Annotated[int, _option("Of prompts, lengths and arrivals.", _DATA)]
InputLen = Annotated[int, _option("Tokens of a random prompt.", _DATA)]
OutputLen = Annotated[int, _option("Tokens to generate for it.", _DATA)]
RangeRatio = Annotated[float, _option("Lengths vary by that share, both ways.", _DATA)]
PrefixLen = Annotated[int, _option("Tokens that all prompts share, before the random ones.", _DATA)]
ShareGptLen = Annotated[int | None, _option("Instead of the length of sharegpt's answers.", _DATA)]
VocabSize = Annotated[int, _option("Random token ids lie below it.", _DATA)]
Rate = Annotated[float | None, _option("Requests/s, or inf. A trace keeps its own times without it.", _LOAD)]
Burstiness = Annotated[float, _option("1 is Poisson, less comes in bursts, more is steadier.", _LOAD)]
SelfTimed = Annotated[
    bool | None, _option("Keep a trace's own times, or not.", _LOAD, "--self-timed/--no-self-timed")
]
MaxConcurrency = Annotated[int | None, _option("Requests open at once.", _LOAD)]
Warmups = Annotated[int, _option("Requests before the measurement.", _LOAD)]
IgnoreEos = Annotated[
    bool | None, _option("Always generate the full length.", _PROMPTS, "--ignore-eos/--no-ignore-eos")
]
Temperature = Annotated[float, _option("0 is greedy.", _PROMPTS)]
ExtraBody = Annotated[_Str, _option("A JSON object of further fields of each request.", _PROMPTS)]
Goodput = Annotated[list[str] | None, _option("Objectives in ms: ttft:200 tpot:50 e2el:5000.", _OUTPUT)]
MoreGoodput = Annotated[list[str] | None, typer.Argument(hidden=True)]
Metrics = Annotated[str, _option("Of ttft, tpot, itl, e2el: which to print.", _OUTPUT)]
Percentiles = Annotated[str, _option("Such as 50,90,99.", _OUTPUT)]
SaveResult = Annotated[bool, _option("Write a JSON file.", _OUTPUT, "--save-result")]
SaveDetailed = Annotated[bool, _option("With every request's times.", _OUTPUT, "--save-detailed")]
ResultDir = Annotated[Path, _option("Where.", _OUTPUT)]
ResultFilename = Annotated[_Str, _option("Under which name.", _OUTPUT)]
Metadata = Annotated[list[str] | None, _option("KEY=VALUE to keep with the results.", _OUTPUT)]
DisableTqdm = Annotated[bool, _option("No progress bar.", _OUTPUT, "--disable-tqdm")]
ModelConfig = Annotated[
    Path | None, _option("Its config.json, for the ceiling of the run; with --gpu.", _OUTPUT)
]
Gpu = Annotated[_Str, _option("Whose ceiling: h100.", _OUTPUT)]


def bench(  # noqa: PLR0913 - a benchmark's options are its arguments
    more_goodput: MoreGoodput = None,
    base_url: BaseUrl = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    model: Model = None,
    served_model_name: ServedName = None,
    backend: Backend = "openai",
    endpoint: Endpoint = None,
    api_key: ApiKey = None,
    header: Header = None,
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
    temperature: Temperature = 0.0,
    extra_body: ExtraBody = None,
    goodput: Goodput = None,
    percentile_metrics: Metrics = "ttft,tpot,itl",
    metric_percentiles: Percentiles = "99",
    save_result: SaveResult = False,
    save_detailed: SaveDetailed = False,
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

    if more_goodput and not goodput:
        raise BenchError(f"{more_goodput[0]!r} belongs to no option")
    # vLLM takes several values after one --goodput; the others arrive here as arguments.
    options["goodput"] = (options.pop("goodput") or []) + (options.pop("more_goodput") or [])
    url = options.pop("base_url")
    address = f"http://{options.pop('host')}:{options.pop('port')}"
    given = {name: value for name, value in options.items() if value is not None}
    return run(Options(base_url=url or address, **given), typer.echo)
