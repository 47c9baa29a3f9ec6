"""The teacher's folder: what it is, and the part of it that travels with the shards.

What reaches the student is published under `teacher/` in the shard set: the tokenizer's files as they are, how prompts
were rendered (`chat.json`), and the principal components of the head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from shards.durable import file_sha256
from shards.manifest import HEAD_PCA_FILE, HEAD_PCA_TENSOR, TEACHER_FOLDER
from shards.storage import Storage
from stages.corpus.chat import CHAT_FILE, chat_document
from stages.corpus.fingerprint import tokenizer_files
from stages.errors import StageError

_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")
"""What architectures call the modules; a head that is tied is saved as the embedding alone."""
_PCA_ROWS = 8_192
_MOST_HEAD_BYTES = 1 << 34


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherFacts:
    """What config.json says that stage one needs."""

    architecture: str
    vocab_size: int
    """Width of the logits; it may exceed the tokenizer's."""
    layers: int
    hidden_size: int
    heads: int
    key_heads: int
    head_dim: int
    inner_widths: tuple[int, ...]
    """Of the perceptron in a layer, and of each of its experts."""
    quantisation: str
    """The method by which the weights are packed ("fp8", "awq", "gptq", …); empty where they are not."""


def read_facts(folder: Path) -> TeacherFacts:
    """Facts of the model in a Hugging Face folder. Raises StageError where it holds none."""
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        width, heads = config["hidden_size"], config.get("num_attention_heads", 1)
        return TeacherFacts(
            architecture=config["architectures"][0],
            vocab_size=config["vocab_size"],
            layers=config["num_hidden_layers"],
            hidden_size=width,
            heads=heads,
            key_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            inner_widths=tuple(
                config[name] for name in ("intermediate_size", "moe_intermediate_size") if config.get(name)
            ),
            quantisation=(config.get("quantization_config") or {}).get("quant_method", ""),
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise StageError(
            f"{path} does not describe a language model: {error!r}",
            hint="teacher.model must be a folder with config.json, safetensors and tokenizer files",
        ) from error


def tensor_parallel_sizes(folder: Path, most: int) -> list[int]:
    """Over how many devices, up to `most`, the teacher can be split: whole heads and equal widths on each.

    Key heads may be fewer than devices: each is then held by several. Raises StageError where config.json is none.
    """
    facts = read_facts(folder)
    return [
        size
        for size in range(1, most + 1)
        if all(number % size == 0 for number in (facts.heads, *facts.inner_widths))
        and (facts.key_heads % size == 0 or size % facts.key_heads == 0)
    ]


def weights_fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and contents of the weight files and config.json, which says how they are used.

    Raises StageError where there are none.
    """
    files = [folder / "config.json", *weight_files(folder)]
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(file_sha256, files))
    digest = hashlib.sha256()
    for path, content in zip(files, contents, strict=True):
        digest.update(f"{path.name}\0{path.stat().st_size}\0{content}\0".encode())
    return digest.hexdigest()


def teacher_files(source: Path, storage: Storage, *, pca_width: int, thinking: bool) -> dict[str, bytes]:
    """What of the teacher travels with the set that `storage` holds, by file name.

    A head that a folder has already is not analysed again. Raises StageError where that was done to another width.
    """
    standing = f"{TEACHER_FOLDER}/{HEAD_PCA_FILE}"
    if storage.exclusive and storage.size(standing) is not None:
        head = storage.read(standing, most=_MOST_HEAD_BYTES)
        if (width := load(head)[HEAD_PCA_TENSOR].shape[1]) != min(pca_width, read_facts(source).hidden_size):
            raise StageError(
                f"{storage.where(TEACHER_FOLDER)} holds {width} components, cache.pca_width is {pca_width}",
                hint="cache.pca_width must stay what it was when this set was begun",
            )
    else:
        head = save({HEAD_PCA_TENSOR: head_components(_head(source), pca_width).half()})
    return {
        **{path.name: path.read_bytes() for path in tokenizer_files(source)},
        CHAT_FILE: chat_document(thinking=thinking),
        HEAD_PCA_FILE: head,
    }


def head_components(head_VD: Tensor, width: int) -> Tensor:
    """The rows of the head in its first `width` principal directions, fp32 [V, min(width, D)], by falling variance.

    The directions' signs are fixed, so that one machine always gives the same bytes.
    """
    mean_D = head_VD.mean(dim=0, dtype=torch.float64)
    covariance_DD = torch.zeros(head_VD.shape[1], head_VD.shape[1], dtype=torch.float64)
    for rows in head_VD.split(_PCA_ROWS):
        centred = rows.double() - mean_D
        covariance_DD.addmm_(centred.t(), centred)
    _, directions_DD = torch.linalg.eigh(covariance_DD)
    directions_DW = directions_DD.flip(-1)[:, :width]
    largest_W = directions_DW.gather(0, directions_DW.abs().argmax(dim=0, keepdim=True))
    directions_DW = directions_DW * largest_W.sign()
    return torch.cat([((rows.double() - mean_D) @ directions_DW).float() for rows in head_VD.split(_PCA_ROWS)])


def head_tensor(folder: Path) -> tuple[str, Path]:
    """Name and file of the output head's weights. Raises StageError where there are none that can be read."""
    tensors = dict(_where(folder))
    parts = [name for name in tensors if _module(name) in _HEADS]
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not parts and config.get("tie_word_embeddings", True):
        parts = [name for name in tensors if _module(name) in _EMBEDDINGS]
    for name in parts:
        if name.endswith(".weight"):
            return name, tensors[name]
    packed = f" but {parts[0]}, which is packed" if parts else ""
    raise StageError(
        f"{folder} has no output head{packed}",
        hint=f"its weights must hold {' or '.join(f'{name}.weight' for name in _HEADS)}, or a tied embedding",
    )


def _module(name: str) -> str:
    """Which module a tensor belongs to: the last word but one."""
    return name.rsplit(".", 2)[-2] if "." in name else ""


def _head(folder: Path) -> Tensor:
    name, path = head_tensor(folder)
    with safe_open(path, framework="pt") as file:
        head: Tensor = file.get_tensor(name)
        return head


def _where(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                yield from ((name, path) for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise StageError(f"{path} cannot be read: {error}", hint="fetch the teacher again") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a model folder, by name. Raises StageError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StageError(f"{folder} holds no safetensors", hint="other weight formats are not read: convert them first")
    return files
