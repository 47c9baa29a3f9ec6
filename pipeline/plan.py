"""What distilling Qwen3-8B would take on paper: hours, bytes, and which resource each stage waits for.

A cost model, not a measurement. Rates of our own code come from the committed benchmarks, each named with its file;
how fast a GPU is has not been measured and is assumed, peak times utilisation. In a stage all resources work at the
same time, so that it takes as long as the busiest of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.errors import PipelineError, UsageError
from pipeline.json_output import json_text
from stages.distill.settings import DistillSettings

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GPUS, TOKENS = (1, 8, 64), (1e9, 100e9)
_DISTILL = DistillSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Qwen3-8B; the head is not tied to the embedding."""

    layers: int = 36
    hidden_size: int = 4096
    query_size: int = 32 * 128
    key_size: int = 8 * 128
    intermediate_size: int = 12_288
    vocab_size: int = 151_936

    def body_flops(self, length: int) -> float:
        """Of one token of a sequence: two for each weight, and causal attention over half of the length."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.key_size)
        weights = attention + 3 * self.hidden_size * self.intermediate_size
        return self.layers * (2.0 * weights + 4 * self.query_size * length / 2)

    @property
    def head_flops(self) -> float:
        """Of one position that is captured."""
        return 2.0 * self.hidden_size * self.vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """The default shape, in weights; the embedding takes no products."""

    hidden_size: int = 256
    encoder_weights: int = 3 * 791_168
    """A prompt token passes through these."""
    decoder_weights: int = 3 * 1_415_616
    """A response token passes through these and the output layer."""

    def training_flops(self, prompts: float, vocab_size: int) -> float:
        """Of one response token, forward and backward: six for each weight; `prompts` prompt tokens belong to it."""
        output = self.hidden_size * vocab_size
        return 6.0 * (self.encoder_weights * prompts + self.decoder_weights + output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """Nobody measured these here. Raises UsageError for values that mean nothing."""

    peak: float = 989.0
    """TFLOP/s of one GPU in bf16; an H100's data sheet says 989."""
    utilisation: float = 0.4
    """Share of the peak that prefill reaches."""
    student_utilisation: float = 0.15
    """The same in training a student that small."""
    store: float = 1.0
    """GB/s between one machine and the object store, each way."""
    gpus_a_machine: int = 8
    cores_a_gpu: int = 8
    """CPU cores that encode and decode."""
    prompt: int = 512
    response: int = 1024
    """Tokens of a sample."""
    epochs: int = _DISTILL.epochs
    global_batch: int = _DISTILL.global_batch
    step_seconds: float = 0.05
    """What no number of GPUs takes off a step: launches, the collective, the optimiser."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UsageError(f"{name} must lie above 0, not {value}")
        for name in ("utilisation", "student_utilisation"):
            if getattr(self, name) > 1:
                raise UsageError(f"{name} is a share of the peak, at most 1, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the benchmarks say of our own code, on the CPU that ran them."""

    bytes_a_token: float
    capture: float
    """Bound over time of capturing: 1 where nothing is added to prefill and head product."""
    encode: float
    """Tokens a second that one core writes."""
    decode: float
    """Tokens a second that one core reads in a shuffled order."""
    loss: float
    """Time of the three matrix products of the output layer over that of the loss."""


SOURCES: dict[str, tuple[tuple[str, str, str, str, str], ...]] = {
    "bytes_a_token": (
        ("codec", "top-64, V = 151,936", "bytes a token", "DistillKit", "ours"),
        ("codec", "partition curve", "bytes a token", "what may be", "ours"),
    ),
    "capture": (
        ("teacher_cache", "top-k, tail, entropy", "CPU time, one core", "bare prefill + head product", "ratio"),
    ),
    "encode": (("codec", "top-64, V = 49,152", "encode", "DistillKit's layout", "ours"),),
    "decode": (("reader", "10M tokens", "decode, shuffled", "in order", "ours"),),
    "loss": (("loss", "bucket 151k x 2048", "forward + backward", "3 matrix products alone", "ratio"),),
}
"""Of each measured number the rows whose sum it is: file, how the case begins, metric, reference, column."""


def measured(results: Path = RESULTS) -> Measured:
    """Raises PipelineError where a result is not there."""
    return Measured(
        **{name: sum(_figure(results, *row) for row in rows) for name, rows in SOURCES.items()},
    )


def _figure(results: Path, file: str, case: str, metric: str, reference: str, column: str) -> float:
    path = results / f"{file}.json"
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        (row,) = (
            row
            for row in rows
            if row["case"].startswith(case) and (row["metric"], row["reference_name"]) == (metric, reference)
        )
        return float(row[column])
    except (OSError, ValueError, KeyError) as error:
        raise PipelineError(
            f"{path}: no figure for {case}: {metric}", hint=f"measure it: python -m benchmarks.{file}"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Hours of every resource of a stage, were it alone."""

    hours: dict[str, float]

    @property
    def bottleneck(self) -> str:
        return max(self.hours, key=self.hours.__getitem__)

    @property
    def total(self) -> float:
        return self.hours[self.bottleneck]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    gpus: int
    tokens: float
    bytes: float
    caching: Stage
    training: Stage


def plan(
    gpus: int,
    tokens: float,
    *,
    known: Measured,
    given: Assumptions,
    teacher: Teacher | None = None,
    student: Student | None = None,
) -> Plan:
    """`tokens` are response tokens, each captured once and trained on `epochs` times."""
    teacher, student = teacher or Teacher(), student or Student()
    prompts = given.prompt / given.response
    machines = -(-gpus // given.gpus_a_machine)
    cores, link = gpus * given.cores_a_gpu, machines * given.store * 1e9
    size = tokens * known.bytes_a_token
    speed = gpus * given.peak * 1e12
    prefill, training = speed * given.utilisation * known.capture, speed * given.student_utilisation * known.loss
    body = teacher.body_flops(given.prompt + given.response) * (1 + prompts)
    caching = {
        "prefill and head on the GPUs": tokens * (body + teacher.head_flops) / prefill,
        "encoding on the cores": tokens / (cores * known.encode),
        "writing to the store": size / link,
    }
    seen = given.epochs * tokens
    steps = seen / (given.global_batch * given.response)
    # A rank without a record of the batch has nothing to do.
    busy = min(1.0, given.global_batch / gpus)
    work = {
        "the student on the GPUs": seen * student.training_flops(prompts, teacher.vocab_size) / (training * busy),
        "steps one after the other": steps * given.step_seconds,
        "decoding on the cores": seen / (cores * known.decode),
        "reading from the store": given.epochs * size / link,
    }
    return Plan(gpus=gpus, tokens=tokens, bytes=size, caching=_stage(caching), training=_stage(work))


def _stage(seconds: dict[str, float]) -> Stage:
    return Stage(hours={name: value / 3600 for name, value in seconds.items()})


def told(given: Assumptions, *, as_json: bool, results: Path = RESULTS) -> list[str]:
    """The plans of 1, 8 and 64 GPUs and of 1 and 100 billion tokens. Raises what `measured` raises."""
    known = measured(results)
    plans = [plan(gpus, tokens, known=known, given=given) for tokens in TOKENS for gpus in GPUS]
    if as_json:
        return [json_text({"assumed": asdict(given), "measured": asdict(known), "plans": [asdict(p) for p in plans]})]
    return [*_table(plans), "", *_shares(given), "", *_grounds(known, given)]


def _table(plans: Sequence[Plan]) -> Iterator[str]:
    yield "Qwen3-8B into the default student, on paper"
    yield f"{'tokens':>7} {'GPUs':>5} {'cached':>9} {'caching':>10}  {'waits for':30} {'training':>10}  waits for"
    for found in plans:
        caching, training = (f"{figures.number(stage.total)} h" for stage in (found.caching, found.training))
        yield (
            f"{found.tokens / 1e9:5.0f} B {found.gpus:5} {figures.size(found.bytes):>9} {caching:>10}  "
            f"{found.caching.bottleneck:30} {training:>10}  {found.training.bottleneck}"
        )


def _shares(given: Assumptions) -> Iterator[str]:
    teacher = Teacher()
    body = teacher.body_flops(given.prompt + given.response) * (1 + given.prompt / given.response)
    share = teacher.head_flops / (body + teacher.head_flops)
    yield f"of the teacher's FLOPs the head's product takes {share:.1%}, the prefill of prompts and responses the rest"


def _grounds(known: Measured, given: Assumptions) -> Iterator[str]:
    yield "measured, on a CPU:"
    for name, value in asdict(known).items():
        where = " + ".join(f"benchmarks/results/{row[0]}.json ({row[1]}: {row[2]})" for row in SOURCES[name])
        yield f"  {name} {value:.5g}  {where}"
    yield "assumed, measured by nobody here:"
    yield f"  {', '.join(f'{name} {value:g}' for name, value in asdict(given).items())}"
    yield "  capture and loss cost on a GPU, beside their matrix products, what they cost on the CPU"
    yield "left out: writing the responses, where a corpus has none; starting up; failures and their repetition"
