"""AdamW with a rate for every depth: the last layer learns fastest, the embedding by its own share.

    layer l of L    learning_rate * layer_decay ** (L - 1 - l)
    embedding       learning_rate * embedding_rate
    liquid          0.3 of its layer's rate

Weight decay acts on matrices and the embedding only. torch's own AdamW serves GPUs, CPUs and offloaded states alike
(its fused kernel covers both), so nothing is compiled at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stages.distill.settings import DistillSettings

if TYPE_CHECKING:
    from stages.student.model import MiniCodformerForConditionalGeneration
    from stages.student.parameters import ParameterFact

LIQUID_RATE = 0.3
BETA1 = 0.9


def parameter_groups(student: MiniCodformerForConditionalGeneration, settings: DistillSettings) -> list[dict[str, Any]]:
    """One group for every pair of rate and decay; `peak` is the rate that schedules scale."""
    from stages.student.parameters import parameter_groups_by_depth

    facts = list(parameter_groups_by_depth(student))
    deepest = max(fact.depth for fact in facts)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for fact in facts:
        key = (_rate(fact, deepest, settings), _decay(fact, settings))
        groups.setdefault(key, []).append(fact.parameter)
    return [
        {"params": parameters, "peak": rate, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _rate(fact: ParameterFact, deepest: int, settings: DistillSettings) -> float:
    if fact.kind == "embedding":
        return settings.learning_rate * settings.embedding_rate
    rate = settings.learning_rate * settings.layer_decay ** (deepest - fact.depth)
    return rate * LIQUID_RATE if fact.kind == "liquid" else rate


def _decay(fact: ParameterFact, settings: DistillSettings) -> float:
    return settings.weight_decay if fact.kind in ("matrix", "embedding") else 0.0


def make_optimizer(student: MiniCodformerForConditionalGeneration, settings: DistillSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(student, settings), betas=(BETA1, settings.beta2), fused=True)


def set_rates(groups: list[dict[str, Any]], factor: float) -> None:
    """Every group at `factor` of its own peak."""
    for group in groups:
        group["lr"] = group["peak"] * factor
