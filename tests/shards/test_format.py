"""FORMAT.md says what the code does: its worked example, its columns, its limits and its bounds."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from shards import attention_planes, contract, schema, topk_planes
from shards.byte_planes import unpack
from shards.codec import codec_for
from shards.contract import AttentionSpec, Contract, Selection
from shards.planes import levels
from shards.planes.tables import KINDS, MAX_BYTES, MAX_CLASSES, fingerprint
from shards.record import AttentionSummary, Record
from shards.validation import require_valid
from tests.shards.whole import contract_of

FORMAT = (Path(schema.__file__).parent / "FORMAT.md").read_text()


EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", FORMAT, re.DOTALL)]
"""Of "topk-planes/1" and of "planes/3"."""


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return dict(EXAMPLES[0])


@pytest.fixture(scope="module")
def worked(example: dict[str, Any], contract: Contract) -> tuple[Contract, Record]:
    def floats(name: str) -> np.ndarray:
        return np.array(example[name], np.float32)

    contract = dataclasses.replace(contract, vocab_size=1000, attention=AttentionSpec(layers=(0,), top_m=2))
    return contract, Record(
        sample_id="worked",
        prompt_ids_P=np.arange(5, dtype=np.int32),
        response_ids_R=np.array([7, 2], np.int32),
        first_position=0,
        ids_NK=np.array(example["topk_ids"], np.int32),
        logprobs_NK=np.log(floats("probabilities")),
        log_tail_N=np.log(floats("tail")),
        entropy_N=floats("entropy"),
        attention=AttentionSummary(
            positions_LNM=np.array(example["keys"], np.int32),
            weights_LNM=floats("weights"),
            sink_LN=floats("sink"),
            prompt_LN=floats("prompt"),
            entropy_LN=floats("attention_entropy"),
        ),
    )


def test_the_worked_signal_has_the_stated_bytes_and_values(
    example: dict[str, Any], worked: tuple[Contract, Record]
) -> None:
    given, record = worked
    codec = codec_for(given, None)
    (cell,) = codec.encode_signals([record])
    assert [stream.tobytes().hex(" ") for stream in unpack(cell, [8, 8, 8, 8])] == example["signal_streams"]
    decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=8)
    assert decoded.ids_NK.tolist() == example["decoded_ids"]
    np.testing.assert_array_equal(decoded.logprobs_NK, np.array(example["decoded_logprobs"], np.float32))
    np.testing.assert_array_equal(decoded.log_tail_N, np.array(example["decoded_log_tail"], np.float32))


def test_the_worked_attention_has_the_stated_bytes_and_values(
    example: dict[str, Any], worked: tuple[Contract, Record]
) -> None:
    given, record = worked
    codec = codec_for(given, None)
    cell = codec.encode_attention(record)
    assert [stream.tobytes().hex(" ") for stream in unpack(cell, [4, 4, 12])] == example["attention_streams"]
    decoded = codec.decode_attention(cell, positions=2, prompt_length=5)
    assert decoded.positions_LNM.tolist() == example["keys"]
    np.testing.assert_array_equal(decoded.weights_LNM, np.array(example["decoded_weights"], np.float32))


def test_the_worked_example_of_planes_has_the_stated_bytes_and_values() -> None:
    example = EXAMPLES[1]
    expanded = bytes.fromhex(example["tables_expanded"]) + bytes(512 * sum(KINDS.values()))
    tables = zstandard.ZstdCompressor().compress(expanded)
    selection = Selection(kind="hybrid", k=2, draws=3)
    given = contract_of(selection, vocab_size=1000, curve=(0.5,), tables=fingerprint(tables))
    record = Record(
        sample_id="worked",
        prompt_ids_P=np.zeros(1, np.int32),
        response_ids_R=np.array(example["labels"], np.int32),
        first_position=0,
        ids_NK=np.array(example["ids"], np.int32),
        logprobs_NK=np.log(np.array(example["probabilities"], np.float32)),
        draws_NK=np.array(example["draws"], np.int32),
        log_tail_N=np.log(np.array(example["tail"], np.float32)),
        entropy_N=np.array(example["entropy"], np.float32),
        curve_NJ=np.array(example["curve"], np.float32),
    )
    require_valid(record, given)
    codec = codec_for(given, tables)
    (cell,) = codec.encode_signals([record])
    assert cell.hex(" ") == example["signal"]
    decoded = codec.decode_signal(cell, labels_N=record.labels_N, entries=4)
    assert decoded.ids_NK.tolist() == example["ids"]
    assert decoded.draws_NK is not None
    assert decoded.draws_NK.tolist() == example["draws"]
    for found, name in (
        (decoded.logprobs_NK, "logprobs"),
        (decoded.log_tail_N, "log_tail"),
        (decoded.entropy_N, "entropy"),
        (decoded.curve_NJ, "curve"),
    ):
        np.testing.assert_array_equal(found, np.array(example[f"decoded_{name}"], np.float32))


def test_the_numbers_of_planes_are_those_of_the_code() -> None:
    stated = re.search(r"Kinds, each with how many contexts it has, in order: (.*?)\.\n\n", FORMAT, re.DOTALL)
    assert stated is not None
    named = (words.split() for words in stated[1].replace("`", "").split(","))
    assert [(kind, int(contexts)) for kind, contexts in named] == list(KINDS.items())
    roots = [3 * 0.55 ** (18 - j) for j in range(18)] + [j - 15 for j in range(18, 208)] + list(range(194, 255, 2))
    np.testing.assert_allclose(levels.level_roots(254), np.array(roots) / 254, rtol=1e-12)
    assert f"({levels.LEAST_STEPS} to {levels.MOST_STEPS})" in FORMAT
    assert f"of classes (1 to {MAX_CLASSES})" in FORMAT
    assert "2^26" in FORMAT
    assert MAX_BYTES == 1 << 26


def test_the_table_of_columns_is_the_schema(contract: Contract) -> None:
    rows = re.findall(r"^\| (`.*?) \| (\w+)(?:<(\w+)>)? \|", FORMAT, re.MULTILINE)
    stated = {name: kind for names, kind, _ in rows for name in re.findall(r"`(\w+)`", names)}
    kinds = {"string": "utf8", "float": "float32", "list<item: int32 not null>": "list"}
    actual = {
        field.name: re.sub(r"\[.*", "", kinds.get(str(field.type), str(field.type)))
        for field in schema.schema_for(dataclasses.replace(contract, tables="0"))
    }
    assert stated == actual | {"checks": "fixed_size_binary"}
    assert list(stated) == list(actual)


def test_the_limits_and_the_fields_of_the_contract_are_those_of_the_code() -> None:
    assert "`vocab_size` (1 to 2^24)" in FORMAT
    assert contract.MAX_VOCABULARY == 1 << 24
    assert "`k` (1 to 4096" in FORMAT
    assert contract.MAX_KEPT == 4096
    assert "at most 1024 layers or keys" in FORMAT
    assert contract.MAX_LAYERS == contract.MAX_ATTENTION_KEYS == 1024
    assert "at most 2^24" in FORMAT
    assert schema.MAX_ENTRIES == 1 << 24
    section = FORMAT.split("## 2.")[1].split("## 3.")[0]
    named = re.findall(r"`(\w+)`", section)
    fields = [field.name for field in dataclasses.fields(Contract)]
    assert [name for name in dict.fromkeys(named) if name in fields] == fields


def test_the_stated_roots_are_the_levels() -> None:
    roots = [1 - j / 240 if j <= 237 else (3 / 240) * 0.55 ** (j - 237) for j in range(256)]
    np.testing.assert_allclose(topk_planes.level_roots(), roots, rtol=1e-12)
    assert attention_planes.SHARE_LEVELS == 63
    assert zstandard.ZSTD_VERSION >= (1, 4, 0)
