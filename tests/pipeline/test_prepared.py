"""Stage one caches what the recipe prepares: another run's data, or rows that have changed since, are refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.prepared import PROCESSED, prepared_corpus
from pipeline.recipe import load
from pipeline.run import RunFolder
from pipeline.steps import plan_cache, teacher_cache
from shards.manifest import begin, read_contract
from shards.storage import LocalStorage
from stages.corpus.prepare import prepare
from stages.corpus.settings import CorpusSettings
from stages.corpus.store import write_commit
from stages.events import Event, silent

SETTINGS = CorpusSettings(source="rows.jsonl", train_size=4, val_size=2)


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_byte_tokenizer: Callable[[Path], None]) -> Path:
    """A user's folder with rows.jsonl, prepared."""
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", "one")
    save_byte_tokenizer(tmp_path / "tokenizer")
    prepare(
        settings=SETTINGS, source=Path("rows.jsonl"), tokenizer_folder=Path("tokenizer"), out=PROCESSED, emit=silent
    )
    return tmp_path


def write(name: str, word: str) -> None:
    rows = [{"input": f"{word} {n}?", "reasoning_content": "", "content": str(n)} for n in range(6)]
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def taken(emit: Any = silent, **changes: Any) -> int:
    """How many samples stage one would be given."""
    storage = LocalStorage(Path("shards"))
    corpus = prepared_corpus(dataclasses.replace(SETTINGS, **changes), storage, Path("responses"), emit)
    return len(corpus.train) + len(corpus.dev)


def test_what_this_recipe_prepared_is_taken_wherever_its_rows_lie_now() -> None:
    assert taken() == 6
    Path("rows.jsonl").rename("moved.jsonl")
    assert taken(source="moved.jsonl") == 6
    said: list[Event] = []
    assert taken(said.append) == 6
    assert ["rows.jsonl is not there" in str(event) for event in said] == [True]


def test_what_another_recipe_prepared_is_refused_by_what_differs() -> None:
    write("others.jsonl", "two")
    with pytest.raises(PipelineError, match=r"was not made from others\.jsonl as it is now"):
        taken(source="others.jsonl")
    with pytest.raises(PipelineError, match="was not made from demo:gsm-symbolic"):
        taken(source="demo:gsm-symbolic")
    with pytest.raises(PipelineError, match=r"corpus\.train_size = 4, not 5") as caught:
        taken(train_size=5)
    assert caught.value.hint.endswith("--recipe, --name, --data and --set"), "what prepare takes, and no more"


@pytest.mark.parametrize("respond", [False, True], ids=["its own responses", "others"])
def test_a_set_that_was_begun_with_this_corpus_goes_on_though_its_rows_have_changed(
    finished_run: Path, respond: bool
) -> None:
    write("rows.jsonl", "three")
    with pytest.raises(PipelineError, match="was not made from"):
        taken()
    fingerprint = json.loads((PROCESSED / "corpus.json").read_text())["fingerprint"]
    if respond:
        Path("responses").mkdir()
        write_commit(Path("responses"), {"fingerprint": "f" * 64, "inputs": {"corpus": fingerprint}})
        fingerprint = "f" * 64
    contract = read_contract(finished_run / "shards")
    begin(Path("shards"), dataclasses.replace(contract, corpus_fingerprint=fingerprint))
    assert taken() == 6


def test_stage_one_and_its_plan_ask_before_anything_is_fetched() -> None:
    recipe, run = load("smollm2-demo", ["corpus.source=rows.jsonl", "teacher.model=/nowhere"]), RunFolder(Path("r"))
    with pytest.raises(PipelineError, match=r"corpus\.train_size"):
        list(plan_cache(recipe, run, gpus=None))
    with pytest.raises(PipelineError, match=r"corpus\.train_size"):
        teacher_cache(recipe, run, gpus=None)
