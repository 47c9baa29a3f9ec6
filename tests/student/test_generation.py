"""Generation: what the caches carry is what a full pass computes (O4, O7)."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from stages.student.parameters import parameter_groups_by_depth

PROMPT = 11
STYLES = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "top_p": 0.9},
}


@pytest.fixture
def student(student):
    """A fresh student mostly repeats its last token, which shares the output's weights; louder layers drown that."""
    with torch.no_grad():
        for fact in parameter_groups_by_depth(student):
            if fact.kind == "matrix":
                fact.parameter.mul_(3)
    return student


@pytest.fixture
def prompts(tokens):
    """A batch of two, the second left-padded by four tokens of arbitrary ids."""
    ids = tokens(2, PROMPT, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(student, inputs, **options):
    torch.manual_seed(0)
    return student.generate(**inputs, **({"max_new_tokens": 24, "eos_token_id": None, "do_sample": False} | options))


@pytest.mark.parametrize("style", STYLES)
def test_O7_generation_with_cache_equals_without(student, prompts, style):
    cached = generate(student, prompts, use_cache=True, **STYLES[style])
    assert torch.equal(cached, generate(student, prompts, use_cache=False, **STYLES[style]))
    assert len(set(cached[0].tolist())) > 4, "a degenerate sequence would prove nothing"


@pytest.mark.parametrize("style", STYLES)
def test_O7_static_cache_equals_the_growing_one(student, prompts, style):
    growing = generate(student, prompts, **STYLES[style])
    assert torch.equal(generate(student, prompts, cache_implementation="static", **STYLES[style]), growing)


def test_O7_a_ragged_batch_answers_as_each_prompt_alone(student, prompts):
    together = generate(student, prompts)
    alone = generate(student, {"input_ids": prompts["input_ids"][1:, 4:]})
    assert torch.equal(together[1], alone[0])


def test_O7_ragged_response_prefixes_continue_as_each_alone(student, prompts, tokens):
    prefix = tokens(2, 6, seed=4)
    mask = torch.ones_like(prefix)
    mask[1, :2] = 0
    prefix[0, 0] = prefix[1, 2] = student.config.decoder_start_token_id
    together = generate(student, prompts, decoder_input_ids=prefix, decoder_attention_mask=mask)
    alone_prompt = {name: value[1:] for name, value in prompts.items()}
    alone = generate(student, alone_prompt, decoder_input_ids=prefix[1:, 2:])
    assert torch.equal(together[1, 2:], alone[0])


def test_O4_prefill_then_chunks_then_single_steps_equal_one_pass(student, prompts, tokens):
    response = tokens(2, 90, seed=2)
    full = student(**prompts, decoder_input_ids=response).logits
    encoded = BaseModelOutput(student.get_encoder()(**prompts).last_hidden_state)
    past, streamed = None, []
    for start, stop in [(0, 2), (2, 70), (70, 75), *((t, t + 1) for t in range(75, 90))]:
        output = student(
            encoder_outputs=encoded,
            attention_mask=prompts["attention_mask"],
            decoder_input_ids=response[:, start:stop],
            past_key_values=past,
            use_cache=True,
        )
        past = output.past_key_values
        streamed.append(output.logits)
    torch.testing.assert_close(torch.cat(streamed, 1), full, rtol=1e-4, atol=1e-5)


def test_cross_attention_keys_are_computed_once(make_student, prompts, tokens, monkeypatch):
    student = make_student()
    calls = []
    projection = student.model.decoder.layers[0].cross.key_value
    projection.register_forward_hook(lambda *_: calls.append(1))
    generate(student, prompts, max_new_tokens=6)
    assert len(calls) == 1


def test_generation_stops_at_the_end_token(make_student, prompts):
    student = make_student()
    free = generate(student, prompts)
    end = int(free[0, 5])
    stopped = generate(student, prompts, eos_token_id=end)
    length = (stopped[0] == end).nonzero()[0].item()
    assert torch.equal(stopped[0, : length + 1], free[0, : length + 1])
    assert stopped[0, length + 1 :].eq(student.config.pad_token_id).all()


def test_assisted_generation_is_refused(make_student, prompts):
    """A recurrent state cannot be taken back to an earlier token."""
    with pytest.raises(ValueError, match="stateful"):
        generate(make_student(), prompts, assistant_model=make_student())


def test_logits_to_keep_are_the_last(student, prompts, tokens):
    response = tokens(2, 20, seed=2)
    full = student(**prompts, decoder_input_ids=response).logits
    torch.testing.assert_close(student(**prompts, decoder_input_ids=response, logits_to_keep=3).logits, full[:, -3:])
