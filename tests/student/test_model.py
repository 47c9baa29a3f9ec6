"""What the student computes: padding, causality, the tied embedding, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.student.config import MiniCodformerConfig
from stages.student.model import IGNORED_LABEL, build_student
from stages.student.parameters import parameter_groups_by_depth
from stages.student.shape import StudentShape

PROMPT, RESPONSE, VOCAB = 11, 70, 97


@pytest.fixture
def batch(tokens) -> tuple[Tensor, Tensor]:
    return tokens(2, PROMPT, seed=1), tokens(2, RESPONSE, seed=2)


def pad(ids: Tensor, filler: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Ids with arbitrary tokens beside them, and the mask that tells which are which."""
    parts = [(filler, torch.zeros_like(filler)), (ids, torch.ones_like(ids))]
    if side == "right":
        parts.reverse()
    return torch.cat([ids for ids, _ in parts], 1), torch.cat([mask for _, mask in parts], 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_O5_padding_of_the_prompt_changes_nothing(student, batch, tokens, side):
    prompt, response = batch
    expected = student(prompt, torch.ones_like(prompt), response).logits
    padded, mask = pad(prompt, tokens(2, 5, seed=3), side)
    torch.testing.assert_close(student(padded, mask, response).logits, expected, rtol=1e-4, atol=1e-5)


def test_O5_a_gap_in_the_prompt_changes_nothing(make_student, batch, tokens):
    """Positions count tokens, not columns. (A primed state does see a gap: its convolution reaches over columns.)"""
    student = make_student()
    prompt, response = batch
    expected = student(prompt, torch.ones_like(prompt), response).logits
    gap = tokens(2, 5, seed=3)
    padded = torch.cat([prompt[:, :4], gap, prompt[:, 4:]], 1)
    mask = torch.ones_like(padded)
    mask[:, 4:9] = 0
    torch.testing.assert_close(student(padded, mask, response).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_O5_padding_of_the_response_changes_nothing(student, batch, tokens, side):
    prompt, response = batch
    expected = student(prompt, torch.ones_like(prompt), response).logits
    padded, mask = pad(response, tokens(2, 9, seed=3), side)
    logits = student(prompt, torch.ones_like(prompt), padded, mask).logits
    torch.testing.assert_close(logits[mask.bool()].view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_O5_a_padded_token_leaves_the_recurrent_state_as_it_is(make_student, batch, tokens):
    student = make_student()
    prompt, response = batch
    padded, mask = pad(response, tokens(2, 9, seed=3), "right")
    states = [
        student(prompt, None, ids, ids_mask, use_cache=True).past_key_values.self_attention_cache.layers[0]
        for ids, ids_mask in ((response, None), (padded, mask))
    ]
    torch.testing.assert_close(states[1].recurrent_states[0], states[0].recurrent_states[0], rtol=1e-5, atol=1e-6)


def test_O6_the_decoder_is_causal_and_the_encoder_is_not(student, batch):
    prompt, response = batch
    before = student(prompt, None, response)
    changed = response.clone()
    changed[:, 30] = (changed[:, 30] + 1) % VOCAB
    logits = student(prompt, None, changed).logits
    torch.testing.assert_close(logits[:, :30], before.logits[:, :30], rtol=0, atol=1e-6)
    assert (logits[:, 30:] - before.logits[:, 30:]).abs().amax((0, 2)).min() > 1e-6

    changed = prompt.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    encoded = student(changed, None, response).encoder_last_hidden_state
    assert (encoded - before.encoder_last_hidden_state)[:, :-1].abs().amax(-1).min() > 1e-5


def test_the_start_token_among_real_tokens_is_read_like_any_other(student, batch):
    """Start and padding share an id: only the mask may tell them apart."""
    prompt, response = batch
    prompt[:, 3], response[:, 5] = 0, 0
    before = student(prompt, torch.ones_like(prompt), response, torch.ones_like(response)).logits
    for ids, position in ((prompt, 3), (response, 5)):
        changed = ids.clone()
        changed[:, position] = 50
        inputs = [changed if part is ids else part for part in (prompt, response)]
        logits = student(inputs[0], torch.ones_like(prompt), inputs[1], torch.ones_like(response)).logits
        assert (logits - before).abs().max() > 1e-3


def test_hidden_times_output_weight_is_the_logits(student, batch):
    prompt, response = batch
    hidden = student.hidden(prompt, torch.ones_like(prompt), response)
    logits = student.output_hidden(hidden.decoder_BTD) @ student.output_weight().T
    torch.testing.assert_close(logits, student(prompt, None, response).logits)
    assert hidden.cross_attention is None


def test_logits_are_scaled_by_the_root_of_the_width(make_student, batch):
    student = make_student()
    hidden_BTD = student.hidden(batch[0], torch.ones_like(batch[0]), batch[1]).decoder_BTD
    expected = hidden_BTD @ student.get_input_embeddings().weight.T / 32**0.5
    torch.testing.assert_close(student(batch[0], None, batch[1]).logits, expected)


def test_cross_attention_is_the_head_mean_over_all_real_keys(student, batch, tokens):
    prompt, response = batch
    padded, mask = pad(prompt, tokens(2, 5, seed=3), "right")
    hidden = student.hidden(padded, mask, response, need_attention=True)
    full = student(padded, mask, response, output_attentions=True).cross_attentions
    assert len(hidden.cross_attention) == 2
    for mean_BTP, weights_BHTP in zip(hidden.cross_attention, full, strict=True):
        assert weights_BHTP.shape == (2, 2, RESPONSE, PROMPT + 5)
        torch.testing.assert_close(mean_BTP, weights_BHTP.mean(1))
        torch.testing.assert_close(mean_BTP.sum(-1), torch.ones(2, RESPONSE))
        assert mean_BTP[..., PROMPT:].eq(0).all()
        assert mean_BTP[..., 0].gt(0).all()
    without = student.hidden(padded, mask, response)
    torch.testing.assert_close(hidden.decoder_BTD, without.decoder_BTD, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_and_the_embedding_is_one_tensor(student, batch):
    prompt, response = batch
    student.train()
    student(prompt, labels=response).loss.backward()
    facts = list(parameter_groups_by_depth(student))
    assert all(fact.parameter.grad is not None and fact.parameter.grad.ne(0).any() for fact in facts)
    assert student.lm_head.weight is student.model.encoder.embed_tokens.weight
    assert sum(fact.parameter.shape[0] == VOCAB for fact in facts) == 1


def test_the_start_and_end_rows_of_the_embedding_learn(make_student, batch):
    """A padding row would have no gradient, and a response would never learn to start or to stop."""
    student = make_student()
    prompt, response = batch
    labels = response.masked_fill(response == 2, 7)
    labels[:, -1] = 2
    embedding = student.get_input_embeddings()
    embedded = embedding(torch.tensor([[0, 2]]))
    (gradient,) = torch.autograd.grad(embedded.sum(), embedding.weight)
    assert gradient[[0, 2]].ne(0).all()
    logits = student(prompt, None, response).logits
    logits.retain_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    assert logits.grad[:, -1, 2].lt(0).all()


def test_loss_shifts_the_labels_and_ignores_what_is_marked(make_student, batch):
    student = make_student()
    prompt, response = batch
    labels = response.clone()
    labels[1, 40:] = IGNORED_LABEL
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.long), response[:, :-1]], 1)
    logits = student(prompt, None, inputs).logits.log_softmax(-1)
    picked = logits.gather(-1, response.unsqueeze(-1)).squeeze(-1)
    expected = -(picked[0].sum() + picked[1, :40].sum()) / (RESPONSE + 40)
    torch.testing.assert_close(student(prompt, labels=labels).loss, expected)


def test_gradient_checkpointing_changes_no_gradient(make_student, batch):
    prompt, response = batch
    student = make_student().train()

    def gradients() -> list[Tensor]:
        student.zero_grad()
        hidden = student.hidden(prompt, torch.ones_like(prompt), response, need_attention=True)
        (hidden.decoder_BTD.square().sum() + sum(w.square().sum() for w in hidden.cross_attention)).backward()
        return [parameter.grad.clone() for name, parameter in student.named_parameters() if parameter.grad is not None]

    plain = gradients()
    student.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in student.model.decoder.layers)
    for checkpointed, expected in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(checkpointed, expected)


def test_parameters_are_read_only_inside_their_own_module(student, batch):
    """ZeRO stage 3 holds a module's own parameters only while its forward runs; elsewhere they are empty."""
    prompt, response = batch
    expected = student.hidden(prompt, torch.ones_like(prompt), response, need_attention=True)
    whole = {name: parameter.data for name, parameter in student.named_parameters(remove_duplicate=False)}

    def own(prefix: str, module: torch.nn.Module):
        return [(parameter, f"{prefix}.{name}") for name, parameter in module.named_parameters(recurse=False)]

    for prefix, module in student.named_modules():

        def gather(module, _, prefix=prefix):
            for parameter, name in own(prefix, module):
                parameter.data = whole[name]

        def release(module, _inputs, _output, prefix=prefix):
            for parameter, _name in own(prefix, module):
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module, None, None)
    with torch.no_grad():
        hidden = student.hidden(prompt, torch.ones_like(prompt), response, need_attention=True)
    assert torch.equal(hidden.decoder_BTD, expected.decoder_BTD)
    assert all(parameter.numel() == 0 for parameter in student.parameters())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)], ids=["bf16", "fp16"])
def test_half_precision_follows_fp32(make_student, batch, dtype, bound):
    student = make_student()
    prompt, response = batch
    exact = student(prompt, None, response).logits
    rough = student.to(dtype)(prompt, None, response).logits
    assert rough.dtype == dtype
    assert student.model.decoder.layers[0].mixer.command.polarity.dtype == torch.int8
    assert (rough.float() - exact).norm() / exact.norm() < bound


def test_build_student_is_a_function_of_its_seed(make_student):
    torch.manual_seed(1)
    first, random_after = make_student(seed=3).state_dict(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), random_after)
    again, other = make_student(seed=3).state_dict(), make_student(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(("start", "end"), [(2, 2), (97, 1), (0, -1)])
def test_build_student_refuses_tokens_that_cannot_work(start, end):
    with pytest.raises(ValueError, match="token"):
        build_student(StudentShape(), vocab_size=97, start_token_id=start, end_token_id=end, seed=0)


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": 30, "num_attention_heads": 4}, {"ode_unfolds": -1}, {"ncp_sparsity": 0.05}]
)
def test_config_refuses_shapes_that_cannot_be_built(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MiniCodformerConfig(**wrong)


@pytest.mark.parametrize("columns", [32, 50, 20])
def test_embedding_from_principal_components(make_student, columns):
    student = make_student()
    before = student.output_weight().detach().clone()
    components = np.random.default_rng(0).normal(size=(VOCAB, columns)).astype(np.float16) * 9
    student.init_embedding_from_pca(components)
    after, used = student.output_weight().detach(), min(columns, 32)
    torch.testing.assert_close(after[:, :used].square().mean().sqrt(), torch.tensor(student.config.embedding_std))
    cosine = torch.nn.functional.cosine_similarity(
        after[:, :used].flatten(), torch.from_numpy(components).float()[:, :used].flatten(), dim=0
    )
    assert cosine > 0.9999
    assert torch.equal(after[:, used:], before[:, used:])
    assert student.lm_head.weight is student.model.encoder.embed_tokens.weight


def test_embedding_from_another_vocabulary_is_refused(make_student):
    with pytest.raises(ValueError, match="vocabulary of 97"):
        make_student().init_embedding_from_pca(np.ones((96, 32), np.float32))


def test_every_parameter_has_its_place_and_kind(student):
    facts = {fact.name: fact for fact in parameter_groups_by_depth(student)}
    assert set(facts) == {name for name, _ in student.named_parameters()}
    assert {fact.depth for fact in facts.values()} == {0, 1, 2, 3}
    embedding = facts.pop("model.encoder.embed_tokens.weight")
    assert (embedding.kind, embedding.depth) == ("embedding", 0)
    assert facts["model.encoder.layers.1.mlp.down.weight"].depth == facts["model.encoder.norm.weight"].depth == 1
    assert facts["model.decoder.layers.0.mixer.gate.weight"].depth == 2
    assert facts["model.decoder.norm.weight"].depth == 3
    liquid = {name.rpartition(".")[-1] for name, fact in facts.items() if fact.kind == "liquid"}
    assert liquid == {"rho", "conductance_bias"}
    for fact in facts.values():
        assert fact.kind in ("liquid", "matrix" if fact.parameter.ndim > 1 else "norm_or_bias")


def test_hidden_states_are_the_embeddings_and_every_layer(student, batch):
    prompt, response = batch
    output = student(prompt, None, response, output_hidden_states=True, output_attentions=True)
    assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == 3
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert torch.equal(output.decoder_hidden_states[0], student.get_input_embeddings()(response))
    logits = student.lm_head(student.output_hidden(output.decoder_hidden_states[-1]))
    torch.testing.assert_close(logits, output.logits)
    assert [weights.shape for weights in output.encoder_attentions] == [(2, 2, PROMPT, PROMPT)] * 2
