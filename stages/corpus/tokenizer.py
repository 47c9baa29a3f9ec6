"""A teacher's tokenizer and chat template, from a local folder: conversations to ids and back.

- Prompt ids are the template with its generation prompt; response ids are what the template puts after it, up to and
  with the token that ends an answer. Where the tokenizer permits, the two joined are the ids of the whole conversation.
- Reasoning stands in the template's own form where it has one, in `<think>` tags where only the vocabulary has them,
  else as text before the answer.
- A tokenizer without a template gives plain text after a BOS token, so a prompt is never empty.
- The start token is a pad that is not the end token; neither is ever a mask (lengths are).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import AutoTokenizer

from stages.corpus.fingerprint import tokenizer_files, tokenizer_fingerprint
from stages.corpus.rows import Conversation, Message
from stages.errors import StageError

_THINK, _END_THINK = "<think>", "</think>"
_PROBE = Conversation(prompt=(Message(role="user", content="ask"),), reasoning="weigh", answer="reply")

Ids = NDArray[np.int32]


class RefusedByTemplate(ValueError):
    """The chat template does not take this conversation: roles in an order it does not know, no system turn, …"""


class ChatTokenizer:
    """`encode` for training pairs, `encode_prompts` and `decode` for use of the finished student."""

    def __init__(self, tokenizer: Any, *, fingerprint: str, thinking: bool) -> None:
        self._tokenizer = tokenizer
        self._thinking = thinking
        self.fingerprint = fingerprint
        self.vocab_size: int = len(tokenizer)
        self._special: dict[int, str] = {
            **{index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special},
            **dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)),
        }
        self._think_tags = _THINK in tokenizer.get_vocab() and _END_THINK in tokenizer.get_vocab()
        self._template_reasons = bool(tokenizer.chat_template) and _PROBE.reasoning in self._whole(_PROBE, "reply")
        self.end_token_id = self._find_end_token()
        self.start_token_id = self._find_start_token()
        self._structure = re.compile("|".join(re.escape(token) for token in self._structural_tokens()))

    @classmethod
    def load(cls, folder: Path, *, thinking: bool = True) -> ChatTokenizer:
        """Read the tokenizer of a model folder; no code from the folder runs. Raises StageError."""
        if not tokenizer_files(folder):
            raise StageError(f"no tokenizer in {folder}", hint="name a folder that holds tokenizer.json")
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            return cls(tokenizer, fingerprint=tokenizer_fingerprint(folder), thinking=thinking)
        except (StageError, MemoryError):
            raise
        except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
            raise StageError(
                f"the tokenizer in {folder} cannot be read: {error}",
                hint="fetch the folder again; a tokenizer that needs its own code is not supported",
            ) from error

    def objection(self, conversation: Conversation) -> str | None:
        """Why a text would not be read as text: it spells out a token that the template uses to separate turns."""
        spelt = any(self._structure.search(text) for text in conversation.texts())
        return "spells out a template token" if spelt else None

    def encode(self, conversations: Sequence[Conversation]) -> list[tuple[Ids, Ids] | RefusedByTemplate]:
        """(prompt ids [P], response ids [R]) of each conversation, or why the template refuses it."""
        rendered: list[tuple[str, str] | RefusedByTemplate] = []
        for conversation in conversations:
            try:
                rendered.append(self.render(conversation))
            except RefusedByTemplate as refusal:
                rendered.append(refusal)
        texts = [pair for pair in rendered if not isinstance(pair, RefusedByTemplate)]
        prompts = self._ids([prompt for prompt, _ in texts])
        wholes = self._ids([prompt + response for prompt, response in texts])
        # A tokenizer may merge across the boundary. The prompt must be what generation sees, so then both stand alone.
        merged = [
            i for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)) if whole[: len(prompt)] != prompt
        ]
        alone = dict(zip(merged, self._ids([texts[i][1] for i in merged]), strict=True))
        pairs = iter(
            (self._prompt_array(prompt), _array([*alone.get(i, whole[len(prompt) :]), self.end_token_id]))
            for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True))
        )
        return [pair if isinstance(pair, RefusedByTemplate) else next(pairs) for pair in rendered]

    def encode_prompts(self, prompts: Sequence[Sequence[Message]]) -> list[Ids]:
        """Prompt ids [P] as `encode` gives them. Raises RefusedByTemplate."""
        return [self._prompt_array(ids) for ids in self._ids([self._prompt(prompt) for prompt in prompts])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without the special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def render(self, conversation: Conversation) -> tuple[str, str]:
        """Prompt and response as text, the response without its end token. Raises RefusedByTemplate."""
        prompt = self._prompt(conversation.prompt)
        answer = self._answer(conversation, prompt)
        if not self._tokenizer.chat_template:
            return prompt, answer
        content = conversation.answer if self._template_reasons else answer
        whole = self._whole(conversation, content)
        # Templates that drop the reasoning of past turns, or open it in the generation prompt, render something else.
        if not whole.startswith(prompt) or content not in whole[len(prompt) :]:
            return prompt, answer
        response = whole[len(prompt) :]
        return prompt, response[: response.rindex(content) + len(content)]

    def _prompt(self, messages: Sequence[Message]) -> str:
        if self._tokenizer.chat_template:
            return self._apply(_turns(messages), add_generation_prompt=True)
        return "".join(f"{message.content}\n" for message in messages)

    def _whole(self, conversation: Conversation, content: str) -> str:
        answer = {"role": "assistant", "content": content}
        if conversation.reasoning:
            answer["reasoning_content"] = conversation.reasoning
        return self._apply([*_turns(conversation.prompt), answer], add_generation_prompt=False)

    def _answer(self, conversation: Conversation, prompt: str) -> str:
        if not conversation.reasoning:
            return conversation.answer
        if not self._think_tags:
            return f"{conversation.reasoning}\n\n{conversation.answer}"
        opening = "" if prompt.rstrip().endswith(_THINK) else f"{_THINK}\n"
        return f"{opening}{conversation.reasoning}\n{_END_THINK}\n\n{conversation.answer}"

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=self._thinking,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RefusedByTemplate(str(error)) from error
        return text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return ids

    def _prompt_array(self, ids: list[int]) -> Ids:
        if self._tokenizer.chat_template:
            return _array(ids)
        bos = self._tokenizer.bos_token_id
        return _array([self.start_token_id if bos is None else bos, *ids])

    def _find_end_token(self) -> int:
        """The first special token that the template puts after an answer, else the declared end of sequence."""
        if self._tokenizer.chat_template:
            whole = self._whole(_PROBE, _PROBE.answer)
            after = whole[whole.rindex(_PROBE.answer) + len(_PROBE.answer) :]
            for index in self._ids([after])[0]:
                if index in self._special:
                    return index
        if self._tokenizer.eos_token_id is None:
            raise StageError("the tokenizer has no token that ends an answer", hint="declare eos_token in its config")
        end: int = self._tokenizer.eos_token_id
        return end

    def _find_start_token(self) -> int:
        vocabulary: Mapping[str, int] = self._tokenizer.get_vocab()
        candidates = (
            self._tokenizer.pad_token_id,
            vocabulary.get("<|endoftext|>"),
            self._tokenizer.unk_token_id,
            self._tokenizer.bos_token_id,
            *sorted(self._special),
        )
        for candidate in candidates:
            if candidate is not None and candidate != self.end_token_id:
                return int(candidate)
        raise StageError(
            "the tokenizer has no special token beside its end token", hint="declare a pad_token other than eos_token"
        )

    def _structural_tokens(self) -> list[str]:
        """Special tokens that are declared or that the template writes; others (`<filename>`) are words in a text."""
        declared = set(self._tokenizer.all_special_ids) | {self.end_token_id, self.start_token_id}
        written = self._ids([self._whole(_PROBE, _PROBE.answer)])[0] if self._tokenizer.chat_template else []
        structural = declared | {index for index in written if index in self._special}
        return sorted(self._special[index] for index in structural if index in self._special)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _array(ids: list[int]) -> Ids:
    return np.array(ids, dtype=np.int32)
