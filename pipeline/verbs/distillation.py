"""The verbs of the two stages: from rows to a student that is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.verbs.options import (
    DataOption,
    DevicesOption,
    GpusOption,
    NameOption,
    RecipeOption,
    RunOption,
    SetOption,
    ShardsOption,
    TensorParallelOption,
    chosen_run,
    finished_run,
    print_checks,
    print_lines,
)


def demo(
    name: Annotated[str, typer.Option("--name", help="The run: runs/NAME.")] = "smollm2-demo",
    gpus: GpusOption = None,
) -> None:
    """The whole path on a real teacher, in minutes.

    Fetches, prepares, caches, distils, evaluates and answers, without a GPU. Run again, it redoes nothing.
    """
    from pipeline.demo import run_demo

    print_lines(run_demo(name, gpus))


def prepare(
    recipe: RecipeOption = None, name: NameOption = None, data: DataOption = None, overrides: SetOption = None
) -> None:
    """JSONL rows to tokenised samples in data/."""
    from pipeline import steps
    from pipeline.summary import prepare_lines

    chosen, run = chosen_run(recipe, name, data, overrides)
    print_lines(prepare_lines(steps.prepare(chosen, run)))


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
    shards: Annotated[
        str | None, typer.Option("--shards", help="The folder or URL of the set to make. [default: the run's own]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it needs; run nothing.")] = False,
) -> None:
    """Stage one: the teacher, once, into shards.

    Stopped and started again, it goes on with the shards that are not there yet. Several copies of the teacher work at
    once where there are devices for them, on this machine or, with RAY_ADDRESS set, on a Ray cluster.

    The set may lie in an object store: --shards s3://bucket/name, and the same for distill.
    """
    from pipeline import steps
    from pipeline.summary import cache_lines

    split = [] if tp is None else [f"teacher.tensor_parallel={tp}"]
    author = [] if respond is None else [f"respond.by={json.dumps(respond, ensure_ascii=False)}"]
    chosen, run = chosen_run(recipe, name, data, [*(overrides or []), *split, *author])
    if dry_run:
        print_checks(steps.plan_cache(chosen, run, gpus=gpus, shards=shards))
        return
    print_lines(cache_lines(steps.teacher_cache(chosen, run, gpus=gpus, shards=shards)))


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
    track: Annotated[
        str, typer.Option("--track", help="tensorboard, none, or, once it is installed, wandb or trackio.")
    ] = "tensorboard",
) -> None:
    """Stage two: the student, out of the shards.

    Stopped and started again, it resumes from its newest whole checkpoint.
    """
    from pipeline import steps
    from pipeline.summary import distill_lines

    chosen, run = chosen_run(recipe, name, data, overrides)
    print_lines(distill_lines(steps.distill(chosen, run, shards=shards, gpus=gpus, hosts=hosts, tracker=track), run))


def evaluate(
    name: RunOption = None,
    shards: ShardsOption = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="The split to measure: validation or train; with --shards, of another set."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Measure on the rows of this JSONL, which no teacher has read.")
    ] = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Load the teacher too: KL over the whole vocabulary.")
    ] = False,
) -> None:
    """Compare the student with its teacher.

    On the validation split that stage one cached: KL, cross-entropy, agreement, and answers to prompts. With --split
    or --data, on other text instead: a split of any set of the student's tokenizer (--shards), or plain rows.
    """
    from pipeline import evaluation
    from pipeline.errors import UsageError
    from pipeline.summary import elsewhere_lines, evaluation_lines

    if data is not None and (split or shards):
        raise UsageError("--data is measured by itself", hint="leave --split and --shards out")
    run = finished_run(name)
    if data is not None:
        print_lines(elsewhere_lines(evaluation.evaluate_rows(run, data, teacher=teacher), run))
    elif split is not None:
        facts = evaluation.evaluate_split(run, shards=shards, split=split, teacher=teacher)
        print_lines(elsewhere_lines(facts, run))
    else:
        print_lines(evaluation_lines(evaluation.evaluate(run, shards=shards, teacher=teacher), run))
