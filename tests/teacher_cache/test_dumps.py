"""vLLM's prompt_logprobs become shards whose tail is not known: exact ids, true log-probabilities, nothing made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import cli
from pipeline.errors import UsageError
from shards import learnt
from shards.errors import ContractMismatch
from shards.manifest import Manifest
from shards.reader import ShardSet
from shards.verify import verify_shards
from stages.errors import StageError
from stages.teacher_cache import dumps
from stages.teacher_cache.dumps import import_dump

VOCABULARY, K = 300, 5


@pytest.fixture
def teacher(dumped_teacher: Path) -> Path:
    return dumped_teacher


def lines(count: int = 5) -> list[dict[str, Any]]:
    """As vLLM writes them: k ids and the token that stands there, which may be one of them, in no order."""
    rng = np.random.default_rng(4)
    found = []
    for number in range(count):
        tokens = rng.integers(0, VOCABULARY, 9 + number).tolist()
        logits_TV = 3 * rng.standard_normal((len(tokens), VOCABULARY))
        logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
        said: list[dict[str, Any] | None] = [None]
        for token, logprobs_V in zip(tokens[1:], logprobs_TV[1:], strict=True):
            ids = [token, *np.argsort(-logprobs_V)[: K + 1].tolist()]
            said.append({str(v): {"logprob": float(logprobs_V[v]), "rank": 1, "decoded_token": "x"} for v in ids})
        found.append(
            {"prompt_token_ids": tokens, "prompt_logprobs": said, "prompt_length": 3, "id": f"sample {number}"}
        )
    found[-1]["split"] = "dev"
    return found


def write(path: Path, dumped: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in dumped))
    return path


def bring(dump: Path, target: Path, teacher: Path, *, k: int = K, **options: Any) -> Manifest:
    return import_dump(
        dump, target, teacher="a/teacher", teacher_folder=teacher, k=k, pca_width=6, thinking=False, **options
    )


def test_a_dump_becomes_a_set_that_says_what_it_does_not_know(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "RECORDS_PER_SHARD", 3)
    dumped = lines()
    manifest = bring(write(tmp_path / "dump.jsonl", dumped), tmp_path / "set", teacher)
    assert [shard.name for shard in manifest.shards] == ["dev-00000.arrow", "train-00000.arrow", "train-00001.arrow"]
    assert not manifest.contract.selection.tail_known
    assert verify_shards(tmp_path / "set").intact
    shards = ShardSet(tmp_path / "set")
    records = [*shards.split("train"), *shards.split("dev")]
    for line, record in zip(dumped, records, strict=True):
        assert record.sample_id == line["id"]
        assert [*record.prompt_ids_P, *record.response_ids_R] == line["prompt_token_ids"]
        assert len(record.prompt_ids_P) == 3
        assert np.isnan(record.log_tail_N).all()
        assert np.isnan(record.entropy_N).all()
        assert record.logprobs_NK is not None
        for n, said in enumerate(line["prompt_logprobs"][3:]):
            truth = {int(v): at["logprob"] for v, at in said.items()}
            best = sorted(truth, key=lambda v: -truth[v])[:K]
            assert set(record.ids_NK[n].tolist()) == set(best)
            for v, logprob in zip(record.ids_NK[n].tolist(), record.logprobs_NK[n].tolist(), strict=True):
                assert np.exp(logprob) == pytest.approx(np.exp(truth[v]), abs=0.02)


def test_an_import_that_was_stopped_goes_on_and_another_dump_is_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dumps, "RECORDS_PER_SHARD", 3)
    dump = write(tmp_path / "dump.jsonl", lines())

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(dump, tmp_path / "set", teacher, progress=stop)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.arrow")}
    assert list(before) == ["train-00000.arrow"]
    assert bring(dump, tmp_path / "set", teacher) == bring(dump, tmp_path / "undisturbed", teacher)
    assert (tmp_path / "set" / "train-00000.arrow").stat().st_mtime_ns == before["train-00000.arrow"]
    with pytest.raises(ContractMismatch, match="corpus_fingerprint"):
        bring(write(tmp_path / "other.jsonl", lines(4)), tmp_path / "set", teacher)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.pop("prompt_logprobs"), "prompt_logprobs"),
        (lambda line: line.update(prompt_length=9), "9 tokens, 9 positions, a prompt of 9"),
        (lambda line: line.update(prompt_length=0), "a prompt of 0"),
        (lambda line: line["prompt_logprobs"].pop(), "9 tokens, 8 positions"),
        (lambda line: line["prompt_logprobs"].__setitem__(4, None), "position 4 has 0 ids, not 5"),
        (lambda line: line["prompt_logprobs"].__setitem__(4, {"1": 0.5, "2": 0, "3": 0, "4": 0, "5": 0}), "mass|prob"),
        (lambda line: line["prompt_token_ids"].__setitem__(8, 300), "300"),
        (lambda line: line.update(split="test"), "train, dev"),
        (lambda line: line["prompt_token_ids"].__setitem__(8, "x"), "invalid literal"),
    ],
)
def test_a_line_that_is_none_is_named(
    tmp_path: Path, teacher: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    dumped = lines()
    dumped.insert(1, dumped[0] | {"id": "changed", "prompt_logprobs": [*dumped[0]["prompt_logprobs"]]})
    dumped[1]["prompt_token_ids"] = [*dumped[0]["prompt_token_ids"]]
    change(dumped[1])
    with pytest.raises(StageError, match=f"line 2: .*({said})"):
        bring(write(tmp_path / "dump.jsonl", dumped), tmp_path / "set", teacher)
    assert not list(tmp_path.glob("set/*.arrow"))


def test_blank_lines_are_none_and_a_sample_without_a_name_is_called_by_its_line(tmp_path: Path, teacher: Path) -> None:
    dumped = lines()
    dumped[0]["id"] = None
    dump = write(tmp_path / "dump.jsonl", dumped)
    dump.write_text("\n" + dump.read_text() + "\n \n")
    bring(dump, tmp_path / "set", teacher)
    names = [*ShardSet(tmp_path / "set").split("train").sample_ids.tolist()]
    assert names == ["line-2", "sample 1", "sample 2", "sample 3"]


def test_a_line_that_is_nested_too_deep_is_named(tmp_path: Path, teacher: Path) -> None:
    (tmp_path / "dump.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(StageError, match="line 1: "):
        bring(tmp_path / "dump.jsonl", tmp_path / "set", teacher)


def test_tables_take_no_more_than_what_a_small_dump_holds_can_bear(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []
    learn = learnt.learn_tables
    monkeypatch.setattr(learnt, "learn_tables", lambda *a, budget: budgets.append(budget) or learn(*a, budget=budget))
    manifest = bring(write(tmp_path / "dump.jsonl", lines()), tmp_path / "set", teacher)
    assert budgets == [learnt.tables_budget(manifest.totals()["positions"])]


def test_a_teacher_without_a_head_is_refused_before_anything_is_written(tmp_path: Path, teacher: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(StageError, match="no output head"):
        bring(write(tmp_path / "dump.jsonl", lines()), tmp_path / "set", folder)
    assert not (tmp_path / "set").exists()


def test_a_sample_that_occurs_twice_is_named_before_anything_is_written(tmp_path: Path, teacher: Path) -> None:
    dumped = lines()
    dumped[3]["id"] = dumped[1]["id"]
    with pytest.raises(StageError, match="line 4: its sample 'sample 1' is that of line 2 already"):
        bring(write(tmp_path / "dump.jsonl", dumped), tmp_path / "set", teacher)
    assert not list(tmp_path.glob("set/*.arrow"))


def test_import_cache_on_the_command_line(tmp_path: Path, teacher: Path) -> None:
    dump = write(tmp_path / "dump.jsonl", lines())
    words = ["import-cache", str(dump), str(tmp_path / "set"), "--teacher", str(teacher), "--k", str(K)]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "imported   2 shards, 5 records" in done.output
    assert "the tail is not known" in done.output
    lines_of = CliRunner().invoke(cli.app, ["inspect-shard", str(tmp_path / "set")]).output
    assert "selection  topk 5 (tail unknown)" in lines_of
    assert "entropy    not stated" in lines_of
    missing = CliRunner().invoke(cli.app, ["import-cache", "absent.jsonl", *words[2:]])
    assert isinstance(missing.exception, UsageError)


def test_an_empty_dump_is_refused(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(StageError, match="is empty"):
        bring(write(tmp_path / "dump.jsonl", []), tmp_path / "set", teacher)


@pytest.mark.parametrize("k", [VOCABULARY + 1, 5000])
def test_more_ids_than_the_teacher_has_are_refused(tmp_path: Path, teacher: Path, k: int) -> None:
    with pytest.raises(StageError, match=rf"has up to {VOCABULARY} ids a position, not {k}") as caught:
        bring(write(tmp_path / "dump.jsonl", lines()), tmp_path / "set", teacher, k=k)
    assert caught.value.hint == f"--k {VOCABULARY} or fewer"
    assert not (tmp_path / "set").exists()


def test_the_line_in_the_documentation_is_one(tmp_path: Path, teacher: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "teacher_cache.md").read_text(encoding="utf-8")
    (tmp_path / "dump.jsonl").write_text(page.split("```json\n")[1].split("```")[0])
    bring(tmp_path / "dump.jsonl", tmp_path / "set", teacher, k=2)
    (record,) = ShardSet(tmp_path / "set").split("dev")
    assert (record.sample_id, record.prompt_ids_P.tolist(), record.ids_NK.tolist()) == ("first", [5, 17], [[3, 8]])
