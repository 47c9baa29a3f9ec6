"""The proof of quality: its arithmetic against a naive one, its ceiling against a cache that loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import quality, quality_shards, quality_teacher
from benchmarks.quality_shards import Kept, bytes_a_position, record_of, shard_set
from benchmarks.quality_statistics import gains
from benchmarks.quality_teacher import Response
from benchmarks.record import Runs
from benchmarks.teacher_logits import TOP_M
from shards.contract import Selection
from shards.record import AttentionSummary
from stages.distill.batches import assemble
from stages.distill.objective import DistillModule, Emphasis
from stages.student.model import build_student
from stages.student.shape import StudentShape
from stages.teacher_cache.signals import summarise_attention

VOCAB = 97
SHAPE = StudentShape(hidden_size=16, encoder_layers=1, decoder_layers=1, heads=2, intermediate_size=24)


def response(seed: int) -> Response:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 9))
    logits_NV = torch.from_numpy(2 * rng.normal(size=(count, VOCAB)))
    prompt_ids_P = rng.integers(2, VOCAB, 5).astype(np.int32)
    attention_NS = torch.rand(3 * count, len(prompt_ids_P) + 1, generator=torch.Generator().manual_seed(seed))
    names = ("positions_LNM", "weights_LNM", "sink_LN", "prompt_LN", "entropy_LN")
    parts = summarise_attention(attention_NS / attention_NS.sum(1, keepdim=True), len(prompt_ids_P), TOP_M)
    summary = {name: part.unflatten(0, (3, count)).numpy() for name, part in zip(names, parts, strict=True)}
    return Response(
        prompt_ids_P=prompt_ids_P,
        response_ids_R=rng.integers(2, VOCAB, count).astype(np.int32),
        attention=AttentionSummary(**summary),
        logprobs_NV=logits_NV.log_softmax(-1).half().numpy(),
    )


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Response]:
    """The benchmark over a vocabulary of VOCAB ids and nine responses."""
    found = [response(seed) for seed in range(9)]
    for module in (quality_shards, quality):
        monkeypatch.setattr(module, "VOCAB", VOCAB)
        monkeypatch.setattr(module, "responses", lambda _: found)
    return found


def gradients(objective: Callable[[torch.nn.Module], torch.Tensor]) -> tuple[float, torch.Tensor]:
    student = build_student(SHAPE, vocab_size=VOCAB, start_token_id=0, end_token_id=1, seed=3)
    loss = objective(student)
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in student.parameters() if weight.grad is not None])


def test_the_ceiling_is_the_house_s_own_loss_where_a_cache_keeps_all_ids_but_one(small: list[Response]):
    kept = Kept(selection=Selection(kind="topk", k=VOCAB - 1))
    batch = assemble([record_of(index, one, kept) for index, one in enumerate(small)], 0)
    settings = quality.objective("tail_bucket_kl")
    logprobs_NV = quality.whole(small)
    ceiling, ceiling_gradient = gradients(lambda student: quality.WholeTeacher(student).rows(batch, logprobs_NV).mean())
    cached, cached_gradient = gradients(
        lambda student: (
            DistillModule(student, settings, kept.contract())(
                batch, scale=1 / batch.positions, emphasis=Emphasis.at(settings, 0, 1)
            ).objective
        )
    )
    assert cached == pytest.approx(ceiling, rel=1e-5)
    torch.testing.assert_close(cached_gradient, ceiling_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", quality.SETTINGS)
def test_every_setting_teaches(
    name: str, small: list[Response], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "SHAPE", SHAPE)
    monkeypatch.setattr(quality, "head_components_VD", lambda: np.random.default_rng(0).normal(size=(VOCAB, 16)))
    monkeypatch.setattr(quality, "shard_set", lambda kept: shard_set(kept, tmp_path))
    setting = quality.SETTINGS[name]
    before = sum(quality.kl_sums(quality.fresh_student(5)))
    full = quality.whole if name == "Full" else None
    student, size = quality.train(setting, seed=5, full=full)
    again, _ = quality.train(setting, seed=5, full=full)
    assert size > 0
    assert sum(quality.kl_sums(student)) < before
    assert all(torch.equal(*pair) for pair in zip(student.parameters(), again.parameters(), strict=True))


def test_whole_distributions_that_were_kept_teach_what_the_live_teacher_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=VOCAB, num_key_value_heads=1, head_dim=12, initializer_range=0.5, **sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(4)
    teacher = object.__new__(quality_teacher.RestrictedTeacher)
    teacher.body, teacher.head_VD = Qwen3Model(config).eval(), torch.randn(VOCAB, 24)
    for module in (quality_shards, quality):
        monkeypatch.setattr(module, "VOCAB", VOCAB)
    monkeypatch.setattr(quality_teacher, "LAYERS", (0, 1, 2))
    monkeypatch.setattr(quality_teacher, "PROMPT", 5)
    monkeypatch.setattr(quality_teacher, "RESPONSE", 8)
    monkeypatch.setattr(quality_teacher, "HOME", tmp_path)
    kept = teacher.answer(torch.randint(2, VOCAB, (9, 5)), seed=1)
    np.save(tmp_path / "logprobs-000.npy", kept.pop("logprobs_BNV"))
    np.savez(tmp_path / "rest-000.npz", **kept)
    found = list(quality_teacher._batch(0))
    for one in found:
        torch.testing.assert_close(teacher.live(one), one.whole(), rtol=2e-3, atol=2e-3)  # fp16 lies between
    monkeypatch.setattr(quality_shards, "responses", lambda _: found)
    monkeypatch.setattr(quality, "responses", lambda _: found)
    monkeypatch.setattr(quality, "SHAPE", SHAPE)
    monkeypatch.setattr(quality, "head_components_VD", lambda: np.random.default_rng(0).normal(size=(VOCAB, 16)))
    monkeypatch.setattr(quality, "shard_set", lambda kept: shard_set(kept, tmp_path))
    before = sum(quality.kl_sums(quality.fresh_student(5)))
    cached, live = (
        sum(quality.kl_sums(quality.train(quality.SETTINGS["Full"], seed=5, full=full)[0]))
        for full in (quality.whole, lambda chosen: torch.cat([teacher.live(one) for one in chosen]))
    )
    assert live < before
    assert abs(cached - live) < 1e-3 * (before - live)


@pytest.mark.parametrize("kept", [quality.HYBRID, quality.SAMPLE_12, quality.TOP_12])
def test_a_set_holds_every_response_and_its_bytes_are_those_of_the_codec(
    kept: Kept, small: list[Response], tmp_path: Path
):
    shards = shard_set(kept, tmp_path)
    split = shards.split("train")
    for index, one in enumerate(small):
        made, read = record_of(index, one, kept), split[index]
        assert (read.response_ids_R == one.response_ids_R).all()
        assert [{*row} - {-1} for row in made.ids_NK.tolist()] == [{*row} - {-1} for row in read.ids_NK.tolist()]
    sizes = [len(cell) for info in shards.manifest.shards for cell in shards.open(info).batch["signal"].to_pylist()]
    positions = sum(len(one.response_ids_R) for one in small)
    assert bytes_a_position(shards) >= sum(sizes) / positions > 0


def test_draws_follow_the_teacher():
    selection = Selection(kind="hybrid", k=4, draws=4_000)
    one = response(5)
    record = record_of(0, one, Kept(selection=selection))
    p_NV = one.whole().exp()
    for n, (ids, draws) in enumerate(zip(record.ids_NK, record.draws_NK, strict=True)):
        tail_V = p_NV[n].clone()
        tail_V[ids[:4].tolist()] = 0
        assert record.log_tail_N[n] == pytest.approx(tail_V.sum().log().item(), abs=1e-4)
        shares_V = torch.zeros(VOCAB)
        shares_V[ids[draws > 0].tolist()] = torch.from_numpy(draws[draws > 0] / 4_000).float()
        assert (shares_V - tail_V / tail_V.sum()).abs().max() < 0.05


def naive(sums: dict[str, np.ndarray], positions: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """One resample, index by index."""
    seeds, records = next(iter(sums.values())).shape
    drawn_seeds, drawn_records = rng.integers(seeds, size=seeds), rng.integers(records, size=records)
    kl = {
        name: sum(table[s, r] for s in drawn_seeds for r in drawn_records)
        / (seeds * sum(positions[r] for r in drawn_records))
        for name, table in sums.items()
    }
    return {name: (kl["CE"] - value) / (kl["CE"] - kl["Full"]) for name, value in kl.items()}


def test_gain_and_interval_are_those_of_a_naive_bootstrap():
    rng = np.random.default_rng(0)
    positions = rng.integers(2, 9, 11).astype(float)
    level = {"CE": 1.0, "Full": 0.6, "x": 0.7}
    sums = {name: positions * (value + 0.1 * rng.normal(size=(3, 11))) for name, value in level.items()}
    found = gains(sums, positions)
    kl = {name: table.sum() / (3 * positions.sum()) for name, table in sums.items()}
    assert found["x"].value == pytest.approx((kl["CE"] - kl["x"]) / (kl["CE"] - kl["Full"]))
    assert (found["CE"].low, found["CE"].high) == (0, 0)
    assert (found["Full"].low, found["Full"].high) == (1, 1)
    resamples = [naive(sums, positions, rng)["x"] for _ in range(3_000)]
    low, high = np.quantile(resamples, (0.025, 0.975))
    assert (found["x"].low, found["x"].high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_settings_of_other_seeds_are_not_compared():
    with pytest.raises(ValueError, match="different seeds"):
        gains({"CE": np.ones((2, 4)), "Full": np.ones((3, 4))}, np.ones(4))


def test_a_run_that_was_cut_short_is_run_again_and_no_other(
    small: list[Response], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained: list[tuple[str, int]] = []
    runs = Runs(tmp_path / "quality.jsonl")

    def run(name: str, seed: int) -> dict[str, object]:
        trained.append((name, seed))
        level = {"CE": 1.0, "Full": 0.5}.get(name, 0.6)
        sums = [level * len(one.response_ids_R) for one in small]
        return {"setting": name, "seed": seed, "bytes": 50.0, "training_seconds": 1.0, "kl_sums": sums}

    written: list[list[quality.Row]] = []
    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "RUNS", runs)
    monkeypatch.setattr(quality, "SETTINGS", {name: quality.SETTINGS[name] for name in ("CE", "Full", quality.BASE)})
    monkeypatch.setattr(quality.quality_teacher, "main", lambda: None)
    monkeypatch.setattr(quality, "dev_positions", lambda: tuple(len(one.response_ids_R) for one in small))
    monkeypatch.setattr(quality, "write", lambda _, rows, **__: written.append(rows))
    for setting in ("set_flush_denormal", "set_num_threads"):
        monkeypatch.setattr(torch, setting, lambda _: True)  # they would outlive this test
    monkeypatch.setattr("sys.argv", ["quality", "--seeds", "2"])
    quality.main()
    assert len(trained) == len(runs.finished()) == 6
    runs.path.write_bytes(runs.path.read_bytes()[:-20])
    quality.main()
    assert trained[6:] == trained[5:6]
    assert len(runs.finished()) == 6
    assert all(json.loads(line)["bytes"] == 50 for line in runs.path.read_text().splitlines())
    gain = {row.case.removesuffix(", 50 B"): row.ours for row in written[1] if row.metric.startswith("gain")}
    assert gain == {"CE": 0, "Full": 100, quality.BASE: 80}
    assert [row.bound for row in written[1]] == [None, None, None, quality.GOAL]
