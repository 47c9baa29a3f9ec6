"""How the next token is chosen: greedily, or by one uniform number put through the inverse of the distribution.

Random numbers come from generators of our own, one an answer and one number a token, so no global random state is read
or moved, and what an answer draws depends on its seed alone, not on the answers beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.inference.settings import Sampling

_LIKELY_NUCLEUS = 256
"""Tokens that hold a nucleus nearly always; where they do not, the whole vocabulary is sorted."""
_LOWEST = 1e-30
"""What a temperature or top_p above 0 is raised to, so that fp32 can hold it. Far below, draws are greedy already."""


def next_tokens(logits_BV: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> list[int]:
    """One token a row. `uniforms` are the rows' random numbers in [0, 1); greedy rows do not look at theirs."""
    tokens = _greedy(logits_BV)
    for nucleus in (False, True):
        rows = [row for row, s in enumerate(samplings) if s.temperature and (s.top_p < 1) is nucleus]
        if not rows:
            continue
        device = logits_BV.device
        scores_RV = logits_BV[rows].float()
        temperature_R1 = torch.tensor([[max(samplings[row].temperature, _LOWEST)] for row in rows])
        # The best score becomes 0, so that the division cannot overflow upwards however low the temperature is.
        scores_RV = (scores_RV - scores_RV.amax(-1, keepdim=True)) / temperature_R1.to(device)
        uniform_R1 = torch.tensor([[uniforms[row]] for row in rows], dtype=torch.float64, device=device)
        probs_RV = scores_RV.softmax(-1)
        if nucleus:
            top_p_R1 = torch.tensor([[max(samplings[row].top_p, _LOWEST)] for row in rows], device=device)
            probs_RK, ids_RK = _nucleus(probs_RV, top_p_R1)
            drawn_R1 = ids_RK.gather(-1, _inverse_cdf(probs_RK, uniform_R1))
        else:
            drawn_R1 = _inverse_cdf(probs_RV, uniform_R1)
        for row, token in zip(rows, drawn_R1[:, 0].tolist(), strict=True):
            tokens[row] = token
    return tokens


def _greedy(logits_BV: Tensor) -> list[int]:
    """The first of the highest logits of each row."""
    # On a CPU torch reads a row one number at a time: of 32 rows of 49,152 numpy takes a thirteenth of the time.
    on_cpu = logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32
    best = logits_BV.numpy(force=True).argmax(-1) if on_cpu else logits_BV.argmax(-1)
    tokens: list[int] = best.tolist()
    return tokens


def _inverse_cdf(weights_RK: Tensor, uniform_R1: Tensor) -> Tensor:
    """Index drawn in proportion to the weights, [R, 1]: the first whose cumulated weight exceeds the uniform share."""
    cumulated_RK = weights_RK.cumsum(-1, dtype=torch.float64)
    # uniform < 1 is a multiple of 2^-53, so the product stays below the total and no weight of 0 is ever drawn.
    return torch.searchsorted(cumulated_RK, uniform_R1 * cumulated_RK[:, -1:], right=True)


def _nucleus(probs_RV: Tensor, top_p_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities by falling size with 0 after the first that reach top_p, and their ids (Holtzman, 2019)."""
    width = min(_LIKELY_NUCLEUS, probs_RV.shape[-1])
    probs_RK, ids_RK = probs_RV.topk(width)
    if (probs_RK.sum(-1, keepdim=True) < top_p_R1).any():
        probs_RK, ids_RK = probs_RV.sort(-1, descending=True)
    before_RK = probs_RK.cumsum(-1) - probs_RK
    return probs_RK.masked_fill(before_RK >= top_p_R1, 0), ids_RK


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token of the vocabulary with its log-probability under the model, before temperature and top_p."""

    token_id: int
    logprob: float


def candidates(logits_V: Tensor, token_id: int, count: int) -> tuple[Candidate, tuple[Candidate, ...]]:
    """The chosen token, and the `count` most probable ones by falling probability."""
    logprobs_V = logits_V.float().log_softmax(-1)
    chosen = Candidate(token_id=token_id, logprob=float(logprobs_V[token_id]))
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return chosen, tuple(Candidate(token_id=index, logprob=value) for index, value in top)
