"""A student beside its teacher and the label, for people: on the terminal, as a page, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.inspection import decoder
from pipeline.json_output import json_text
from pipeline.matching import known_split, require_same_tokens
from pipeline.run import RunFolder
from pipeline.steps import shards_of, silence_loading_bars
from stages.distill.compare import ComparedToken, compare_record

FULL_KL = 4.0
"""Nats from which on a token has the full colour."""


def compare(
    run: RunFolder, *, shards: str | None, split: str, record: int, page: Path | None, as_json: bool
) -> list[str]:
    """Compare the run's student with the cached teacher on one record. Raises PipelineError and UsageError."""
    from pipeline.comparison_page import page_text
    from pipeline.terminal.comparison import rendered
    from shards.reader import ShardSet
    from stages.inference.generate import Student

    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        raise UsageError(f"no page can be written to {page}", hint="name a file in a folder that is there")
    silence_loading_bars()
    shard_set = ShardSet(shards_of(run, shards))
    require_same_tokens(run, shard_set)
    split, name = known_split(shard_set, split)
    records = shard_set.split(name)
    if not 0 <= record < len(records):
        raise UsageError(f"no record {record} in {split}", hint=f"count from 0 to {len(records) - 1}")
    student = Student.load(run.final_model)
    chosen = records[record]
    decode = decoder(shard_set.teacher_folder)
    if decode is None:
        raise PipelineError(
            f"{shard_set.teacher_folder} has no tokenizer.json", hint="restore it from a copy of the set"
        )
    compared = compare_record(student.model, chosen, shard_set.contract, decode)
    if as_json:
        return [json_text(compared)]
    title = f"{run.path.name}, {split} record {record} ({chosen.sample_id})"
    prompt = decode(chosen.prompt_ids_P.tolist())
    if page is None:
        return [rendered(title, prompt, compared)]
    page.write_text(page_text(title, prompt, compared), encoding="utf-8")
    return [f"wrote {page}: {summary(compared)}"]


def summary(compared: Sequence[ComparedToken]) -> str:
    """Mean KL and agreement."""
    mean = sum(token.kl for token in compared) / len(compared)
    known = [token for token in compared if token.teacher]
    agreed = sum(token.teacher[0].text == token.student[0].text for token in known)
    told = f"{len(compared)} tokens, mean KL {mean:.3f} nats"
    return f"{told}, the same best token at {agreed / len(known):.0%}" if known else told


def visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"
