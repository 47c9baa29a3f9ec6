"""The verbs that look at shards and make something of them, as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import polars
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from typer.testing import CliRunner, Result

import cli
from pipeline import estimate as estimate_module
from pipeline import inspection, shard_tools
from pipeline.errors import UsageError
from pipeline.explanation import exit_code
from shards.contract import Contract
from shards.errors import InvalidRequest, StorageFailed
from shards.manifest import begin, publish_teacher_files, read_manifest, seal
from shards.record import Record
from shards.writer import write_shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, make_set: Callable[..., Path]) -> Path:
    words = Tokenizer(WordLevel({f"word{id_}": id_ for id_ in range(300)}, unk_token="word0"))
    return make_set(tmp_path_factory.mktemp("set"), words.to_str())


@pytest.fixture
def run() -> Callable[..., Result]:
    def invoke(*words: object) -> Result:
        return CliRunner().invoke(cli.app, [str(word) for word in words])

    return invoke


def test_inspect_shard_states_the_contract_first_and_every_key(run: Callable[..., Result], shards: Path) -> None:
    lines = run("inspect-shard", shards).output.splitlines()
    assert lines[0].startswith("teacher ")
    assert any(line.startswith("checksum   2 of ") and line.endswith(" as written") for line in lines)
    facts = json.loads(run("inspect-shard", shards, "--json").output)
    assert next(iter(facts)) == "contract"
    assert {"records", "positions", "entries", "bytes_per_position", "coverage", "checksum"} <= set(facts)
    assert facts["bytes_per_position"]["all"] > facts["bytes_per_position"]["signal"] > 0
    assert facts["checksum"] == {"intact": True, "damage": {}}


def test_inspect_shard_shows_a_sample_in_words(run: Callable[..., Result], shards: Path) -> None:
    words = run("inspect-shard", shards, "--sample", 1, "--position", 0, "--position", 1).output
    assert "prompt: word" in words
    assert words.count("looked at: ") == 2 * len(read_manifest(shards).contract.attention.layers)  # type: ignore[union-attr]
    outcome = run("inspect-shard", shards, "--sample", 10_000)
    assert isinstance(outcome.exception, InvalidRequest)
    assert "samples 0 to" in str(outcome.exception)


def test_verify_shards_exits_with_1_names_the_damage_and_sets_it_aside(
    run: Callable[..., Result], shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    done = run("verify-shards", copy)
    assert (done.exit_code, "all intact" in done.output) == (0, True)
    damaged = next(copy.glob("train-*.arrow"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = run("verify-shards", copy)
    assert done.exit_code == 1
    assert f"  {damaged.name}: " in done.output
    assert "--quarantine" in done.output
    report = json.loads(run("verify-shards", copy, "--json").output)
    assert list(report["damage"]) == [damaged.name]
    assert run("verify-shards", copy, "--quarantine").exit_code == 1
    assert not damaged.exists()
    assert (copy / "quarantine" / damaged.name).exists()
    assert "run the command that makes the set again" in str(getattr(run("verify-shards", copy).exception, "hint", ""))


def test_the_hint_for_a_set_that_no_teacher_made_brings_it_back(
    run: Callable[..., Result], shards: Path, tmp_path: Path
) -> None:
    made = ("reselect", shards, tmp_path / "narrow", "--k", 2)
    run(*made)
    whole = {path: path.read_bytes() for path in (tmp_path / "narrow").rglob("*") if path.is_file()}
    damaged = tmp_path / "narrow" / "train-1.arrow"
    damaged.write_bytes(whole[damaged][:-1])
    hint = str(run("verify-shards", tmp_path / "narrow").output).splitlines()[-1]
    assert hint.endswith("--quarantine and run the command that made the set again")
    run("verify-shards", tmp_path / "narrow", "--quarantine")
    assert run(*made).exit_code == 0
    assert {path: path.read_bytes() for path in whole} == whole


def test_export_shards_writes_what_polars_reads(run: Callable[..., Result], shards: Path, tmp_path: Path) -> None:
    done = run("export-shards", shards, tmp_path / "out", "--to", "parquet")
    assert done.exit_code == 0, done.output
    totals = read_manifest(shards).totals()
    assert f"{totals['records']:,} records" in done.output
    assert polars.read_parquet(tmp_path / "out" / "*.parquet")["positions"].sum() == totals["positions"]
    assert "there before" in run("export-shards", shards, tmp_path / "out").output
    assert isinstance(run("export-shards", shards, tmp_path / "out", "--to", "csv").exception, UsageError)


def test_reselect_keeps_fewer_ids(run: Callable[..., Result], shards: Path, tmp_path: Path) -> None:
    done = run("reselect", shards, tmp_path / "narrow", "--k", 2)
    assert done.exit_code == 0, done.output
    assert "reselected 4 shards, 8 records" in done.output
    narrow = read_manifest(tmp_path / "narrow")
    assert narrow.contract.selection.k == 2
    assert narrow.totals()["positions"] == read_manifest(shards).totals()["positions"]
    outcome = run("reselect", shards, tmp_path / "wide", "--k", 5)
    assert isinstance(outcome.exception, InvalidRequest)
    assert "keeps 4 ids a position, not 5" in str(outcome.exception)
    outcome = run("reselect", shards, tmp_path / "wide", "--k", 3, "--mass", 2)
    assert isinstance(outcome.exception, UsageError)
    assert "mass must lie in (0, 1]" in str(outcome.exception)


def test_merge_refuses_one_set_twice(run: Callable[..., Result], shards: Path, tmp_path: Path) -> None:
    outcome = run("merge", shards, shards, tmp_path / "out")
    assert isinstance(outcome.exception, InvalidRequest)
    assert "is in" in str(outcome.exception)
    assert exit_code(outcome.exception) == 2
    assert not (tmp_path / "out").exists()


def test_merge_tells_of_prompts_that_would_validate_what_is_trained_on(
    run: Callable[..., Result], shards: Path, tmp_path: Path, contract: Contract, written: list[Record]
) -> None:
    other, train = tmp_path / "other", dataclasses.replace(written[0], sample_id="again")
    begin(other, contract)
    publish_teacher_files(other, {"tokenizer.json": (shards / "teacher" / "tokenizer.json").read_bytes()})
    seal(other, contract, [write_shard(other, "dev-0", "dev", contract, [train])])
    told = run("merge", shards, other, tmp_path / "out").output
    assert "warning    prompts that validate in one of these sets and are trained on in another: 1" in told


def test_estimate_tells_bytes_hours_and_cost(
    run: Callable[..., Result], make_set: Callable[..., Path], tmp_path: Path
) -> None:
    shards = make_set(tmp_path / "shards")
    totals = read_manifest(shards).totals()
    words = ("estimate", shards, "--positions", 100 * totals["positions"])
    assert "hours      not known: give --rate" in run(*words).output
    summary = {"captured": 500, "seconds": 10.0, "where": str(tmp_path / "elsewhere")}
    (tmp_path / "summary.json").write_text(json.dumps({"teacher_cache": summary}))
    assert "hours      not known" in run(*words).output, "that was the making of another set"
    (tmp_path / "summary.json").write_text(json.dumps({"teacher_cache": summary | {"where": str(shards)}}))
    assert "at 50 tokens/s each, loading the teacher included" in run(*words).output
    facts = json.loads(run(*words, "--machines", 4, "--price", 3, "--json").output)
    assert facts["bytes"] == pytest.approx(100 * totals["bytes"])
    assert facts["positions_per_second"] == 50
    assert facts["hours"] == pytest.approx(100 * totals["positions"] / 200 / 3600)
    assert facts["cost"] == pytest.approx(facts["hours"] * 4 * 3)
    told = run(*words, "--rate", 100).output
    assert "at 100 tokens/s each\n" in told
    assert f"{100 * totals['positions']:,} response tokens" in told


def test_copy_shards_makes_the_same_set(run: Callable[..., Result], shards: Path, tmp_path: Path) -> None:
    done = run("copy-shards", shards, tmp_path / "copy")
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "copy") == read_manifest(shards)
    assert isinstance(run("copy-shards", shards, "ftp://there").exception, UsageError)


@pytest.mark.parametrize(
    "words", [("verify-shards",), ("inspect-shard",), ("merge", "s3://here/other", "s3://here/new")]
)
def test_a_cache_of_no_size_is_named_and_nothing_else_is_blamed(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MINICODFORMER_SHARD_CACHE_GB", "plenty")
    error = run(words[0], "s3://here/set", *words[1:]).exception
    assert isinstance(error, StorageFailed)
    assert "MINICODFORMER_SHARD_CACHE_GB must be a number of GiB" in str(error)
    assert "unset it" in error.hint


@pytest.mark.parametrize(
    ("room", "called", "words"),
    [
        (shard_tools, "export_parquet", ("export-shards", "out")),
        (shard_tools, "merge_sets", ("merge", "other", "out")),
        (shard_tools, "copy_set", ("copy-shards", "out")),
        (shard_tools, "reselect_set", ("reselect", "out", "--k", "2")),
        (inspection, "inspect", ("inspect-shard", "--sample", "0")),
        (estimate_module, "estimate_size", ("estimate", "--positions", "5")),
    ],
)
def test_a_fault_of_ours_is_not_told_as_the_users(
    run: Callable[..., Result],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: ModuleType,
    called: str,
    words: tuple[str, ...],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a fault of ours")

    monkeypatch.setattr(room, called, fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").symlink_to(shards)
    assert type(run(words[0], shards, *words[1:]).exception) is ValueError
