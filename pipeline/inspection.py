"""Shards looked at from the command line: the facts of `shards.inspect` as lines, with tokens turned into text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from shards.contract import Selection
from shards.inspect import Decode, InspectedRecord, Inspection, Spread, inspect_shard, verify_shards
from shards.manifest import TEACHER_FOLDER, read_manifest

_SHOWN_POSITIONS = 12


def inspect(path: Path, *, record: int | None, as_json: bool) -> list[str]:
    """Describe a shard, or a set by its totals and its first shard. Raises PipelineError where nothing is there."""
    if not path.exists():
        raise PipelineError(f"no shard {path}", hint="give a .arrow file or the folder of a shard set")
    lines: list[str] = []
    if path.is_dir():
        manifest = read_manifest(path)
        totals = manifest.totals()
        lines = [f"{path}: {', '.join(f'{count:,} {name}' for name, count in totals.items())}", ""]
        path = path / manifest.shards[0].name
    try:
        inspection = inspect_shard(path, record=record, decode=_decoder(path.parent))
    except ValueError as error:
        raise UsageError(str(error), hint="count records from 0") from error
    if as_json:
        return [json.dumps(dataclasses.asdict(inspection), default=str, ensure_ascii=False, indent=2)]
    return lines + _shard_lines(inspection)


def verify(path: Path) -> list[str]:
    """Check a set. Raises PipelineError listing every damaged file."""
    report = verify_shards(path)
    if not report.intact:
        damage = "; ".join(report.damage.values())
        raise PipelineError(
            f"{len(report.damage)} damaged: {damage}",
            hint="restore these files from a copy, or delete the shard folder and run stage one again",
        )
    return [
        f"{path}: {report.shards} shards and {report.teacher_files} teacher files, {report.bytes:,} bytes, all intact"
    ]


def _decoder(folder: Path) -> Decode | None:
    """The set's own tokenizer; a shard that travels alone shows ids."""
    file = folder / TEACHER_FOLDER / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def _shard_lines(inspection: Inspection) -> list[str]:
    contract = inspection.contract
    attention = contract.attention
    facts = {
        "shard": f"{inspection.path} ({inspection.unit}, split {inspection.split})",
        "integrity": inspection.damage or "every byte as written",
        "records": f"{inspection.records:,}",
        "positions": f"{inspection.positions:,} predicted, {inspection.entries / inspection.positions:.1f} ids each",
        "bytes": f"{inspection.bytes:,}",
        "a position": "  ".join(f"{part} {size:.1f}" for part, size in inspection.bytes_per_position.items()),
        "coverage": _spread(inspection.coverage),
        "entropy": _spread(inspection.entropy) + " nats",
        "teacher": f"{contract.teacher}  {contract.teacher_fingerprint[:12]}",
        "engine": f"{contract.engine}, {contract.dtype}",
        "selection": f"{_selection(contract.selection)} of {contract.vocab_size:,}, codec {contract.codec}",
        "attention": f"layers {', '.join(map(str, attention.layers))}, top {attention.top_m}" if attention else "none",
        "corpus": contract.corpus_fingerprint[:12],
    }
    lines = [f"{name:<10} {fact}" for name, fact in facts.items()]
    return lines + (_record_lines(inspection.record) if inspection.record else [])


def _record_lines(record: InspectedRecord) -> list[str]:
    lines = ["", f"record {record.row}  {record.sample_id}"]
    for name, text in (("prompt", record.prompt), ("response", record.response)):
        lines += [f"{name}: {text}"] if text is not None else []
    for position in record.positions[:_SHOWN_POSITIONS]:
        shown = "  ".join(f"{id_ if text is None else repr(text)} {p:.3f}" for id_, text, p in position.alternatives)
        token = position.token_id if position.token is None else repr(position.token)
        lines.append(f"  {token!s:<16} entropy {position.entropy:5.2f}  coverage {position.coverage:.3f}  {shown}")
    hidden = len(record.positions) - _SHOWN_POSITIONS
    return lines + ([f"  … {hidden} more positions"] if hidden > 0 else [])


def _selection(selection: Selection) -> str:
    stated = {
        "mass": selection.mass if selection.mass < 1 else None,
        "floor": selection.floor or None,
        "draws": selection.draws or None,
    }
    words = [selection.kind, str(selection.k or ""), *(f"{name} {value}" for name, value in stated.items() if value)]
    return " ".join(word for word in words if word)


def _spread(spread: Spread) -> str:
    return f"median {spread.median:.3f}, from {spread.minimum:.3f} to {spread.maximum:.3f}"
