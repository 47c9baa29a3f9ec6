"""What inspect-shard shows is what was written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from shards.contract import Contract
from shards.errors import Corrupt, Incomplete, InvalidRequest
from shards.inspect import Inspection, Request, inspect
from shards.manifest import begin, publish_teacher_files, seal
from shards.record import Record
from shards.sample_view import Decode, SampleView
from shards.writer import build_shard, write_shard


def numbers(_: Path) -> Decode:
    return lambda ids: " ".join(map(str, ids))


def viewed(facts: Inspection) -> SampleView:
    assert facts.sample is not None
    return facts.sample


def require_sums(facts: Inspection, size: int, positions: int) -> None:
    parts = dict(facts.bytes_per_position)
    assert parts.pop("all") == pytest.approx(size / positions)
    assert sum(parts.values()) == pytest.approx(size / positions)
    assert {"signal", "attention", "tokens", "columns"} <= set(parts)
    assert sum(facts.bytes_by_column.values()) == size


def test_a_shard(folder: Path, contract: Contract, written: list[Record]) -> None:
    path = folder / "train-0.arrow"
    facts = inspect(path)
    positions = sum(record.positions for record in written[:3])
    assert next(field.name for field in dataclasses.fields(facts)) == "contract"
    assert (facts.contract, facts.where, facts.shards) == (contract, str(path), 1)
    assert (facts.records, facts.positions, facts.entries) == (3, positions, positions * contract.selection.k)
    assert facts.bytes == path.stat().st_size
    require_sums(facts, facts.bytes, positions)
    assert facts.bytes_by_column["prompt_ids"] == sum(4 * len(record.prompt_ids_P) for record in written[:3]) + 12
    assert facts.checksum.intact
    assert facts.sample is None
    entropies = sorted(float(record.entropy_N.mean()) for record in written[:3])
    found = facts.entropy
    assert (found.minimum, found.median, found.maximum) == pytest.approx(entropies)


def test_a_set(folder: Path, contract: Contract, written: list[Record]) -> None:
    facts = inspect(folder)
    assert (facts.contract, facts.shards, facts.records) == (contract, 4, 8)
    assert facts.bytes == sum(path.stat().st_size for path in folder.glob("*.arrow"))
    assert facts.looked_into == (str(folder / "dev-0.arrow"), str(folder / "train-0.arrow"))
    looked = sum(Path(path).stat().st_size for path in facts.looked_into)
    require_sums(facts, looked, 5 + sum(record.positions for record in written[:3]))
    assert facts.coverage.minimum == pytest.approx(
        min(inspect(path).coverage.minimum for path in folder.glob("*.arrow"))
    )


def test_what_was_measured_against_the_teacher_is_shown(
    tmp_path: Path, contract: Contract, written: list[Record]
) -> None:
    measured = {"positions": 512.0, "KL(full || decoded), the rest as one, mean": 1.6e-4}
    begin(tmp_path, contract)
    folder = publish_teacher_files(tmp_path, {"fidelity.json": json.dumps(measured).encode()})
    seal(tmp_path, contract, [write_shard(tmp_path, "train-0", "train", contract, written)], teacher_folder=folder)
    assert inspect(tmp_path).fidelity == measured
    assert inspect(tmp_path / "train-0.arrow").fidelity == {}
    (tmp_path / "teacher" / "fidelity.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"fidelity\.json differs"):
        inspect(tmp_path)


def test_a_sample_in_words(folder: Path, contract: Contract, written: list[Record]) -> None:
    """Sample 5 of the set is the second of the second training shard: dev-0 comes first, with one."""
    truth = written[4]
    shown = viewed(inspect(folder, show=Request(sample=5, positions=[1], decoder=numbers)))
    assert (shown.sample_id, shown.row) == (truth.sample_id, 1)
    assert shown.prompt == " ".join(map(str, truth.prompt_ids_P))
    assert shown.response == " ".join(map(str, truth.response_ids_R))
    (position,) = shown.positions
    assert position.token.id == truth.response_ids_R[1]
    assert position.token.text == str(position.token.id)
    assert position.entropy == pytest.approx(float(truth.entropy_N[1]), abs=1 / 2048)
    assert position.coverage == pytest.approx(float(truth.coverage_N[1]), abs=0.01)
    assert truth.logprobs_NK is not None
    for alternative, logprob in zip(position.alternatives, truth.logprobs_NK[1], strict=False):
        assert alternative.probability == pytest.approx(float(np.exp(logprob)), abs=0.02)
        assert alternative.draws is None
    assert {alternative.token.id for alternative in position.alternatives} == set(truth.ids_NK[1].tolist())

    assert truth.attention is not None
    assert contract.attention is not None
    assert tuple(layer.layer for layer in position.attended) == contract.attention.layers
    for index, layer in enumerate(position.attended):
        assert layer.sink == pytest.approx(float(truth.attention.sink_LN[index, 1]), abs=1e-4)
        assert {key.position for key in layer.keys} == set(truth.attention.positions_LNM[index, 1].tolist()) - {-1}
        assert all(key.token.id == truth.prompt_ids_P[key.position] for key in layer.keys)


def test_the_least_certain_positions_are_shown_unless_others_are_asked_for(
    tmp_path: Path, contract: Contract, written: list[Record]
) -> None:
    entropy_N = np.array([0.1, 3.0, 0.2, 2.0, 1.0] * 4, np.float32)
    base = written[3]  # five positions
    many = dataclasses.replace(
        base,
        **{
            name: np.tile(getattr(base, name), (4, *[1] * (getattr(base, name).ndim - 1)))
            for name in ("response_ids_R", "ids_NK", "logprobs_NK", "log_tail_N")
        },
        entropy_N=entropy_N,
        attention=None,
    )
    path = tmp_path / "shard.arrow"
    path.write_bytes(build_shard("u", "train", dataclasses.replace(contract, attention=None), [many]))
    shown = [position.position for position in viewed(inspect(path, show=Request(sample=0))).positions]
    assert shown == [1, 3, 6, 8, 11, 13, 16, 18]
    with pytest.raises(InvalidRequest, match="positions 0 to 19 of this sample, not 20"):
        inspect(path, show=Request(sample=0, positions=[3, 20]))


def test_a_shard_that_travels_alone_shows_ids(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = (folder / "train-0.arrow").rename(tmp_path / "alone" / "x.arrow")
    shown = viewed(inspect(alone, show=Request(sample=0, decoder=numbers)))
    assert shown.prompt is None
    assert shown.positions[0].token.text is None


def test_damage_is_reported_not_raised(folder: Path, contract: Contract, written: list[Record]) -> None:
    path = folder / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(written[4].prompt_ids_P.tobytes())] ^= 1
    path.write_bytes(data)
    facts = inspect(path)
    assert not facts.checksum.intact
    assert "record 1" in facts.checksum.damage[str(path)]


def test_what_is_not_there_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="samples 0 to 2, not 3"):
        inspect(folder / "train-1.arrow", show=Request(sample=3))
    with pytest.raises(InvalidRequest, match="samples 0 to 7, not 8"):
        inspect(folder, show=Request(sample=8))
    with pytest.raises(Incomplete):
        inspect(tmp_path / "nowhere")
