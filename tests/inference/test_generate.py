from __future__ import annotations

import json
import random
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.errors import StageError
from stages.inference import generate as generate_module
from stages.inference.generate import Student
from stages.inference.loading import load_model
from stages.inference.sampling import next_tokens
from stages.inference.settings import Sampling


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    return Student.load(student_folder, device="cpu")


def test_the_student_says_what_it_has_learnt_and_stops(student: Student, answers: dict[str, str]) -> None:
    given = student.generate(list(answers))
    assert [generation.text for generation in given] == list(answers.values())
    for generation in given:
        assert generation.finish_reason == "stop"
        assert student.decode(generation.token_ids) == generation.text
        assert generation.prompt_tokens > 0


def test_one_prompt_is_answered_as_it_is_among_others(student: Student, answers: dict[str, str]) -> None:
    for prompt, answer in answers.items():
        (generation,) = student.generate(prompt)
        assert generation.text == answer


def test_more_prompts_than_a_batch_are_answered_in_order(
    student: Student, answers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = student.generate([*answers] * 2, temperature=2.0, seed=3, max_new_tokens=8)
    monkeypatch.setattr(generate_module, "BATCH", 4)
    assert student.generate([*answers] * 2, temperature=2.0, seed=3, max_new_tokens=8) == whole
    assert student.generate([]) == []


def test_an_answer_is_cut_at_max_new_tokens(student: Student) -> None:
    (cut,) = student.generate("count", max_new_tokens=2)
    assert cut.finish_reason == "length"
    assert len(cut.token_ids) == 2
    assert "one two three four".startswith(cut.text)


def test_a_stop_string_ends_one_answer_and_not_its_neighbours(student: Student, answers: dict[str, str]) -> None:
    given = student.generate(list(answers), stop=["two", "答"])
    assert [generation.text for generation in given] == ["one ", "It is 42. ", "从前有座山。"]
    assert all(generation.finish_reason == "stop" for generation in given)
    assert student.generate("count", stop="three")[0].text == "one two "


@pytest.mark.parametrize("sampling", [{}, {"temperature": 5.0, "seed": 4, "top_p": 0.9}, {"stop": ["42"]}])
def test_streamed_pieces_join_to_the_answer(
    student: Student, answers: dict[str, str], sampling: dict[str, Any]
) -> None:
    for prompt in answers:
        pieces = list(student.stream(prompt, max_new_tokens=60, **sampling))
        (whole,) = student.generate(prompt, max_new_tokens=60, **sampling)
        assert "".join(pieces) == whole.text
        assert all(pieces)


def test_streaming_gives_whole_characters_as_they_come(student: Student, answers: dict[str, str]) -> None:
    pieces = list(student.stream("讲"))
    assert pieces == list(answers["讲"]), "each character is several tokens"


def test_a_stream_can_be_left_before_its_end(student: Student) -> None:
    stream = student.stream("count", temperature=50.0, max_new_tokens=100_000)
    assert len(list(islice(stream, 3))) == 3


def test_an_error_while_streaming_reaches_the_caller(student: Student, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(student.model, "output_hidden", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        list(student.stream("count"))


def test_a_seed_decides_what_is_drawn_whatever_stands_beside_it(student: Student, answers: dict[str, str]) -> None:
    settings: dict[str, Any] = {"temperature": 30.0, "max_new_tokens": 12}
    prompt, other = list(answers)[:2]
    (alone,) = student.generate(prompt, seed=7, **settings)
    assert student.generate([prompt, other], seed=7, **settings)[0] == alone
    assert student.generate([other, prompt], seed=6, **settings)[1] == alone
    assert student.generate(prompt, seed=8, **settings)[0] != alone


def test_after_the_last_seed_comes_the_first(student: Student) -> None:
    last, first = student.generate(["count", "count"], seed=2**63 - 1, temperature=30.0, max_new_tokens=12)
    assert first == student.generate("count", seed=0, temperature=30.0, max_new_tokens=12)[0] != last


def test_no_global_random_state_is_read_or_moved(student: Student) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    def draw() -> str:
        return student.generate("count", temperature=20.0, seed=1, max_new_tokens=12)[0].text

    torch.manual_seed(1)
    first, before = draw(), states()
    list(student.stream("count", temperature=20.0, max_new_tokens=4))
    draw()
    assert states() == before
    torch.manual_seed(2)
    assert draw() == first


def test_draws_follow_the_softmax_at_the_temperature_within_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    draws = 20_000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8)):
        sampling = Sampling(temperature=temperature, top_p=top_p)
        uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0)).tolist()
        drawn = torch.tensor(next_tokens(logits.expand(draws, -1), [sampling] * draws, uniforms))
        expected = (logits / temperature).softmax(-1)
        order = expected.argsort(descending=True)
        nucleus = order[(expected[order].cumsum(0) - expected[order]) < top_p]
        kept = torch.zeros(5).index_fill(0, nucleus, 1.0) * expected
        kept /= kept.sum()
        found = torch.bincount(drawn, minlength=5) / draws
        assert (found[kept == 0] == 0).all()
        error = (found - kept).abs() / (kept * (1 - kept) / draws).sqrt().clamp_min(1e-9)
        assert error[kept > 0].max() < 4.5, "further from the softmax than chance allows"


def test_the_tiniest_temperature_and_top_p_are_greedy(student: Student, answers: dict[str, str]) -> None:
    for temperature, top_p in ((1e-38, 1.0), (5e-324, 0.5), (5e-324, 5e-324), (50.0, 5e-324)):
        (generation,) = student.generate("count", temperature=temperature, top_p=top_p)
        assert generation.text == answers["count"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_values_that_mean_nothing_are_refused(student: Student, values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        student.generate("count", **values)
    with pytest.raises(ValueError, match=named):
        student.stream("count", **values)


@pytest.mark.parametrize("ids", [[], [-1], [10_000_000]])
def test_ids_that_are_no_prompt_are_refused(student: Student, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="prompt 1"):
        student.generate_from_ids([[3], ids])


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no model in .*absent") as caught:
        Student.load(tmp_path / "absent")
    assert "final_model" in caught.value.hint


def test_another_kind_of_model_is_no_student(smollm2: Path) -> None:
    with pytest.raises(StageError, match="'llama' model, not a student"):
        Student.load(smollm2)


@pytest.mark.parametrize("victim", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_folder_is_refused(student_folder: Path, tmp_path: Path, victim: str) -> None:
    copy = copy_of(student_folder, tmp_path)
    (copy / victim).write_bytes((copy / victim).read_bytes()[:200])
    with pytest.raises(StageError, match="cannot be read"):
        Student.load(copy)


def test_weights_of_another_precision_are_read_in_fp32(student_folder: Path, tmp_path: Path) -> None:
    copy = copy_of(student_folder, tmp_path)
    load_model(copy).to(torch.bfloat16).save_pretrained(copy)
    student = Student.load(copy, device="cpu")
    assert {weight.dtype for weight in student.model.parameters()} == {torch.float32}
    assert student.generate("count")[0].text


def test_missing_weights_are_named_and_not_made_up(student_folder: Path, tmp_path: Path) -> None:
    copy = copy_of(student_folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_encoder_layers": 2}))
    with pytest.raises(StageError, match=r"do not fit its config\.json: model\.encoder\.layers\.1") as refused:
        Student.load(copy)
    assert "move it away and run make distill" in refused.value.hint, "training takes a folder that is there for whole"


def test_a_foreign_tokenizer_is_refused(student_folder: Path, tmp_path: Path, smollm2: Path) -> None:
    copy = copy_of(student_folder, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(smollm2 / name, copy / name)
    with pytest.raises(StageError, match="the tokenizer has 49152 tokens"):
        Student.load(copy)
