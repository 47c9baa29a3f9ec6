"""What writes a run's responses: `python -m pipeline.responses RUN`, a process of its own, whose memory ends with it.

The run's lock is held by whoever started it; its recipe says who writes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from pipeline.assets import teacher_folder
from pipeline.explanation import EXPLAINED, exit_code, explained
from pipeline.recipe import Recipe
from pipeline.run import RunFolder
from pipeline.sinks import listening
from shards.durable import file_sha256
from stages.corpus.store import Corpus, read_corpus
from stages.errors import StageError
from stages.events import Emit
from stages.inference.generate import Student
from stages.teacher_cache.engines.vllm.generation import VllmAuthor
from stages.teacher_cache.preflight import require_fits
from stages.teacher_cache.respond import Author, respond
from stages.teacher_cache.settings import RespondSettings
from stages.teacher_cache.teacher import weights_fingerprint


class StudentAuthor:
    """A finished student as an author."""

    def __init__(self, student: Student, settings: RespondSettings, end_token_id: int, *, context: int) -> None:
        """`context` is the teacher's, which is to read prompt and response."""
        self._student, self._settings, self._end, self._context = student, settings, end_token_id, context

    def write(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
        """See Author. A prompt that leaves no room in the teacher's context gets no response."""
        answers = self._student.generate_from_ids(
            prompts,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            seed=seed,
        )
        responses = [
            [*answer.token_ids, self._end] if answer.finish_reason == "stop" else list(answer.token_ids)
            for answer in answers
        ]
        return [
            response[: max(0, self._context - len(prompt))] for prompt, response in zip(prompts, responses, strict=True)
        ]

    def close(self) -> None:
        pass


def write_responses(recipe: Recipe, corpus: Corpus, teacher: Path, out: Path, emit: Emit) -> Corpus:
    """The corpus with the responses that the recipe asks for. Raises StageError."""
    if recipe.respond.student:  # what it writes joins the corpus's own
        require_fits(corpus, recipe.teacher, recipe.cache, teacher)
    identity, author = _author(recipe, corpus, teacher)
    return respond(corpus=corpus, settings=recipe.respond, identity=identity, author=author, out=out, emit=emit)


def _author(recipe: Recipe, corpus: Corpus, teacher: Path) -> tuple[str, Callable[[], Author]]:
    settings = recipe.respond
    if not settings.student:
        return f"teacher {weights_fingerprint(teacher)}", lambda: VllmAuthor(
            teacher, recipe.teacher, settings, corpus.end_token_id
        )
    weights = Path(settings.student) / "model.safetensors"
    if not weights.is_file():
        raise StageError(f"no student in {settings.student}", hint="name the final_model folder of a finished run")
    return f"student {file_sha256(weights)}", lambda: StudentAuthor(
        Student.load(Path(settings.student)), settings, corpus.end_token_id, context=recipe.teacher.max_model_len
    )


def main() -> None:
    run, processed = RunFolder(Path(sys.argv[1])), Path(sys.argv[2])
    disable_progress_bar()  # of transformers, for a moment's reading
    try:
        with listening(run.events) as emit:
            recipe = run.recipe()
            teacher = teacher_folder(recipe.teacher.model, recipe.teacher.revision, emit)
            write_responses(recipe, read_corpus(processed), teacher, run.responses, emit)
    except EXPLAINED as error:
        print(*explained(error), sep="\n", file=sys.stderr)  # noqa: T201
        sys.exit(exit_code(error))


if __name__ == "__main__":
    main()
