"""The verbs that look at runs and at this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.verbs.options import JsonOption, print_checks, print_lines, run_names


def monitor(
    run: Annotated[
        str | None,
        typer.Argument(autocompletion=run_names, help="A run's name or folder. [default: the running or newest]"),
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

    print_lines(watch(find_run(run), once=once, as_json=as_json))


def report(
    run: Annotated[
        str | None,
        typer.Argument(autocompletion=run_names, help="A run's name or folder. [default: the running or newest]"),
    ] = None,
) -> None:
    """Write a run's report.html anew.

    One self-contained page of its curves and answers; training and evaluation end with it, this is for a look before.
    """
    from pipeline.report import write_report
    from pipeline.runs import find_run

    typer.echo(write_report(find_run(run)))


def list_runs(as_json: JsonOption = False) -> None:
    """List the runs with their state."""
    from pipeline import runs
    from pipeline.json_output import json_text
    from pipeline.run import RUNS

    found = runs.list_runs(RUNS)
    print_lines([json_text(found)] if as_json else runs.run_lines(found))


def doctor() -> None:
    """Check what this machine has."""
    from pipeline.doctor import examine

    print_checks(examine())
