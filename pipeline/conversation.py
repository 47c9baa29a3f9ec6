"""A conversation with a run's student, turn by turn: what was said stays in the prompt until it is reset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Unpack

from pipeline.asking import UNANSWERABLE, require_sampling
from pipeline.errors import as_usage
from pipeline.run import RunFolder
from pipeline.steps import silence_loading_bars
from stages.inference.settings import SamplingOptions

RESET, END = "/reset", "/quit"


def converse(
    run: RunFolder,
    turns: Iterable[str],
    write: Callable[[str], None],
    *,
    as_json: bool = False,
    **options: Unpack[SamplingOptions],
) -> None:
    """Answer each turn through `write`, in pieces as they come, or as one line of JSON when the answer is whole.

    `/reset` forgets what was said, `/quit` ends, an empty turn says nothing. Raises UsageError for options or a turn
    that mean nothing.
    """
    from stages.corpus.rows import Message
    from stages.inference.generate import Student

    require_sampling(options)
    silence_loading_bars()
    student, said = Student.load(run.final_model), list[Message]()
    for turn in (line.strip() for line in turns):
        if turn == END:
            return
        if turn == RESET:
            said.clear()
        elif turn:
            said.append(Message(role="user", content=turn))
            pieces = []
            with as_usage(UNANSWERABLE):
                answering = student.stream(said, **options)
            for text in answering:
                pieces.append(text)
                if not as_json:
                    write(text)
            answer = "".join(pieces)
            said.append(Message(role="assistant", content=answer))
            facts = {"turn": len(said) // 2, "prompt": turn, "answer": answer}
            write(json.dumps(facts, ensure_ascii=False) + "\n" if as_json else "\n")
