"""What the student answers to a few validation prompts while it learns: for those who watch, beside the curves.

- Rank 0 writes the answers, greedily, on the CPU, with a copy of the student in fp32: the model that an export at this
  step would be. The other ranks take part in gathering the weights, and wait at their next step.
- Nothing of training is touched by it, random numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch

from shards.reader import ShardSet
from shards.record import Record
from stages.corpus.tokenizer import ChatTokenizer
from stages.distill.batches import pad
from stages.distill.engine import Engine
from stages.distill.settings import DistillSettings
from stages.distill.world import World
from stages.events import Answered
from stages.student.model import MiniCodformerForConditionalGeneration


class Respondent:
    """Answers the first prompts of the dev split, the same at every step."""

    def __init__(
        self,
        build: Callable[[], MiniCodformerForConditionalGeneration],
        shards: ShardSet,
        engine: Engine,
        world: World,
        settings: DistillSettings,
    ) -> None:
        """`build` makes a student of the shape that the engine trains; only rank 0 calls it."""
        self._build = build
        self._shards, self._engine, self._world, self._settings = shards, engine, world, settings

    def answers(self, stage: str, step: int) -> Iterator[Answered]:
        """On rank 0 an answer to each prompt, elsewhere none; a collective operation."""
        weights = self._engine.weights()
        if self._world.rank == 0:
            for name, parameter in self._student.named_parameters():
                parameter.data.copy_(weights[name])
            for record, answer_ids in zip(self._records, self._write(), strict=True):
                yield Answered(
                    stage=stage,
                    step=step,
                    prompt=self._tokenizer.decode(record.prompt_ids_P.tolist()),
                    answer=self._tokenizer.decode(answer_ids),
                    label=self._tokenizer.decode(record.response_ids_R.tolist()),
                )

    def _write(self) -> list[list[int]]:
        """Ids of each answer up to its end token, or to the limit."""
        ids_BP, mask_BP = pad([record.prompt_ids_P for record in self._records])
        with torch.inference_mode():
            written_BT = self._student.generate(
                input_ids=ids_BP,
                attention_mask=mask_BP,
                max_new_tokens=self._settings.answer_tokens,
                do_sample=False,
            )
        end = self._student.config.eos_token_id
        rows = [row[1:] for row in written_BT.tolist()]  # the first is the start token
        return [row[: row.index(end)] if end in row else row for row in rows]

    @cached_property
    def _student(self) -> MiniCodformerForConditionalGeneration:
        student = self._build()
        student.eval()
        return student

    @cached_property
    def _records(self) -> list[Record]:
        return self._shards.split("dev")[: self._settings.answers]

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.load(self._shards.teacher_folder)
