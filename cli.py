#!/usr/bin/env python3
"""The verbs of MiniCodformer: parse, call, print. No logic here, and nothing heavy is imported before a verb runs."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pipeline.doctor import Row
    from pipeline.recipe import Recipe
    from pipeline.run import RunFolder
    from stages.teacher_cache.preflight import Check

app = typer.Typer(
    name="minicodformer",
    help="Offline knowledge distillation: a teacher once into shards, a liquid student many times out of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _recipe_names() -> list[str]:
    from pipeline.recipe import shipped

    return list(shipped())


def _run_names() -> list[str]:
    return sorted(path.parent.name for path in Path("runs").glob("*/recipe.toml"))


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        autocompletion=_recipe_names,
        help="A shipped recipe or a TOML file. [default: qwen3-8b with a GPU, else smollm2-demo]",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", autocompletion=_run_names, help="The run: runs/NAME. [default: the recipe's name]"),
]
RunOption = Annotated[
    str | None,
    typer.Option("--name", autocompletion=_run_names, help="The run: runs/NAME. [default: the newest finished run]"),
]
DataOption = Annotated[Path | None, typer.Option("--data", help="A JSONL file; the same as --set corpus.source=…")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value.")]
GpusOption = Annotated[int | None, typer.Option("--gpus", help="Ranks: GPUs, or CPU processes where there is none.")]
DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--gpus", help="Devices: GPUs, or CPU processes where there is none. [default: all GPUs, else one process]"
    ),
]
TensorParallelOption = Annotated[
    int | None, typer.Option("--tp", help="Devices to each copy of the teacher; the same as teacher.tensor_parallel.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1)]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0)]
SeedOption = Annotated[int, typer.Option("--seed")]
ShardsOption = Annotated[
    str | None, typer.Option("--shards", help="The folder or URL of a shard set. [default: the run's own]")
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["MINICODFORMER_DEBUG"] = "1"


@app.command()
def demo(
    name: Annotated[str, typer.Option("--name", help="The run: runs/NAME.")] = "smollm2-demo",
    gpus: GpusOption = None,
) -> None:
    """The whole path on a real teacher, in minutes.

    Fetches, prepares, caches, distils, evaluates and answers, without a GPU. Run again, it redoes nothing.
    """
    from pipeline.demo import run_demo

    _print(run_demo(name, gpus))


@app.command()
def prepare(
    recipe: RecipeOption = None, name: NameOption = None, data: DataOption = None, overrides: SetOption = None
) -> None:
    """JSONL rows to tokenised samples in data/."""
    from pipeline import steps
    from pipeline.summary import prepare_lines

    chosen, run = _choose(recipe, name, data, overrides)
    _print(prepare_lines(steps.prepare(chosen, run)))


@app.command("teacher-cache")
def teacher_cache(
    recipe: RecipeOption = None,
    name: NameOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    gpus: DevicesOption = None,
    tp: TensorParallelOption = None,
    respond: Annotated[
        str | None,
        typer.Option(
            "--respond",
            metavar="teacher|student=PATH",
            help="Have responses written first; the same as respond.by.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it needs; run nothing.")] = False,
) -> None:
    """Stage one: the teacher, once, into shards.

    Stopped and started again, it goes on with the shards that are not there yet. Several copies of the teacher work at
    once where there are devices for them, on this machine or, with RAY_ADDRESS set, on a Ray cluster.
    """
    from pipeline import steps
    from pipeline.summary import cache_lines

    split = [] if tp is None else [f"teacher.tensor_parallel={tp}"]
    author = [] if respond is None else [f"respond.by={json.dumps(respond, ensure_ascii=False)}"]
    chosen, run = _choose(recipe, name, data, [*(overrides or []), *split, *author])
    if dry_run:
        _print_checks(steps.plan_cache(chosen, run, gpus=gpus))
        return
    _print(cache_lines(steps.teacher_cache(chosen, run, gpus=gpus), run))


@app.command()
def distill(
    recipe: RecipeOption = None,
    name: NameOption = None,
    data: DataOption = None,
    overrides: SetOption = None,
    gpus: GpusOption = None,
    hosts: Annotated[
        Path | None, typer.Option("--hosts", help="Train over machines: a hostfile, `worker-1 slots=4` a line.")
    ] = None,
    shards: ShardsOption = None,
    track: Annotated[str, typer.Option("--track", help="tensorboard, trackio, wandb or none.")] = "tensorboard",
) -> None:
    """Stage two: the student, out of the shards.

    Stopped and started again, it resumes from its newest whole checkpoint.
    """
    from pipeline import steps
    from pipeline.summary import distill_lines

    chosen, run = _choose(recipe, name, data, overrides)
    _print(distill_lines(steps.distill(chosen, run, shards=shards, gpus=gpus, hosts=hosts, tracker=track), run))


@app.command()
def evaluate(name: RunOption = None, shards: ShardsOption = None) -> None:
    """Compare the student with its teacher.

    On the validation split that stage one cached: KL, cross-entropy, agreement, and answers to a few prompts.
    """
    from pipeline import steps
    from pipeline.summary import evaluation_lines

    run = _finished_run(name)
    _print(evaluation_lines(steps.evaluate(run, shards=shards), run))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask. [default: read standard input]")] = None,
    file: Annotated[Path | None, typer.Option(help="Ask every line of this file instead.")] = None,
    name: RunOption = None,
    max_new_tokens: MaxNewTokensOption = 160,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, or every line of a file, with the student."""
    from pipeline import steps
    from pipeline.json_output import json_text

    prompts = [sys.stdin.read() if prompt is None else prompt] if file is None else steps.prompts_of(file)
    answers = steps.generate(
        _finished_run(name), prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if as_json:
        typer.echo(json_text(answers))
        return
    for asked, answer in zip(prompts, answers, strict=True):
        typer.echo(answer.text if file is None else f"> {asked}\n{answer.text}\n")


@app.command()
def chat(
    name: RunOption = None,
    max_new_tokens: MaxNewTokensOption = 160,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Talk with the student: a turn a line, from the keyboard or a pipe.

    /reset forgets what was said; /quit or the end of the input ends.
    """
    from pipeline.conversation import converse

    converse(
        _finished_run(name),
        _turns(),
        lambda text: typer.echo(text, nl=False),
        as_json=as_json,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


@app.command()
def compare(
    name: RunOption = None,
    shards: ShardsOption = None,
    split: Annotated[str, typer.Option(help="dev or train.")] = "dev",
    record: Annotated[int, typer.Option(min=0, help="Which record of the split.")] = 0,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page of all tokens to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Set the student beside its teacher and the label, token by token.

    From the shards, without the teacher: the response coloured by KL, and what either side would have said.
    """
    from pipeline.compare import compare as compare_run

    run = _finished_run(name)
    _print(compare_run(run, shards=shards, split=split, record=record, page=page, as_json=as_json))


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=_run_names, metavar="[RUN | NAME=FOLDER]…", help="[default: the newest finished run]"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MINICODFORMER_API_KEY", help="Ask for this key; the variable hides it from `ps`."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers written together.")] = 64,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for a slot; then 429.")] = 128,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 4096,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for.")] = 1024,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="Time to finish answers when stopped.")] = 30.0,
) -> None:
    """Serve students over HTTP.

    OpenAI's protocol below /v1, a page to chat on at /, the runs at /runs, and /health, /ready and /metrics.
    """
    from pipeline import serving

    serving.serve(
        models or [],
        typer.echo,
        host=host,
        port=port,
        api_key=api_key,
        slots=slots,
        queue=queue,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        drain_seconds=drain_seconds,
    )


@app.command("inspect-shard")
def inspect_shard(
    path: Annotated[str, typer.Argument(help="A .arrow shard, the folder of a shard set, or the URL of either.")],
    sample: Annotated[int | None, typer.Option("--sample", min=0, help="Show this sample too.")] = None,
    positions: Annotated[
        list[int] | None,
        typer.Option("--position", min=0, help="A response token to show. [default: where the teacher was least sure]"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a shard or a set holds.

    Its contract, sizes by part, coverage, entropy and checksums; with --sample, one sample's text and, at some of its
    positions, the teacher's alternatives and what it attended to.
    """
    from pipeline.inspection import inspection_lines

    _print(inspection_lines(path, sample=sample, positions=positions, as_json=as_json))


@app.command("verify-shards")
def verify_shards(
    path: Annotated[str, typer.Argument(help="The folder or URL of a shard set.")],
    set_aside: Annotated[
        bool, typer.Option("--quarantine", help="Set damaged files aside, for stage one to make anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a shard set.

    Exits with 1 where a file is damaged or missing, and names it.
    """
    from pipeline.inspection import verify

    intact, lines = verify(path, set_aside=set_aside, as_json=as_json)
    _print(lines)
    if not intact:
        raise typer.Exit(1)


@app.command("export-shards")
def export_shards(
    path: Annotated[str, typer.Argument(help="The folder or URL of a shard set.")],
    target: Annotated[Path, typer.Argument(help="The folder to write to.")],
    kind: Annotated[str, typer.Option("--to", help="The format: parquet.")] = "parquet",
) -> None:
    """Decode a shard set into files that other tools read.

    One file a shard, every value in a typed column. Stopped and started again, it goes on.
    """
    from pipeline.shard_tools import export

    _print(export(path, target, kind=kind))


@app.command()
def estimate(
    path: Annotated[str, typer.Argument(help="A small shard set, made as the planned one will be.")],
    positions: Annotated[int, typer.Option("--positions", min=1, help="Response tokens of the planned set.")],
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=1e-6, help="Response tokens a second and machine. [default: its run's]"),
    ] = None,
    machines: Annotated[int, typer.Option("--machines", min=1, help="Machines like that of the sample.")] = 1,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of one machine and hour.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell bytes, hours and cost of a planned teacher cache.

    From a few real samples that are cached already, before anything is spent.
    """
    from pipeline.estimate import estimate as tell

    _print(tell(path, positions, rate=rate, machines=machines, price=price, as_json=as_json))


@app.command("import-cache")
def import_cache(
    dump: Annotated[Path, typer.Argument(help="prompt_logprobs of vLLM, one JSON object a line.")],
    target: Annotated[Path, typer.Argument(help="The folder of the set to make.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The model that was dumped: a folder or a hub name.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Ids to keep a position; every position must have them.")],
    thinking: Annotated[
        bool, typer.Option("--thinking", help="The prompts were rendered for a chain of thought.")
    ] = False,
) -> None:
    """Make a shard set of log-probabilities that vLLM dumped.

    The mass outside the kept ids is marked as not known, and losses that need it refuse the set. Stopped and started
    again, it goes on.
    """
    from pipeline.shard_tools import import_cache as import_dump

    _print(import_dump(dump, target, teacher=teacher, k=k, thinking=thinking))


@app.command("copy-shards")
def copy_shards(
    source: Annotated[str, typer.Argument(help="The folder or URL of the set to copy.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
) -> None:
    """Copy a shard set to another folder or object store.

    Every byte is checked on the way. Stopped and started again, it goes on.
    """
    from pipeline.shard_tools import copy

    _print(copy(source, target))


@app.command()
def merge(
    sources: Annotated[list[str], typer.Argument(help="Two or more sets of one teacher.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
) -> None:
    """Make one shard set of several.

    They may differ in their corpus and the tables of their codec only, and no sample may be in two of them. No teacher
    is needed. Stopped and started again, it goes on.
    """
    from pipeline.shard_tools import merge as merge_sets

    _print(merge_sets(sources, target))


@app.command()
def reselect(
    source: Annotated[str, typer.Argument(help="The folder or URL of the set to take it from.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Most ids a position.")],
    mass: Annotated[float | None, typer.Option("--mass", help="Stop at this probability mass.")] = None,
    floor: Annotated[float | None, typer.Option("--floor", help="Keep no id less probable than this.")] = None,
) -> None:
    """Make a shard set that keeps fewer ids a position.

    What is dropped goes back to the tail, its partition curve included; no teacher is needed. Stopped and started
    again, it goes on.
    """
    from pipeline.shard_tools import reselect as reselect_set

    _print(reselect_set(source, target, k=k, mass=mass, floor=floor))


@app.command()
def card(name: RunOption = None) -> None:
    """Write the model card of a finished run.

    From the facts of the run only, into README.md of its final model; what was not measured is said to be absent.
    """
    from pipeline.card import write_card

    typer.echo(f"card       {write_card(_finished_run(name))}")


@app.command("export-model")
def export_model(
    target: Annotated[Path, typer.Argument(help="The folder to make; it must not be there yet.")],
    name: RunOption = None,
) -> None:
    """Copy a finished model to give it away.

    Weights, config, code, tokenizer, generation config and card: a folder that transformers loads by itself.
    """
    from pipeline.export import export_model as export

    _print(export(_finished_run(name), target))


@app.command()
def share(path: Annotated[Path, typer.Argument(help="The folder of a complete shard set.")]) -> None:
    """Write the dataset card of a shard set.

    Sizes, contract, coverage, fidelity where it was measured, licences as far as known, and how to read the set.
    """
    from pipeline.share import share as write

    _print(write(path))


@app.command()
def monitor(
    run: Annotated[
        str | None,
        typer.Argument(autocompletion=_run_names, help="A run's name or folder. [default: the running or newest]"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch a run, live or once.

    Progress, curves, load, warnings and answers; live on a terminal until Ctrl-C, which leaves the run alone, and once
    where the output is no terminal.
    """
    from pipeline.monitor import monitor as watch
    from pipeline.runs import find_run

    _print(watch(find_run(run), once=once, as_json=as_json))


@app.command()
def report(
    run: Annotated[
        str | None,
        typer.Argument(autocompletion=_run_names, help="A run's name or folder. [default: the running or newest]"),
    ] = None,
) -> None:
    """Write a run's report.html anew.

    One self-contained page of its curves and answers; training and evaluation end with it, this is for a look before.
    """
    from pipeline.report import write_report
    from pipeline.runs import find_run

    typer.echo(write_report(find_run(run)))


@app.command("runs")
def list_runs(as_json: JsonOption = False) -> None:
    """List the runs with their state."""
    from pipeline import runs
    from pipeline.json_output import json_text

    found = runs.list_runs(Path("runs"))
    _print([json_text(found)] if as_json else runs.run_lines(found))


@app.command()
def doctor() -> None:
    """Check what this machine has."""
    from pipeline.doctor import examine

    _print_checks(examine())


def _choose(
    recipe: str | None, name: str | None, data: Path | None, overrides: list[str] | None
) -> tuple[Recipe, RunFolder]:
    from pipeline.choose import choose

    choice = choose(recipe, name=name, data=data, overrides=overrides or [])
    typer.echo(choice.why)
    return choice.recipe, choice.run


def _finished_run(name: str | None) -> RunFolder:
    from pipeline import steps
    from pipeline.run import RunFolder

    return steps.newest_run() if name is None else RunFolder(Path("runs") / name)


def _print_checks(checks: Iterable[Check | Row]) -> None:
    """One line a fact; the exit code says whether all are ok."""
    healthy = True
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12} {check.fact}")
        healthy &= check.ok
    if not healthy:
        raise typer.Exit(1)


def _turns() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _explain(error: Exception) -> int:
    """Print what went wrong and what to do about it; the exit code is 2 for usage, 1 for everything else."""
    from pipeline.errors import UsageError

    if os.environ.get("MINICODFORMER_DEBUG"):
        traceback.print_exception(error)
    typer.echo(f"error: {error}", err=True)
    if hint := getattr(error, "hint", _HINTS.get(getattr(error, "errno", None), "")):
        typer.echo(f"hint: {hint}", err=True)
    return 2 if isinstance(error, UsageError) else 1


_HINTS: dict[int | None, str] = {
    errno.ENOSPC: "make room on the disk and run the same command again; what was finished is kept",
    errno.EDQUOT: "free some of your quota and run the same command again; what was finished is kept",
    errno.EACCES: "check who owns the file or folder",
}


def main() -> None:
    """Run the command line; our own errors become `error:` and `hint:` lines instead of tracebacks."""
    from pipeline.errors import PipelineError
    from shards.errors import ShardError
    from stages.errors import StageError

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its start-up remarks are not the user's business
    try:
        app()
    except (PipelineError, StageError, ShardError, OSError) as error:
        sys.exit(_explain(error))
    except SystemExit as stop:
        if stop.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            typer.echo("stopped; run the same command again to go on", err=True)
        raise


if __name__ == "__main__":
    main()
