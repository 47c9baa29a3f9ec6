"""Whole distributions that were kept, as the quality benchmark's ceiling learns from, beside the teacher at hand.

One student twice, from the same start on the same records in the same order, over one epoch: once from what
`quality_teacher` kept, once from SmolLM2 computed anew at every step. Then no cache of its states, no batch of other
prompts and no fp16 lies between teacher and student.

    python -m benchmarks.quality_live
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks import quality_teacher
from benchmarks.quality import DISTILL, SETTINGS, dev_positions, fresh_student, kl_sums, train, whole
from benchmarks.quality_shards import SPLIT
from benchmarks.quality_statistics import WHOLE
from benchmarks.quality_teacher import RestrictedTeacher, responses
from benchmarks.record import Row, compare, write

SEED, EXAMPLES = 0, 32


def rows(teacher: RestrictedTeacher) -> Iterator[Row]:
    chosen = responses(SPLIT)[:EXAMPLES]
    live_NV, kept_NV = torch.cat([teacher.live(one) for one in chosen]), whole(chosen)
    off = (live_NV.exp() * (live_NV - kept_NV)).sum(1).mean()
    entropy = -(live_NV.exp() * live_NV).sum(1).mean()
    yield compare("the teacher", "KL(live || kept)", "nats", float(off), float(entropy), "its entropy")

    setting = replace(SETTINGS[WHOLE], distill=replace(DISTILL, epochs=1))
    ways = {"kept": whole, "live": lambda asked: torch.cat([teacher.live(one) for one in asked])}
    students = {name: train(setting, seed=SEED, full=full)[0] for name, full in ways.items()}
    kl = {name: sum(kl_sums(one)) for name, one in {**students, "untrained": fresh_student(SEED)}.items()}
    mean = {name: total / sum(dev_positions()) for name, total in kl.items()}
    yield compare("one epoch", "validation KL", "nats", mean["kept"], mean["live"], "live teacher")
    yield compare("one epoch", "validation KL", "nats", mean["kept"], mean["untrained"], "untrained")


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quality_teacher.main()
    write("quality_live", list(rows(RestrictedTeacher())), clock="none", packages=("torch", "transformers"), threads=1)


if __name__ == "__main__":
    main()
