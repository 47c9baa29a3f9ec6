"""Training from an object store is training from a folder: a real S3 server on loopback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.merge import copy_set
from stages.distill.export import exported_facts
from tests.shards.object_store import CREDENTIALS, serving


def test_shards_of_a_url_train_the_same_student(
    tmp_path: Path, shards: Path, train_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**CREDENTIALS, "MINICODFORMER_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    here = train_here(tmp_path / "here", epochs=1)
    with serving() as store:
        url = store.new_url()
        copy_set(shards, url)
        there = train_here(tmp_path / "there", shards=url, epochs=1)
    weights = "final_model/model.safetensors"
    assert (tmp_path / "there" / weights).read_bytes() == (tmp_path / "here" / weights).read_bytes()
    assert there.result.validation == here.result.validation
    ours, theirs = (exported_facts(tmp_path / place / "final_model") for place in ("here", "there"))
    assert ours is not None
    assert theirs is not None
    assert ours["identity"] == theirs["identity"], "a copy is the same set: a run goes on with either"
