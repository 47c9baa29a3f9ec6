"""What is looked at before a teacher is loaded."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stages.checks import Check
from stages.corpus.sample import Sample
from stages.corpus.store import Corpus
from stages.errors import StageError
from stages.teacher_cache.preflight import Devices, preflight
from stages.teacher_cache.settings import CacheSettings, TeacherSettings

GIB = 1 << 30


@pytest.fixture
def look(smollm2: Path, tmp_path: Path) -> Callable[..., dict[str, Check]]:
    """The checks of a run with the real teacher, by name."""

    def look(
        corpus: Corpus, memory: int | None = 8 * GIB, *, gpus: bool = True, replicas: int = 2, **settings: object
    ) -> dict[str, Check]:
        teacher = TeacherSettings(dtype="bfloat16", **settings)
        devices = Devices(replicas=replicas, memory=memory, gpus=gpus)
        checks = preflight(
            corpus=corpus,
            teacher=teacher,
            cache=CacheSettings(records_per_shard=3),
            teacher_folder=smollm2,
            target=tmp_path / "shards",
            devices=devices,
        )
        return {check.name: check for check in checks}

    return look


def test_the_plan_and_its_needs_are_counted(
    recorded: ModuleType, smollm2: Path, tmp_path: Path, look: Callable[..., dict[str, Check]]
) -> None:
    corpus = recorded.make_corpus(smollm2)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-00001.arrow").touch()
    checks = look(corpus)
    assert all(check.ok for check in checks.values())
    samples = [*corpus.train, *corpus.dev]
    prompt, response = (sum(len(getattr(s, name)) for s in samples) for name in ("prompt_ids", "response_ids"))
    assert checks["plan"].fact == (
        f"4 shards of up to 3 records, 1 of them published; {prompt:,} prompt and {response:,} response tokens"
    )
    operations = 2 * 134_515_008 * (prompt + response)
    assert checks["work"].fact.startswith(f"{operations / 1e15:.3g} PFLOP")
    assert "weights 0.3," in checks["memory"].fact, "134.5 million parameters in two bytes"


@pytest.mark.parametrize(
    ("memory", "split", "fits"),
    [(8 * GIB, 1, True), (2 * GIB // 5, 1, False), (2 * GIB // 5, 3, True), (None, 1, True)],
)
def test_memory_is_what_one_device_holds(
    recorded: ModuleType,
    smollm2: Path,
    look: Callable[..., dict[str, Check]],
    memory: int | None,
    split: int,
    fits: bool,
) -> None:
    check = look(recorded.make_corpus(smollm2), memory, tensor_parallel=split, max_batched_tokens=256)["memory"]
    assert check.ok == fits
    assert fits or "tensor_parallel" in check.fact


@pytest.mark.parametrize(
    ("devices", "remedy"),
    [
        ({"gpus": True}, "raise teacher.tensor_parallel (TP=…)"),
        ({"gpus": False}, "have fewer copies (GPUS=1), or lower teacher.max_model_len"),
        ({"gpus": False, "replicas": 1}, "lower teacher.max_model_len"),
    ],
)
def test_where_memory_falls_short_what_is_said_to_help_does(
    recorded: ModuleType, smollm2: Path, look: Callable[..., dict[str, Check]], devices: dict[str, int], remedy: str
) -> None:
    check = look(recorded.make_corpus(smollm2), GIB // 5, **devices)["memory"]
    assert check.fact.endswith(f"; {remedy}")


def test_a_sample_beyond_the_context_and_an_id_beyond_the_vocabulary_are_seen(
    recorded: ModuleType, smollm2: Path, look: Callable[..., dict[str, Check]]
) -> None:
    corpus = recorded.make_corpus(smollm2)
    odd = Sample(sample_id="f" * 16, prompt_ids=np.full(90, 49_152, np.int32), response_ids=np.ones(11, np.int32))
    corpus = dataclasses.replace(corpus, dev=[*corpus.dev, odd])
    checks = look(corpus, max_model_len=99)
    assert {name for name, check in checks.items() if not check.ok} == {"vocabulary", "context"}
    assert "100 tokens" in checks["context"].fact
    assert "; raise teacher.max_model_len" in checks["context"].fact
    assert "; the tokenizer belongs to another model" in checks["vocabulary"].fact
    assert all(check.ok for check in look(recorded.make_corpus(smollm2), max_model_len=100).values())


def test_a_run_does_not_begin_with_what_it_could_not_end_with(
    recorded: ModuleType, recorded_teacher: Path, tmp_path: Path
) -> None:
    corpus = recorded.make_corpus(recorded_teacher)
    odd = Sample(sample_id="f" * 16, prompt_ids=np.full(1, 300, np.int32), response_ids=np.ones(1, np.int32))
    engines: list = []
    with pytest.raises(StageError, match="largest id is 300"):
        recorded.fill(
            tmp_path / "shards",
            recorded_teacher,
            corpus=dataclasses.replace(corpus, dev=[*corpus.dev, odd]),
            engines=engines,
        )
    assert not engines
    assert not (tmp_path / "shards").exists()


def test_what_no_record_or_contract_could_hold_is_seen(
    recorded: ModuleType, recorded_teacher: Path, tmp_path: Path
) -> None:
    corpus = recorded.make_corpus(recorded_teacher)
    long = Sample(sample_id="f" * 16, prompt_ids=np.ones(2, np.int32), response_ids=np.ones(6_000, np.int32))
    checks = {
        "record": {"corpus": dataclasses.replace(corpus, dev=[long])},
        "vocabulary": {"corpus": dataclasses.replace(corpus, start_token_id=300)},
        "kept ids": {"cache": CacheSettings(k=301)},
    }
    for name, odd in checks.items():
        asked = {"corpus": corpus, "cache": CacheSettings(k=300, attention_top_m=1_000)} | odd
        found = {
            check.name
            for check in preflight(
                teacher=TeacherSettings(max_model_len=10_000, dtype="float32"),
                teacher_folder=recorded_teacher,
                target=tmp_path / "shards",
                devices=Devices(replicas=1, memory=None, gpus=False),
                **asked,
            )
            if not check.ok
        }
        assert found == {name}


def test_a_teacher_whose_head_cannot_be_read_is_refused_before_it_is_loaded(
    recorded: ModuleType, recorded_teacher: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(recorded_teacher, tmp_path / "teacher"))
    save_file({"lm_head.qweight": torch.ones(2, 2)}, folder / "model.safetensors")
    engines: list = []
    with pytest.raises(StageError, match=r"no output head but lm_head\.qweight, which is packed"):
        recorded.fill(tmp_path / "shards", folder, engines=engines)
    assert not engines


def test_quantised_weights_take_what_their_files_take(
    recorded: ModuleType, recorded_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(recorded_teacher, tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    save_file({"lm_head.weight": torch.zeros(1 << 28, dtype=torch.int8)}, folder / "model.safetensors")
    facts = {}
    for name, quantised in (("plain", {}), ("fp8", {"quantization_config": {"quant_method": "fp8"}})):
        (folder / "config.json").write_text(json.dumps(config | quantised))
        checks = preflight(
            corpus=recorded.make_corpus(folder),
            teacher=TeacherSettings(dtype="float32"),
            cache=CacheSettings(),
            teacher_folder=folder,
            target=tmp_path / "shards",
            devices=Devices(replicas=1, memory=8 * GIB, gpus=False),
        )
        facts[name] = next(check.fact for check in checks if check.name == "memory")
    assert "weights 1.0," in facts["plain"]
    assert "weights 0.3," in facts["fp8"]
