"""The student's scan for training on a CPU: `scan_naive` in compiled loops, each head of each row on its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stages.distill.scan_loops import SPAN, STRIDE, Sequences, run_head, run_head_back
from stages.student.recurrences import DiagonalRecurrence


def compile_scans(student: nn.Module) -> None:
    """Have the recurrences scan by compiled loops. The student is for a CPU from then on."""
    for module in student.modules():
        if isinstance(module, DiagonalRecurrence):
            module.scan = scan_compiled


def scan_compiled(
    query_BTHE: Tensor,
    key_BTHE: Tensor,
    value_BTHF: Tensor,
    log_decay_BTHE: Tensor,
    state_BHEF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The function of `scan_naive`, for tensors on a CPU. Differentiable once.

    A ragged end is filled with steps that neither decay nor write.
    """
    batch, steps, heads, key_size = query_BTHE.shape
    if state_BHEF is None:
        state_BHEF = query_BTHE.new_zeros(batch, heads, key_size, value_BTHF.shape[-1])
    sequences = [query_BTHE, key_BTHE, value_BTHF, log_decay_BTHE]
    if missing := -steps % STRIDE:
        sequences = [F.pad(tensor, (0, 0, 0, 0, 0, missing)) for tensor in sequences]
    output_BTHF, state_BHEF = _CompiledScan.apply(*sequences, state_BHEF)
    return output_BTHF[:, :steps], state_BHEF


class _CompiledScan(torch.autograd.Function):
    """The scan over whole strides."""

    @staticmethod
    def forward(
        ctx: Any, query_BTHE: Tensor, key_BTHE: Tensor, value_BTHF: Tensor, log_decay_BTHE: Tensor, state_BHEF: Tensor
    ) -> tuple[Tensor, Tensor]:
        sequences = [part.contiguous() for part in (query_BTHE, key_BTHE, value_BTHF, log_decay_BTHE.exp())]
        batch, steps, heads, _ = query_BTHE.shape
        state_BHEF = state_BHEF.clone(memory_format=torch.contiguous_format)
        entering_BHNEF = state_BHEF.new_empty(batch, heads, -(-steps // SPAN), *state_BHEF.shape[2:])
        output_BTHF = torch.empty_like(sequences[2])
        rows, outputs = _rows(*sequences), output_BTHF.flatten(2).numpy()
        states, entering = state_BHEF.numpy(), entering_BHNEF.numpy()

        def run(row: int, head: int) -> None:
            run_head(rows[row], head, states[row, head], entering[row, head], outputs[row])

        _for_each_head(run, batch, heads)
        ctx.save_for_backward(*sequences, entering_BHNEF)
        return output_BTHF, state_BHEF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad_BTHF: Tensor, last_grad_BHEF: Tensor) -> tuple[Tensor, ...]:
        *sequences, entering_BHNEF = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in sequences]
        state_grad_BHEF = last_grad_BHEF.clone(memory_format=torch.contiguous_format)
        rows, row_gradients = _rows(*sequences), _rows(*gradients)
        output_grads = output_grad_BTHF.contiguous().flatten(2).numpy()
        states, entering = state_grad_BHEF.numpy(), entering_BHNEF.numpy()

        def run(row: int, head: int) -> None:
            run_head_back(
                rows[row], output_grads[row], head, entering[row, head], states[row, head], row_gradients[row]
            )

        _for_each_head(run, *state_grad_BHEF.shape[:2])
        return *gradients, state_grad_BHEF


def _rows(*tensors_BTHX: Tensor) -> list[Sequences]:
    """Of each row the four sequences [T, H * X], in the tensors' memory."""
    query, key, value, decay = (tensor.flatten(2).numpy() for tensor in tensors_BTHX)
    return list(zip(query, key, value, decay, strict=True))


def _for_each_head(run: Callable[[int, int], None], batch: int, heads: int) -> None:
    """`run(row, head)` for all, by as many threads as torch may use."""
    places = list(product(range(batch), range(heads)))
    threads = min(torch.get_num_threads(), len(places))
    if threads == 1:
        for place in places:
            run(*place)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(run, *place) for place in places]:
                done.result()
