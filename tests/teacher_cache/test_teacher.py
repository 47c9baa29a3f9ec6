"""What is read of the teacher's folder: facts, fingerprint, principal components."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.manifest import HEAD_PCA_FILE, HEAD_PCA_TENSOR, publish_teacher_files
from shards.storage import LocalStorage
from stages.errors import StageError
from stages.teacher_cache.teacher import (
    head_components,
    head_tensor,
    read_facts,
    teacher_files,
    tensor_parallel_sizes,
    weights_fingerprint,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    facts = {"architectures": ["LlamaForCausalLM"], "vocab_size": 50, "num_hidden_layers": 3, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(facts))
    generator = torch.Generator().manual_seed(0)
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model-00001-of-00002.safetensors")
    head = {"model.embed_tokens.weight": torch.randn(50, 8, generator=generator).bfloat16()}
    save_file(head, folder / "model-00002-of-00002.safetensors")
    return folder


def test_facts_of_the_real_teacher(smollm2: Path) -> None:
    facts = read_facts(smollm2)
    assert (facts.architecture, facts.vocab_size, facts.layers) == ("LlamaForCausalLM", 49_152, 30)
    assert (facts.hidden_size, facts.heads, facts.key_heads, facts.head_dim) == (576, 9, 3, 64)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"architectures": []}', '{"architectures": ["X"], "vocab_size": 1}'])
def test_a_folder_that_describes_no_model_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StageError, match=r"config\.json"):
        read_facts(tmp_path)


def test_the_fingerprint_follows_the_weights(folder: Path) -> None:
    before = weights_fingerprint(folder)
    assert weights_fingerprint(folder) == before
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_fingerprint(folder) != before
    second.write_bytes(content)
    second.rename(folder / "model-00003-of-00003.safetensors")
    assert weights_fingerprint(folder) != before


def test_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(StageError, match="no safetensors"):
        weights_fingerprint(tmp_path)


def test_components_are_those_of_a_dense_decomposition() -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(9_000, 12, generator=generator) * torch.linspace(3, 0.2, 12) + 5
    ours = head_components(head, 5).double().numpy()
    centred = head.double().numpy() - head.double().numpy().mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    theirs = centred @ directions[:5].T
    signs = np.sign((ours * theirs).sum(axis=0))
    assert np.abs(ours - theirs * signs).max() < 1e-4
    assert (np.diff(ours.var(axis=0)) < 0).all()


def test_components_are_as_many_as_the_teacher_is_wide() -> None:
    head = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    assert head_components(head, 256).shape == (40, 6)
    assert torch.equal(head_components(head, 3), head_components(head, 6)[:, :3])


def publish(source: Path, target: Path, *, width: int = 4) -> None:
    storage = LocalStorage(target)
    publish_teacher_files(storage, teacher_files(source, storage, pca_width=width, thinking=True))


def test_a_tied_head_is_found_in_the_embedding_and_published_once(folder: Path, tmp_path: Path) -> None:
    publish(folder, tmp_path / "shards")
    path = tmp_path / "shards" / "teacher" / HEAD_PCA_FILE
    components = load_file(path)[HEAD_PCA_TENSOR]
    assert (components.shape, components.dtype) == ((50, 4), torch.float16)
    first = path.read_bytes()
    (folder / "model-00002-of-00002.safetensors").unlink()
    publish(folder, tmp_path / "shards")
    assert path.read_bytes() == first


def test_a_teacher_without_a_head_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(StageError, match="no output head"):
        publish(folder, tmp_path / "shards")


@pytest.mark.parametrize(
    ("tensors", "tied", "found"),
    [
        (("lm_head.weight", "model.embed_tokens.weight"), False, "lm_head.weight"),
        (("embed_out.weight", "gpt_neox.embed_in.weight"), False, "embed_out.weight"),
        (("transformer.wte.weight",), True, "transformer.wte.weight"),
        (("wte.weight",), True, "wte.weight"),
        (("model.embed_tokens.weight",), False, None),
        (("lm_head.qweight", "lm_head.scales", "model.embed_tokens.weight"), True, None),
    ],
)
def test_the_head_is_found_under_its_names_and_an_embedding_is_no_head_unless_it_is_tied(
    folder: Path, tensors: tuple[str, ...], tied: bool, found: str | None
) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    path = folder / "model-00001-of-00002.safetensors"
    save_file({name: torch.ones(50, 8) for name in tensors}, path)
    if found is None:
        with pytest.raises(StageError, match="no output head"):
            head_tensor(folder)
    else:
        assert head_tensor(folder) == (found, path)


def test_components_of_another_width_are_refused(folder: Path, tmp_path: Path) -> None:
    publish(folder, tmp_path / "shards")
    with pytest.raises(StageError, match="pca_width"):
        publish(folder, tmp_path / "shards", width=5)


@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "expected"),
    [(32, 8, 12_288, [1, 2, 4, 8, 16]), (9, 3, 1_536, [1, 3]), (8, 4, 24, [1, 2, 4, 8]), (6, 6, 100, [1, 2])],
)
def test_a_teacher_is_split_into_whole_heads_and_equal_widths(
    tmp_path: Path, heads: int, key_heads: int, width: int, expected: list[int]
) -> None:
    """Qwen3-8B, SmolLM2 and two others."""
    facts = {"architectures": ["X"], "vocab_size": 300, "num_hidden_layers": 4, "hidden_size": 16}
    split = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": width}
    (tmp_path / "config.json").write_text(json.dumps(facts | split))
    assert tensor_parallel_sizes(tmp_path, 16) == expected
