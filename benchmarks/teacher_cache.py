"""Stage one's capture beside vLLM's own prompt_logprobs, and beside what the matrix products alone would take.

Workload: prompts and responses of 256 tokens, the response rows captured with k = 64, by the demo's real teacher. The
bound is the teacher's body (bare prefill: one token generated a prompt) and the head's product on the captured rows.
How many times as fast as prompt_logprobs that can be depends on how fast the machine multiplies matrices, so what each
adds to the body is compared too.
Every way runs once a round, the rounds follow one another, and a ratio is the median of the rounds' ratios. Figures are
CPU time of this process on one core, so that other work on the machine disturbs them little.

    python -m benchmarks.teacher_cache [--quick]
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.record import Row, compare, parser, write
from benchmarks.teacher_logits import TEACHER
from pipeline.assets import teacher_folder
from shards.contract import AttentionSpec, Contract, Selection
from shards.planes.codec import Planes3
from shards.planes.learn_tables import learn_tables
from shards.planes.tables import fingerprint
from shards.record import Record
from shards.writer import build_shard
from stages.corpus.sample import Sample
from stages.events import silent
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.engines.vllm.process import InProcessVllm, resolve_dtype
from stages.teacher_cache.replica import to_record
from stages.teacher_cache.settings import TeacherSettings

SAMPLES, PROMPT, RESPONSE, K = 4, 256, 256, 64
ROUNDS, QUICK_ROUNDS = 3, 1
TOPK = Selection(kind="topk", k=K)
CURVE = (0.5, 0.25)
ATTENTION = AttentionSpec(layers=(10, 20, 29), top_m=16)


class Generation(InProcessVllm):
    """vLLM as it is served: bare prefill, and its own log-probabilities of the prompt."""

    def run(self, samples: Sequence[Sample], **asked: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1, temperature=0.0, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **asked
        )
        prompts = [[*sample.prompt_ids.tolist(), *sample.response_ids[:-1].tolist()] for sample in samples]
        answers = list(self._answers(prompts, [params] * len(samples)))
        for answer in answers if asked else ():
            # Whoever wants the numbers walks them.
            logprobs = answer.prompt_logprobs
            if not asked.get("flat_logprobs"):
                [[(token, entry.logprob) for token, entry in place.items()] for place in logprobs if place]

    def _options(self) -> dict[str, Any]:
        return {"max_logprobs": K, "enable_prefix_caching": False, "enforce_eager": True}


def make_samples() -> list[Sample]:
    """Random ids: every product and every pass costs what it costs with text."""
    rng = np.random.default_rng(0)
    return [
        Sample(
            sample_id=f"{number:016x}",
            prompt_ids=rng.integers(0, 49_000, PROMPT).astype(np.int32),
            response_ids=rng.integers(0, 49_000, RESPONSE).astype(np.int32),
        )
        for number in range(SAMPLES)
    ]


def head_product(folder: Path, dtype: torch.dtype) -> Callable[[], object]:
    """The product on the captured rows, in the engine's blocks."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weight_VD = file.get_tensor("model.embed_tokens.weight").to(dtype)
    hidden_ND = torch.randn(SAMPLES * RESPONSE, weight_VD.shape[1], dtype=dtype)
    return lambda: [block_ND @ weight_VD.t() for block_ND in hidden_ND.split(512)]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every way in every round."""
    dtype = resolve_dtype("auto", folder)
    length = PROMPT + RESPONSE
    settings = TeacherSettings(dtype=dtype, head_dtype=dtype, max_model_len=length, max_batched_tokens=SAMPLES * length)
    samples = make_samples()
    specs = {
        "top-k, tail, entropy": CaptureSpec(selection=TOPK),
        "and curve": CaptureSpec(selection=TOPK, curve=CURVE),
        "and attention": CaptureSpec(selection=TOPK, curve=CURVE, attention=ATTENTION),
    }
    with ExitStack() as stack:
        served = stack.enter_context(closing(Generation(folder, settings)))
        ways: dict[str, Callable[[], object]] = {
            "bare prefill": lambda: served.run(samples),
            "prompt_logprobs": lambda: served.run(samples, prompt_logprobs=K),
            "flat": lambda: served.run(samples, prompt_logprobs=K, flat_logprobs=True, detokenize=False),
            "head product": head_product(folder, getattr(torch, dtype)),
        }
        for name, spec in specs.items():
            engine = stack.enter_context(closing(VllmEngine(folder, settings, spec)))
            ways[name] = lambda engine=engine: list(engine.capture(samples))  # type: ignore[misc]
        served.start()
        for work in ways.values():
            work()
        spent: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, work in ways.items():
                spent[name].append(seconds(work))
        signals = list(engine.capture(samples))
    records = [to_record(sample, signal) for sample, signal in zip(samples, signals, strict=True)]
    spent["encode"] = encoding(records, rounds)
    return spent


def encoding(records: list[Record], rounds: int) -> list[float]:
    """CPU seconds of writing the captured records, with tables learnt from them."""
    contract = Contract(
        codec=Planes3.name,
        teacher="t",
        teacher_fingerprint="t",
        tokenizer_fingerprint="t",
        vocab_size=49_152,
        start_token_id=0,
        end_token_id=2,
        selection=TOPK,
        curve=CURVE,
        attention=ATTENTION,
        corpus_fingerprint="c",
        engine="e",
        dtype="d",
    )
    tables = learn_tables(records, contract)
    contract = replace(contract, tables=fingerprint(tables))
    return [seconds(lambda: build_shard("u", "train", contract, records, tables=tables)) for _ in range(rounds)]


def rows(spent: dict[str, list[float]]) -> Iterator[Row]:
    bound = [body + head for body, head in zip(spent["bare prefill"], spent["head product"], strict=True)]
    plain = spent["top-k, tail, entropy"]

    def against(case: str, ours: list[float], reference: list[float], name: str, least: float | None) -> Row:
        """The median round stands for all."""
        ratios = sorted((theirs / mine, mine, theirs) for mine, theirs in zip(ours, reference, strict=True))
        _, mine, theirs = ratios[len(ratios) // 2]
        return compare(case, "CPU time, one core", "s", mine, theirs, name, bound=least)

    yield against("top-k, tail, entropy", plain, bound, "bare prefill + head product", 1 / 1.10)
    for name, title, least in (("prompt_logprobs", "vLLM prompt_logprobs", 2.5), ("flat", "vLLM flat, no text", 1.4)):
        yield against("top-k, tail, entropy", plain, spent[name], title, least)
        added = [ours - body for ours, body in zip(plain, spent["bare prefill"], strict=True)]
        theirs = [their - body for their, body in zip(spent[name], spent["bare prefill"], strict=True)]
        yield against("added to bare prefill", added, theirs, title, None)
    for case, ours, before, share in (
        ("curve added", spent["and curve"], plain, 0.10),
        ("attention of 3 added", spent["and attention"], spent["and curve"], 0.05),
    ):
        allowed = [old + share * whole for old, whole in zip(before, bound, strict=True)]
        yield against(case, ours, allowed, f"without, and {share:.0%} of the bound", 1.0)
    per_round = statistics.median(plain)
    yield compare(
        "encoding a shard",
        "CPU time, one core",
        "s",
        statistics.median(spent["encode"]),
        per_round,
        "capturing it",
        bound=1,
    )


def main() -> None:
    quick: bool = parser(__doc__).parse_args().quick
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # vLLM takes as many threads as there are cores
    torch.set_num_threads(1)
    folder = teacher_folder(TEACHER, None, silent)
    write(
        "teacher_cache",
        list(rows(measure(folder, QUICK_ROUNDS if quick else ROUNDS))),
        clock="CPU time of the process on one core, median of the rounds' ratios",
        packages=("torch", "vllm", "transformers"),
        threads=1,
        quick=quick,
    )


if __name__ == "__main__":
    main()
