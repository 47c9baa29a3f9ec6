"""The liquid recurrence of one head as compiled loops, one step after another, and its gradients.

A head's state stays in a core's nearest cache and is moved on in place. Four steps are taken at once, so that a number
of it is read and written once for them; what tensor operations do in dozens of passes through memory are three here.
Backward keeps no state but one every `SPAN` steps, and runs forward again from there.

Shape suffixes, beside those of `stages/student/scan_naive.py`:
    X key channels, Y value channels of all heads, side by side   N spans
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.compiled import compiled_freely

Floats = NDArray[np.floating[Any]]
Sequences = tuple[Floats, Floats, Floats, Floats]
"""Query [T, X], key [T, X], value [T, Y] and decay [T, X] of a row; or their gradients, of the log decay the last."""

STRIDE = 4
"""Steps taken at once; a sequence has a multiple of them."""
SPAN = 64
"""Steps between two states that are kept for backward."""


@compiled_freely
def four_rows(array_TX: Floats, t: int, columns: slice) -> tuple[Floats, Floats, Floats, Floats]:
    """Those of the steps from t on."""
    return array_TX[t, columns], array_TX[t + 1, columns], array_TX[t + 2, columns], array_TX[t + 3, columns]


@compiled_freely
def run_head(
    sequences: Sequences,
    head: int,
    state_EF: Floats,
    entering_NEF: Floats,
    output_TY: Floats,
) -> None:
    """Outputs and the last state, from the first; `entering` is told the state that enters each span."""
    query_TX, key_TX, value_TY, decay_TX = sequences
    keys, values = state_EF.shape
    x, y = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
    for t in range(0, len(query_TX), STRIDE):
        if t % SPAN == 0:
            entering_NEF[t // SPAN] = state_EF
        query0, query1, query2, query3 = four_rows(query_TX, t, x)
        key0, key1, key2, key3 = four_rows(key_TX, t, x)
        decay0, decay1, decay2, decay3 = four_rows(decay_TX, t, x)
        value0, value1, value2, value3 = four_rows(value_TY, t, y)
        out0, out1, out2, out3 = four_rows(output_TY, t, y)
        for f in range(values):
            out0[f] = out1[f] = out2[f] = out3[f] = 0
        for e in range(keys):
            d0, d1, d2, d3 = decay0[e], decay1[e], decay2[e], decay3[e]
            k0, k1, k2, k3 = key0[e], key1[e], key2[e], key3[e]
            q0, q1, q2, q3 = query0[e], query1[e], query2[e], query3[e]
            for f in range(values):
                held = d0 * state_EF[e, f] + k0 * value0[f]
                out0[f] += q0 * held
                held = d1 * held + k1 * value1[f]
                out1[f] += q1 * held
                held = d2 * held + k2 * value2[f]
                out2[f] += q2 * held
                held = d3 * held + k3 * value3[f]
                out3[f] += q3 * held
                state_EF[e, f] = held


@compiled_freely
def query_grads(
    sequences: Sequences,
    output_grad_TY: Floats,
    head: int,
    first: int,
    last: int,
    state_EF: Floats,
    query_grad_TX: Floats,
) -> None:
    """Over the steps from `first` to `last`, forwards; the state that enters becomes the one that leaves."""
    _, key_TX, value_TY, decay_TX = sequences
    keys, values = state_EF.shape
    x, y = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
    for t in range(first, last, STRIDE):
        key0, key1, key2, key3 = four_rows(key_TX, t, x)
        decay0, decay1, decay2, decay3 = four_rows(decay_TX, t, x)
        value0, value1, value2, value3 = four_rows(value_TY, t, y)
        asked0, asked1, asked2, asked3 = four_rows(output_grad_TY, t, y)
        grad0, grad1, grad2, grad3 = four_rows(query_grad_TX, t, x)
        for e in range(keys):
            d0, d1, d2, d3 = decay0[e], decay1[e], decay2[e], decay3[e]
            k0, k1, k2, k3 = key0[e], key1[e], key2[e], key3[e]
            sum0 = sum1 = sum2 = sum3 = state_EF.dtype.type(0)
            for f in range(values):
                held = d0 * state_EF[e, f] + k0 * value0[f]
                sum0 += held * asked0[f]
                held = d1 * held + k1 * value1[f]
                sum1 += held * asked1[f]
                held = d2 * held + k2 * value2[f]
                sum2 += held * asked2[f]
                held = d3 * held + k3 * value3[f]
                sum3 += held * asked3[f]
                state_EF[e, f] = held
            grad0[e], grad1[e], grad2[e], grad3[e] = sum0, sum1, sum2, sum3


@compiled_freely
def key_and_value_grads(
    sequences: Sequences,
    output_grad_TY: Floats,
    head: int,
    first: int,
    last: int,
    grad_EF: Floats,
    key_grad_TX: Floats,
    value_grad_TY: Floats,
) -> None:
    """Over the steps from `last` back to `first`; the gradient of the state that leaves becomes that of the one that
    enters."""
    query_TX, key_TX, value_TY, decay_TX = sequences
    keys, values = grad_EF.shape
    x, y = slice(head * keys, (head + 1) * keys), slice(head * values, (head + 1) * values)
    for t in range(last - STRIDE, first - 1, -STRIDE):
        query0, query1, query2, query3 = four_rows(query_TX, t, x)
        key0, key1, key2, key3 = four_rows(key_TX, t, x)
        decay0, decay1, decay2, decay3 = four_rows(decay_TX, t, x)
        value0, value1, value2, value3 = four_rows(value_TY, t, y)
        asked0, asked1, asked2, asked3 = four_rows(output_grad_TY, t, y)
        grad0, grad1, grad2, grad3 = four_rows(value_grad_TY, t, y)
        key_grad0, key_grad1, key_grad2, key_grad3 = four_rows(key_grad_TX, t, x)
        for f in range(values):
            grad0[f] = grad1[f] = grad2[f] = grad3[f] = 0
        for e in range(keys):
            d0, d1, d2, d3 = decay0[e], decay1[e], decay2[e], decay3[e]
            k0, k1, k2, k3 = key0[e], key1[e], key2[e], key3[e]
            q0, q1, q2, q3 = query0[e], query1[e], query2[e], query3[e]
            sum0 = sum1 = sum2 = sum3 = grad_EF.dtype.type(0)
            for f in range(values):
                held = grad_EF[e, f] + q3 * asked3[f]
                sum3 += held * value3[f]
                grad3[f] += k3 * held
                held = d3 * held + q2 * asked2[f]
                sum2 += held * value2[f]
                grad2[f] += k2 * held
                held = d2 * held + q1 * asked1[f]
                sum1 += held * value1[f]
                grad1[f] += k1 * held
                held = d1 * held + q0 * asked0[f]
                sum0 += held * value0[f]
                grad0[f] += k0 * held
                grad_EF[e, f] = d0 * held
            key_grad0[e], key_grad1[e], key_grad2[e], key_grad3[e] = sum0, sum1, sum2, sum3


@compiled_freely
def run_head_back(
    sequences: Sequences,
    output_grad_TY: Floats,
    head: int,
    entering_NEF: Floats,
    grad_EF: Floats,
    gradients: Sequences,
) -> None:
    """All gradients; that of the last state becomes that of the first.

    A step's log decay scales all that is held from then on. With G the gradient of the state S, its own gradient is
    sum_F(G S) less what the step wrote, so that from the step after it, it differs by q dq - k dk (as in Yang et al.,
    Gated Linear Attention Transformers, appendix C). Sums begin anew at each span from the product itself.
    """
    query_TX, key_TX, _, _ = sequences
    query_grad_TX, key_grad_TX, value_grad_TY, log_decay_grad_TX = gradients
    steps = len(query_TX)
    keys, values = grad_EF.shape
    x = slice(head * keys, (head + 1) * keys)
    state_EF = np.empty_like(grad_EF)
    held_E = np.empty(keys, grad_EF.dtype)
    for n in range(len(entering_NEF) - 1, -1, -1):
        first, last = n * SPAN, min(steps, (n + 1) * SPAN)
        state_EF[:] = entering_NEF[n]
        query_grads(sequences, output_grad_TY, head, first, last, state_EF, query_grad_TX)
        for e in range(keys):
            total = grad_EF.dtype.type(0)
            for f in range(values):
                total += grad_EF[e, f] * state_EF[e, f]
            held_E[e] = total
        key_and_value_grads(sequences, output_grad_TY, head, first, last, grad_EF, key_grad_TX, value_grad_TY)
        for t in range(last - 1, first - 1, -1):
            query, query_grad, key, key_grad = query_TX[t, x], query_grad_TX[t, x], key_TX[t, x], key_grad_TX[t, x]
            log_decay_grad = log_decay_grad_TX[t, x]
            for e in range(keys):
                held_E[e] += query[e] * query_grad[e] - key[e] * key_grad[e]
                log_decay_grad[e] = held_E[e]
