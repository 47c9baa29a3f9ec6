#!/usr/bin/env python3
"""The command line of MiniCodformer: its verbs, and how an error is told. What a verb does is in pipeline/verbs."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.verbs import distillation, shard_sets, student, watching

if TYPE_CHECKING:
    from collections.abc import Callable

VERBS: dict[str, Callable[..., None]] = {
    "demo": distillation.demo,
    "prepare": distillation.prepare,
    "teacher-cache": distillation.teacher_cache,
    "distill": distillation.distill,
    "evaluate": distillation.evaluate,
    "generate": student.generate,
    "chat": student.chat,
    "compare": student.compare,
    "serve": student.serve,
    "card": student.card,
    "export-model": student.export_model,
    "inspect-shard": shard_sets.inspect_shard,
    "verify-shards": shard_sets.verify_shards,
    "export-shards": shard_sets.export_shards,
    "estimate": shard_sets.estimate,
    "import-cache": shard_sets.import_cache,
    "copy-shards": shard_sets.copy_shards,
    "merge": shard_sets.merge,
    "reselect": shard_sets.reselect,
    "share": shard_sets.share,
    "monitor": watching.monitor,
    "report": watching.report,
    "runs": watching.list_runs,
    "doctor": watching.doctor,
}

app = typer.Typer(
    name="minicodformer",
    help="Offline knowledge distillation: a teacher once into shards, a liquid student many times out of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for word, verb in VERBS.items():
    app.command(word)(verb)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["MINICODFORMER_DEBUG"] = "1"


def main() -> None:
    """Run the command line; our own errors become `error:` and `hint:` lines instead of tracebacks."""
    from pipeline.explanation import EXPLAINED, exit_code, explained

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its start-up remarks are not the user's business
    try:
        app()
    except EXPLAINED as error:
        if os.environ.get("MINICODFORMER_DEBUG"):
            traceback.print_exception(error)
        for line in explained(error):
            typer.echo(line, err=True)
        sys.exit(exit_code(error))
    except SystemExit as stop:
        if stop.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            typer.echo("stopped; run the same command again to go on", err=True)
        raise


if __name__ == "__main__":
    main()
