"""Naive oracles: every loss from the teacher's and the student's full distributions, in float64, logits and all.

They know no cache: a temperature is a softmax of log p / T over all V ids, a bucket a sum over a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.distill.losses.rows import TeacherRows

NODES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
"""So dense that the partition curve is nearly exact: what is left to differ is the loss itself."""
BETA = 0.3


@dataclass(frozen=True, kw_only=True)
class Side:
    """The teacher in full."""

    log_p_NV: Tensor
    rows: TeacherRows
    """What a cache keeps of it."""

    @property
    def inside_NV(self) -> Tensor:
        """bool: kept."""
        mask = torch.zeros_like(self.log_p_NV, dtype=torch.bool)
        for row, (ids, present) in enumerate(zip(self.rows.ids_NK, self.rows.present_NK, strict=True)):
            mask[row, ids[present]] = True
        return mask


def teacher_of(
    logits_NV: Tensor,
    k: int,
    *,
    labels_N: Tensor | None = None,
    draws: int = 0,
    nodes: tuple[float, ...] = NODES,
    kept_N: Tensor | None = None,
) -> Side:
    """Keep the k best (or kept_N of each row), and `draws` draws from the others."""
    log_p_NV = logits_NV.log_softmax(1)
    ids = log_p_NV.topk(k, 1).indices
    exact = torch.ones_like(ids, dtype=torch.bool) if kept_N is None else torch.arange(k) < kept_N[:, None]
    tail_NV = log_p_NV.clone()
    for row in range(len(ids)):
        tail_NV[row, ids[row][exact[row]]] = -torch.inf
    log_tail_N = tail_NV.logsumexp(1)
    counts_NV = torch.zeros_like(log_p_NV)
    present = exact
    if draws:
        drawn = torch.multinomial(tail_NV.exp(), draws, replacement=True)
        counts_NV.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=counts_NV.dtype))
        most = int((counts_NV > 0).sum(1).max())
        counted, more = counts_NV.topk(most, 1)
        ids, present = torch.cat([ids, more], 1), torch.cat([exact, counted > 0], 1)
        exact = torch.cat([exact, torch.zeros_like(more, dtype=torch.bool)], 1)
    log_kept = log_p_NV.gather(1, ids).masked_fill(~present, -torch.inf)
    share = torch.where(exact, log_kept, (counts_NV / max(draws, 1)).gather(1, ids).log() + log_tail_N[:, None])
    drawn_mass_N = torch.where(present & ~exact, log_kept.exp(), 0.0).sum(1)
    curve = [[(b * tail_NV).logsumexp(1) for b in nodes]]
    curve.append([((b * tail_NV).softmax(1) * tail_NV.masked_fill(tail_NV.isinf(), 0.0)).sum(1) for b in nodes])
    rows = TeacherRows(
        ids_NK=torch.where(present, ids, ids[:, :1]),
        present_NK=present,
        exact_NK=exact,
        log_kept_NK=log_kept,
        log_share_NK=share.masked_fill(~present, -torch.inf),
        log_rest_N=(log_tail_N.exp() - drawn_mass_N).clamp_min(0.0).log(),
        log_tail_N=log_tail_N,
        entropy_N=-(log_p_NV.exp() * log_p_NV).sum(1),
        curve_NJ=torch.stack(curve[0] + curve[1], 1) if nodes else None,
        labels_N=torch.randint(logits_NV.shape[1], logits_NV.shape[:1]) if labels_N is None else labels_N,
    )
    return Side(log_p_NV=log_p_NV, rows=rows)


def tempered(log_NV: Tensor, temperature_N: Tensor) -> Tensor:
    return (log_NV / temperature_N[:, None]).log_softmax(1)


def coarse(log_NV: Tensor, side: Side) -> Tensor:
    """Probabilities of every kept id, 0 at others, and of the rest in one more column: [N, V + 1]."""
    probability, inside = log_NV.exp(), side.inside_NV
    rest = torch.where(inside, 0.0, probability).sum(1, keepdim=True)
    return torch.cat([torch.where(inside, probability, 0.0), rest], 1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), 0.0).sum(1)


Oracle = Callable[[Tensor, Side, Tensor], Tensor]


def bucketed(divergence: Callable[[Tensor, Tensor], Tensor]) -> Oracle:
    def value(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
        p, q = (coarse(tempered(log, temperature_N), side) for log in (side.log_p_NV, logits_NV))
        return temperature_N**2 * divergence(p, q)

    return value


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    mixture = BETA * p + (1 - BETA) * q
    return BETA * kl(p, mixture) + (1 - BETA) * kl(q, mixture)


def ghost(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    p, q = (coarse(tempered(log, torch.ones_like(temperature_N)), side) for log in (side.log_p_NV, logits_NV))
    power = 1 / temperature_N[:, None]
    flat_p, flat_q = (torch.where(x > 0, x.clamp_min(1e-300) ** power, 0.0) for x in (p, q))
    return temperature_N**2 * kl(flat_p / flat_p.sum(1, keepdim=True), flat_q / flat_q.sum(1, keepdim=True))


def conditional(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    inside = side.inside_NV
    mass_p, mass_q = (torch.where(inside, log.exp(), 0.0).sum(1) for log in (side.log_p_NV, logits_NV.log_softmax(1)))
    within_p, within_q = (
        tempered(log.masked_fill(~inside, -torch.inf), temperature_N).exp() for log in (side.log_p_NV, logits_NV)
    )
    masses = kl(torch.stack([mass_p, 1 - mass_p], 1), torch.stack([mass_q, 1 - mass_q], 1))
    return masses + mass_p * temperature_N**2 * kl(within_p, within_q)


def residual(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    p = coarse(tempered(side.log_p_NV, temperature_N), side)
    label_NV = torch.nn.functional.one_hot(side.rows.labels_N, logits_NV.shape[1])
    target = p[:, :-1] + p[:, -1:] * label_NV
    return temperature_N**2 * kl(target, tempered(logits_NV, temperature_N).exp())


def renormalised(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    p = coarse(tempered(side.log_p_NV, temperature_N), side)[:, :-1]
    return temperature_N**2 * kl(p / p.sum(1, keepdim=True), tempered(logits_NV, temperature_N).exp())


def water_filled_target(q_NV: Tensor, p_NV: Tensor, inside_NV: Tensor) -> Tensor:
    """p* by bisection: p where kept, min(kappa, c q) elsewhere, c such that it sums to 1."""
    kappa = torch.where(inside_NV, p_NV, torch.inf).amin(1, keepdim=True)
    rho = torch.where(inside_NV, 0.0, p_NV).sum(1, keepdim=True)
    low, high = torch.zeros_like(rho), kappa / q_NV.amin(1, keepdim=True)
    for _ in range(200):
        middle = (low + high) / 2
        over = torch.where(inside_NV, 0.0, torch.minimum(kappa, middle * q_NV)).sum(1, keepdim=True) > rho
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return torch.where(inside_NV, p_NV, torch.minimum(kappa, low * q_NV))


def water_filled(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    q = tempered(logits_NV, temperature_N).exp()
    target = water_filled_target(q.detach(), tempered(side.log_p_NV, temperature_N).exp(), side.inside_NV)
    return temperature_N**2 * kl(target, q)


def sampled_target(side: Side, temperature_N: Tensor) -> Tensor:
    """What the draws say of p_T: a drawn id weighs its share of the draws times p_T/p, for all of the tail."""
    p_T, rows = tempered(side.log_p_NV, temperature_N).exp(), side.rows
    target = torch.zeros_like(p_T)
    for n in range(len(p_T)):
        for k in range(rows.ids_NK.shape[1]):
            if rows.present_NK[n, k]:
                v = rows.ids_NK[n, k]
                share = rows.log_share_NK[n, k].exp()
                target[n, v] = p_T[n, v] if rows.exact_NK[n, k] else share * p_T[n, v] / side.log_p_NV[n, v].exp()
    return target


def sampled(logits_NV: Tensor, side: Side, temperature_N: Tensor) -> Tensor:
    p_T = tempered(side.log_p_NV, temperature_N)
    cross = -(sampled_target(side, temperature_N) * tempered(logits_NV, temperature_N)).sum(1)
    return temperature_N**2 * (cross + (p_T.exp() * p_T).sum(1))


def cross_entropy(logits_NV: Tensor, side: Side, _: Tensor) -> Tensor:
    return -logits_NV.log_softmax(1)[torch.arange(len(logits_NV)), side.rows.labels_N]


ORACLES: dict[str, Oracle] = {
    "tail_bucket_kl": bucketed(kl),
    "water_filled_kl": water_filled,
    "sampled_kl": sampled,
    "reverse_kl": bucketed(lambda p, q: kl(q, p)),
    "jensen_shannon": bucketed(jensen_shannon),
    "total_variation": bucketed(lambda p, q: 0.5 * (p - q).abs().sum(1)),
    "ghost_kl": ghost,
    "conditional_kl": conditional,
    "residual_to_label": residual,
    "topk_kl_renormalised": renormalised,
}
