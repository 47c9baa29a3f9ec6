"""The table of distillation losses: what `objective.kd` can name, and what each needs of the cache.

A new loss is one function and one row here. What a set of shards cannot give is refused before the first step, with
the reason: no loss is ever computed from something else in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from shards.contract import DRAWN, Contract, Selection
from stages.distill.losses.divergences import (
    conditional_kl,
    ghost_kl,
    jensen_shannon,
    residual_to_label,
    reverse_kl,
    tail_bucket_kl,
    topk_kl_renormalised,
    total_variation,
)
from stages.distill.losses.hard_negatives import water_filled_kl
from stages.distill.losses.rows import RowLoss, plain, tempered, where_unsure
from stages.distill.losses.sampled import sampled_kl
from stages.distill.settings import ObjectiveSettings
from stages.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationLoss:
    """One loss of the table."""

    build: Callable[[ObjectiveSettings], RowLoss]
    log_probabilities: bool = True
    """It compares log-probabilities of the kept ids."""
    tail: bool = True
    """It needs the mass outside the kept ids."""
    exact: bool = False
    """It holds only where the kept ids are the most probable ones."""
    draws: bool = False
    """It is about drawn ids."""
    curve: bool = True
    """At T != 1 it needs the tail's partition curve."""
    hard_negatives: bool = False
    """It looks at the student's best ids outside the kept ones."""


LOSSES: dict[str, DistillationLoss] = {
    "tail_bucket_kl": DistillationLoss(build=lambda _: tempered(tail_bucket_kl)),
    "water_filled_kl": DistillationLoss(build=lambda _: tempered(water_filled_kl), exact=True, hard_negatives=True),
    "sampled_kl": DistillationLoss(
        build=lambda _: tempered(sampled_kl), log_probabilities=False, tail=False, draws=True
    ),
    "reverse_kl": DistillationLoss(build=lambda _: tempered(reverse_kl)),
    "jensen_shannon": DistillationLoss(build=lambda settings: tempered(partial(jensen_shannon, beta=settings.beta))),
    "total_variation": DistillationLoss(build=lambda _: tempered(total_variation)),
    "ghost_kl": DistillationLoss(build=lambda _: ghost_kl, curve=False),
    "conditional_kl": DistillationLoss(build=lambda _: conditional_kl, curve=False),
    "residual_to_label": DistillationLoss(build=lambda _: tempered(residual_to_label)),
    "topk_kl_renormalised": DistillationLoss(build=lambda _: tempered(topk_kl_renormalised), tail=False),
}


def yardstick(contract: Contract) -> RowLoss:
    """The loss that measures every student of a set alike, whatever it was trained on; at temperature 1."""
    if not contract.selection.logprobs:
        return plain(sampled_kl)
    return plain(tail_bucket_kl if contract.selection.tail_known else topk_kl_renormalised)


def what_kl_is(selection: Selection) -> str:
    """What the yardstick of a set tells, in words that follow its figure in nats."""
    if not selection.logprobs:
        words = "as the drawn ids estimate it (it may be negative)"
    elif selection.tail_known:
        words = "over the kept ids and one bucket for the rest (a lower bound of the whole)"
    else:
        words = "over the kept ids alone, scaled to sum to 1 (no bound of the whole)"
    drawn = "; top-1 and top-5 are of the most probable drawn id"
    return words + drawn * (selection.kind == "sample")


def distillation_term(settings: ObjectiveSettings, contract: Contract) -> RowLoss:
    """The KD of the objective: the loss that it names, where the teacher is not too sure; unweighted, the yardstick."""
    if settings.kd_weight == 0:
        return yardstick(contract)
    loss = LOSSES[settings.kd].build(settings)
    return where_unsure(loss, settings.least_entropy) if settings.least_entropy else loss


_OTHER_LOSS = "set objective.kd to one of them; docs/objective.md says what each needs"
_NO_TEMPERATURE = "set objective.temperature_mode = 'fixed' and objective.temperature = 1"


def require_supported(settings: ObjectiveSettings, contract: Contract) -> None:
    """Raise SettingError where the set cannot give what the objective asks for: what is missing, and what to set."""
    if settings.kd not in LOSSES:
        raise SettingError(f"objective.kd is {settings.kd!r}; there are {', '.join(LOSSES)}", hint=_OTHER_LOSS)
    if settings.kd_weight == 0:
        return
    loss, selection = LOSSES[settings.kd], contract.selection
    kind, name = selection.kind, f"objective.kd = {settings.kd!r}"
    if loss.exact and kind in DRAWN:
        raise SettingError(
            f"{name} needs the most probable ids; ids of a selection {kind!r} were drawn",
            hint="set objective.kd = 'sampled_kl', which is for drawn ids",
        )
    if loss.draws and kind not in DRAWN:
        raise SettingError(
            f"{name} estimates from drawn ids; a selection {kind!r} has none",
            hint="set objective.kd = 'tail_bucket_kl' or 'water_filled_kl'",
        )
    if loss.log_probabilities and not selection.logprobs:
        raise SettingError(
            f"{name} compares log-probabilities; this selection {kind!r} keeps none: take 'sampled_kl'",
            hint="set objective.kd = 'sampled_kl'",
        )
    if loss.tail and not selection.tail_known:
        raise SettingError(
            f"{name} needs the mass of the ids that were not kept, which these shards do not know",
            hint="set objective.kd = 'topk_kl_renormalised', or write the shards anew from the teacher",
        )
    if settings.least_entropy and not selection.tail_known:
        raise SettingError(
            "objective.least_entropy needs the teacher's entropy, which these shards do not know",
            hint="set objective.least_entropy = 0",
        )
    _require_temperature(settings, contract, loss)


def _require_temperature(settings: ObjectiveSettings, contract: Contract, loss: DistillationLoss) -> None:
    if not settings.tempers:
        return
    mode = settings.temperature_mode
    asked = (
        f"a temperature other than 1 (objective.temperature_mode = {mode!r}, temperature = {settings.temperature:g})"
    )
    if not contract.selection.logprobs:
        raise SettingError(
            f"{asked} needs log-probabilities; this selection {contract.selection.kind!r} keeps none",
            hint=_NO_TEMPERATURE,
        )
    if mode == "adaptive" and not contract.selection.tail_known:
        raise SettingError(
            f"{asked} needs the mass of the ids that were not kept, which these shards do not know",
            hint=_NO_TEMPERATURE,
        )
    if not loss.curve:
        return
    if not contract.curve:
        raise SettingError(
            f"{asked} needs the tail's partition curve, which these shards do not have; "
            "objective.kd = 'conditional_kl' or 'ghost_kl' does without",
            hint=f"{_NO_TEMPERATURE}; or write the shards anew with cache.curve = [0.5, 0.25]",
        )
    if settings.temperature_cap * min(contract.curve) > 1:
        end = 1 / min(contract.curve)
        raise SettingError(
            f"objective.temperature_cap is {settings.temperature_cap:g}; the shards' partition curve ends at {end:g}",
            hint=f"set objective.temperature_cap = {end:g} or lower",
        )
