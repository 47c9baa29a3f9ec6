"""A finished student beside a shard set: do they belong together, and which split is meant by either of its names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import PipelineError, UsageError
from pipeline.run import RunFolder

if TYPE_CHECKING:
    from shards.reader import ShardSet

_PEOPLES_WORDS = {"dev": "validation"}
"""For the splits that shards call otherwise."""


def known_split(shard_set: ShardSet, asked: str) -> tuple[str, str]:
    """What people and what the set call a split, of which either may be asked for. Raises UsageError."""
    for name in shard_set.splits:
        word = _PEOPLES_WORDS.get(name, name)
        if asked in (word, name):
            return word, name
    there = " and ".join(f"--split {_PEOPLES_WORDS.get(name, name)}" for name in shard_set.splits)
    raise UsageError(f"{shard_set.where} has no {asked} split", hint=f"there is {there}")


def require_same_tokens(run: RunFolder, shard_set: ShardSet) -> None:
    """Raises PipelineError where ids mean other tokens to the student, or where it has more or fewer of them."""
    from stages.corpus.fingerprint import tokenizer_fingerprint
    from stages.inference.loading import read_config

    contract, width = shard_set.contract, read_config(run.final_model)["vocab_size"]
    hint = "name a set of the student's own teacher with --shards; `evaluate --data rows.jsonl` needs none"
    if contract.tokenizer_fingerprint != tokenizer_fingerprint(run.final_model):
        raise PipelineError(f"{shard_set.where} is of another tokenizer than {run.final_model}", hint=hint)
    if contract.vocab_size != width:  # teachers of one tokenizer may be padded differently
        raise PipelineError(
            f"{shard_set.where} is of {contract.vocab_size:,} tokens, the student in {run.final_model} of {width:,}",
            hint=hint,
        )


def require_trained_on(run: RunFolder, shard_set: ShardSet) -> None:
    """Raises UsageError for a set that is not the one which the student was trained on, as far as its folder tells."""
    from stages.distill.export import exported_facts
    from stages.distill.identity import SHARDS_SHA256, shards_sha256

    identity = (exported_facts(run.final_model) or {}).get("identity", {})
    if identity.get(SHARDS_SHA256) not in (None, shards_sha256(shard_set)):
        raise UsageError(
            f"{shard_set.where} is not the set that this student was trained on",
            hint="name that one with --shards; or add --split validation or --split train to measure on this one",
        )
