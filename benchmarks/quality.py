"""What a cache teaches: students trained from cached signals, beside labels alone and beside whole distributions.

The teacher is SmolLM2-135M over 4,096 ids, the text sampled from it, the student the house's, of width 128. Gain:
(KL_CE - KL_x) / (KL_CE - KL_Full), KL being KL(teacher || student) at T = 1 over all ids, on responses that no student
saw. Students of one seed start alike and see the same records in the same order. In brackets the 95 % interval of a
bootstrap over seeds and records. Signals go through the real codec: bytes are those of a position in a shard. Beside
each on/off option stands the same without.

Every (setting, seed) appends its figures to results/quality.jsonl and is not run again; the table is made from that
file. Run from the repository's root:

    python -m benchmarks.quality [--seeds 3]        with --seeds 0, the table alone
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import quality_teacher
from benchmarks.quality_shards import SPLIT, Kept, bytes_a_position, record_of, shard_set
from benchmarks.quality_statistics import LABELS, WHOLE, gains
from benchmarks.quality_teacher import END, START, VOCAB, Response, head_components_VD, responses
from benchmarks.record import RESULTS, Row, Runs, compare, write
from benchmarks.teacher_logits import NODES
from shards.contract import Selection
from stages.distill.batches import Batch, assemble
from stages.distill.mining import RecordDifficulty
from stages.distill.objective import DistillModule, Emphasis
from stages.distill.optimizer import make_optimizer, set_rates
from stages.distill.order import TrainingOrder, record_lengths
from stages.distill.schedules import learning_rate_factor
from stages.distill.settings import DistillSettings, ObjectiveSettings
from stages.distill.temperature import Difficulty
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape

RUNS = Runs(RESULTS / "quality.jsonl")
SHAPE = StudentShape(hidden_size=128, encoder_layers=2, decoder_layers=2, heads=4, intermediate_size=344)
DISTILL = DistillSettings(epochs=3, global_batch=4, bucket_batches=1, learning_rate=4e-3)
GOAL, GOAL_BYTES = 0.97, 55.0
DEV_BATCH = 32

TOP_40, TOP_50, TOP_12 = (Kept(selection=Selection(kind="topk", k=k)) for k in (40, 50, 12))
SAMPLE_12 = Kept(selection=Selection(kind="sample", draws=12, logprobs=False))
HYBRID, WIDE_HYBRID = (Kept(selection=Selection(kind="hybrid", k=k, draws=draws)) for k, draws in ((16, 12), (20, 14)))


def objective(kd: str, **changes: Any) -> ObjectiveSettings:
    """One loss alone: labels weigh nothing, so that settings differ in what the teacher told and in nothing else."""
    return ObjectiveSettings(kd=kd, **({"ce_weight": 0.0, "attention_weight": 0.0, "encoder_weight": 0.0} | changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a student is trained on."""

    kept: Kept = TOP_12
    objective: ObjectiveSettings = field(default_factory=lambda: objective("tail_bucket_kl"))
    distill: DistillSettings = DISTILL
    beside: str | None = None
    """The setting that differs from this one in one thing; None in the main table."""
    cached: bool = True
    """Whether it learns from what the cache holds, and not only from labels or from whole distributions."""


BASE = "top 40, water-filled"
SETTINGS: dict[str, Setting] = {
    LABELS: Setting(objective=objective("tail_bucket_kl", kd_weight=0.0, ce_weight=1.0), cached=False),
    WHOLE: Setting(cached=False),
    "top 40, tail bucket": Setting(kept=TOP_40, objective=objective("tail_bucket_kl")),
    BASE: Setting(kept=TOP_40, objective=objective("water_filled_kl")),
    "sample 12": Setting(kept=SAMPLE_12, objective=objective("sampled_kl")),
    "hybrid 16 + 12": Setting(kept=HYBRID, objective=objective("sampled_kl")),
    "hybrid 20 + 14": Setting(kept=WIDE_HYBRID, objective=objective("sampled_kl")),
    "top 12, renormalised": Setting(kept=TOP_12, objective=objective("topk_kl_renormalised")),
    "top 40, renormalised": Setting(kept=TOP_40, objective=objective("topk_kl_renormalised")),
    "top 50, renormalised": Setting(kept=TOP_50, objective=objective("topk_kl_renormalised")),
    "top 50, tail bucket": Setting(kept=TOP_50, objective=objective("tail_bucket_kl")),
    "top 40, residual to label": Setting(kept=TOP_40, objective=objective("residual_to_label")),
    "temperature by difficulty": Setting(
        kept=replace(TOP_40, curve=NODES),
        objective=objective("water_filled_kl", temperature_mode="adaptive", temperature=1.0),
        beside=BASE,
    ),
    "attention matched": Setting(
        kept=replace(TOP_40, attention=True), objective=objective("water_filled_kl", attention_weight=0.1), beside=BASE
    ),
    "hard records mined": Setting(
        kept=TOP_40, objective=objective("water_filled_kl"), distill=replace(DISTILL, mining_share=0.125), beside=BASE
    ),
    "only where the teacher is unsure": Setting(
        kept=TOP_40, objective=objective("water_filled_kl", least_entropy=1.0), beside=BASE
    ),
    "one rate for all layers": Setting(
        kept=TOP_40, objective=objective("water_filled_kl"), distill=replace(DISTILL, layer_decay=1.0), beside=BASE
    ),
    "labels too, weight 0.1": Setting(kept=TOP_40, objective=objective("water_filled_kl", ce_weight=0.1), beside=BASE),
}


class WholeTeacher(nn.Module):
    """The ceiling: KL(teacher || student) over every id, from distributions that no cache has touched."""

    def __init__(self, student: MiniCodformerForConditionalGeneration) -> None:
        super().__init__()
        self.student = student

    def rows(self, batch: Batch, logprobs_NV: Tensor) -> Tensor:
        """KL of each of the batch's N positions."""
        hidden = self.student.hidden(
            batch.prompt_ids_BP, batch.prompt_mask_BP, batch.decoder_ids_BT, batch.decoder_mask_BT, need_attention=False
        )
        hidden_ND = self.student.output_hidden(hidden.decoder_BTD.flatten(0, 1)[batch.rows_N])
        log_q_NV = (hidden_ND @ self.student.output_weight().T).log_softmax(1)
        return nn.functional.kl_div(log_q_NV, logprobs_NV, reduction="none", log_target=True).sum(1)


Full = Callable[[Sequence[Response]], Tensor]
"""Whole distributions of some responses, one after the other, [N, V] log-probabilities."""


def whole(chosen: Sequence[Response]) -> Tensor:
    """As they were kept."""
    return torch.cat([response.whole() for response in chosen])


def fresh_student(seed: int) -> MiniCodformerForConditionalGeneration:
    student = build_student(SHAPE, vocab_size=VOCAB, start_token_id=START, end_token_id=END, seed=seed)
    student.init_embedding_from_pca(head_components_VD())
    return student


def train(
    setting: Setting, *, seed: int, full: Full | None = None
) -> tuple[MiniCodformerForConditionalGeneration, float]:
    """The student after its last step, and the bytes of a position that it was taught with, unless `full` taught it."""
    shards = shard_set(setting.kept)
    split, teacher = shards.split(SPLIT), responses(SPLIT)
    settings, student = replace(setting.distill, seed=seed), fresh_student(seed)
    module, ceiling = DistillModule(student, setting.objective, shards.contract), WholeTeacher(student)
    optimizer = make_optimizer(student, settings)
    order = TrainingOrder(
        lengths_N2=record_lengths(split),
        seed=seed,
        global_batch=settings.global_batch,
        epochs=settings.epochs,
        bucket_batches=settings.bucket_batches,
        mining_share=settings.mining_share,
    )
    mined = RecordDifficulty(len(split), memory=settings.mining_memory)
    difficulty: Difficulty | None = None
    for step in range(order.steps):
        factor = learning_rate_factor(step, order.steps, warmup=settings.warmup, final=settings.final_rate)
        set_rates(optimizer.param_groups, factor)
        records = order.global_batch_of(step, mined.snapshot)
        batch = assemble([split[int(record)] for record in records], START)
        if full:
            loss = ceiling.rows(batch, full([teacher[int(record)] for record in records])).mean()
        else:
            emphasis = Emphasis.at(setting.objective, step, order.steps, difficulty)
            terms = module(batch, scale=1 / batch.positions, emphasis=emphasis)
            loss, difficulty = terms.objective, Difficulty.of(terms.score_counts)
            mined.observe(records, terms.record_kl_B.numpy() / split.positions[records])
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        epoch, within = divmod(step, order.steps_per_epoch)
        if settings.mining_share and within == order.steps_per_epoch - 1:
            mined.begin_epoch(order.visits_R(epoch, mined.snapshot) == 0)
    return student, bytes_a_position(shards)


@torch.inference_mode()
def kl_sums(student: MiniCodformerForConditionalGeneration) -> list[float]:
    """KL(teacher || student) summed over the positions of each held-back record."""
    judge, found = WholeTeacher(student).eval(), responses("dev")
    bare = Kept(selection=Selection(kind="topk", k=1))
    sums: list[float] = []
    for start in range(0, len(found), DEV_BATCH):
        chosen = found[start : start + DEV_BATCH]
        batch = assemble([record_of(index, response, bare) for index, response in enumerate(chosen)], START)
        rows = judge.rows(batch, whole(chosen)).split([len(response.response_ids_R) for response in chosen])
        sums += [round(float(row.double().sum()), 4) for row in rows]
    return sums


def run(name: str, seed: int) -> dict[str, Any]:
    start = time.process_time()
    student, size = train(SETTINGS[name], seed=seed, full=whole if name == WHOLE else None)
    spent = time.process_time() - start
    return {
        "setting": name,
        "seed": seed,
        "bytes": round(size, 2),
        "training_seconds": round(spent, 1),
        "kl_sums": kl_sums(student),
    }


@cache
def dev_positions() -> tuple[int, ...]:
    return tuple(len(response.response_ids_R) for response in responses("dev"))


def rows(runs: Sequence[dict[str, Any]], positions: Sequence[int]) -> Iterator[Row]:
    """Every setting as its share of the gain, over the seeds that it, its neighbour and both ends have finished."""
    sums = {(facts["setting"], facts["seed"]): facts["kl_sums"] for facts in runs}
    sizes = {facts["setting"]: facts["bytes"] for facts in runs}
    for name, setting in SETTINGS.items():
        other = setting.beside or WHOLE
        names = list(dict.fromkeys((LABELS, WHOLE, other, name)))
        seeds = sorted({seed for _, seed in sums if all((one, seed) in sums for one in names)})
        if seeds:
            table = {one: np.array([sums[one, seed] for seed in seeds]) for one in names}
            found = gains(table, np.array(positions, float))
            kl = float(table[name].mean(0).sum() / sum(positions))
            label = f"{name}, {sizes[name]:.3g} B" if setting.cached else name
            value, low, high = (100 * share for share in dataclasses.astuple(found[name]))
            metric = f"gain [{low:.1f}, {high:.1f}], KL {kl:.4f}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
            yield compare(label, metric, "%", value, 100 * found[other].value, other, more_is_better=True)
            if setting.cached and sizes[name] <= GOAL_BYTES and setting.beside is None:
                yield compare(label, "its lower end", "%", low, 100.0, WHOLE, bound=GOAL, more_is_better=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quality_teacher.main()
    done = {(facts["setting"], facts["seed"]) for facts in RUNS.finished()}
    main_table = [name for name, setting in SETTINGS.items() if setting.beside is None]
    options = [name for name in SETTINGS if name not in main_table]
    for names, seed in itertools.product((main_table, options), range(arguments.seeds)):
        for name in names:
            if (name, seed) not in done:
                facts = run(name, seed)
                RUNS.append(facts)
                print(name, seed, round(sum(facts["kl_sums"]) / sum(dev_positions()), 4), flush=True)
    found = list(rows(RUNS.finished(), dev_positions()))
    write("quality", found, clock="none", packages=("torch", "transformers"), threads=1)


if __name__ == "__main__":
    main()
