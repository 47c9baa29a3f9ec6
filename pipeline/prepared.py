"""The prepared data that a recipe means: what lies in data/processed may be another run's, and is then refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.assets import source_sha256
from pipeline.errors import PipelineError
from stages.events import Emit, Note

if TYPE_CHECKING:
    from shards.storage import Storage
    from stages.corpus.settings import CorpusSettings
    from stages.corpus.store import Corpus

PROCESSED = Path("data/processed")


def prepared_corpus(settings: CorpusSettings, target: Storage, responses: Path, emit: Emit) -> Corpus:
    """data/processed, to be cached at `target`. Raises PipelineError where other settings or rows made it.

    A set that was begun with this very corpus, or with `responses` to it, goes on, whatever became of the rows since.
    """
    from stages.corpus.store import read_commit, read_corpus

    corpus, begun = read_corpus(PROCESSED), _begun_with(target)
    written = read_commit(responses)
    if written is not None and written["fingerprint"] == begun:
        begun = written["inputs"]["corpus"]
    if begun != corpus.fingerprint:
        commit = read_commit(PROCESSED)
        assert commit is not None, "a corpus that was read has its commit"
        _require_made_from(settings, commit["inputs"], emit)
    return corpus


def _begun_with(target: Storage) -> str | None:
    """The fingerprint of the corpus that a set holds; None where nothing was begun."""
    from shards.manifest import CONTRACT_NAME, read_contract

    return None if target.size(CONTRACT_NAME) is None else read_contract(target).corpus_fingerprint


def _require_made_from(settings: CorpusSettings, inputs: Mapping[str, Any], emit: Emit) -> None:
    hint = "run prepare with this recipe: give it the same --recipe, --name, --data and --set"
    for name, value in settings.deciding().items():
        made = inputs["settings"].get(name)
        if made != value:
            raise PipelineError(f"{PROCESSED} was made with corpus.{name} = {made!r}, not {value!r}", hint=hint)
    found = source_sha256(settings.source)
    if found is None and settings.source:
        text = f"{settings.source} is not there: whether {PROCESSED} was made from it cannot be seen"
        emit(Note(stage="corpus", text=text, level="warning"))
    if found not in (None, inputs["source_sha256"]):
        raise PipelineError(f"{PROCESSED} was not made from {settings.source} as it is now", hint=hint)
