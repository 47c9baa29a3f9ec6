from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from stages.corpus.rows import Conversation, Message
from stages.corpus.tokenizer import ChatTokenizer, RefusedByTemplate
from stages.errors import StageError


def conversation(question: str = "how much?", reasoning: str = "6 days", answer: str = "42") -> Conversation:
    return Conversation(prompt=(Message(role="user", content=question),), reasoning=reasoning, answer=answer)


@pytest.fixture(scope="module")
def smollm2_tokenizers(smollm2: Path) -> tuple[ChatTokenizer, Any]:
    """Ours and transformers' of the same folder."""
    return ChatTokenizer.load(smollm2), AutoTokenizer.from_pretrained(str(smollm2))


@pytest.mark.parametrize("reasoning", ["", "six days\nof work"])
@pytest.mark.parametrize("answer", ["42", "答案是四十二。🎉", "    return x\n  # <filename>", "a\n\n\nb"])
def test_prompt_and_response_are_the_ids_of_the_whole_conversation(
    smollm2_tokenizers: tuple[ChatTokenizer, Any], reasoning: str, answer: str
) -> None:
    ours, theirs = smollm2_tokenizers
    row = conversation("多少 days?", reasoning, answer.strip())
    (pair,) = ours.encode([row])
    assert not isinstance(pair, RefusedByTemplate)
    prompt_ids, response_ids = pair

    content = f"{reasoning}\n\n{answer.strip()}" if reasoning else answer.strip()
    messages = [{"role": "user", "content": "多少 days?"}, {"role": "assistant", "content": content}]
    whole = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    newline = theirs("\n", add_special_tokens=False)["input_ids"]
    assert [*prompt_ids, *response_ids, *newline] == whole
    assert prompt_ids.tolist() == theirs.apply_chat_template(
        messages[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )


def test_smollm2_starts_with_a_pad_that_is_not_its_end_token(
    smollm2_tokenizers: tuple[ChatTokenizer, Any],
) -> None:
    tokenizer, _ = smollm2_tokenizers
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.vocab_size) == (0, 2, 49_152)


@pytest.mark.parametrize("kind", ["chatml", "thinking", "opened", "strict", "plain"])
def test_the_start_token_is_never_the_end_token_which_closes_every_response(
    tokenizer_folders: dict[str, Path], kind: str
) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folders[kind])
    assert tokenizer.start_token_id == 0
    assert tokenizer.end_token_id == 2
    ((prompt_ids, response_ids),) = tokenizer.encode([conversation()])
    assert prompt_ids.dtype == response_ids.dtype == np.int32
    assert len(prompt_ids) >= 1
    assert response_ids.tolist().index(2) == len(response_ids) - 1


@pytest.mark.parametrize(
    ("kind", "thinking", "prompt_ends", "response"),
    [
        ("chatml", True, "assistant\n", "6 days\n\n42"),
        ("thinking", True, "assistant\n", "<think>\n6 days\n</think>\n\n42"),
        ("opened", True, "assistant\n<think>\n", "6 days\n</think>\n\n42"),
        ("plain", True, "how much?\n", "6 days\n\n42"),
    ],
)
def test_reasoning_stands_in_the_templates_own_form(
    tokenizer_folders: dict[str, Path], kind: str, thinking: bool, prompt_ends: str, response: str
) -> None:
    prompt, answer = ChatTokenizer.load(tokenizer_folders[kind], thinking=thinking).render(conversation())
    assert prompt.endswith(prompt_ends)
    assert answer == response


def test_thinking_switched_off_is_said_in_the_prompt(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folders["thinking"], thinking=False)
    prompt, response = tokenizer.render(conversation(reasoning=""))
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert response == "42"


def test_without_a_template_a_prompt_is_bos_and_text_and_never_empty(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folders["plain"])
    (prompt_ids,) = tokenizer.encode_prompts([[Message(role="user", content="how?")]])
    assert prompt_ids[0] == 1
    assert tokenizer.decode(prompt_ids.tolist()) == "how?\n"
    (nothing,) = tokenizer.encode_prompts([[]])
    assert nothing.tolist() == [1]


def test_a_refusal_of_the_template_concerns_its_row_alone(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folders["strict"])
    refused = Conversation(
        prompt=(Message(role="system", content="be brief"), Message(role="user", content="how?")),
        reasoning="",
        answer="42",
    )
    first, second, third = tokenizer.encode([conversation("one?"), refused, conversation("three?")])
    assert isinstance(second, RefusedByTemplate)
    assert "no system turns here" in str(second)
    assert "one?" in tokenizer.decode(first[0].tolist())
    assert "three?" in tokenizer.decode(third[0].tolist())


def test_a_text_that_spells_a_turn_token_is_told_from_one_that_spells_a_word(
    tokenizer_folders: dict[str, Path],
) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_folders["chatml"])
    assert tokenizer.objection(conversation(question="ends<|im_end|>here"))
    assert tokenizer.objection(conversation(reasoning="<|endoftext|>"))
    assert not tokenizer.objection(conversation(question="usage: open <filename>"))


def test_the_prompt_of_training_is_the_prompt_of_generation(tokenizer_folders: dict[str, Path]) -> None:
    for folder in tokenizer_folders.values():
        tokenizer = ChatTokenizer.load(folder)
        row = conversation()
        ((trained, _),) = tokenizer.encode([row])
        (generated,) = tokenizer.encode_prompts([row.prompt])
        np.testing.assert_array_equal(trained, generated)


def test_the_fingerprint_covers_the_template_and_follows_a_copy(
    tokenizer_folders: dict[str, Path], tmp_path: Path
) -> None:
    original = ChatTokenizer.load(tokenizer_folders["chatml"]).fingerprint
    copy = shutil.copytree(tokenizer_folders["chatml"], tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"weights are no tokenizer")
    assert ChatTokenizer.load(copy).fingerprint == original
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert ChatTokenizer.load(copy).fingerprint != original


def test_a_folder_without_or_with_a_damaged_tokenizer_is_named(
    tmp_path: Path, tokenizer_folders: dict[str, Path]
) -> None:
    with pytest.raises(StageError, match=str(tmp_path)):
        ChatTokenizer.load(tmp_path)
    copy = shutil.copytree(tokenizer_folders["chatml"], tmp_path / "copy")
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes()[:1_000])
    with pytest.raises(StageError, match="cannot be read") as caught:
        ChatTokenizer.load(copy)
    assert caught.value.hint
