"""Shards looked at from the command line: the facts of `shards.inspect` and `shards.verify` as lines or JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.json_output import json_text
from pipeline.locations import set_or_shard, standing_set
from pipeline.sinks import listening
from shards.contract import Contract, Selection
from shards.inspect import Inspection, Request, Spread, inspect
from shards.sample_view import Alternative, Decode, LayerView, SampleView, Token
from shards.verify import VerifyReport, quarantine, verify_shards
from stages.events import Progress

_SHOWN_KEYS = 6
"""Of a layer, in lines; JSON has all."""


def inspection_lines(place: str, *, sample: int | None, positions: Sequence[int] | None, as_json: bool) -> list[str]:
    """Describe a shard or a set. Raises PipelineError where nothing is there, InvalidRequest for no such sample."""
    where = set_or_shard(place)
    shown = None if sample is None else Request(sample=sample, positions=positions, decoder=decoder)
    facts = inspect(where, show=shown)
    return [json_text(facts)] if as_json else _lines(facts)


def verify(place: str, *, set_aside: bool, as_json: bool) -> tuple[bool, list[str]]:
    """Check a set, with progress; whether it is intact, and lines. Damaged files are set aside where asked for."""
    where = standing_set(place)
    with listening() as emit:

        def told(done: int, total: int) -> None:
            emit(Progress(stage="verify-shards", done=done, total=total, unit="bytes"))

        report = verify_shards(where, progress=None if as_json else told)
    if set_aside and not report.intact:
        quarantine(where, report)
    return report.intact, [json_text(report)] if as_json else _verdict(report, set_aside=set_aside)


def _verdict(report: VerifyReport, *, set_aside: bool) -> list[str]:
    if report.intact:
        found = f"{report.shards} shards and {report.teacher_files} teacher files, {report.bytes:,} bytes"
        return [f"{report.where}: {found}, all intact"]
    again = "run the command that made the set again"
    remedy = f"{again}: it makes anew what is in quarantine/ and nothing else"
    if not set_aside:
        remedy = f"restore these files from a copy, or set them aside with --quarantine and {again}"
    return [
        f"{report.where}: {len(report.damage)} damaged",
        *(f"  {name}: {what}" for name, what in report.damage.items()),
        f"hint: {remedy}",
    ]


def decoder(teacher_folder: Path) -> Decode | None:
    file = teacher_folder / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _lines(facts: Inspection) -> list[str]:
    kept = facts.entries / facts.positions
    checked = f"{len(facts.looked_into)} of {facts.shards} shards" if facts.shards > 1 else "every byte"
    rows = {
        **_contract_rows(facts.contract),
        "where": facts.where,
        "holds": f"{facts.shards:,} shards, {facts.records:,} records, {facts.positions:,} positions, "
        f"{kept:.1f} ids each, {facts.bytes:,} bytes",
        "a position": "  ".join(f"{part} {size:.1f}" for part, size in facts.bytes_per_position.items()) + "  bytes",
        "columns": "  ".join(f"{name} {size:,}" for name, size in facts.bytes_by_column.items()) + "  bytes",
        "coverage": _spread(facts.coverage),
        "entropy": f"{_spread(facts.entropy)} nats",
        "checksum": f"{checked} as written" if facts.checksum.intact else "; ".join(facts.checksum.damage.values()),
    }
    lines = [f"{name:<10} {fact}" for name, fact in rows.items()]
    lines += [f"fidelity   {name}: {value:.4g}" for name, value in facts.fidelity.items()]
    return lines + (_sample_lines(facts.sample) if facts.sample else [])


def _contract_rows(contract: Contract) -> dict[str, str]:
    attention = contract.attention
    seen = "none" if attention is None else f"layers {', '.join(map(str, attention.layers))}, top {attention.top_m}"
    return {
        "teacher": f"{contract.teacher}  {contract.teacher_fingerprint[:12]}",
        "tokenizer": f"{contract.tokenizer_fingerprint[:12]}, {contract.vocab_size:,} ids",
        "corpus": contract.corpus_fingerprint[:12],
        "engine": f"{contract.engine}, {contract.dtype}",
        "format": f"version {contract.format_version}, codec {contract.codec}",
        "selection": _selection(contract.selection),
        "curve": ", ".join(map(str, contract.curve)) or "none",
        "attention": seen,
    }


def _selection(selection: Selection) -> str:
    stated = {
        "mass": selection.mass if selection.mass < 1 else None,
        "floor": selection.floor or None,
        "draws": selection.draws or None,
    }
    words = [selection.kind, str(selection.k or ""), *(f"{name} {value}" for name, value in stated.items() if value)]
    unknown = [] if selection.tail_known else ["(tail unknown)"]
    return " ".join(word for word in [*words, *unknown] if word)


def _spread(spread: Spread) -> str:
    if not math.isfinite(spread.median):
        return "not stated"
    quantiles = (spread.minimum, spread.lower_quartile, spread.median, spread.upper_quartile, spread.maximum)
    return "  ".join(
        f"{name} {value:.4f}" for name, value in zip(("min", "25%", "median", "75%", "max"), quantiles, strict=True)
    )


def _sample_lines(sample: SampleView) -> list[str]:
    lines = ["", f"sample {sample.sample_id} (row {sample.row} of its shard)"]
    for name, text in (("prompt", sample.prompt), ("response", sample.response)):
        lines += [f"{name}: {text}"] if text is not None else []
    for position in sample.positions:
        facts = f"entropy {position.entropy:.2f}  coverage {position.coverage:.3f}"
        lines.append(f"  {position.position:>5}  {_token(position.token)}  {facts}")
        lines.append(f"         {'  '.join(map(_alternative, position.alternatives))}")
        lines += [f"         {_layer(layer)}" for layer in position.attended]
    return lines


def _alternative(alternative: Alternative) -> str:
    drawn = f" ({alternative.draws} draws)" if alternative.draws else ""
    return f"{_token(alternative.token)} {alternative.probability:.3f}{drawn}"


def _layer(layer: LayerView) -> str:
    keys = "  ".join(f"{_token(key.token)}@{key.position} {key.weight:.3f}" for key in layer.keys[:_SHOWN_KEYS])
    return f"layer {layer.layer} looked at: {keys}  (prompt {layer.prompt:.3f}, sink {layer.sink:.3f})"


def _token(token: Token) -> str:
    return str(token.id) if token.text is None else repr(token.text)
