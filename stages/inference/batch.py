"""Answers that are decoded together. They join and leave at every token, and no answer depends on its neighbours."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from stages.inference.answer import Answer, Piece
from stages.inference.prompts import PromptCache
from stages.inference.sampling import candidates, next_tokens
from stages.inference.stepping import DecoderState, advance, fresh, joined, kept
from stages.student.model import MiniCodformerForConditionalGeneration


class DecodeBatch:
    """Not for several threads at once."""

    def __init__(self, model: MiniCodformerForConditionalGeneration, prompts: PromptCache) -> None:
        self._model = model
        self._prompts = prompts
        self._answers: list[Answer] = []
        self._tokens: list[int] = []
        self._state: DecoderState = fresh(model, [])

    def __len__(self) -> int:
        return len(self._answers)

    def join(self, answers: Sequence[Answer]) -> None:
        """Take answers in: their prompts are encoded now, their first tokens come with the next step."""
        if not answers:
            return
        encoded = self._prompts.encoded([answer.prompt_ids for answer in answers])
        self._state = joined(self._state, fresh(self._model, encoded))
        self._answers += answers
        self._tokens += [self._model.config.decoder_start_token_id] * len(answers)

    @torch.inference_mode()
    def step(self) -> list[tuple[Answer, Piece]]:
        """Write one token into every answer; those that it finishes leave."""
        logits_BV = advance(self._model, self._tokens, self._state)
        samplings = [answer.sampling for answer in self._answers]
        self._tokens = next_tokens(logits_BV, samplings, [answer.uniform() for answer in self._answers])
        pieces = []
        for row, (answer, token) in enumerate(zip(self._answers, self._tokens, strict=True)):
            if answer.sampling.logprobs is None:
                pieces.append((answer, answer.push(token)))
            else:
                pieces.append(
                    (answer, answer.push(token, *candidates(logits_BV[row], token, answer.sampling.logprobs)))
                )
        self._keep([row for row, answer in enumerate(self._answers) if answer.finish_reason is None])
        return pieces

    def drop(self, answers: Collection[Answer]) -> None:
        """Let go of answers that nobody waits for any more."""
        self._keep([row for row, answer in enumerate(self._answers) if answer not in answers])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self._answers):
            self._state = kept(self._state, rows)
            self._answers = [self._answers[row] for row in rows]
            self._tokens = [self._tokens[row] for row in rows]
