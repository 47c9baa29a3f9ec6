"""The decode batch against transformers' own `generate`, an implementation that shares none of its code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from stages.inference.batch import DecodeBatch
from stages.inference.few_rows import FewRowsLinear, FewRowsNorm, FewRowsRecurrence, expect_few_rows
from stages.inference.generate import Student
from stages.inference.prompts import PromptCache
from stages.inference.sampling import candidates
from stages.inference.settings import Sampling
from stages.inference.stepping import advance, encode, fresh
from stages.student.config import MiniCodformerConfig
from stages.student.layers import RMSNorm
from stages.student.model import build_student
from stages.student.recurrences import MatrixRecurrence
from stages.student.shape import StudentShape


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Student:
    return Student.load(student_folder, device="cpu")


def by_transformers(student: Student, prompt: list[int], new_tokens: int) -> list[int]:
    config = student.model.config
    wanted = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    ids = student.model.generate(input_ids=torch.tensor([prompt]), generation_config=wanted)[0, 1:].tolist()
    return [token for token in ids if token != config.eos_token_id]


@pytest.fixture(scope="module")
def prompts(student: Student, answers: dict[str, str]) -> list[list[int]]:
    """Ragged: what the student has learnt, and noise of 1 to 40 tokens that it has not."""
    generator = torch.Generator().manual_seed(5)
    noise = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (1, 2, 7, 19, 40)]
    return [student.prompt_ids(text) for text in answers] + noise


def test_greedy_answers_are_those_of_transformers(student: Student, prompts: list[list[int]]) -> None:
    given = student.generate_from_ids(prompts, max_new_tokens=24)
    assert [list(g.token_ids) for g in given] == [by_transformers(student, prompt, 24) for prompt in prompts]


def test_joining_and_leaving_at_any_token_changes_no_answer(student: Student, prompts: list[list[int]]) -> None:
    alone = [list(student.generate_from_ids([prompt], max_new_tokens=20)[0].token_ids) for prompt in prompts]
    answers = [student.answer(prompt, Sampling(max_new_tokens=20)) for prompt in prompts]
    left = [student.answer(prompt, Sampling(max_new_tokens=20)) for prompt in prompts]
    batch = DecodeBatch(student.model, PromptCache(student.model))
    for answer, leaver in zip(answers, left, strict=True):
        batch.join([leaver, answer])
        batch.step()
        batch.step()
        batch.drop([leaver])
    while len(batch):
        batch.step()
    assert [answer.token_ids for answer in answers] == alone
    assert all(len(leaver.token_ids) == 2 or leaver.finish_reason for leaver in left)


def test_where_nobody_joins_no_state_is_copied(student: Student) -> None:
    batch = DecodeBatch(student.model, PromptCache(student.model))
    batch.join([student.answer([5], Sampling())])
    state = batch._state
    batch.join([])
    assert batch._state is state


def test_a_finished_answer_leaves_the_batch_and_is_not_written_on(student: Student, answers: dict[str, str]) -> None:
    batch = DecodeBatch(student.model, PromptCache(student.model))
    short, long = (student.answer(student.prompt_ids("count"), Sampling(max_new_tokens=n)) for n in (2, 9))
    batch.join([short, long])
    sizes = []
    while len(batch):
        sizes.append(len(batch))
        batch.step()
    assert sizes[:2] == [2, 2]
    assert set(sizes[2:]) == {1}
    assert short.finish_reason == "length"


def test_the_prompt_cache_keeps_the_last_used_within_its_bytes(student: Student) -> None:
    prompts = [(5,) * 8, (6,) * 8, (7,) * 8]
    (size,) = {encoded.bytes for encoded in PromptCache(student.model).encoded(prompts)}
    cache = PromptCache(student.model, capacity=2 * size)
    first, second, again = cache.encoded([prompts[0], prompts[1], prompts[0]])
    assert again is first
    assert (cache.hits, cache.misses, cache.bytes) == (1, 2, 2 * size)
    assert cache.encoded([prompts[2]])[0] is not second
    assert [prompt in cache for prompt in prompts] == [True, False, True], "the least recently used one went"
    tiny = PromptCache(student.model, capacity=size - 1)
    assert len(tiny.encoded(prompts)) == 3
    assert tiny.bytes == 0


def test_log_probabilities_are_the_models_own(student: Student, answers: dict[str, str]) -> None:
    prompt = student.prompt_ids("count")
    for temperature in (0.0, 3.0):
        (given,) = student.generate_from_ids([prompt], temperature=temperature, logprobs=4, max_new_tokens=12)
        assert given.logprobs is not None
        assert [token.token_id for token in given.logprobs] == list(given.token_ids)
        start = [student.model.config.decoder_start_token_id, *given.token_ids]
        with torch.no_grad():
            logits = student.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start])).logits[0]
        for token, expected in zip(given.logprobs, logits.log_softmax(-1), strict=False):
            assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
            best = expected.topk(4)
            assert [t.logprob for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert student.generate("count")[0].logprobs is None


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    chosen, top = candidates(torch.tensor([0.0, 1.0]), 0, 20)
    assert chosen.logprob == pytest.approx(-1.3133, abs=1e-3)
    assert [candidate.token_id for candidate in top] == [1, 0]


@pytest.mark.parametrize("changes", [{"recurrence": "vector"}, {"recurrence": "delta", "prime_state": True}])
def test_every_recurrence_streams_what_transformers_computes(changes: dict[str, Any]) -> None:
    shape = StudentShape(hidden_size=32, heads=2, encoder_layers=1, decoder_layers=2, intermediate_size=48, **changes)
    model = build_student(shape, vocab_size=97, start_token_id=0, end_token_id=2, seed=6).eval()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(97, (length,), generator=generator) for length in (3, 11)]
    responses = torch.randint(97, (2, 9), generator=generator)
    state = fresh(model, encode(model, [prompt.tolist() for prompt in prompts]))
    with torch.inference_mode():
        streamed = torch.stack([advance(model, column.tolist(), state) for column in responses.T], 1)
        for row, prompt in enumerate(prompts):
            expected = model(prompt[None], decoder_input_ids=responses[row : row + 1]).logits[0]
            torch.testing.assert_close(streamed[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wiring", ["ncp", "dense"])
def test_a_model_made_for_few_rows_computes_what_it_did(wiring: str) -> None:
    shape = StudentShape(
        hidden_size=32, heads=2, encoder_layers=1, decoder_layers=2, intermediate_size=48, wiring=wiring
    )
    model = build_student(shape, vocab_size=97, start_token_id=0, end_token_id=2, seed=6).eval()
    ids = torch.arange(3, 15).view(2, 6)
    with torch.inference_mode():
        expected = model(ids, decoder_input_ids=ids).logits
        expect_few_rows(model)
        torch.testing.assert_close(model(ids, decoder_input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    kinds = {type(module).__name__ for layer in model.model.decoder.layers for module in layer.modules()}
    assert kinds >= {"FewRowsLinear", "FewRowsNorm", "FewRowsRecurrence"}
    assert "RMSNorm" not in kinds


@pytest.mark.parametrize("unfolds", [6, 1, 0])
def test_a_loop_moves_the_matrices_as_the_scan_does(unfolds: int) -> None:
    """Against `forward` over the whole sequence: what is read at every token, and the state in the end."""
    config = MiniCodformerConfig(vocab_size=9, hidden_size=32, num_attention_heads=2, ode_unfolds=unfolds)
    plain = MatrixRecurrence(config)
    plain.initialize()
    generator = torch.Generator().manual_seed(unfolds)
    command = 3 * torch.randn(3, 40, 4 * 32, generator=generator)
    state = torch.randn(3, *plain.state_shape, generator=generator)
    with torch.inference_mode():
        expected, last = plain(command, None, state)
        fast = FewRowsRecurrence(plain, config)
        read = torch.stack([fast.step(command[:, step].contiguous(), state) for step in range(40)], 1)
    torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 24), (5, 24), (3, 2, 1, 24)])
def test_the_norm_for_few_rows_is_the_plain_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = RMSNorm(24, 0.3)
    torch.nn.init.normal_(plain.weight, generator=generator)
    hidden = torch.randn(shape, generator=generator)
    torch.testing.assert_close(FewRowsNorm(plain)(hidden), plain(hidden).detach())
    scattered = torch.randn(24, *shape[:-1], generator=generator).movedim(0, -1)
    torch.testing.assert_close(FewRowsNorm(plain)(scattered), plain(scattered).detach())


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 33])
def test_the_layer_for_few_rows_is_the_plain_one(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.nn.Linear(24, 301, bias=False)
    hidden = torch.randn(rows, 1, 24, generator=generator)
    logits = FewRowsLinear(plain.weight)(hidden)
    torch.testing.assert_close(logits, plain(hidden), rtol=1e-5, atol=1e-5)
    assert logits.is_contiguous()
