"""O8: what is saved is what is loaded, here and on a machine that has neither this project nor ncps."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForSeq2SeqLM

from stages.student import ltc

LOAD_ELSEWHERE = """
import json, sys
sys.modules.update(dict.fromkeys(("ncps", "stages", "shards", "pipeline")))
import torch
from transformers import AutoModelForSeq2SeqLM
student = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert type(student).__module__.startswith("transformers_modules")
ids = torch.arange(3, 14)[None]
print(json.dumps(student.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()))
"""


def test_O8_save_and_load_change_no_bit(student, tmp_path, monkeypatch):
    student.save_pretrained(tmp_path)

    def wired_again(*_):
        raise AssertionError("loading must not wire")

    monkeypatch.setattr(ltc, "build_wiring", wired_again)
    loaded, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.state_dict().keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.lm_head.weight is loaded.model.encoder.embed_tokens.weight
    ids = torch.arange(3, 14)[None]
    assert torch.equal(loaded(ids, decoder_input_ids=ids).logits, student(ids, decoder_input_ids=ids).logits)


def test_the_embedding_is_stored_once(student, tmp_path):
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        vocabulary_wide = [name for name in stored.keys() if 97 in stored.get_slice(name).get_shape()]  # noqa: SIM118
    assert vocabulary_wide == ["model.encoder.embed_tokens.weight"]


def test_the_base_model_loads_from_the_same_folder(make_student, tmp_path):
    student = make_student()
    student.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 14)[None]
    hidden = student.hidden(ids, torch.ones_like(ids), ids).decoder_BTD
    assert torch.equal(base(ids, decoder_input_ids=ids).last_hidden_state, hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_survives_and_polarity_stays_int8(make_student, tmp_path, dtype):
    make_student().to(dtype).save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.int8}


def test_O8_an_exported_checkpoint_answers_alike_without_this_project(make_student, tmp_path):
    student = make_student()
    folder = tmp_path / "exported"
    student.save_pretrained(folder)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    answer = subprocess.run(
        [sys.executable, "-c", LOAD_ELSEWHERE, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    ids = torch.arange(3, 14)[None]
    expected = student.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)[0].tolist()
    assert json.loads(answer.stdout.splitlines()[-1]) == expected
