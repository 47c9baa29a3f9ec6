"""W6 and the commit of a set: contract first, manifest last, nothing half-agreed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from shards import manifest
from shards.contract import AttentionSpec, Contract, Selection
from shards.errors import ContractMismatch, Corrupt, Incomplete, ShardError, Truncated, UnknownVersion
from shards.manifest import ShardInfo, begin, is_sealed, read_contract, read_manifest, seal
from shards.reader import ShardSet
from shards.record import Record
from shards.sealed_json import sealed
from shards.writer import write_shard


@pytest.fixture
def infos(tmp_path: Path, contract: Contract, records: list[Record]) -> list[ShardInfo]:
    """A begun folder with two shards and two teacher files, not sealed."""
    begin(tmp_path, contract)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    (tmp_path / "teacher" / "head_pca.safetensors").write_bytes(b"pca")
    return [
        write_shard(tmp_path, "train-00000", "train", contract, records[:2]),
        write_shard(tmp_path, "dev-00000", "dev", contract, records[2:]),
    ]


def test_a_sealed_set_says_what_it_holds(tmp_path: Path, contract: Contract, infos: list[ShardInfo]) -> None:
    assert not is_sealed(tmp_path)
    made = seal(tmp_path, contract, infos)
    assert is_sealed(tmp_path)
    assert made == read_manifest(tmp_path)
    assert made.contract == contract
    assert [shard.name for shard in made.shards] == ["dev-00000.arrow", "train-00000.arrow"]
    assert made.totals() == {
        "shards": 2,
        "records": 3,
        "positions": 5 + 1 + 5,
        "bytes": sum(path.stat().st_size for path in tmp_path.glob("*.arrow")),
    }
    for shard in made.shards:
        assert hashlib.sha256((tmp_path / shard.name).read_bytes()).hexdigest() == shard.sha256
    assert made.teacher_files == {
        "tokenizer.json": hashlib.sha256(b"{}").hexdigest(),
        "head_pca.safetensors": hashlib.sha256(b"pca").hexdigest(),
    }


def test_sealing_again_agrees_and_sealing_something_else_is_refused(
    tmp_path: Path, contract: Contract, infos: list[ShardInfo]
) -> None:
    first = seal(tmp_path, contract, infos)
    assert seal(tmp_path, contract, infos[::-1]) == first
    with pytest.raises(ContractMismatch, match="sealed already"):
        seal(tmp_path, contract, infos[:1])


CHANGES: list[tuple[str, Any]] = [
    ("codec", "topk-planes/2"),
    ("teacher", "another"),
    ("teacher_fingerprint", "9"),
    ("tokenizer_fingerprint", "9"),
    ("vocab_size", 301),
    ("start_token_id", 1),
    ("end_token_id", 3),
    ("selection", Selection(kind="topk", k=5)),
    ("selection", Selection(kind="adaptive", k=4, mass=0.9)),
    ("curve", (0.5, 0.25)),
    ("tables", "9"),
    ("attention", None),
    ("attention", AttentionSpec(layers=(0, 2), top_m=3)),
    ("corpus_fingerprint", "9"),
    ("engine", "vllm 9"),
    ("dtype", "bfloat16"),
]


def test_every_field_of_the_contract_is_among_the_changes_tried() -> None:
    assert {name for name, _ in CHANGES} == {field.name for field in dataclasses.fields(Contract)} - {"format_version"}


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_W6_resuming_under_another_contract_is_refused_naming_field_and_values(
    tmp_path: Path, contract: Contract, infos: list[ShardInfo], name: str, value: Any
) -> None:
    other = dataclasses.replace(contract, **{name: value})
    for resume in (lambda: begin(tmp_path, other), lambda: seal(tmp_path, other, infos)):
        with pytest.raises(ContractMismatch) as error:
            resume()
        assert f"{name} is {getattr(contract, name)!r} there, {value!r} here" in str(error.value)
        assert error.value.hint
    begin(tmp_path, contract)
    assert read_contract(tmp_path) == contract


def test_W6_a_shard_of_another_contract_in_the_folder_is_not_taken_for_ours(
    tmp_path: Path, contract: Contract, records: list[Record], infos: list[ShardInfo]
) -> None:
    other = dataclasses.replace(contract, engine="another engine")
    with pytest.raises(ContractMismatch, match="engine"):
        write_shard(tmp_path, "train-00000", "train", other, records[:2])


def test_a_set_that_lacks_a_shard_is_not_sealed(tmp_path: Path, contract: Contract, infos: list[ShardInfo]) -> None:
    (tmp_path / infos[0].name).unlink()
    with pytest.raises(Incomplete):
        seal(tmp_path, contract, infos)
    assert not is_sealed(tmp_path)


def test_W3_a_set_that_holds_a_sample_twice_is_not_sealed(
    tmp_path: Path, contract: Contract, records: list[Record], infos: list[ShardInfo]
) -> None:
    twice = write_shard(tmp_path, "train-00001", "train", contract, records[:1])
    with pytest.raises(ValueError, match=r"'sample-0' is in train-00000\.arrow and again in train-00001\.arrow"):
        seal(tmp_path, contract, [*infos, twice])
    assert not is_sealed(tmp_path)


@pytest.mark.parametrize("name", [manifest.CONTRACT_NAME, manifest.MANIFEST_NAME])
def test_R1_any_flipped_bit_of_a_json_file_is_found(
    tmp_path: Path, contract: Contract, infos: list[ShardInfo], name: str
) -> None:
    seal(tmp_path, contract, infos)
    path = tmp_path / name
    data, read = path.read_bytes(), read_contract if name == manifest.CONTRACT_NAME else read_manifest
    for offset in range(len(data)):
        damaged = bytearray(data)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=name.replace(".", r"\.")):
            read(tmp_path)


@pytest.mark.parametrize("name", [manifest.CONTRACT_NAME, manifest.MANIFEST_NAME])
def test_R2_a_json_file_cut_at_any_length_is_truncated(
    tmp_path: Path, contract: Contract, infos: list[ShardInfo], name: str
) -> None:
    seal(tmp_path, contract, infos)
    path = tmp_path / name
    data, read = path.read_bytes(), read_contract if name == manifest.CONTRACT_NAME else read_manifest
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(Truncated):
            read(tmp_path)


def reseal(path: Path, change: Any) -> None:
    document = json.loads(path.read_bytes())
    del document["seal"]
    change(document)
    path.write_bytes(sealed(document))


def in_shard(**changes: object) -> Any:
    """Totals follow, so that nothing but the change itself is wrong."""

    def change(document: Any) -> None:
        document["shards"][0].update(changes)
        for name in ("records", "positions", "bytes"):
            document["totals"][name] = sum(shard[name] for shard in document["shards"])

    return change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (in_shard(split=["x"]), Corrupt),
        (in_shard(split=None), Corrupt),
        (in_shard(records=2.5), Corrupt),
        (in_shard(records=1.0), Corrupt),
        (in_shard(bytes=True), Corrupt),
        (in_shard(positions=0), Corrupt),
        (lambda document: document["columns"].update(bytes="7"), Corrupt),
        (lambda document: document["columns"].update(bytes=True), Corrupt),
        (lambda document: document["columns"].update(bytes=-1), Corrupt),
        (lambda document: document["shards"][0].update(name="../outside.arrow"), Corrupt),
        (lambda document: document["shards"][0].update(name="/etc/passwd"), Corrupt),
        (lambda document: document["teacher_files"].update({"../x": "0"}), Corrupt),
        (lambda document: document["shards"][0].update(records=7), Corrupt),
        (lambda document: document["shards"][0].update(records="7"), Corrupt),
        (lambda document: document["shards"][0].pop("sha256"), Corrupt),
        (lambda document: document.update(shards=3), Corrupt),
        (lambda document: document.pop("contract"), Corrupt),
        (lambda document: document.update(contract=[]), Corrupt),
        (lambda document: document["contract"].update(format_version=99), UnknownVersion),
    ],
)
def test_R5_a_senseless_manifest_under_a_valid_seal_is_refused(
    tmp_path: Path, contract: Contract, infos: list[ShardInfo], change: Any, error: type[ShardError]
) -> None:
    seal(tmp_path, contract, infos)
    reseal(tmp_path / manifest.MANIFEST_NAME, change)
    with pytest.raises(error):
        ShardSet(tmp_path)


@pytest.mark.parametrize("unit", ["", "../up", "a/b", ".hidden", "UPPER", "x" * 300])
def test_a_unit_whose_name_could_leave_the_folder_is_refused(
    tmp_path: Path, contract: Contract, records: list[Record], unit: str
) -> None:
    with pytest.raises(ValueError, match="no name for a file"):
        write_shard(tmp_path, unit, "train", contract, records)


def test_an_empty_folder_asks_for_stage_one(tmp_path: Path) -> None:
    with pytest.raises(Incomplete) as error:
        read_manifest(tmp_path)
    assert "run stage one" in error.value.hint
