"""What a recipe asks of stage one, and the plan that comes of it."""

from __future__ import annotations

import pytest

from shards.contract import SELECTIONS, Selection
from stages.teacher_cache.plan import plan_units
from stages.teacher_cache.settings import CacheSettings


def test_the_plan_covers_every_sample_once() -> None:
    units = plan_units({"train": range(10), "dev": range(4), "empty": ()}, 4)
    assert [(unit.name, unit.start, unit.stop) for unit in units] == [
        ("train-00000", 0, 4),
        ("train-00001", 4, 8),
        ("train-00002", 8, 10),
        ("dev-00000", 0, 4),
    ]


def test_attention_depths_name_the_layers_of_any_teacher() -> None:
    settings = CacheSettings()
    assert [settings.attention(layers).layers for layers in (36, 30, 2)] == [(12, 24, 35), (10, 20, 29), (0, 1)]
    assert CacheSettings(attention_depths=()).attention(30) is None


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"selection": "best"}, "selection"),
        ({"k": 0}, "k must be"),
        ({"selection": "hybrid", "draws": 0}, "draws"),
        ({"selection": "adaptive", "mass": 1.5}, "mass"),
        ({"attention_rows": "some"}, "rows"),
        ({"curve": (0.25, 0.5)}, "curve"),
        ({"curve": (1.5,)}, "curve"),
    ],
)
def test_a_selection_that_cannot_be_is_refused_by_name(asked: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CacheSettings(**asked)


def test_what_has_no_meaning_for_a_selection_is_left_out_of_it() -> None:
    kinds = [CacheSettings(selection=kind, sample_logprobs=False).chosen() for kind in SELECTIONS]
    assert kinds == [
        Selection(kind="topk", k=64),
        Selection(kind="adaptive", k=64, mass=0.95, floor=1e-3),
        Selection(kind="hybrid", k=64, draws=12),
        Selection(kind="sample", draws=12, logprobs=False),
    ]
