"""What the verbs share: the options that several take, the run they mean, and how they print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.recipe import Recipe
    from pipeline.run import RunFolder
    from stages.checks import Check


def _recipe_names() -> list[str]:
    from pipeline.recipe import shipped

    return list(shipped())


def run_names() -> list[str]:
    from pipeline.run import RUNS

    return sorted(path.parent.name for path in RUNS.glob("*/recipe.toml"))


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        autocompletion=_recipe_names,
        help="A shipped recipe or a TOML file. "
        "[default: the run's own; for a new run qwen3-8b with a GPU, else smollm2-demo]",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", autocompletion=run_names, help="The run: runs/NAME. [default: the recipe's name]"),
]
RunOption = Annotated[
    str | None,
    typer.Option("--name", autocompletion=run_names, help="A run's name or folder. [default: the newest finished run]"),
]
DataOption = Annotated[Path | None, typer.Option("--data", help="A JSONL file; the same as --set corpus.source=…")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value.")]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        help="Ranks: GPUs, or CPU processes where there is none. [default: of all GPUs, else of two processes, as many "
        "as share the global batch]",
    ),
]
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
TopPOption = Annotated[
    float, typer.Option("--top-p", max=1.0, help="Draw among the likeliest tokens that reach this mass; above 0.")
]
SeedOption = Annotated[int, typer.Option("--seed")]
ShardsOption = Annotated[
    str | None, typer.Option("--shards", help="The folder or URL of a shard set. [default: the run's own]")
]


def chosen_run(
    recipe: str | None, name: str | None, data: Path | None, overrides: list[str] | None
) -> tuple[Recipe, RunFolder]:
    from pipeline.choose import choose

    choice = choose(recipe, name=name, data=data, overrides=overrides or [])
    typer.echo(choice.why)
    return choice.recipe, choice.run


def finished_run(name: str | None) -> RunFolder:
    from pipeline import runs

    return runs.finished_run(name)


def print_checks(checks: Iterable[Check]) -> None:
    """One line a fact; the exit code says whether all are ok."""
    healthy = True
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<12} {check.fact}")
        healthy &= check.ok
    if not healthy:
        raise typer.Exit(1)


def print_lines(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
