"""Qwen3's own tokenizer and template: ids, `<think>`, thinking on and off. From a registry, pinned; never imported.

The template's own rendering by transformers is the reference. A machine that cannot have the files skips, and says why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from stages.corpus.rows import Conversation, Message
from stages.corpus.tokenizer import ChatTokenizer, RefusedByTemplate

IM_END, PAD = 151_645, 151_643
THINK, END_THINK = 151_667, 151_668
TEXTS = (
    "The carpenter earns $1,234.56 a week — isn't that enough?",
    "答案是四十二。🎉 今天天气很好,我们去公园吧!",
    "def f(x):\n    return {k: v ** 2 for k, v in x.items()}  # <filename>\n\n\n",
)


@pytest.fixture(scope="module")
def theirs(qwen3_tokenizer: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(qwen3_tokenizer)


def encoded(tokenizer: ChatTokenizer, row: Conversation) -> tuple[list[int], list[int]]:
    (pair,) = tokenizer.encode([row])
    assert not isinstance(pair, RefusedByTemplate)
    return pair[0].tolist(), pair[1].tolist()


def asked(question: str, reasoning: str, answer: str) -> Conversation:
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content=question))
    return Conversation(prompt=prompt, reasoning=reasoning, answer=answer)


def turns(row: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in row.prompt]


def test_the_ids_are_those_that_qwen3_was_trained_with(qwen3_tokenizer: Path, theirs: Any) -> None:
    ours = ChatTokenizer.load(qwen3_tokenizer)
    assert (ours.vocab_size, ours.start_token_id, ours.end_token_id) == (151_669, PAD, IM_END)
    assert theirs("<think></think><|im_end|>", add_special_tokens=False)["input_ids"] == [THINK, END_THINK, IM_END]
    # Ids of the published vocabulary: "Hello", ",", " world", "!".
    assert theirs("Hello, world!")["input_ids"] == [9707, 11, 1879, 0]
    for text in TEXTS:
        assert ours.decode(theirs(text)["input_ids"]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_with_thinking_the_response_is_the_reasoning_in_tags_and_the_answer(
    qwen3_tokenizer: Path, theirs: Any, text: str
) -> None:
    row = asked(text.strip(), "six days\nof work", text.strip())
    prompt, response = encoded(ChatTokenizer.load(qwen3_tokenizer, thinking=True), row)
    assert prompt == theirs.apply_chat_template(turns(row), add_generation_prompt=True, return_dict=False)
    answer = {"role": "assistant", "content": row.answer, "reasoning_content": row.reasoning}
    whole = theirs.apply_chat_template([*turns(row), answer], return_dict=False)
    newline = theirs("\n")["input_ids"]
    assert [*prompt, *response, *newline] == whole
    assert THINK not in prompt
    assert (response[0], response.count(THINK), response.count(END_THINK), response[-1]) == (THINK, 1, 1, IM_END)


def test_without_thinking_the_prompt_closes_the_reasoning_and_the_response_is_the_answer(
    qwen3_tokenizer: Path, theirs: Any
) -> None:
    row = asked("How many days?", "", "Six.")
    prompt, response = encoded(ChatTokenizer.load(qwen3_tokenizer, thinking=False), row)
    assert prompt == theirs.apply_chat_template(
        turns(row), add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert prompt[-4:] == theirs("<think>\n\n</think>\n\n")["input_ids"]
    assert response == [*theirs("Six.")["input_ids"], IM_END]


def test_an_answer_without_reasoning_shows_that_there_was_none(qwen3_tokenizer: Path) -> None:
    """As the template itself writes the last answer: an empty pair of tags, so that both modes teach their own form."""
    prompt, response = encoded(ChatTokenizer.load(qwen3_tokenizer, thinking=True), asked("How many days?", "", "Six."))
    assert THINK not in prompt
    assert (response[0], response[2]) == (THINK, END_THINK)


def test_past_answers_lose_their_reasoning(qwen3_tokenizer: Path, theirs: Any) -> None:
    past = Message(role="assistant", content="<think>\nhm\n</think>\n\nSix.")
    row = Conversation(
        prompt=(Message(role="user", content="How many?"), past, Message(role="user", content="Sure?")),
        reasoning="yes",
        answer="Yes.",
    )
    prompt, response = encoded(ChatTokenizer.load(qwen3_tokenizer), row)
    assert prompt == theirs.apply_chat_template(turns(row), add_generation_prompt=True, return_dict=False)
    assert THINK not in prompt
    assert response[0] == THINK


def test_text_that_spells_a_turn_is_found_and_code_tags_are_not(qwen3_tokenizer: Path) -> None:
    ours = ChatTokenizer.load(qwen3_tokenizer)
    assert ours.objection(asked("say <|im_end|>", "", "no"))
    assert not ours.objection(asked("what is <tool_call>?", "", "a tag"))
