"""The distillation loss without logits beside the same objective dense, and beside the three matrix products alone.

Both sides compute KD + 0.1 CE and the gradients of hidden rows and output weight, in fp32. The dense one is what one
writes who has room: all logits at once, autograd, the tail as 1 - sum of the kept probabilities. Time is CPU time of
one thread, the median of runs that take turns in one process. Memory is the peak beyond the inputs, the gradients that
are returned included, each side in a process of its own.

    python -m benchmarks.loss [--quick]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import Row, compare, parser, write
from stages.distill.losses.cross_entropy import cross_entropy
from stages.distill.losses.fused import BLOCK_ROWS, RowObjective, fused_rows
from stages.distill.losses.partition import tempered_teacher
from stages.distill.losses.rows import TeacherRows, plain
from stages.distill.losses.table import LOSSES
from stages.distill.settings import ObjectiveSettings

WIDTH, KEPT, NEGATIVES, CE_WEIGHT, TEMPERATURE = 256, 64, 32, 0.1, 1.3
NODES = (0.5, 0.25)
QWEN3, SMOLLM2, ROWS = 151_936, 49_152, 2048
GROWTH, QUICK_GROWTH, GROWTH_ROWS = (8_192, 16_384, 32_768, 65_536, 131_072), (8_192, 32_768), 512
"""Vocabularies over which the cost is followed."""
TIME_BOUND, MEMORY_BOUND = 1 / 0.95, 12.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    kd: str
    tempered: bool
    vocab: int
    rows: int

    @property
    def name(self) -> str:
        short = {"tail_bucket_kl": "bucket", "water_filled_kl": "water-filled"}[self.kd]
        return f"{short}{' T=1.3' if self.tempered else ''} {self.vocab // 1000}k x {self.rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    hidden_ND: Tensor
    weight_VD: Tensor
    teacher: TeacherRows


def inputs_of(case: Case) -> Inputs:
    """A student somewhat like its teacher: the kept ids are among the likelier ones."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.rows, WIDTH, generator=generator) * 0.4
    weight = torch.randn(case.vocab, WIDTH, generator=generator) * 0.4
    ids = torch.rand(case.rows, case.vocab // 64, generator=generator).argsort(1)[:, :KEPT] * 64
    log_kept = (
        -1.5 * torch.arange(1, KEPT + 1).log() + 0.2 * torch.rand(case.rows, KEPT, generator=generator)
    ).log_softmax(1)
    log_kept = log_kept + torch.tensor(0.92).log()
    log_tail = torch.full((case.rows,), 0.08).log()
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    return Inputs(
        hidden_ND=hidden.requires_grad_(),
        weight_VD=weight.requires_grad_(),
        teacher=TeacherRows(
            ids_NK=ids,
            present_NK=everywhere,
            exact_NK=everywhere,
            log_kept_NK=log_kept,
            log_share_NK=log_kept,
            log_rest_N=log_tail,
            log_tail_N=log_tail,
            entropy_N=torch.full((case.rows,), 2.5),
            curve_NJ=torch.tensor([3.0, 6.0, -10.0, -9.0]).expand(case.rows, 4).contiguous(),
            labels_N=ids[:, 0].contiguous(),
        ),
    )


def ours(case: Case, inputs: Inputs) -> Tensor:
    what = RowObjective(
        terms=[(LOSSES[case.kd].build(ObjectiveSettings()), 1.0), (plain(cross_entropy), CE_WEIGHT)],
        hard_negatives=NEGATIVES if case.kd == "water_filled_kl" else 0,
    )
    if case.tempered:
        what = replace(
            what,
            temperature=lambda _, teacher: torch.full_like(teacher.log_rest_N, TEMPERATURE),
            temper=partial(tempered_teacher, nodes=NODES, vocab_size=case.vocab),
        )
    return fused_rows(inputs.hidden_ND, inputs.weight_VD, inputs.teacher, what).objective


def dense(case: Case, inputs: Inputs) -> Tensor:
    teacher, scale, warmth = inputs.teacher, 1.0, 1.0
    logits_NV = inputs.hidden_ND @ inputs.weight_VD.T
    log_total_N1 = logits_NV.logsumexp(1, keepdim=True)
    # One look-up for ids and label: each costs a gradient as wide as the vocabulary.
    named_NJ = logits_NV.gather(1, torch.cat([teacher.ids_NK, teacher.labels_N[:, None]], 1))
    ce = (log_total_N1 - named_NJ[:, -1:]).sum()
    if case.tempered:
        temperature_N = torch.full_like(teacher.log_rest_N, TEMPERATURE)
        teacher = tempered_teacher(teacher, temperature_N, NODES, case.vocab)
        scale, warmth = TEMPERATURE**2, TEMPERATURE
        log_total_N1 = (logits_NV / TEMPERATURE).logsumexp(1, keepdim=True)
    log_kept_NK = named_NJ[:, :-1] / warmth - log_total_N1
    q_rest_N = (1 - log_kept_NK.exp().sum(1)).clamp_min(1e-9)
    p_NK, rho_N = teacher.log_kept_NK.exp(), teacher.log_rest_N.exp()
    kd_N = (p_NK * (teacher.log_kept_NK - log_kept_NK)).sum(1)
    if case.kd == "water_filled_kl":
        hard_NM, kappa_N, rho_N = _dense_negatives(logits_NV / warmth, q_rest_N, log_total_N1, teacher)
        log_hard_NM = logits_NV.gather(1, hard_NM.clamp_min(0)) / warmth - log_total_N1
        taken_NM = hard_NM >= 0
        kd_N = kd_N + torch.where(taken_NM, kappa_N[:, None] * (kappa_N.log()[:, None] - log_hard_NM), 0.0).sum(1)
        q_rest_N = (q_rest_N - torch.where(taken_NM, log_hard_NM.exp(), 0.0).sum(1)).clamp_min(1e-9)
    kd_N = kd_N + rho_N * (rho_N.log() - q_rest_N.log())
    return scale * kd_N.sum() + CE_WEIGHT * ce


@torch.no_grad()
def _dense_negatives(
    logits_NV: Tensor, q_rest_N: Tensor, log_total_N1: Tensor, teacher: TeacherRows
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids of the hard negatives (-1: none), kappa, and the mass that is left to the others."""
    outside_NV = logits_NV.scatter(1, teacher.ids_NK, -torch.inf)
    best_NM, ids_NM = outside_NV.topk(NEGATIVES, 1)
    q_NM = (best_NM - log_total_N1).exp()
    kappa_N, rho_N = teacher.log_kept_NK.amin(1).exp(), teacher.log_rest_N.exp()
    left_NM = q_rest_N[:, None] - q_NM.cumsum(1) + q_NM
    count_M = torch.arange(NEGATIVES)
    over_NM = (rho_N[:, None] - count_M * kappa_N[:, None]) * q_NM > kappa_N[:, None] * left_NM
    taken_NM = over_NM.cumprod(1).bool()
    return ids_NM.masked_fill(~taken_NM, -1), kappa_N, rho_N - kappa_N * taken_NM.sum(1)


def products(case: Case, inputs: Inputs) -> None:
    """The three matrix products alone, in the same blocks: what no loss can go below."""
    hidden, weight = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    logits = torch.empty(BLOCK_ROWS["cpu"], case.vocab)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, case.rows, BLOCK_ROWS["cpu"]):
        rows = slice(start, start + BLOCK_ROWS["cpu"])
        block = logits[: len(hidden[rows])]
        torch.mm(hidden[rows], weight.T, out=block)
        torch.mm(block, weight, out=grad_hidden[rows])
        grad_weight.addmm_(block.T, hidden[rows])


SIDES: dict[str, Callable[[Case, Inputs], Tensor]] = {"ours": ours, "dense": dense}


def train_once(side: str, case: Case, inputs: Inputs) -> float:
    """Forward and backward; the value."""
    inputs.hidden_ND.grad = inputs.weight_VD.grad = None
    value = SIDES[side](case, inputs)
    value.backward()
    return value.item()


def peak_bytes(side: str, case: Case) -> int:
    """In a process of its own, which this one starts."""
    arguments = [side, case.kd, str(int(case.tempered)), str(case.vocab), str(case.rows)]
    command = [sys.executable, "-m", "benchmarks.loss", "--peak", *arguments]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(told.stdout))


def measure_peak(side: str, case: Case) -> int:
    inputs = inputs_of(case)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _status("VmRSS")
    train_once(side, case, inputs)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def time_rows(case: Case, runs: int, bound: float | None = TIME_BOUND) -> Iterator[Row]:
    inputs = inputs_of(case)
    values = [train_once(side, case, inputs) for side in ("ours", "dense")]
    assert abs(values[0] - values[1]) < 1e-3 * abs(values[1]), f"two objectives, not one: {values}"
    spent: dict[str, list[float]] = {"ours": [], "dense": [], "products": []}
    for _ in range(runs):
        spent["ours"].append(seconds(lambda: train_once("ours", case, inputs)))
        spent["dense"].append(seconds(lambda: train_once("dense", case, inputs)))
        spent["products"].append(seconds(lambda: products(case, inputs)))
    median = {name: statistics.median(found) for name, found in spent.items()}
    yield compare(case.name, "forward + backward", "s", median["ours"], median["dense"], "the same dense", bound=bound)
    yield compare(case.name, "forward + backward", "s", median["ours"], median["products"], "3 matrix products alone")


def memory_row(case: Case, bound: float | None) -> Row:
    found = {side: peak_bytes(side, case) / 1e6 for side in SIDES}
    return compare(case.name, "peak memory", "MB", found["ours"], found["dense"], "the same dense", bound=bound)


def main() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    asked = parser(__doc__)
    asked.add_argument("--runs", type=int, default=3, help="turns of every side")
    asked.add_argument("--peak", nargs=5, metavar=("SIDE", "KD", "TEMPERED", "VOCAB", "ROWS"))
    arguments = asked.parse_args()
    if arguments.peak:
        side, kd, warm, vocab, rows = arguments.peak
        print(measure_peak(side, Case(kd=kd, tempered=bool(int(warm)), vocab=int(vocab), rows=int(rows))))
        return
    quick: bool = arguments.quick
    clock = "CPU time of one thread, median of turns"
    for rows in _growing(_growth(QUICK_GROWTH, arguments.runs) if quick else _measured(arguments.runs)):
        # After every figure, so that a run that is cut short leaves what it found.
        write("loss", rows, clock=clock, packages=("torch",), threads=1, quick=quick)


def _growth(vocabularies: Sequence[int], runs: int) -> Iterator[Row]:
    for vocab in vocabularies:
        case = Case(kd="tail_bucket_kl", tempered=False, vocab=vocab, rows=GROWTH_ROWS)
        yield from time_rows(case, runs, bound=None)
        yield memory_row(case, None)


def _measured(runs: int) -> Iterator[Row]:
    main_case = Case(kd="tail_bucket_kl", tempered=False, vocab=QWEN3, rows=ROWS)
    yield from time_rows(main_case, runs)
    yield memory_row(main_case, MEMORY_BOUND)
    everything = Case(kd="water_filled_kl", tempered=True, vocab=QWEN3, rows=ROWS // 4)
    yield memory_row(everything, None)
    yield from time_rows(everything, runs)
    for rows in (512, 1024, 2048):
        yield memory_row(Case(kd="tail_bucket_kl", tempered=False, vocab=SMOLLM2, rows=rows), None)
    yield from _growth(GROWTH, runs)


def _growing(rows: Iterator[Row]) -> Iterator[list[Row]]:
    found: list[Row] = []
    for row in rows:
        found.append(row)
        yield found


if __name__ == "__main__":
    main()
