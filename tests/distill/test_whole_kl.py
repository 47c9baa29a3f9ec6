"""KL to the teacher itself: against full distributions in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from shards.reader import ShardSet
from stages.distill.settings import DistillSettings
from stages.distill.start import fresh_student
from stages.distill.whole_kl import whole_kl
from stages.errors import StageError
from stages.student.shape import StudentShape

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.8,
}


@pytest.fixture(scope="module")
def student_folder(
    shards: Path, settings: DistillSettings, shape: StudentShape, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("student")
    fresh_student(ShardSet(shards), settings, shape).save_pretrained(folder)
    return folder


def save_teacher(folder: Path, vocab: int) -> Path:
    torch.manual_seed(3)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **TINY)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("block_rows", [3, 128])
def test_it_is_the_kl_of_full_distributions(
    block_rows: int, shards: Path, student_folder: Path, tmp_path: Path
) -> None:
    """The teacher's head is wider than the vocabulary, as padded ones are: what is beyond is no id."""
    from stages.student.model import MiniCodformerForConditionalGeneration

    shard_set = ShardSet(shards)
    report = whole_kl(student_folder, save_teacher(tmp_path, 224), shard_set.split("dev"), block_rows=block_rows)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    student = MiniCodformerForConditionalGeneration.from_pretrained(student_folder, dtype=torch.float64).eval()
    kl = entropy = agreed = positions = 0.0
    with torch.no_grad():
        for record in shard_set.split("dev"):
            prompt, response = record.prompt_ids_P.tolist(), record.response_ids_R.tolist()
            p = teacher(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :211].softmax(1)
            ids = torch.tensor([[0, *response[:-1]]])
            q = student(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0].softmax(1)
            kl += (p * (p / q).log()).sum().item()
            entropy -= (p * p.log()).sum().item()
            agreed += (p.argmax(1) == q.argmax(1)).sum().item()
            positions += len(response)
    assert report.positions == positions
    assert report.kl == pytest.approx(kl / positions, rel=1e-5)
    assert report.teacher_entropy == pytest.approx(entropy / positions, rel=1e-5)
    assert report.top1_agreement == pytest.approx(agreed / positions)


def test_a_teacher_that_cannot_be_compared_is_refused(student_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="the teacher knows 100 ids, the student 211"):
        whole_kl(student_folder, save_teacher(tmp_path / "other", 100), [])
    capped = Gemma2Config(vocab_size=211, final_logit_softcapping=2.0, **TINY)
    Gemma2ForCausalLM(capped).save_pretrained(tmp_path / "capped")
    with pytest.raises(StageError, match="not those of its head alone"):
        whole_kl(student_folder, tmp_path / "capped", [])
