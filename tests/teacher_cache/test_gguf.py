"""GGUF checkpoints, small ones written here, against what transformers makes of the same file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from stages.errors import StageError
from stages.events import Event, Progress, silent
from stages.teacher_cache.gguf import convert_gguf
from stages.teacher_cache.gguf_container import read_gguf

WIDTH, INNER, HEADS, KEY_HEADS, LAYERS = 64, 96, 4, 2, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 127)), "Ġ", "he", "ll"]
Kind = gguf.GGMLQuantizationType


def write_gguf(path: Path, architecture: str = "llama", *, tied: bool = True) -> Path:
    """A random model of three quantisations with a byte-level tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(12_345.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    def add(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
        weight = rng.standard_normal(shape).astype(np.float32)
        data = weight if kind == Kind.F32 else gguf.quants.quantize(weight, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    key_width = KEY_HEADS * WIDTH // HEADS
    add("token_embd.weight", (len(TOKENS), WIDTH), Kind.Q8_0)
    for layer in range(LAYERS):
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (key_width, WIDTH),
            "attn_v": (key_width, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }.items():
            add(f"blk.{layer}.{name}.weight", shape, Kind.Q4_1 if layer else Kind.F16)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", shape[:1], Kind.F32)
        add(f"blk.{layer}.attn_norm.weight", (WIDTH,), Kind.F32)
        add(f"blk.{layer}.ffn_norm.weight", (WIDTH,), Kind.F32)
    add("output_norm.weight", (WIDTH,), Kind.F32)
    if not tied:
        add("output.weight", (len(TOKENS), WIDTH), Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_the_checkpoint_is_what_transformers_reads(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = write_gguf(tmp_path / "model.gguf", architecture, tied=tied)
    convert_gguf(source, tmp_path / "out", silent)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    expected = {name: weight for name, weight in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, expected[name].bfloat16()), name
    config = AutoConfig.from_pretrained(tmp_path / "out")
    for field in ("num_hidden_layers", "hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(theirs.config, field), field
    assert config.rope_parameters["rope_theta"] == 12_345.0
    assert config.architectures == [type(theirs).__name__]


def test_the_converted_model_runs_and_its_tokenizer_travels(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf")
    events: list[Event] = []
    convert_gguf(source, tmp_path / "out", events.append)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file=source.name)
    text = "hello hello<|im_end|>"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 128)
    progress = [event for event in events if isinstance(event, Progress)]
    assert progress[-1].done == progress[-1].total == len(read_gguf(source).tensors)


def test_a_foreign_architecture_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", "gemma2")
    with pytest.raises(StageError, match="gemma2"):
        convert_gguf(source, tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused_and_leaves_no_folder(tmp_path: Path, share: float) -> None:
    source = write_gguf(tmp_path / "model.gguf")
    content = source.read_bytes()
    source.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(StageError, match="cannot be read as GGUF"):
        convert_gguf(source, tmp_path / "out", silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04" + bytes(200))
    with pytest.raises(StageError, match="cannot be read as GGUF"):
        read_gguf(tmp_path / "model.gguf")


def test_a_death_while_writing_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.teacher_cache import gguf as module

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    source = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert_gguf(source, tmp_path / "out", silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
