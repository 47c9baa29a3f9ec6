"""What a cache loses: decoded records beside the full distributions that they were made from. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shards.contract import Contract
from shards.record import Float64, Record

KL_AS_ONE = "KL(full || decoded), the rest as one"
KL_SPREAD = "KL(full || decoded), the rest spread evenly"
KEPT_MASS = "mass of the kept ids"
SHARE_KEPT = "share of the KL kept at T = "
"""The temperature follows."""
MEAN, LARGEST = "mean", "largest"
"""After a quantity's name and a comma: which figure of it."""
TEMPERATURES = (1.25, 1.5, 2.0, 4.0)
"""Beside 1, at which a distribution needs no partition."""


@dataclass(slots=True)
class Fidelity:
    """Gathers positions record by record; `report` sums them up."""

    contract: Contract
    _values: dict[str, list[Float64]] = field(default_factory=dict, init=False)
    _shares: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict, init=False)
    """Parts and wholes, which are summed before they are divided."""

    def add(self, record: Record, logprobs_NV: Float64) -> None:
        """A decoded record and the teacher's full log-probabilities of its positions."""
        self._put(KEPT_MASS, self._kept_mass(record, logprobs_NV))
        if self.contract.selection.kind != "sample":
            self._compare_heads(record, logprobs_NV)
            self._weigh_heads(record, logprobs_NV)
        entropy_N = -(np.exp(logprobs_NV) * logprobs_NV).sum(axis=1)
        self._put("error of the entropy", np.abs(record.entropy_N - entropy_N))
        if record.curve_NJ is not None:
            self._compare_partitions(record, logprobs_NV)

    def report(self) -> Mapping[str, float]:
        """Means over all positions, the largest errors, and shares of sums."""
        values = {name: np.concatenate(parts) for name, parts in self._values.items()}
        facts: dict[str, float] = {"positions": float(len(next(iter(values.values()), ())))}
        for name, values_N in values.items():
            facts[f"{name}, {MEAN}"] = _figure(values_N.mean())
            if name != KEPT_MASS:
                facts[f"{name}, {LARGEST}"] = _figure(values_N.max())
        return facts | {name: _figure(sum(part) / sum(whole)) for name, (part, whole) in self._shares.items()}

    def _put(self, name: str, values_N: Float64) -> None:
        self._values.setdefault(name, []).append(values_N.astype(np.float64))

    def _kept_mass(self, record: Record, logprobs_NV: Float64) -> Float64:
        kept_NK = record.ids_NK >= 0
        probs_NK: Float64 = np.exp(np.take_along_axis(logprobs_NV, np.where(kept_NK, record.ids_NK, 0), axis=1))
        mass_N: Float64 = np.where(kept_NK, probs_NK, 0.0).sum(axis=1)
        return mass_N

    def _head(self, record: Record) -> tuple[NDArray[np.integer], Float64]:
        """Ids [N, k] of the exact head, as indices, and their decoded log-probabilities; -inf where there is none."""
        assert record.logprobs_NK is not None, "an exact head has log-probabilities"
        k = self.contract.selection.k
        ids_NK, logprobs_NK = record.ids_NK[:, :k], record.logprobs_NK[:, :k].astype(np.float64)
        return np.where(ids_NK >= 0, ids_NK, 0), np.where(ids_NK >= 0, logprobs_NK, -np.inf)

    def _compare_heads(self, record: Record, logprobs_NV: Float64) -> None:
        """KL(full || decoded) with the ids outside the head as one, and with its mass spread evenly over them."""
        ids_NK, ours_NK = self._head(record)
        there_NK = np.isfinite(ours_NK)
        theirs_NK = np.take_along_axis(logprobs_NV, ids_NK, axis=1)
        probs_NK = np.where(there_NK, np.exp(theirs_NK), 0.0)
        head_N = (probs_NK * np.where(there_NK, theirs_NK - np.where(there_NK, ours_NK, 0.0), 0.0)).sum(axis=1)
        outside_NV = logprobs_NV.copy()
        for row, (ids_K, there_K) in enumerate(zip(ids_NK, there_NK, strict=True)):
            outside_NV[row, ids_K[there_K]] = -np.inf
        tail_N = np.logaddexp.reduce(outside_NV, axis=1)
        log_tail_N = record.log_tail_N.astype(np.float64)
        rest_N = np.where(np.isfinite(log_tail_N), np.exp(tail_N) * (tail_N - log_tail_N), 0.0)
        self._put(KL_AS_ONE, head_N + rest_N)
        probs_NV = np.exp(outside_NV)
        spread_N = log_tail_N - np.log((probs_NV > 0).sum(axis=1))
        negative_N = (probs_NV * np.where(probs_NV > 0, outside_NV, 0.0)).sum(axis=1)
        even_N = np.where(np.isfinite(log_tail_N), negative_N - np.exp(tail_N) * spread_N, 0.0)
        self._put(KL_SPREAD, head_N + even_N)

    def _weigh_heads(self, record: Record, logprobs_NV: Float64) -> None:
        """The share of the tempered KL that the head and the rest as one still show, whatever the codec.

        It depends on the student. This is the share for one whose logits err independently and alike on every id, to
        second order: the expected KL is then half the error's variance times 1 - sum p^2, and of the rest, seen as one
        outcome of mass t, only the variance of its mean counts: sum p^2 / t instead of t.
        """
        ids_NK, ours_NK = self._head(record)
        for temperature in (1.0, *TEMPERATURES):
            logits_NV = logprobs_NV / temperature
            probs_NV = np.exp(logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True))
            probs_NK = np.where(np.isfinite(ours_NK), np.take_along_axis(probs_NV, ids_NK, axis=1), 0.0)
            mass_N, squares_N = probs_NK.sum(axis=1), np.square(probs_NV).sum(axis=1)
            rest_N = np.maximum(1 - mass_N, np.finfo(np.float64).tiny)
            as_one_N = np.maximum(squares_N - np.square(probs_NK).sum(axis=1), 0.0) / rest_N
            parts, wholes = self._shares.setdefault(f"{SHARE_KEPT}{temperature:g}", ([], []))
            parts.append(float((mass_N + as_one_N - squares_N).sum()))
            wholes.append(float((1 - squares_N).sum()))

    def _compare_partitions(self, record: Record, logprobs_NV: Float64) -> None:
        """log Z(1/T) of the whole distribution: of the decoded head, and the tail's curve between its nodes."""
        k = self.contract.selection.k
        head_NK = self._head(record)[1] if k else np.full((record.positions, 1), -np.inf)
        for temperature in TEMPERATURES:
            power = 1 / temperature
            tail_N = tail_partition(record, self.contract.curve, power, self.contract.vocab_size)
            ours_N = np.logaddexp(tail_N, np.logaddexp.reduce(power * head_NK, axis=1))
            theirs_N = np.logaddexp.reduce(power * logprobs_NV, axis=1)
            self._put(f"error of log Z at T = {temperature:g}", np.abs(ours_N - theirs_N))


def tail_partition(record: Record, nodes: Sequence[float], power: float, vocab_size: int) -> Float64:
    """[N]: log sum p^power outside the exact head: cubic Hermite between the curve's nodes, a line beyond the last.

    The node 1 follows from the tail's mass, the entropy and the head.
    """
    assert record.curve_NJ is not None, "the record has a curve"
    curve_NJ = record.curve_NJ.astype(np.float64)
    values = {node: curve_NJ[:, index] for index, node in enumerate(nodes)}
    slopes = {node: curve_NJ[:, len(nodes) + index] for index, node in enumerate(nodes)}
    values[1.0], slopes[1.0] = record.log_tail_N.astype(np.float64), _slope_at_one(record, vocab_size)
    lower = max((node for node in values if node <= power), default=None)
    upper = min((node for node in values if node > power), default=None)
    if lower is None or upper is None:
        edge = min(values) if lower is None else max(values)
        return values[edge] + slopes[edge] * (power - edge)
    width = upper - lower
    t = (power - lower) / width
    blended: Float64 = (
        (1 + 2 * t) * (1 - t) ** 2 * values[lower]
        + t * (1 - t) ** 2 * width * slopes[lower]
        + t**2 * (3 - 2 * t) * values[upper]
        + t**2 * (t - 1) * width * slopes[upper]
    )
    return blended


def _slope_at_one(record: Record, vocab_size: int) -> Float64:
    """d/db log sum p^b at b = 1: the mean of log p under the tail.

    It follows from the entropy, whose rounding a thin tail magnifies. But no id of the tail is likelier than the least
    likely exact one, and no mean of log p lies below that of equal shares.
    """
    entropy_N, highest_N = record.entropy_N.astype(np.float64), np.zeros(record.positions)
    if record.logprobs_NK is not None:
        exact_NK = np.isfinite(record.logprobs_NK)
        if record.draws_NK is not None:
            exact_NK &= record.draws_NK == 0
        logprobs_NK = np.where(exact_NK, record.logprobs_NK.astype(np.float64), -np.inf)
        highest_N = np.where(exact_NK, logprobs_NK, 0.0).min(axis=1)
        entropy_N = entropy_N + np.where(exact_NK, np.exp(logprobs_NK) * np.where(exact_NK, logprobs_NK, 0), 0).sum(1)
    log_tail_N = record.log_tail_N.astype(np.float64)
    slope_N: Float64 = np.clip(-entropy_N / np.exp(log_tail_N), log_tail_N - np.log(vocab_size), highest_N)
    return slope_N


def _figure(value: float) -> float:
    return float(f"{value:.4g}")
