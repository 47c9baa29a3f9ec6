"""A program: the largest relative error of each case of a kernel beside plain torch in double precision, as JSON.

    python errors.py attention | scan

On a GPU where there is one. Else Triton's interpreter runs the kernels' own source, an instruction at a time: numpy has
no bfloat16, so that type is left to a GPU.
"""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def attention() -> Iterator[tuple[str, float]]:
    from stages.teacher_cache.attention_kernel import attention_heads_sum
    from stages.teacher_cache.signals import attention_heads_sum as plain

    shapes = {"a row": (1, 199, 200), "a prompt": (100, 0, 100), "a response": (70, 60, 131)}
    heads = {"one head": (1, 1, 16), "shared keys": (6, 2, 24), "wide": (2, 2, 128)}
    types = {"fp32": torch.float32, "fp16": torch.float16, **({"bf16": torch.bfloat16} if ON_GPU else {})}
    generator = torch.Generator().manual_seed(0)
    for shape, head, window, kind in product(shapes, heads, (None, 1, 17, 64), types):
        (rows, first_row, span), (count, key_heads, width) = shapes[shape], heads[head]
        sizes = ((rows, count, width), (span, key_heads, width))
        # Strides of tensors that share memory with others, as a worker's do.
        queries, keys = (
            torch.randn(size[0], 2 * size[1], size[2], generator=generator).to(types[kind])[:, : size[1]]
            for size in sizes
        )
        told = {"first_row": first_row, "scale": width**-0.5, "window": window}
        mine = attention_heads_sum(queries.to(DEVICE), keys.to(DEVICE), **told).cpu().double()
        exact = plain(queries.float(), keys.float(), **told).double()
        yield f"{shape}, {head}, window {window}, {kind}", ((mine - exact).abs().max() / count).item()


def scan() -> Iterator[tuple[str, float]]:
    """Output, last state and every gradient of flash-linear-attention beside the loop."""
    from fla.ops.gla import chunk_gla

    from stages.student import scan_fla
    from stages.student.recurrences import scan_naive

    if ON_GPU:
        assert scan_fla.fla_serves(torch.zeros(1, 1, 1, 64, device=DEVICE))
    else:
        scan_fla._CHUNK_GLA = chunk_gla
        _interpret_loops()
    names = ("output", "state", "of query", "of key", "of value", "of decay", "of the first state")
    for steps in (16, 80) + (513,) * ON_GPU:
        inputs = _scan_inputs(steps)
        exact = _with_gradients(scan_naive, [tensor.double() for tensor in inputs])
        mine = _with_gradients(scan_fla.scan_fla, [tensor.to(DEVICE) for tensor in inputs])
        for name, found, expected in zip(names, mine, exact, strict=True):
            yield f"{steps} steps, {name}", ((found.cpu().double() - expected).norm() / expected.norm()).item()


def _scan_inputs(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, steps, 2, 64, generator=generator) for _ in range(3)]
    decay = -5 * torch.rand(1, steps, 2, 64, generator=generator) ** 3
    return [*parts, decay, torch.randn(1, 2, 64, 64, generator=generator)]


def _with_gradients(scan: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output, state = scan(*leaves)
    weight = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).view_as(output).to(output.device)
    return (output, state, *torch.autograd.grad((output * weight).sum() + state.square().sum(), leaves))


def _interpret_loops() -> None:
    """What the interpreter lacks for these kernels: a clock to choose between tile sizes, and counters with a type."""
    import fla.ops.common.chunk_h as module
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import interpreter_semantic

    def counted(*ends: Any) -> Iterator[Any]:
        numbers = (int(end.handle.data.item()) if hasattr(end, "handle") else end for end in ends)
        return map(interpreter_semantic.to_tensor, builtins.range(*numbers))

    Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    module.range = counted


if __name__ == "__main__":
    print(json.dumps(dict({"attention": attention, "scan": scan}[sys.argv[1]]())))
