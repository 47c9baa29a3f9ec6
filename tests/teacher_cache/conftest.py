"""Teachers and samples of this room's tests. vLLM starts once a session, in this process."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shards.contract import AttentionSpec, Selection
from stages.corpus.sample import Sample
from stages.teacher_cache.engines.protocol import CaptureSpec
from stages.teacher_cache.engines.transformers import TransformersEngine
from stages.teacher_cache.engines.vllm.adapter import VllmEngine
from stages.teacher_cache.settings import TeacherSettings
from stages.teacher_cache.signals import TeacherSignal
from tests.teacher_cache.folders import contents

TEXT = (
    "A farmer keeps 12 hens, and every hen lays 5 eggs a week. He sells the eggs at the market in boxes of six for "
    "three coins a box. How many coins does he earn in four weeks? Each week the hens lay 12 x 5 = 60 eggs, which "
    "fill 60 / 6 = 10 boxes. The boxes bring 10 x 3 = 30 coins a week, so in four weeks he earns 4 x 30 = 120 coins. "
    "The answer is 120. Rivers begin as springs in the hills; they gather rain and snow from the land around them, "
    "cut valleys through the rock, and slow down when they reach the plain, where they drop the sand that they carry."
)
STEP_TOKENS = 48
"""The session engine's token budget: the longer samples are prefilled in chunks."""
SHAPES = ((1, 1), (1, 9), (3, 20), (30, 1), (40, 18), (55, 60), (17, 5))
"""Prompt and response lengths; the sums on both sides of STEP_TOKENS."""


@pytest.fixture(scope="session")
def spec() -> CaptureSpec:
    """All that one engine can be asked for at once; what else there is, the head is asked for alone."""
    return CaptureSpec(
        selection=Selection(kind="adaptive", k=64, mass=0.98, floor=1e-4),
        curve=(0.5, 0.25),
        attention=AttentionSpec(layers=(10, 20, 29), top_m=16, rows="all"),
    )


@pytest.fixture(scope="session")
def samples(smollm2: Path) -> list[Sample]:
    """English cut at arbitrary places into prompts and responses."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(smollm2)
    ids = np.array(tokenizer(TEXT)["input_ids"], np.int32)
    return [
        Sample(
            sample_id=f"{number:016x}",
            prompt_ids=ids[3 * number : 3 * number + prompt],
            response_ids=ids[3 * number + prompt : 3 * number + prompt + response],
        )
        for number, (prompt, response) in enumerate(SHAPES)
    ]


@pytest.fixture(scope="session")
def oracle_signals(smollm2: Path, spec: CaptureSpec, samples: list[Sample]) -> list[TeacherSignal]:
    return list(TransformersEngine(smollm2, spec).capture(samples))


@pytest.fixture(scope="session")
def engine(smollm2: Path, spec: CaptureSpec) -> Iterator[VllmEngine]:
    teacher = TeacherSettings(dtype="float32", head_dtype="float32", max_model_len=256, max_batched_tokens=STEP_TOKENS)
    engine = VllmEngine(smollm2, teacher, spec)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def signals(engine: VllmEngine, samples: list[Sample]) -> list[TeacherSignal]:
    return list(engine.capture(samples))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose heads divide by two and whose vocabulary of 1,000 is padded to 1,024."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1_000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recorded_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with just what the loop reads of a teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    facts = {"architectures": ["X"], "vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    head = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    save_file({"lm_head.weight": head}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def recorded() -> ModuleType:
    """The recorded teacher, which is a program as well."""
    path = Path(__file__).with_name("recorded.py")
    specification = importlib.util.spec_from_file_location("recorded", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, recorded: ModuleType, recorded_teacher: Path
) -> dict[str, bytes]:
    """What a run of the recorded teacher leaves that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recorded.fill(folder, recorded_teacher)
    return contents(folder)


@pytest.fixture(scope="session")
def dumped_teacher(tmp_path_factory: pytest.TempPathFactory, save_byte_tokenizer: Callable[[Path], None]) -> Path:
    """A model folder with a tokenizer of bytes and a head: what an import takes of the teacher."""
    folder = tmp_path_factory.mktemp("teacher")
    save_byte_tokenizer(folder)
    facts = {"architectures": ["X"], "vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 16}
    (folder / "config.json").write_text(json.dumps(facts))
    save_file({"lm_head.weight": torch.randn(300, 16)}, folder / "model.safetensors")
    return folder
