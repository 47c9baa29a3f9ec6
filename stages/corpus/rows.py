"""One line of a JSONL file becomes a conversation, or says exactly why it cannot.

Two kinds of row are read: distilled reasoning (`input`, `reasoning_content`, `content`, optional `score`) and chat
(`messages`; the last assistant turn is the answer, everything before it the prompt). Any bytes give a `Conversation`
or a `BrokenRow`, nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn

ROLES = ("system", "user", "assistant", "tool")


class BrokenRow(ValueError):
    """A line that holds no usable example; the message is the reason, for the rejects file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A prompt and its answer. No text is empty, but `reasoning` may be."""

    prompt: tuple[Message, ...]
    reasoning: str
    answer: str
    score: float | None = None

    def without_reasoning(self) -> Conversation:
        return dataclasses.replace(self, reasoning="")

    def texts(self) -> tuple[str, ...]:
        return (*(message.content for message in self.prompt), self.reasoning, self.answer)

    def prompt_key(self) -> int:
        """64 bits of sha256 over the prompt: rows that ask the same share it."""
        return _digest64([_turns(self.prompt)])

    def sample_key(self) -> int:
        """64 bits of sha256 over prompt and answer; the score is not part of what is learnt."""
        return _digest64([_turns(self.prompt), self.reasoning, self.answer])


def _turns(messages: tuple[Message, ...]) -> list[list[str]]:
    return [[message.role, message.content] for message in messages]


def _digest64(canonical: list[Any]) -> int:
    text = json.dumps(canonical, ensure_ascii=False, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def parse_row(line: bytes) -> Conversation:
    """Read one line. Raises BrokenRow, whatever the bytes are."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise BrokenRow(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise BrokenRow("not JSON: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BrokenRow(f"not JSON: {error.msg} at column {error.colno}") from error
    except BrokenRow:
        raise
    except ValueError as error:
        raise BrokenRow(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BrokenRow(f"a row must be an object, not {_kind(row)}")
    score = _score(row)
    if "messages" in row:
        return _chat(row["messages"], score)
    if "input" in row or "content" in row:
        prompt = (Message(role="user", content=_text(row, "input")),)
        reasoning, answer = _answer(row)
        return Conversation(prompt=prompt, reasoning=reasoning, answer=answer, score=score)
    raise BrokenRow("neither `messages` nor `input` and `content`")


def _chat(turns: Any, score: float | None) -> Conversation:
    if not isinstance(turns, list):
        raise BrokenRow(f"`messages` must be a list, not {_kind(turns)}")
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BrokenRow(f"messages[{index}] must be an object, not {_kind(turn)}")
        if turn.get("role") not in ROLES:
            raise BrokenRow(f"messages[{index}]: `role` must be one of {', '.join(ROLES)}")
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BrokenRow("`messages` holds no assistant turn")
    before = turns[: answers[-1]]
    if not any(turn["role"] == "user" for turn in before):
        raise BrokenRow("no user turn before the answer")
    prompt = tuple(
        Message(role=turn["role"], content=_text(turn, "content", f"messages[{index}]: "))
        for index, turn in enumerate(before)
    )
    reasoning, answer = _answer(turns[answers[-1]], f"messages[{answers[-1]}]: ")
    return Conversation(prompt=prompt, reasoning=reasoning, answer=answer, score=score)


def _answer(holder: dict[str, Any], where: str = "") -> tuple[str, str]:
    """Reasoning and answer; reasoning in tags at the head of the content is taken out of it."""
    content = _text(holder, "content", where)
    reasoning = _optional_text(holder, "reasoning_content", where)
    if content.startswith("<think>") and "</think>" in content:
        tagged, _, content = content.removeprefix("<think>").partition("</think>")
        reasoning, content = reasoning or tagged.strip(), content.strip()
        if not content:
            raise BrokenRow(f"{where}`content` holds reasoning and no answer")
    return reasoning, content


def _text(holder: dict[str, Any], name: str, where: str = "") -> str:
    if name not in holder:
        raise BrokenRow(f"{where}`{name}` is missing")
    value = holder[name]
    if not isinstance(value, str):
        raise BrokenRow(f"{where}`{name}` must be a string, not {_kind(value)}")
    if "\0" in value:
        raise BrokenRow(f"{where}`{name}` holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BrokenRow(f"{where}`{name}` holds half of a surrogate pair at character {error.start}") from error
    value = value.strip()
    if not value:
        raise BrokenRow(f"{where}`{name}` is empty")
    return value


def _optional_text(holder: dict[str, Any], name: str, where: str) -> str:
    """The text, or "" where the row leaves it out, null or blank: an answer without reasoning is an example too."""
    value = holder.get(name)
    blank = value is None or (isinstance(value, str) and not value.strip())
    return "" if blank else _text(holder, name, where)


def _score(row: dict[str, Any]) -> float | None:
    value = row.get("score")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BrokenRow(f"`score` must be a number, not {_kind(value)}")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise BrokenRow("`score` is not finite")
    return score


def _refuse_constant(name: str) -> NoReturn:
    raise BrokenRow(f"not JSON: {name} is no JSON number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
