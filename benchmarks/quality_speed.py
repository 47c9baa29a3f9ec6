"""Training from a cache beside training with the teacher at hand, and beside what the teacher's absence alone allows.

A step: SmolLM2-135M's vocabulary of 49,152, the default student, water-filled KL over the top 64, AdamW. Cached, its
signals are read from a shard and decoded; live, the teacher computes its body on all tokens, its head on the rows of
the response alone, and the same top 64 are taken from it. The bound is 0.95 of 1 + teacher's forward / student's step.
All ways take turns in one run; a ratio is that of medians. For Qwen3-8B the same is counted in floating-point
operations of the matrix products.

    python -m benchmarks.quality_speed
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.quality_shards import ExactHead, exact_head
from benchmarks.record import Row, compare, write
from benchmarks.teacher_logits import TEACHER
from pipeline.assets import teacher_folder
from shards.contract import Contract, Selection
from shards.learnt import with_tables
from shards.manifest import begin, seal
from shards.planes.codec import Planes3
from shards.reader import ShardSet
from shards.record import Record
from shards.storage import storage_at
from shards.writer import write_shard
from stages.distill.batches import Batch, assemble
from stages.distill.objective import DistillModule
from stages.distill.optimizer import make_optimizer
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.events import silent
from stages.student.model import build_student
from stages.student.shape import StudentShape

K, VOCAB, RECORDS = 64, 49_152, 4
CASES = ((96, 128), (512, 128))
"""Tokens of prompt and response."""
SHARE = 0.95
OBJECTIVE = ObjectiveSettings(kd="water_filled_kl", attention_weight=0.0, encoder_weight=0.0)
CONTRACT = Contract(
    **dict.fromkeys(("teacher_fingerprint", "tokenizer_fingerprint", "corpus_fingerprint", "engine", "dtype"), ""),
    codec=Planes3.name,
    teacher=TEACHER,
    vocab_size=VOCAB,
    start_token_id=0,
    end_token_id=2,
    selection=Selection(kind="topk", k=K),
    attention=None,
)
Tokens = list[tuple[np.ndarray, np.ndarray]]


class Teacher:
    def __init__(self) -> None:
        folder = teacher_folder(TEACHER, None, silent)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.no_grad()
    def logits(self, tokens: Tokens) -> Tensor:
        """[N, V] fp32, of the response rows of all records."""
        ids_BT = torch.from_numpy(np.stack([np.concatenate(pair) for pair in tokens])).long()[:, :-1]
        hidden_BTD = self._model.model(ids_BT, use_cache=False).last_hidden_state
        hidden_ND = hidden_BTD[:, len(tokens[0][0]) - 1 :].flatten(0, 1)
        logits_NV: Tensor = self._model.lm_head(hidden_ND).float()
        return logits_NV


class Student:
    """The default student with its optimiser."""

    def __init__(self) -> None:
        student = build_student(StudentShape(), vocab_size=VOCAB, start_token_id=0, end_token_id=2, seed=0)
        self.module = DistillModule(student, OBJECTIVE, CONTRACT)
        self._optimizer = make_optimizer(student, DistillSettings())

    def step(self, batch: Batch) -> None:
        self.module(batch, scale=1 / batch.positions).objective.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_tokens(prompt: int, response: int) -> Tokens:
    """Random ids: every product and every pass costs what it costs with text."""
    rng = np.random.default_rng(prompt)
    lengths = ((prompt, response) for _ in range(RECORDS))
    return [(*(rng.integers(3, VOCAB, size).astype(np.int32) for size in pair),) for pair in lengths]  # type: ignore[misc]


def make_records(tokens: Tokens, head: ExactHead) -> list[Record]:
    rows = len(tokens[0][1])
    return [
        Record(
            sample_id=f"{number:016x}",
            prompt_ids_P=prompt_ids_P,
            response_ids_R=response_ids_R,
            first_position=0,
            ids_NK=head.ids_NK[part].int().numpy(),
            logprobs_NK=head.logprobs_NK[part].numpy(),
            log_tail_N=head.log_tail_N[part].numpy(),
            entropy_N=head.entropy_N[part].numpy(),
        )
        for number, (prompt_ids_P, response_ids_R) in enumerate(tokens)
        for part in [slice(number * rows, (number + 1) * rows)]
    ]


def write_set(folder: Path, records: Sequence[Record]) -> ShardSet:
    storage = storage_at(folder)
    contract, tables = with_tables(storage, CONTRACT, lambda: records, budget=1 << 16)
    begin(storage, contract)
    seal(storage, contract, [write_shard(storage, "train-00000", "train", contract, records, tables=tables)])
    return ShardSet(folder)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(prompt: int, response: int, teacher: Teacher, student: Student, rounds: int, folder: Path) -> Row:
    tokens = make_tokens(prompt, response)
    records = make_records(tokens, exact_head(teacher.logits(tokens), K, ()))
    split, batch = write_set(folder, records).split("train"), assemble(records, 0)

    def live() -> None:
        student.step(assemble(make_records(tokens, exact_head(teacher.logits(tokens), K, ())), 0))

    ways: dict[str, Callable[[], object]] = {
        "teacher": lambda: teacher.logits(tokens),
        "student": lambda: student.step(batch),
        "cached": lambda: student.step(assemble(list(split), 0)),
        "live": live,
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            took = seconds(way)
            if number:  # the first round warms up
                spent[name].append(took)
    median = {name: statistics.median(found) for name, found in spent.items()}
    bound = 1 + median["teacher"] / median["student"]
    rate = {name: RECORDS * response / median[name] for name in ("cached", "live")}
    return compare(
        f"SmolLM2, {prompt} + {response} tokens",
        f"training; without a teacher {bound:.2f} times",
        "tokens/s",
        rate["cached"],
        rate["live"],
        "live",
        bound=round(SHARE * bound, 3),
        more_is_better=True,
    )


def qwen3(prompt: int, response: int) -> Row:
    """Two operations a weight and token forward, four more backward; attention's own products are left out."""
    width, layers, heads, key_heads, size, inner, vocab = 4_096, 36, 32, 8, 128, 12_288, 151_936
    layer = 2 * width * heads * size + 2 * width * key_heads * size + 3 * width * inner
    teacher = 2 * (layers * layer * (prompt + response) + width * vocab * response)
    with torch.device("meta"):
        student = build_student(StudentShape(), vocab_size=vocab, start_token_id=0, end_token_id=1, seed=0)
    encoder, decoder = (
        sum(weight.numel() for weight in part.layers.parameters() if weight.ndim > 1)
        for part in (student.model.encoder, student.model.decoder)
    )
    taught = 6 * (encoder * prompt + decoder * response + student.config.hidden_size * vocab * response)
    case, metric = f"Qwen3-8B, {prompt} + {response} tokens", "products of a response token"
    return compare(case, metric, "GFLOP", taught / response / 1e9, (taught + teacher) / response / 1e9, "live, counted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, into results/quick")
    quick = parser.parse_args().quick
    torch.set_flush_denormal(True)
    write(
        "quality_speed",
        list(_rows(2 if quick else 7)),
        clock="wall time, median of turns",
        packages=("torch", "transformers"),
        threads=torch.get_num_threads(),
        quick=quick,
    )


def _rows(rounds: int) -> Iterator[Row]:
    teacher, student = Teacher(), Student()
    for prompt, response in CASES:
        with tempfile.TemporaryDirectory() as folder:
            yield measure(prompt, response, teacher, student, rounds, Path(folder))
    for prompt, response in CASES:
        yield qwen3(prompt, response)


if __name__ == "__main__":
    main()
