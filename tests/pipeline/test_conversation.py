"""The student asked on the command line: turn by turn with history, from a file, as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.asking import generate, prompts_of, text_of
from pipeline.conversation import converse
from pipeline.errors import UsageError
from pipeline.run import RunFolder
from stages.corpus.rows import Message
from stages.corpus.tokenizer import ChatTokenizer, RefusedByTemplate
from stages.inference.generate import SamplingOptions, Student

DRAWN: SamplingOptions = {"max_new_tokens": 9, "temperature": 1.0, "seed": 4}
CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


def said(run: Path, *turns: str, as_json: bool = False) -> str:
    written: list[str] = []
    converse(RunFolder(run), turns, written.append, as_json=as_json, **DRAWN)
    return "".join(written)


def test_what_was_said_stays_in_the_prompt_until_it_is_reset(finished_run: Path) -> None:
    student = Student.load(finished_run / "final_model")
    first = student.chat([Message(role="user", content="one")], **DRAWN).text
    history = [("user", "one"), ("assistant", first), ("user", "two")]
    second = student.chat([Message(role=role, content=text) for role, text in history], **DRAWN).text
    alone = student.chat([Message(role="user", content="two")], **DRAWN).text
    assert second != alone, "an answer that does not depend on history would prove nothing"
    assert said(finished_run, "one", "", "two") == f"{first}\n{second}\n"
    assert said(finished_run, "one", "/reset", "two") == f"{first}\n{alone}\n"


def test_nothing_is_answered_after_the_end(finished_run: Path) -> None:
    assert said(finished_run, "/quit", "one") == ""


def test_a_turn_is_a_line_of_json(finished_run: Path) -> None:
    turns = [json.loads(line) for line in said(finished_run, "one", "two", as_json=True).splitlines()]
    assert [(turn["turn"], turn["prompt"]) for turn in turns] == [(1, "one"), (2, "two")]


def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(UsageError, match="holds no prompt"):
        prompts_of(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        prompts_of(file)

    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        prompts_of(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.0}, {"seed": -1}, {"seed": 10**20}, {"temperature": float("inf")}, {"temperature": float("nan")}],
)
def test_options_that_mean_nothing_are_refused_before_a_model_is_read(
    options: SamplingOptions, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Student, "load", lambda *_: pytest.fail("the model was read"))
    for ask in (
        lambda: generate(RunFolder(finished_run), ["one"], **options),
        lambda: converse(RunFolder(finished_run), ["one"], print, **options),
    ):
        with pytest.raises(UsageError, match=next(iter(options))) as caught:
            ask()
        assert caught.value.hint


def test_a_prompt_that_is_no_text_is_refused() -> None:
    assert text_of(lambda: "多少？") == "多少？"
    for read in (b"\xff".decode, lambda: os.fsdecode(b"\xff")):
        with pytest.raises(UsageError, match="not UTF-8 text"):
            text_of(read)


def test_a_prompt_that_the_chat_template_refuses_is_a_usage_error(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RefusedByTemplate("roles must alternate")

    monkeypatch.setattr(ChatTokenizer, "encode_prompts", refuse)
    for ask in (lambda: generate(RunFolder(finished_run), ["one"]), lambda: said(finished_run, "one")):
        with pytest.raises(UsageError, match="refuses this prompt: roles must alternate"):
            ask()


def test_the_command_line_answers_a_file_as_json_and_a_pipe_turn_by_turn(finished_run: Path) -> None:
    user = finished_run.parent.parent
    (user / "prompts.txt").write_text("one\n\ntwo\n", encoding="utf-8")

    def run(*words: str, asked: str = "") -> str:
        done = subprocess.run(
            [sys.executable, str(CLI), *words, *("--max-new-tokens", "9", "--temperature", "1", "--seed", "4")],
            cwd=user,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            input=asked,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    student = Student.load(finished_run / "final_model")
    answers = json.loads(run("generate", "--file", "prompts.txt", "--json"))
    assert [answer["text"] for answer in answers] == [a.text for a in student.generate(["one", "two"], **DRAWN)]
    turns = [json.loads(line) for line in run("chat", "--json", asked="one\n/reset\ntwo\n").splitlines()]
    assert [turn["answer"] for turn in turns] == [
        student.chat([Message(role="user", content=text)], **DRAWN).text for text in ("one", "two")
    ]
    assert all(turn["answer"] for turn in turns)
