"""OpenAI's own Python client against the server: what it sends is understood, and what comes back is what it knows."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from stages.corpus.rows import Message
from stages.inference.generate import Student

MODEL = "learnt-3.answers"


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_models_are_those_of_the_table(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "minicodformer"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other' here"):
        client.models.retrieve("other")


def test_greedy_chat_is_what_the_student_says(client: openai.OpenAI, student: Student, answers: dict[str, str]) -> None:
    for prompt, answer in answers.items():
        told = client.chat.completions.create(model=MODEL, messages=user(prompt), temperature=0)
        (choice,) = told.choices
        assert (choice.message.content, choice.message.role, choice.finish_reason) == (answer, "assistant", "stop")
        (expected,) = student.generate(prompt)
        assert told.usage is not None
        assert told.usage.prompt_tokens == expected.prompt_tokens
        assert told.usage.completion_tokens == len(expected.token_ids)
        assert told.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
        assert (told.model, told.object) == (MODEL, "chat.completion")
        assert told.system_fingerprint


def test_a_crowd_gets_the_greedy_tokens_of_generate(client: openai.OpenAI, student: Student) -> None:
    generator = random.Random(3)
    prompts = [[generator.randrange(3, 250) for _ in range(generator.randrange(1, 60))] for _ in range(24)]
    expected = [g.text for g in student.generate_from_ids(prompts, max_new_tokens=24)]

    def ask(prompt: list[int]) -> str:
        return client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=24).choices[0].text

    with ThreadPoolExecutor(24) as crowd:
        assert list(crowd.map(ask, prompts)) == expected


def test_a_conversation_has_turns(client: openai.OpenAI, student: Student) -> None:
    turns: list[Any] = [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "count"},
    ]
    told = client.chat.completions.create(model=MODEL, messages=turns, temperature=0, max_tokens=12)
    texts = ["Count.", "one two", "three", "count"]
    messages = [Message(role=turn["role"], content=text) for turn, text in zip(turns, texts, strict=True)]
    assert told.choices[0].message.content == student.chat(messages, max_new_tokens=12).text


def test_a_stream_joins_to_the_answer_and_ends_with_its_usage(client: openai.OpenAI, answers: dict[str, str]) -> None:
    for prompt, answer in answers.items():
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=user(prompt), temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        texts = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
        assert "".join(texts) == answer
        assert len(texts) > 3, "it comes in pieces"
        assert not any("\ufffd" in text for text in texts)
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
        assert chunks[-1].choices == []
        whole = client.chat.completions.create(model=MODEL, messages=user(prompt), temperature=0)
        assert chunks[-1].usage == whole.usage
        assert len({chunk.id for chunk in chunks}) == 1
        assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_ends_with_done_and_is_an_event_stream(address: str) -> None:
    body = {"model": MODEL, "prompt": "count", "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{address}/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line for line in response.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "one two three four"


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_several_prompts(client: openai.OpenAI, student: Student, stream: bool) -> None:
    prompts = ["count", "讲"]
    told = client.completions.create(
        model=MODEL, prompt=prompts, n=3, seed=5, temperature=2.0, max_tokens=10, stream=stream
    )
    texts = [""] * 6
    for part in told if stream else [told]:  # type: ignore[union-attr]
        for choice in part.choices:
            texts[choice.index] += choice.text
    wanted = [student.prompt_ids(text) for text in prompts for _ in range(3)]
    expected = student.generate_from_ids(wanted, seed=5, temperature=2.0, max_new_tokens=10)
    assert texts == [generation.text for generation in expected]
    assert len(set(texts)) == 6
    if not stream:
        assert told.usage.prompt_tokens == sum(len(student.prompt_ids(text)) for text in prompts)  # type: ignore[union-attr]


def test_a_seed_decides_and_without_one_chance_does(client: openai.OpenAI) -> None:
    def ask(**options: Any) -> str | None:
        told = client.chat.completions.create(
            model=MODEL, messages=user("count"), temperature=2, max_tokens=30, **options
        )
        return told.choices[0].message.content

    assert ask(seed=-1) == ask(seed=-1) != ask(seed=2)
    assert ask() != ask()


def test_stop_strings_end_an_answer_before_them(client: openai.OpenAI) -> None:
    for stop in ("three", ["nowhere", "three"]):
        told = client.chat.completions.create(model=MODEL, messages=user("count"), temperature=0, stop=stop)
        assert told.choices[0].message.content == "one two "
        assert told.choices[0].finish_reason == "stop"
    cut = client.chat.completions.create(model=MODEL, messages=user("count"), temperature=0, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_chat(client: openai.OpenAI, student: Student, stream: bool) -> None:
    (expected,) = student.generate("讲", logprobs=3, max_new_tokens=6)
    told = client.chat.completions.create(
        model=MODEL, messages=user("讲"), temperature=0, max_tokens=6, logprobs=True, top_logprobs=3, stream=stream
    )
    content: list[Any] = []
    for part in told if stream else [told]:
        for choice in part.choices:
            content += choice.logprobs.content if choice.logprobs else []
    assert expected.logprobs is not None
    assert [token.token for token in content] == [token.text for token in expected.logprobs]
    assert [token.logprob for token in content] == pytest.approx([token.logprob for token in expected.logprobs])
    for token, truth in zip(content, expected.logprobs, strict=True):
        assert [(top.token, round(top.logprob, 4)) for top in token.top_logprobs] == [
            (top.text, round(top.logprob, 4)) for top in truth.top
        ]
        assert token.bytes is None or bytes(token.bytes).decode() == token.token


def test_log_probabilities_of_a_completion(client: openai.OpenAI) -> None:
    told = client.completions.create(model=MODEL, prompt="count", temperature=0, max_tokens=5, logprobs=2)
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == told.choices[0].text
    assert logprobs.text_offset == [told.choices[0].text.index(token) for token in logprobs.tokens or []]
    assert [max(top, key=top.__getitem__) for top in logprobs.top_logprobs or []] == logprobs.tokens
    bare = client.completions.create(model=MODEL, prompt="count", temperature=0, max_tokens=5, logprobs=0)
    assert bare.choices[0].logprobs is not None
    assert bare.choices[0].logprobs.top_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_of_a_completion_point_into_its_text_where_characters_take_several_tokens(
    client: openai.OpenAI, stream: bool
) -> None:
    """A token of the test's tokenizer is a byte, so the truth is told by the text's own bytes."""
    told = client.completions.create(model=MODEL, prompt="讲", temperature=0, max_tokens=40, logprobs=0, stream=stream)
    choices = [choice for part in (told if stream else [told]) for choice in part.choices]
    offsets = [at for choice in choices if choice.logprobs for at in choice.logprobs.text_offset or []]
    text = "".join(choice.text for choice in choices)
    assert len(text.encode()) > len(text)
    assert offsets == [at for at, character in enumerate(text) for _ in character.encode()]


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"top_logprobs": 2}, None),
        ({"max_tokens": 65}, "max_tokens"),
        ({"n": 60}, "n"),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(
    client: openai.OpenAI, options: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=user("count"), **options)
    assert refused.value.type == "invalid_request_error"
    if param:
        assert (refused.value.param or "").startswith(param)
        assert param in refused.value.message


def test_what_changes_nothing_is_taken_and_listed(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=user("count"),
        temperature=0,
        user="me",
        metadata={"a": "b"},
        store=False,
        tools=[],
        tool_choice="auto",
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        extra_body={"seed": None},
    )
    assert raw.headers["x-ignored-fields"] == "metadata, store, user"
    assert raw.parse().choices[0].message.content == "one two three four"
    plain = client.chat.completions.with_raw_response.create(model=MODEL, messages=user("count"), temperature=0)
    assert "x-ignored-fields" not in plain.headers
