"""O8: the finished model's folder serves where neither this project nor ncps is."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shards.manifest import begin, seal
from shards.reader import ShardSet
from shards.record import Record
from shards.writer import write_shard
from stages.distill.engine import Engine
from stages.distill.export import export_model, exported_facts
from stages.errors import StageError
from stages.student.model import MiniCodformerForConditionalGeneration, build_student
from stages.student.shape import StudentShape

TEXT = "t3 t4 t5 t9 t11"
REPORT = {
    "positions": 1234,
    "kl": 0.5,
    "cross_entropy": 1.25,
    "perplexity": 3.49,
    "top1_agreement": 0.625,
    "top5_agreement": 0.875,
}
RESULT = {
    "steps": 7,
    "positions": 4321,
    "precision": "fp32",
    "untrained": REPORT | {"kl": 2.75},
    "validation": REPORT,
}
ANSWER_ELSEWHERE = """
import json, sys
sys.modules.update(dict.fromkeys(("ncps", "stages", "shards", "pipeline")))
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
student = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
assert type(student).__module__.startswith("transformers_modules")
prompt = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
answer = student.generate(**prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
print(json.dumps([prompt["input_ids"][0].tolist(), answer]))
"""


@pytest.fixture
def sealed(tmp_path: Path, shards: Path, record: Callable[..., Record]) -> ShardSet:
    """One record, and a teacher whose tokenizer reads the word t<id> as that id."""
    folder, contract = tmp_path / "shards", ShardSet(shards).manifest.contract
    begin(folder, contract)
    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(contract.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "teacher")
    seal(folder, contract, [write_shard(folder, "train-000", "train", contract, [record(0, 0)])])
    return ShardSet(folder)


@pytest.fixture
def student(sealed: ShardSet, shape: StudentShape) -> MiniCodformerForConditionalGeneration:
    contract = sealed.manifest.contract
    return build_student(
        shape,
        vocab_size=contract.vocab_size,
        start_token_id=contract.start_token_id,
        end_token_id=contract.end_token_id,
        seed=3,
    ).eval()


def export(folder: Path, student: MiniCodformerForConditionalGeneration, sealed: ShardSet, **result: Any) -> None:
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    export_model(folder, student, weights, sealed, {"identity": {}, "result": RESULT | result})


def test_O8_the_exported_folder_answers_alike_without_this_project(student, sealed, tmp_path):
    folder = tmp_path / "final_model"
    export(folder, student, sealed)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    answer = subprocess.run(
        [sys.executable, "-I", "-c", ANSWER_ELSEWHERE, str(folder), TEXT],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    prompt = [3, 4, 5, 9, 11]
    expected = student.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert json.loads(answer.stdout.splitlines()[-1]) == [prompt, expected[0].tolist()]
    assert exported_facts(folder)["result"] == RESULT


@pytest.mark.parametrize("refusal", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_refuses_is_a_stage_error_and_leaves_no_model(student, sealed, tmp_path, monkeypatch, refusal):
    def refuse(*_: object, **__: object) -> None:
        raise refusal

    folder = tmp_path / "final_model"
    with monkeypatch.context() as full:
        full.setattr(student, "save_pretrained", refuse)
        with pytest.raises(StageError, match=re.escape(f"final_model could not be written: {refusal}")) as raised:
            export(folder, student, sealed)
    assert raised.value.hint == "make room, then run again: the last checkpoint holds its weights"
    assert not folder.exists()
    export(folder, student, sealed)
    assert exported_facts(folder)["result"] == RESULT


def test_a_run_that_was_only_not_exported_gathers_its_weights_and_no_more(
    undisturbed, train_here, tmp_path, monkeypatch
):
    saved = "checkpoints/step-00000009"
    shutil.copytree(undisturbed.run / saved, tmp_path / saved)
    monkeypatch.delattr(Engine, "state")
    exported = train_here(tmp_path)
    assert all(torch.equal(exported.weights[name], tensor) for name, tensor in undisturbed.weights.items())
