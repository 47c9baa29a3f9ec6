"""The dataset card of a shard set: README.md beside its manifest, from the manifest and from nothing else.

The card is no part of the set: `verify-shards` neither knows nor misses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.card import ABSENT, CARD, table
from pipeline.figures import size
from pipeline.locations import local_set
from pipeline.run import write_atomically
from shards.manifest import TEACHER_FOLDER
from shards.reader import ShardSet

_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")


def share(place: str) -> list[str]:
    """Write the card of a complete set and return lines to print.

    Raises UsageError where it lies in no folder, ShardError where it is not whole.
    """
    folder = local_set(place)
    path = folder / CARD
    write_atomically(path, dataset_card(folder))
    return [f"card       {path}", "           the folder can be copied as it is; verify-shards checks a copy"]


def dataset_card(folder: Path) -> str:
    """The card's text."""
    shards = ShardSet(folder)
    contract = dataclasses.asdict(shards.contract)
    parts = [
        ["---", "tags:", "- distillation", "- logits", "---"],
        [f"# What {shards.contract.teacher} says of a corpus"],
        [
            "A teacher's distributions over the next token, at every response token of a corpus, with what a student",
            "needs of the teacher besides. One Arrow file a shard, one row a sample; the format's specification comes",
            "with MiniCodformer (`shards/FORMAT.md`).",
        ],
        ["## Sizes", "", *_sizes(shards)],
        ["## What was kept", "", *_quality(shards)],
        ["## Fidelity", "", *_fidelity(shards)],
        [
            "## Contract",
            "",
            "The same in every shard; two sets with equal contracts read as one.",
            "",
            *table(contract_rows(contract)),
        ],
        ["## The teacher's files", "", *table(dict(shards.manifest.teacher_files))],
        ["## How to read it", "", *_reading(shards)],
        ["## Licences", "", *_licences(shards.teacher_folder)],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def contract_rows(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Fields as text; a field that is itself a record, as its own fields."""
    return {f"`{name}`": _stated(value) for name, value in contract.items()}


def _stated(value: Any) -> Any:
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_stated(item)}" for name, item in value.items())
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return value


def _sizes(shards: ShardSet) -> list[str]:
    lines = ["| split | shards | records | positions | bytes |", "|---|---|---|---|---|"]
    for name in shards.splits:
        infos = [info for info in shards.manifest.shards if info.split == name]
        records, positions, content = (
            sum(getattr(i, part) for i in infos) for part in ("records", "positions", "bytes")
        )
        lines.append(f"| {name} | {len(infos)} | {records:,} | {positions:,} | {size(content)} |")
    totals = shards.manifest.totals()
    each = totals["bytes"] / totals["positions"]
    return [*lines, "", f"{each:.1f} bytes a position in all, tokens and columns included."]


def _quality(shards: ShardSet) -> list[str]:
    """Means over positions, from the plain columns."""
    lines = ["| split | mean coverage | least coverage | mean entropy (nats) | prompt tokens | response tokens |"]
    lines.append("|---|---|---|---|---|---|")
    for name in shards.splits:
        split = shards.split(name)
        weights = split.positions.astype(np.float64)
        coverage, entropy = (
            float(np.average(split.column(column), weights=weights)) for column in ("mean_coverage", "mean_entropy")
        )
        least = float(split.column("min_coverage").min())
        prompts, responses = int(split.prompt_lengths.sum()), int(split.response_lengths.sum())
        cells = [_known(coverage), _known(least), _known(entropy), f"{prompts:,}", f"{responses:,}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "Coverage is the probability mass of the ids kept at a position."]


def _known(value: float) -> str:
    return f"{value:.4f}" if np.isfinite(value) else ABSENT


def _fidelity(shards: ShardSet) -> list[str]:
    """What stage one measured against the live teacher, if it did."""
    facts = shards.fidelity()
    return list(table(facts)) if facts else ["Not measured."]


def _reading(shards: ShardSet) -> list[str]:
    split = shards.splits[-1]
    return [
        "```python",
        "from pathlib import Path",
        "",
        "from shards.reader import ShardSet  # of MiniCodformer: numpy and pyarrow, no torch",
        "",
        'shards = ShardSet(Path("path/of/this/folder"))',
        f'record = shards.split("{split}")[0]',
        "record.prompt_ids_P, record.response_ids_R, record.ids_NK, record.logprobs_NK",
        "```",
        "",
        "Any Arrow reader reads the plain columns; `signal` and `attention` are the codec's. `verify-shards` checks",
        "every byte.",
    ]


def _licences(teacher: Path) -> list[str]:
    found = [name for name in _LICENCES if (teacher / name).is_file()]
    if found:
        return [f"The teacher's own, in `{TEACHER_FOLDER}/`: {', '.join(found)}. The corpus's licence is {ABSENT}."]
    return [
        f"Of the teacher and of the corpus: {ABSENT}; no file of the set says them. Ask before you pass the set on."
    ]
