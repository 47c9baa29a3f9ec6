"""What a student is asked on the command line, checked at the edge: prompts, and how they are to be answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from pipeline.errors import UsageError, as_usage
from pipeline.run import RunFolder
from pipeline.steps import silence_loading_bars
from stages.inference.settings import Sampling, SamplingOptions

if TYPE_CHECKING:
    from stages.inference.generate import Generation

UNANSWERABLE = "ask something else: the chat template of the student's teacher does not take this"


def generate(run: RunFolder, prompts: Sequence[str], **options: Unpack[SamplingOptions]) -> list[Generation]:
    """Answer prompts with the student of a finished run. Raises UsageError."""
    from stages.inference.generate import Student

    require_sampling(options)
    silence_loading_bars()
    student = Student.load(run.final_model)
    with as_usage(UNANSWERABLE):
        return student.generate(prompts, **options)


def require_sampling(options: SamplingOptions) -> None:
    """Raises UsageError for options that mean nothing, before a model is loaded or anything is typed."""
    with as_usage("leave the option out to take its default"):
        Sampling(**options)


def text_of(read: Callable[[], str]) -> str:
    """What was typed, piped or given as an argument. Raises UsageError where it is not UTF-8."""
    try:
        text = read()
        text.encode()  # foreign bytes of an argument are there as halves of characters
    except UnicodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: {error}", hint="ask in UTF-8") from error
    return text


def prompts_of(file: Path) -> list[str]:
    """The lines of a file that are not blank. Raises UsageError where there is none, or where it is not text."""
    hint = "name a text file with a prompt a line"
    try:
        prompts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error}", hint=hint) from error
    if not prompts:
        raise UsageError(f"{file} holds no prompt", hint="write a prompt a line")
    return prompts
