"""Recipes: every key checked once, resolved recipes read back equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.choose import choose
from pipeline.errors import UsageError
from pipeline.recipe import SECTIONS, load, shipped


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_survive_being_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = load(name, ["corpus.source=rows.jsonl", "student.embedding_rank=128", "cache.attention_depths=[0.5]"])
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    again = load(str(tmp_path / "recipe.toml"))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()
    assert recipe.cache.attention_depths == (0.5,)


@given(rate=st.floats(1e-9, 1e3), source=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))))
def test_any_value_survives_the_toml_file(rate: float, source: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load("smollm2-demo")
    recipe = dataclasses.replace(
        base,
        corpus=dataclasses.replace(base.corpus, source=source),
        distill=dataclasses.replace(base.distill, learning_rate=rate),
    )
    path = tmp_path_factory.mktemp("recipe") / "smollm2-demo.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load(str(path)) == recipe


def test_the_fingerprint_sees_every_value() -> None:
    base = load("smollm2-demo")
    seen = {base.fingerprint()}
    for override in ("distill.seed=1", "cache.k=8", "student.heads=2", "objective.ce_weight=0.2", "teacher.revision=x"):
        seen.add(load("smollm2-demo", [override]).fingerprint())
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("distill.epoch=5", "distill.epoch"),
        ("distil.epochs=5", "[distil]"),
        ("distill.epochs=many", "distill.epochs"),
        ("distill.epochs=0", "distill.epochs"),
        ("distill.epochs=2.5", "distill.epochs"),
        ("distill.pca_init=1", "distill.pca_init"),
        ("cache.attention_depths=0.5", "cache.attention_depths"),
        ("distill.offload_parameters=true", ""),
        ("corpus.source=x\udcff", "corpus.source must be UTF-8 text"),
        ("generation.seed=-1", "generation.seed must be a whole number from 0 and below 2^63, not -1"),
        ("generation.seed=9223372036854775808", "generation.seed must be a whole number from 0 and below 2^63"),
        ("generation.checked=-1", "generation.checked must not be negative"),
        ("distill.clip=inf", "distill.clip must be finite, not inf"),
        ("distill.learning_rate=nan", "distill.learning_rate must be finite, not nan"),
        ("cache.attention_depths=[0.5, inf]", "cache.attention_depths must be finite, not inf"),
        (f"distill.learning_rate=1{'0' * 400}", "distill.learning_rate"),
        ("epochs=5", "epochs=5"),
        ("distill.epochs", "distill.epochs"),
    ],
)
def test_a_wrong_override_is_a_usage_error_that_names_the_key(override: str, named: str) -> None:
    overrides = [override, "distill.zero_stage=2"] if "offload" in override else [override]
    with pytest.raises(UsageError) as caught:
        load("smollm2-demo", overrides)
    assert named in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "named"), [("corpus = 3", "corpus must be a section"), ("corpse = 3", r"unknown section \[corpse\]")]
)
def test_what_is_no_section_is_refused_also_where_a_key_of_it_is_set(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=named):
        load(str(tmp_path / "mine.toml"), ["corpus.source=rows.jsonl"])


@pytest.mark.parametrize(
    "override",
    [
        "distill.epochs=0",
        "distill.epoch=5",
        "distill.epochs=many",
        "teacher.tensor_parallel=0",
        'respond.by="nonsense"',
    ],
)
def test_what_was_set_wrong_is_not_laid_on_the_file(override: str, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=f"^--set: .*{key}") as caught:
        load("smollm2-demo", [override])
    assert "smollm2-demo" not in caught.value.hint
    (tmp_path / "mine.toml").write_text("[distill]\nepochs = 0")
    with pytest.raises(UsageError, match=r"mine\.toml: distill.epochs"):
        load(str(tmp_path / "mine.toml"), [override])


def test_unknown_keys_get_the_nearest_known_one() -> None:
    with pytest.raises(UsageError) as caught:
        load("smollm2-demo", ["distill.lerning_rate=1.0"])
    assert "learning_rate" in caught.value.hint


def test_a_missing_or_broken_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe 'nowhere'"):
        load("nowhere")
    broken = tmp_path / "broken.toml"
    broken.write_text("[distill\nepochs = 3")
    with pytest.raises(UsageError, match=r"broken\.toml"):
        load(str(broken))
    broken.write_bytes(b"name = '\xff'")
    with pytest.raises(UsageError, match=r"broken\.toml"):
        load(str(broken))


def test_a_recipe_that_names_itself_out_of_runs_needs_another_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "../../elsewhere"')
    with pytest.raises(UsageError, match=r"'\.\./\.\./elsewhere' cannot name a run") as caught:
        choose(str(path), name=None, data=None, overrides=())
    assert "--name" in caught.value.hint
    assert choose(str(path), name="mine", data=None, overrides=()).run.path == Path("runs/mine")


def test_every_section_of_a_recipe_can_be_set() -> None:
    assert set(SECTIONS) == {
        "corpus",
        "teacher",
        "respond",
        "cache",
        "student",
        "distill",
        "objective",
        "generation",
    }
