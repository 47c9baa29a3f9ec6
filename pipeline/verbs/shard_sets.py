"""The verbs for shard sets: look, check, plan, convert, give away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.plan import Assumptions, told
from pipeline.verbs.options import JsonOption, print_lines

_ASSUMED = Assumptions()  # whose defaults are the options' own


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
    from pipeline.errors import UsageError
    from pipeline.inspection import inspection_lines

    if positions and sample is None:
        raise UsageError("--position shows a token of a sample", hint="name the sample too: --sample 0")
    print_lines(inspection_lines(path, sample=sample, positions=positions, as_json=as_json))


def verify_shards(
    path: Annotated[str, typer.Argument(help="The folder or URL of a shard set.")],
    set_aside: Annotated[
        bool, typer.Option("--quarantine", help="Set damaged files aside, for what made the set to make anew.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a shard set.

    Exits with 1 where a file is damaged or missing, and names it.
    """
    from pipeline.inspection import verify

    intact, lines = verify(path, set_aside=set_aside, as_json=as_json)
    print_lines(lines)
    if not intact:
        raise typer.Exit(1)


def export_shards(
    path: Annotated[str, typer.Argument(help="The folder or URL of a shard set.")],
    target: Annotated[str, typer.Argument(help="The folder to write to.")],
    kind: Annotated[str, typer.Option("--to", help="The format: parquet.")] = "parquet",
) -> None:
    """Decode a shard set into files that other tools read.

    One file a shard, every value in a typed column. Stopped and started again, it goes on.
    """
    from pipeline.shard_tools import export

    print_lines(export(path, target, kind=kind))


def estimate(
    context: typer.Context,
    path: Annotated[str | None, typer.Argument(help="A small shard set, made as the planned one will be.")] = None,
    positions: Annotated[
        int | None, typer.Option("--positions", min=1, help="Response tokens of the planned set.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            min=1e-6,
            help="Response tokens a second and machine. [default: its run's, loading the teacher included]",
        ),
    ] = None,
    machines: Annotated[int, typer.Option("--machines", min=1, help="Machines like that of the sample.")] = 1,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of one machine and hour.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="No set: both stages for Qwen3-8B on GPUs, on paper.")] = False,
    peak: Annotated[
        float, typer.Option("--peak", help="With --plan: bf16 TFLOP/s of one GPU, assumed.")
    ] = _ASSUMED.peak,
    utilisation: Annotated[
        float, typer.Option("--utilisation", help="With --plan: prefill's share of it.")
    ] = _ASSUMED.utilisation,
    store: Annotated[
        float, typer.Option("--store", help="With --plan: GB/s of a machine's object store.")
    ] = _ASSUMED.store,
    as_json: JsonOption = False,
) -> None:
    """Tell bytes, hours and cost of a planned teacher cache.

    From a few real samples that are cached already, before anything is spent. With --plan, from the committed
    benchmarks and stated assumptions: Qwen3-8B on 1, 8 and 64 GPUs, 1 and 100 billion response tokens, and what each
    stage waits for.
    """
    from pipeline.errors import UsageError
    from pipeline.estimate import estimate as tell

    of_set, of_plan = ("path", "positions", "rate", "machines", "price"), ("peak", "utilisation", "store")
    if void := [name for name in (of_set if plan else of_plan) if _was_given(context, name)]:
        words = " and ".join("a shard set" if name == "path" else f"--{name}" for name in void)
        raise UsageError(f"{words} can say nothing {'with' if plan else 'without'} --plan", hint="leave out either")
    if plan:
        print_lines(told(Assumptions(peak=peak, utilisation=utilisation, store=store), as_json=as_json))
    elif path is None or positions is None:
        raise UsageError("an estimate takes a shard set and --positions", hint="or --plan, which takes neither")
    else:
        print_lines(tell(path, positions, rate=rate, machines=machines, price=price, as_json=as_json))


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether an option was typed, be it as its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def import_cache(
    dump: Annotated[Path, typer.Argument(help="A JSONL of vLLM's prompt_logprobs, or DistillKit's folder.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
    teacher: Annotated[str, typer.Option("--teacher", help="The model that was dumped: a folder or a hub name.")],
    k: Annotated[int, typer.Option("--k", min=1, help="Ids to keep a position; every position must have them.")],
    thinking: Annotated[
        bool, typer.Option("--thinking", help="The prompts were rendered for a chain of thought.")
    ] = False,
) -> None:
    """Make a shard set of log-probabilities that vLLM dumped, or DistillKit wrote as Parquet.

    The mass outside the kept ids is marked as not known, and losses that need it refuse the set. Stopped and started
    again, it goes on. What a line of the JSONL holds: docs/teacher_cache.md.
    """
    from pipeline.shard_tools import import_cache as import_dump

    print_lines(import_dump(dump, target, teacher=teacher, k=k, thinking=thinking))


def copy_shards(
    source: Annotated[str, typer.Argument(help="The folder or URL of the set to copy.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
) -> None:
    """Copy a shard set to another folder or object store.

    Every byte is checked on the way. Stopped and started again, it goes on.
    """
    from pipeline.shard_tools import copy

    print_lines(copy(source, target))


def merge(
    sources: Annotated[list[str], typer.Argument(help="Two or more sets of one teacher.")],
    target: Annotated[str, typer.Argument(help="The folder or URL of the set to make.")],
) -> None:
    """Make one shard set of several.

    They may differ in their corpus and the tables of their codec only, and no sample may be in two of them. Prompts
    that validate in one and are trained on in another are counted. No teacher is needed. Stopped and started again, it
    goes on.
    """
    from pipeline.shard_tools import merge as merge_sets

    print_lines(merge_sets(sources, target))


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

    print_lines(reselect_set(source, target, k=k, mass=mass, floor=floor))


def share(path: Annotated[str, typer.Argument(help="The folder of a complete shard set.")]) -> None:
    """Write the dataset card of a shard set.

    Sizes, contract, coverage, fidelity where it was measured, licences as far as known, and how to read the set.
    """
    from pipeline.share import share as write

    print_lines(write(path))
