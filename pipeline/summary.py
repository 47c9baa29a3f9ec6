"""The closing lines of each verb, made from the facts in summary.json and from nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.report import REPORT
from pipeline.run import RunFolder

if TYPE_CHECKING:
    from stages.corpus.prepare import PrepareReport

_WIDTH = 100
_SHOWN_CHARACTERS = 480


def prepare_lines(report: PrepareReport) -> list[str]:
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
    lines = [
        f"prepared   {report.train:,} train and {report.dev:,} validation samples of {report.rows:,} rows: "
        f"{report.prompt_tokens:,} prompt and {report.response_tokens:,} response tokens"
    ]
    lines += [f"left out   {dropped}"] if dropped else []
    lines += [f"cut        {report.cut:,} responses at the length limit"] if report.cut else []
    lines += [f"rejected   {report.rejected:,} broken rows: data/processed/rejects.jsonl"] if report.rejected else []
    return lines


def cache_lines(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"shards     {facts['shards']} files, {facts['records']:,} records, {facts['positions']:,} positions, "
        f"{facts['bytes'] / 1e6:.1f} MB: {facts['bytes'] / facts['positions']:.1f} bytes a position in all",
        f"stage one  {facts['captured']:,} positions in {facts['seconds']:.0f} s: "
        f"{facts['captured'] / max(facts['seconds'], 0.1):,.0f} response tokens/s, loading the teacher included",
        *_fidelity_lines(facts.get("fidelity") or {}),
        f"           {facts['where']}",
    ]


def _fidelity_lines(fidelity: Mapping[str, float]) -> list[str]:
    """The cache beside the teacher; what was measured depends on what is kept."""
    from shards.fidelity import KEPT_MASS, KL_AS_ONE, MEAN, SHARE_KEPT

    if not fidelity:
        return []
    named = {f"{KL_AS_ONE}, {MEAN}": "KL", f"{KEPT_MASS}, {MEAN}": "mass kept"}
    parts = [f"{short} {fidelity[name]:.3g}" for name, short in named.items() if name in fidelity]
    lines = [f"fidelity   against the teacher at {fidelity['positions']:.0f} positions: {', '.join(parts)}"]
    shares = {name.removeprefix(SHARE_KEPT): value for name, value in fidelity.items() if name.startswith(SHARE_KEPT)}
    if shares:
        told = ", ".join(f"{value:.0%} at {at}" for at, value in shares.items())
        lines.append(f"           share of the KL at temperature T that the kept ids carry: {told}")
    return lines


def distill_lines(facts: Mapping[str, Any], run: RunFolder) -> list[str]:
    lines = [
        f"stage two  {facts['steps']:,} steps on {facts['ranks']} ranks in {facts['precision']}, "
        f"{facts['positions']:,} positions in {facts['seconds']:.0f} s: "
        f"{facts['positions'] / max(facts['seconds'], 1e-9):,.0f} tokens/s"
    ]
    if not facts["finished"]:
        return [*lines, "stopped    run the same command again to go on"]
    before, after = facts["untrained"], facts["validation"]
    if before and after:
        lines.append(
            f"validation KL to the teacher {before['kl']:.3f} -> {after['kl']:.3f} nats, "
            f"top-1 agreement {before['top1_agreement']:.1%} -> {after['top1_agreement']:.1%}"
        )
        lines.append(f"           KL {facts['kl_is']}")
    return [*lines, f"           {run.final_model}"]


def evaluation_lines(facts: Mapping[str, Any], run: RunFolder) -> list[str]:
    report, seen = facts["validation"], facts["training"]
    return [
        f"positions       {report['positions']:,} of the validation split",
        *_cached_lines(report, facts["kl_is"]),
        *_whole_lines(facts),
        *_text_lines(report),
        f"training split  KL {seen['kl']:.4f}, cross-entropy {seen['cross_entropy']:.4f}, "
        f"top-1 {seen['top1_agreement']:.1%} on {seen['positions']:,} positions",
        *_answer_lines(facts, run),
    ]


def elsewhere_lines(facts: Mapping[str, Any], run: RunFolder) -> list[str]:
    """Of text beside the standing report; what needs a teacher's cache is there only where there was one."""
    return [
        f"positions       {facts['positions']:,}, {facts['where']}",
        *(_cached_lines(facts, facts["kl_is"]) if "kl" in facts else _unread_lines(facts)),
        *_whole_lines(facts),
        *_text_lines(facts),
        *_answer_lines(facts, run),
    ]


def _cached_lines(report: Mapping[str, Any], kl_is: str) -> list[str]:
    return [
        f"KL to teacher   {report['kl']:.4f} nats {kl_is}",
        f"agreement       top-1 {report['top1_agreement']:.1%}, top-5 {report['top5_agreement']:.1%}",
    ]


def _unread_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"accuracy        top-1 {report['top1_accuracy']:.1%}, top-5 {report['top5_accuracy']:.1%} of the text's tokens"
    ]


def _whole_lines(facts: Mapping[str, Any]) -> list[str]:
    if not (whole := facts["whole"]):
        return []
    return [
        f"whole KL        {whole['kl']:.4f} nats over the whole vocabulary, beside the teacher itself, "
        f"whose entropy is {whole['teacher_entropy']:.4f}"
    ]


def _text_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"cross-entropy   {report['cross_entropy']:.4f} nats, perplexity {report['perplexity']:.2f}",
        f"calibration     {report['ece']:.1%} expected error of the most probable token's probability",
    ]


def _answer_lines(facts: Mapping[str, Any], run: RunFolder) -> list[str]:
    lines = [
        f"speed           {facts['positions_per_s']:,.0f} positions/s measured, "
        f"{facts['generated_tokens_per_s']:,.0f} tokens/s generated"
    ]
    if match := facts["exact_match"]:
        lines.append(
            f"exact match     {match['share']:.1%} of {match['answers']} answers end as the label does "
            f"(95 % interval {match['low']:.1%} to {match['high']:.1%})"
        )
    return [*lines, f"answers         {len(facts['samples'])} with prompt and label, in {run.path / REPORT}"]


def _sample_lines(samples: list[Mapping[str, str]]) -> list[str]:
    lines: list[str] = []
    for sample in samples:
        lines.append("")
        for name in ("prompt", "answer", "label"):
            lines += _block(name, sample[name])
    return lines


def demo_lines(run: RunFolder, seconds: float) -> list[str]:
    """What the demo made, in one look."""
    facts = run.summary()
    made = (
        run.recipe_file,
        run.events,
        run.shards,
        run.checkpoints,
        run.final_model,
        run.summary_file,
        run.path / REPORT,
    )
    return [
        "",
        "the demo's summary",
        *cache_lines(facts["teacher_cache"])[:-1],
        *distill_lines(facts["distill"], run)[:-1],
        *_sample_lines(facts["evaluate"]["samples"]),
        "",
        f"made       {'  '.join(str(path) for path in made)}",
        f"time       {seconds:.0f} s for this call",
        'next       .venv/bin/python cli.py generate "How many eggs are in three dozen?"',
    ]


def _block(name: str, text: str) -> list[str]:
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
    wrapped = [piece for line in shown.strip().splitlines() for piece in textwrap.wrap(line, _WIDTH) or [""]]
    return [f"{name if first else '':<10} {line}" for first, line in ((i == 0, line) for i, line in enumerate(wrapped))]
