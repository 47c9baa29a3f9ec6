"""The verbs for a finished student: ask it, compare it, serve it, give it away."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.verbs.options import (
    JsonOption,
    MaxNewTokensOption,
    RunOption,
    SeedOption,
    ShardsOption,
    TemperatureOption,
    TopPOption,
    finished_run,
    print_lines,
    run_names,
)
from stages.inference.server.settings import ServerSettings
from stages.inference.settings import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

_SAMPLING, _SERVER = Sampling(), ServerSettings()  # whose defaults are the options' own


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to ask. [default: read standard input]")] = None,
    file: Annotated[Path | None, typer.Option(help="Ask every line of this file instead.")] = None,
    name: RunOption = None,
    max_new_tokens: MaxNewTokensOption = _SAMPLING.max_new_tokens,
    temperature: TemperatureOption = _SAMPLING.temperature,
    top_p: TopPOption = _SAMPLING.top_p,
    seed: SeedOption = _SAMPLING.seed,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt, or every line of a file, with the student."""
    from pipeline import asking
    from pipeline.errors import UsageError
    from pipeline.json_output import json_text

    if prompt is not None and file is not None:
        raise UsageError("a prompt and --file cannot both be given", hint="leave one of them out")
    if file is not None:
        prompts = asking.prompts_of(file)
    else:
        prompts = [asking.text_of(sys.stdin.read if prompt is None else lambda: prompt)]
    answers = asking.generate(
        finished_run(name), prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if as_json:
        typer.echo(json_text(answers))
        return
    for asked, answer in zip(prompts, answers, strict=True):
        typer.echo(answer.text if file is None else f"> {asked}\n{answer.text}\n")


def chat(
    name: RunOption = None,
    max_new_tokens: MaxNewTokensOption = _SAMPLING.max_new_tokens,
    temperature: TemperatureOption = _SAMPLING.temperature,
    top_p: TopPOption = _SAMPLING.top_p,
    seed: SeedOption = _SAMPLING.seed,
    as_json: JsonOption = False,
) -> None:
    """Talk with the student: a turn a line, from the keyboard or a pipe.

    /reset forgets what was said; /quit or the end of the input ends.
    """
    from pipeline.conversation import converse

    converse(
        finished_run(name),
        _turns(),
        lambda text: typer.echo(text, nl=False),
        as_json=as_json,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def compare(
    name: RunOption = None,
    shards: ShardsOption = None,
    split: Annotated[str, typer.Option(help="validation or train.")] = "validation",
    record: Annotated[int, typer.Option(min=0, help="Which record of the split.")] = 0,
    page: Annotated[Path | None, typer.Option("--html", help="Write a page of all tokens to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Set the student beside its teacher and the label, token by token.

    From the shards, without the teacher: the response coloured by KL, and what either side would have said.
    """
    from pipeline.compare import compare as compare_run
    from pipeline.errors import UsageError

    if page is not None and as_json:
        raise UsageError("--html and --json cannot both be given", hint="leave one of them out")
    run = finished_run(name)
    print_lines(compare_run(run, shards=shards, split=split, record=record, page=page, as_json=as_json))


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            autocompletion=run_names, metavar="[RUN | NAME=FOLDER]…", help="[default: the newest finished run]"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = _SERVER.host,
    port: Annotated[int, typer.Option(help="0 is any free one.")] = _SERVER.port,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="MINICODFORMER_API_KEY", help="Ask for this key; the variable hides it from `ps`."),
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers written together.")] = _SERVER.slots,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait for a slot; then 429.")] = _SERVER.queue,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = _SERVER.max_prompt_tokens,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer that may be asked for.")
    ] = _SERVER.max_new_tokens,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="Time to finish answers when stopped.")
    ] = _SERVER.drain_seconds,
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


def card(name: RunOption = None) -> None:
    """Write the model card of a finished run.

    From the facts of the run only, into README.md of its final model; what was not measured is said to be absent.
    """
    from pipeline.card import write_card

    typer.echo(f"card       {write_card(finished_run(name))}")


def export_model(
    target: Annotated[Path, typer.Argument(help="The folder to make; it must not be there yet.")],
    name: RunOption = None,
) -> None:
    """Copy a finished model to give it away.

    Weights, config, code, tokenizer, generation config and card: a folder that transformers loads by itself.
    """
    from pipeline.export import export_model as export

    print_lines(export(finished_run(name), target))


def _turns() -> Iterator[str]:
    from pipeline.asking import text_of

    while True:
        try:
            yield text_of(lambda: input("> " if sys.stdin.isatty() else ""))
        except EOFError:
            return
