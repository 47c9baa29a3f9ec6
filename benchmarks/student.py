"""The student beside its peers: the liquid scan, a decoder layer, and decoding one token at a growing context.

Prints a table and writes results/student.json. Every figure is CPU time of this process on one thread, the lower
quartile of several runs, so that other work on the machine disturbs it little. Run from the repository's root:

    python -m benchmarks.student [--quick]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from ncps.torch import LTC
from ncps.wirings import AutoNCP
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.record import Row, compare, parser, write
from stages.distill.compiled_scan import compile_scans, scan_compiled
from stages.inference.few_rows import expect_few_rows
from stages.inference.stepping import DecoderState, advance, encode, fresh
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.scan_chunked import scan_chunked
from stages.student.scan_delta import scan_delta_chunked
from stages.student.scan_naive import scan_naive
from stages.student.shape import StudentShape

HEADS, HEAD_SIZE = 4, 64
WIDTH = HEADS * HEAD_SIZE
NCPS_UNITS = 128
BATCHES = (1, 32)
WRITTEN = 64
"""Tokens of an answer before any of its steps is timed."""
PROMPT, VOCAB, SMALL_VOCAB = 512, 49_152, 1_000
SMOLLM2 = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape; speed does not ask for its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """Which lengths are measured, and in how many turns."""

    scans: tuple[int, ...]
    looped: tuple[int, ...]
    ncps: tuple[int, ...]
    layers: tuple[int, ...]
    contexts: tuple[int, ...]
    prompts: tuple[int, ...]
    turns: int


FULL = Cases(
    scans=(256, 512, 1024, 2048, 4096, 8192),
    looped=(512, 2048),
    ncps=(256, 512),
    layers=(512, 2048, 8192),
    contexts=(1024, 16_384),
    prompts=(64, 512, 2048),
    turns=200,
)
QUICK = Cases(
    scans=(256, 512, 1024), looped=(512,), ncps=(256,), layers=(512,), contexts=(1024,), prompts=(512,), turns=50
)


def milliseconds(work: Callable[[], object], runs: int) -> float:
    work()
    spent = []
    for _ in range(runs):
        start = time.process_time()
        work()
        spent.append(time.process_time() - start)
    return 1e3 * sorted(spent)[len(spent) // 4]


def trained(compute: Callable[[], Tensor], runs: int) -> float:
    return milliseconds(lambda: compute().sum().backward(), runs)


def scan_rows(cases: Cases) -> Iterator[Row]:
    """Forward and backward over one sequence of hidden size 256, without projections."""
    gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
    liquid = LTC(NCPS_UNITS, AutoNCP(NCPS_UNITS, NCPS_UNITS // 4))
    metric, spent = "forward + backward", {}
    for steps in cases.scans:
        query, key, value = (torch.randn(1, steps, HEADS, HEAD_SIZE, requires_grad=True) for _ in range(3))
        log_decay = (-2 * torch.rand(1, steps, HEADS, HEAD_SIZE)).requires_grad_()
        hidden = torch.randn(1, steps, WIDTH, requires_grad=True)
        inputs, case, runs = (query, key, value, log_decay), f"scan T={steps}", max(3, 4096 // steps)

        def attention(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
            heads = (tensor.transpose(1, 2) for tensor in inputs[:3])
            return F.scaled_dot_product_attention(*heads, is_causal=True)

        def delta(inputs: tuple[Tensor, ...] = inputs) -> Tensor:
            query, key, value, decay = inputs
            share = torch.full(query.shape[:-1], 0.3)
            return scan_delta_chunked(query, F.normalize(key, dim=-1), value, decay.mean(-1), share, share)[0]

        ours = spent[steps] = trained(lambda inputs=inputs: scan_compiled(*inputs)[0], runs)
        if steps in cases.looped:
            loop = trained(lambda inputs=inputs: scan_naive(*inputs)[0], 1)
            yield compare(case, metric, "ms", ours, loop, "the same, looped", bound=40 if steps == 2048 else None)
        in_chunks = trained(lambda inputs=inputs: scan_chunked(*inputs)[0], runs)
        yield compare(case, metric, "ms", ours, in_chunks, "in chunks, torch alone")
        bound = 4 if steps == 4096 else None
        yield compare(case, metric, "ms", ours, trained(attention, runs), "causal SDPA", bound=bound)
        yield compare(case, metric, "ms", ours, trained(lambda hidden=hidden: gru(hidden)[0], runs), "nn.GRU 256")
        yield compare(case, metric, "ms", ours, trained(delta, runs), "our delta recurrence")
        if steps in cases.ncps:
            narrow = torch.randn(1, steps, NCPS_UNITS)
            ltc = trained(lambda narrow=narrow: liquid(narrow)[0], 1)
            yield compare(case, metric, "ms", ours, ltc, f"ncps LTC, {NCPS_UNITS} units")
    if cases is FULL:
        yield compare("scan T=1024 … 8192", "cost exponent", "", exponent(spent), 1.0, "linear", bound=1 / 1.05)


def exponent(spent: dict[int, float]) -> float:
    """Slope of log time over log length from 1024 on."""
    points = [(math.log(steps), math.log(time)) for steps, time in spent.items() if steps >= 1024]
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def layer_rows(cases: Cases) -> Iterator[Row]:
    """A whole decoder layer, forward and backward, beside a Llama layer of the same width that reads the prompt too."""
    student = make_student()
    compile_scans(student)
    layer = student.model.decoder.layers[0]
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=688, num_attention_heads=HEADS, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    llama, rotary = LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)
    encoded = torch.randn(1, PROMPT, WIDTH)
    for steps in cases.layers:
        hidden = torch.randn(1, steps, WIDTH, requires_grad=True)
        whole = torch.randn(1, PROMPT + steps, WIDTH, requires_grad=True)
        position = rotary(whole, torch.arange(PROMPT + steps)[None])
        runs = max(2, 2048 // steps)
        ours = trained(lambda hidden=hidden: layer(hidden, encoded, None, None, None, False)[0], runs)
        theirs = trained(lambda whole=whole, at=position: llama(whole, position_embeddings=at), runs)
        case = f"layer T={steps}"
        yield compare(case, "forward + backward", "ms", ours, theirs, f"Llama layer over {PROMPT}+T")


def make_student(vocabulary: int = VOCAB) -> MiniCodformerForConditionalGeneration:
    """As `Student.load` makes it on a CPU."""
    student = build_student(StudentShape(), vocab_size=vocabulary, start_token_id=0, end_token_id=1, seed=0).eval()
    expect_few_rows(student)
    return student


def after(student: MiniCodformerForConditionalGeneration, prompt: int, context: int, batch: int) -> DecoderState:
    """Rows that have written `context` tokens, each after a prompt of its own."""
    prompts = torch.randint(student.config.vocab_size, (batch, prompt)).tolist()
    state = fresh(student, encode(student, prompts))
    for _ in range(context):
        advance(student, [5] * batch, state)
    return state


def step_time(student: MiniCodformerForConditionalGeneration, prompt: int, batch: int = 1) -> float:
    """CPU milliseconds of one more token in every row, after 64 tokens."""
    state = after(student, prompt, WRITTEN, batch)
    return milliseconds(lambda: advance(student, [5] * batch, state), 40)


def step_times(student: MiniCodformerForConditionalGeneration, cases: Cases) -> dict[int, float]:
    """The same after each context, measured in turns, so that what disturbs one disturbs all."""
    states = {context: after(student, PROMPT, context, 1) for context in (WRITTEN, *cases.contexts)}
    spent: dict[int, list[float]] = {context: [] for context in states}
    for _ in range(cases.turns):
        for context, state in states.items():
            spent[context].append(milliseconds(partial(advance, student, [5], state), 1))
    return {context: sorted(times)[len(times) // 4] for context, times in spent.items()}


def bandwidth(size: int) -> float:
    """Bytes a second that one thread reads of a block of `size` bytes, read again and again.

    It is as large as what a step reads: the machine's last cache may hold part of the one as of the other.
    """
    block = torch.ones(size // 4)
    return 1e3 * block.nbytes / milliseconds(lambda: block.sum(), 8)


def decode_rows(cases: Cases) -> Iterator[Row]:
    """One more token: at a growing answer, at a growing prompt, and beside the memory's bound."""
    with torch.inference_mode():
        small = make_student(SMALL_VOCAB)  # a large output layer would hide any growth
        spent = step_times(small, cases)
        for context in cases.contexts:
            yield compare(
                f"decode after {context}",
                "time a token",
                "ms",
                spent[context],
                spent[WRITTEN],
                f"our own after {WRITTEN}",
                bound=0.95,
            )
        student = make_student()
        weights = sum(p.nbytes for name, p in student.named_parameters() if "encoder.layers" not in name)
        for prompt in cases.prompts:
            keys = 2 * 3 * prompt * WIDTH * 4
            bound = 1e3 * (weights + keys) / bandwidth(weights + keys)
            ours = step_time(student, prompt)
            yield compare(
                f"decode, prompt {prompt}",
                "time a token",
                "ms",
                ours,
                bound,
                "weights + keys / bandwidth",
                bound=1 / 1.5,
            )


def output_rows(_: Cases) -> Iterator[Row]:
    """The output layer of a few rows as `Student.load` makes it on a CPU, beside the plain one."""
    student = make_student()
    weight = student.output_weight()
    plain = nn.Linear(WIDTH, VOCAB, bias=False)
    plain.weight = weight
    with torch.inference_mode():
        for rows in (1, 4, 32):
            hidden = torch.randn(rows, WIDTH)
            ours = milliseconds(lambda hidden=hidden: student.lm_head(hidden), 16)
            theirs = milliseconds(lambda hidden=hidden: plain(hidden), 16)
            yield compare(f"output layer, {rows} rows", "forward", "ms", ours, theirs, "nn.Linear")


def teacher_rows(_: Cases) -> Iterator[Row]:
    """Tokens a second beside the teacher's shape under transformers, and what a batch gains."""
    student = make_student()
    llama = LlamaForCausalLM(LlamaConfig(**SMOLLM2)).eval()
    rates = {}
    with torch.inference_mode():
        for batch in BATCHES:
            rates[batch] = 1e3 * batch / step_time(student, PROMPT, batch)
            ids = torch.randint(VOCAB, (batch, 64 if batch > 1 else PROMPT))
            cache = llama(ids, use_cache=True, logits_to_keep=1).past_key_values
            token = torch.randint(VOCAB, (batch, 1))
            theirs = milliseconds(lambda token=token, cache=cache: llama(token, past_key_values=cache), 8)
            yield compare(
                f"decode, batch {batch}",
                "tokens a second",
                "1/s",
                rates[batch],
                1e3 * batch / theirs,
                "SmolLM2-135M, transformers, fp32",
                bound=7 if batch == 1 else None,
                more_is_better=True,
            )
    yield compare(
        "decode, batch 32",
        "tokens a second",
        "1/s",
        rates[32],
        rates[1],
        "our own, batch 1",
        bound=6,
        more_is_better=True,
    )


def main() -> None:
    quick: bool = parser(__doc__).parse_args().quick
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = (scan_rows, layer_rows, decode_rows, output_rows, teacher_rows)
    rows = [row for part in parts for row in part(QUICK if quick else FULL)]
    write(
        "student",
        rows,
        clock="CPU time of the process, lower quartile",
        packages=("torch", "transformers", "ncps"),
        threads=1,
        quick=quick,
    )


if __name__ == "__main__":
    main()
