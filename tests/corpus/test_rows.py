from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.corpus.rows import BrokenRow, Conversation, Message, parse_row

ROW = {"input": "why?", "reasoning_content": "because …", "content": "so.", "repo_name": "r", "score": 8}
CHAT = {"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_distilled_row_is_read_with_its_reasoning_and_score() -> None:
    assert parse_row(encoded(ROW)) == Conversation(
        prompt=(Message(role="user", content="why?"),), reasoning="because …", answer="so.", score=8.0
    )


def test_a_chat_row_answers_with_its_last_assistant_turn() -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "二"},
        {"role": "assistant", "content": "two", "reasoning_content": "after one"},
        {"role": "user", "content": "left without an answer"},
    ]
    row = parse_row(json.dumps({"messages": turns}, ensure_ascii=False).encode())
    assert [message.content for message in row.prompt] == ["be brief", "一", "one", "二"]
    assert (row.reasoning, row.answer, row.score) == ("after one", "two", None)


def test_reasoning_in_tags_at_the_head_of_the_content_is_taken_out_of_it() -> None:
    row = parse_row(encoded({"input": "why?", "content": "<think>\nhm\n</think>\n\nso."}))
    assert (row.reasoning, row.answer) == ("hm", "so.")


@pytest.mark.parametrize("reasoning", [None, "", " \n"])
def test_an_answer_without_reasoning_is_an_example(reasoning: str | None) -> None:
    assert parse_row(encoded(ROW | {"reasoning_content": reasoning})).reasoning == ""


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8: invalid start byte at byte 0"),
        (b"[" * 200_000, "not JSON: nested too deeply"),
        (b'{"score": ' + b"9" * 5_000 + b"}", "not JSON"),
        (b"[1]", "must be an object, not a list"),
        (b'{"a": 1}', "neither `messages` nor"),
        (encoded(ROW).replace(b"8", b"NaN"), "NaN is no JSON number"),
        (encoded(ROW).replace(b"8", b"1e999"), "`score` is not finite"),
        (encoded(ROW).replace(b"8", b"9" * 400), "`score` is not finite"),
        (encoded(ROW | {"score": True}), "`score` must be a number, not a boolean"),
        (encoded(ROW | {"score": "8"}), "`score` must be a number, not a string"),
        (encoded({key: value for key, value in ROW.items() if key != "input"}), "`input` is missing"),
        (encoded(ROW | {"content": " \n\t"}), "`content` is empty"),
        (encoded(ROW | {"content": None}), "`content` must be a string, not null"),
        (encoded(ROW | {"input": ["why?"]}), "`input` must be a string, not a list"),
        (encoded(ROW | {"reasoning_content": 3}), "`reasoning_content` must be a string, not a number"),
        (encoded(ROW | {"input": "a\0b"}), "`input` holds a NUL character"),
        (encoded(ROW | {"content": "a\ud800b"}), "`content` holds half of a surrogate pair at character 1"),
        (encoded(ROW | {"content": "<think>x</think> "}), "holds reasoning and no answer"),
        (encoded({"messages": {}}), "`messages` must be a list, not an object"),
        (encoded({"messages": []}), "no assistant turn"),
        (encoded({"messages": ["hi"]}), "messages[0] must be an object, not a string"),
        (encoded({"messages": CHAT["messages"][1:]}), "no user turn before the answer"),
        (encoded({"messages": [{"role": "robot", "content": "x"}]}), "messages[0]: `role` must be one of"),
        (encoded({"messages": [{"role": [], "content": "x"}]}), "messages[0]: `role` must be one of"),
        (encoded({"messages": [{"role": "user"}, CHAT["messages"][1]]}), "messages[0]: `content` is missing"),
    ],
)
def test_a_broken_row_says_why(line: bytes, reason: str) -> None:
    with pytest.raises(BrokenRow) as caught:
        parse_row(line)
    assert reason in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
almost_rows = st.fixed_dictionaries(
    {},
    optional={
        "input": json_values,
        "content": json_values,
        "reasoning_content": json_values,
        "score": json_values,
        "messages": st.lists(
            st.fixed_dictionaries(
                {}, optional={"role": st.sampled_from(["user", "assistant", 1]), "content": json_values}
            )
            | json_values,
            max_size=4,
        ),
    },
)


@given(st.binary() | almost_rows.map(lambda row: json.dumps(row).encode("utf-8", "surrogatepass")))
def test_any_bytes_give_a_whole_conversation_or_a_broken_row(line: bytes) -> None:
    try:
        row = parse_row(line)
    except BrokenRow as error:
        reason: str | None = str(error)
    else:
        reason = None
    if reason is not None:
        assert reason
        return
    assert row.answer.strip() == row.answer != ""
    assert row.prompt
    assert all(message.content.strip() for message in row.prompt)
    for text in row.texts():
        text.encode()


def test_keys_depend_on_the_text_alone_and_for_ever() -> None:
    row = parse_row(encoded(ROW))
    assert f"{row.sample_key():016x}" == sha256('[[["user","why?"]],"because …","so."]'.encode()).hexdigest()[:16]
    assert f"{row.prompt_key():016x}" == sha256(b'[[["user","why?"]]]').hexdigest()[:16]
    assert parse_row(encoded(ROW | {"score": 1, "repo_name": "other"})).sample_key() == row.sample_key()
    assert parse_row(encoded(ROW | {"content": "other"})).prompt_key() == row.prompt_key()
    assert parse_row(encoded(ROW | {"content": "other"})).sample_key() != row.sample_key()
    # A separator that could be forged from within a text would make these two one.
    turns = [("a", "b", "c"), ("a", "b\nc", "c"), ("a\nb", "c", "c")]
    rows = [Conversation(prompt=(Message(role="user", content=p),), reasoning=r, answer=a) for p, r, a in turns]
    assert len({row.sample_key() for row in rows}) == 3
