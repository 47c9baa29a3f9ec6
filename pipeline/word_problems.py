"""The demo's text: grade-school word problems with their working, made by the reasoning-gym package.

Rows have the fields of a distilled-reasoning data set. The working loses its last line, which repeats the answer; each
row's score is the package's own verdict on the answer.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pipeline.errors import PipelineError
from stages.events import Emit, Progress

SOURCE = "demo:gsm-symbolic"
"""What corpus.source calls them."""
ROWS = 800
SEED = 0
_DRAWN = 4_300
_MIN_WORKING = 330
"""Characters. Problems worked in several steps: more to learn from a prompt that the teacher has to read."""
_REPORT_EVERY = 100


def write_word_problems(path: Path, emit: Emit) -> None:
    """Write ROWS distinct problems as JSONL; every call writes the same bytes. Raises PipelineError."""
    with path.open("w", encoding="utf-8") as file:
        for number, line in enumerate(islice(_lines(), ROWS), start=1):
            file.write(line)
            if number % _REPORT_EVERY == 0:
                emit(Progress(stage="word problems", done=number, total=ROWS, unit="rows"))


def final_answer(response: str) -> str:
    """What a response comes to: its last line that is not empty, which in these problems is the number alone."""
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _lines() -> Iterator[str]:
    # The package seeds Python's global generator, and one that it uses does not compile without warnings.
    state = random.getstate()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import reasoning_gym

            problems = reasoning_gym.create_dataset("gsm_symbolic", size=_DRAWN, seed=SEED)
    except ImportError as error:
        raise PipelineError(
            f"the demo's text needs a package that is not installed: {error}",
            hint="install the demo's extra (make setup does), or name your own rows with corpus.source",
        ) from error
    finally:
        random.setstate(state)
    asked = set()
    for problem in problems:
        question, answer = problem["question"], problem["answer"]
        working, _, _ = problem["metadata"]["answer_cot"].rpartition("\n#### ")
        if question in asked or len(working) < _MIN_WORKING:
            continue
        asked.add(question)
        row = {
            "input": question,
            "reasoning_content": working,
            "content": answer,
            "repo_name": "reasoning-gym/gsm_symbolic",
            "score": problems.score_answer(answer, problem),
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"
