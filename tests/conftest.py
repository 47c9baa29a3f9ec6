"""What every room's tests share: the real teacher, fetched once a machine, and a quiet engine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Wall time is measured in benchmarks/, never asserted in tests: a busy machine must not fail a property.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's teacher, SmolLM2-135M-Instruct, as a Hugging Face folder."""
    from pipeline.assets import teacher_folder
    from stages.events import silent

    return teacher_folder("demo:smollm2-135m-instruct", None, silent)
