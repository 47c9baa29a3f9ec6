"""Beside the standing report: either split of any set of the same tokenizer, and rows that nobody cached."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cli import app
from pipeline import evaluation
from pipeline.card import CARD, write_card
from pipeline.compare import compare
from pipeline.errors import PipelineError, UsageError
from pipeline.report import REPORT, write_report
from pipeline.run import RunFolder
from shards.contract import Contract, Selection
from shards.manifest import begin, seal
from shards.reader import ShardSet
from shards.reselect import reselect_set
from shards.writer import write_shard
from stages.distill.evaluate import evaluate_model
from stages.distill.identity import SHARDS_SHA256, shards_sha256

CLI = Path(__file__).resolve().parent.parent.parent / "cli.py"


@pytest.fixture
def run(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.chdir(finished_run.parent.parent)
    return RunFolder(finished_run)


@pytest.fixture
def other_set(run: RunFolder, tmp_path: Path) -> Callable[..., Path]:
    """The validation records of the run as the train split of a set whose contract differs."""

    def write(**changes: object) -> Path:
        own = ShardSet(run.shards)
        contract: Contract = dataclasses.replace(own.contract, **changes)  # type: ignore[arg-type]
        folder = tmp_path / "other"
        begin(folder, contract)
        seal(folder, contract, [write_shard(folder, "train-00000", "train", contract, list(own.split("dev")))])
        return folder

    return write


def test_rows_are_measured_without_a_word_of_transformers(run: RunFolder) -> None:
    """In a process that has read no student before."""
    Path("rows.jsonl").write_text(json.dumps({"input": "What is 7 + 7?", "content": "It is 14."}), encoding="utf-8")
    words = [sys.executable, str(CLI), "evaluate", "--name", run.path.name, "--data", "rows.jsonl"]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of type" not in done.stdout + done.stderr


def evaluate(*words: str) -> str:
    done = CliRunner().invoke(app, ["evaluate", "--name", "tiny", *words])
    if done.exception:
        raise done.exception
    return done.stdout


def test_either_split_is_measured_whole_and_kept_beside_the_standing_report(run: RunFolder) -> None:
    told = evaluate("--split", "train")
    want = evaluate_model(run.final_model, ShardSet(run.shards), split="train")
    assert f"KL to teacher   {want.kl:.4f} nats" in told
    assert f"top-1 {want.top1_agreement:.1%}, top-5 {want.top5_agreement:.1%}" in told
    standing = run.summary()["evaluate"]
    evaluate("--split", "validation")
    summary = run.summary()
    assert summary["evaluate"] == standing
    facts = list(summary["evaluate_elsewhere"].values())
    assert [fact["positions"] for fact in facts] == [
        int(ShardSet(run.shards).split(name).positions.sum()) for name in ("train", "dev")
    ]
    assert all(fact["positions_per_s"] > 0 < fact["generated_tokens_per_s"] for fact in facts)
    page = (run.path / REPORT).read_text(encoding="utf-8")
    assert "Other text" in page
    assert f"{want.kl:.4f}" in page


def test_what_was_measured_of_other_weights_is_told_no_more(run: RunFolder) -> None:
    standing = evaluation.evaluate(run, shards=None)
    facts = evaluation.evaluate_split(run, shards=None, split="train")
    run.report("evaluate", {**standing, "exact_match": {"share": 1.0, "low": 0.9, "high": 1.0, "answers": 40}})
    told = ("of 40 answers are right", "Answers to validation prompts", facts["where"])

    def pages() -> str:
        write_card(run)
        return write_report(run).read_text("utf-8") + (run.final_model / CARD).read_text("utf-8")

    assert all(words in pages() for words in told)
    assert f"own kind and on other text ({facts['where']}); on any other" in pages()
    trained_again = load_file(run.final_model / "model.safetensors")
    next(iter(trained_again.values())).add_(1)
    save_file(trained_again, run.final_model / "model.safetensors", metadata={"format": "pt"})
    assert not any(words in pages() for words in told)
    assert "own kind only; on any other text nothing is known" in pages()
    evaluation.evaluate_split(run, shards=None, split="validation")
    assert len(run.summary()["evaluate_elsewhere"]) == 1


def test_another_set_of_the_same_tokenizer_is_measured(run: RunFolder, other_set: Callable[..., Path]) -> None:
    folder = other_set(corpus_fingerprint="d" * 64)
    facts = evaluation.evaluate_split(run, shards=str(folder), split="train")
    own = evaluate_model(run.final_model, ShardSet(run.shards))
    assert facts["kl"] == pytest.approx(own.kl, rel=1e-6)
    for split in ("validation", "dev"):
        with pytest.raises(UsageError, match=f"has no {split} split") as refused:
            evaluation.evaluate_split(run, shards=str(folder), split=split)
        assert refused.value.hint == "there is --split train"
    with pytest.raises(UsageError, match="has no test split"):
        evaluation.evaluate_split(run, shards=None, split="test")


def test_a_split_is_known_by_either_name(run: RunFolder) -> None:
    for split in ("validation", "dev"):
        where = evaluation.evaluate_split(run, shards=None, split=split)["where"]
        assert where == f"validation split of {run.shards.resolve()}"


def trained_on(run: RunFolder, folder: Path) -> None:
    """Have the student's folder say so, as training does."""
    path = run.final_model / "training.json"
    identity = {SHARDS_SHA256: shards_sha256(ShardSet(folder))}
    path.write_text(json.dumps({**json.loads(path.read_text()), "identity": identity}))


def test_the_standing_report_is_of_the_set_it_was_trained_on(run: RunFolder, tmp_path: Path) -> None:
    # The same corpus with other distributions: no other fact tells the two apart.
    narrow = tmp_path / "narrow"
    reselect_set(run.shards, narrow, Selection(kind="topk", k=2))
    for folder, other in ((run.shards, narrow), (narrow, run.shards)):
        trained_on(run, folder)
        with pytest.raises(UsageError, match="is not the set that this student was trained on") as refused:
            evaluation.evaluate(run, shards=str(other))
        assert "--split" in refused.value.hint
        kl = evaluation.evaluate(run, shards=str(folder))["validation"]["kl"]
        assert kl == evaluate_model(run.final_model, ShardSet(folder)).kl


def test_a_set_without_a_validation_split_is_refused_with_what_it_has(
    run: RunFolder, other_set: Callable[..., Path]
) -> None:
    folder = other_set()
    with pytest.raises(UsageError, match="has no validation split") as refused:
        evaluation.evaluate(run, shards=str(folder))
    assert refused.value.hint == "there is --split train"


def test_a_foreign_tokenizer_is_refused(run: RunFolder, other_set: Callable[..., Path]) -> None:
    folder = other_set(tokenizer_fingerprint="e" * 64)
    for measure in measures(run, folder):
        with pytest.raises(PipelineError, match="is of another tokenizer than") as refused:
            measure()
        assert "--data" in refused.value.hint


def measures(run: RunFolder, folder: Path) -> tuple[Callable[[], object], ...]:
    """All that sets a student beside a cached teacher."""
    place = str(folder)
    return (
        lambda: evaluation.evaluate_split(run, shards=place, split="train"),
        lambda: evaluation.evaluate(run, shards=place),
        lambda: compare(run, shards=place, split="train", record=0, page=None, as_json=False),
    )


def test_a_teacher_of_another_width_is_refused(run: RunFolder, other_set: Callable[..., Path]) -> None:
    width = ShardSet(run.shards).contract.vocab_size
    folder = other_set(vocab_size=width + 8)
    for measure in measures(run, folder):
        with pytest.raises(PipelineError, match=f"is of {width + 8} tokens, the student in .* of {width}$"):
            measure()


def test_rows_that_nobody_cached_are_measured_against_themselves(run: RunFolder, tmp_path: Path) -> None:
    # The very rows of the validation split: what needs no teacher must come to the same.
    rows = [{"input": f"What is {n} + {n}? 多少？", "content": f"It is {2 * n}. <b>&"} for n in (4, 5)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    told = evaluate("--data", str(source))
    want = evaluate_model(run.final_model, ShardSet(run.shards))
    assert f"positions       {want.positions:,}, rows of {source}" in told
    assert f"cross-entropy   {want.cross_entropy:.4f} nats, perplexity {want.perplexity:.2f}" in told
    assert "exact match     0.0% of 2 answers" in told
    assert "KL" not in told
    assert "1 of 3 rows cannot be read" in told
    assert (run.path / "evaluate-rejects.jsonl").read_text().count("\n") == 1
    with pytest.raises(UsageError, match="--data is measured by itself"):
        evaluate("--data", str(source), "--split", "train")
