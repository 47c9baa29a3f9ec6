"""What a tokenizer is, as sha256. Imports nothing heavy, so that asking costs no time."""

from __future__ import annotations

import hashlib
from pathlib import Path

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a model folder that make its tokenizer, chat template included, by name."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 over the names, sizes and contents of `tokenizer_files`: a copy of them has the same fingerprint."""
    digest = hashlib.sha256()
    for path in tokenizer_files(folder):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
