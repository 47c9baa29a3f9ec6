"""A small student that has learnt three answers by heart, in a folder like the one a run ends with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stages.corpus.chat import CHAT_FILE, chat_document
from stages.corpus.rows import Conversation, Message
from stages.corpus.tokenizer import ChatTokenizer
from stages.student.model import build_student
from stages.student.shape import StudentShape

ANSWERS = {
    "count": "one two three four",
    "how much is six times seven, please?": "It is 42. 答案是四十二 🎉!",
    "讲": "从前有座山。",
}


@pytest.fixture(scope="session")
def answers() -> dict[str, str]:
    """What the student has learnt: prompt -> answer."""
    return ANSWERS


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory, save_byte_tokenizer: Callable[[Path], None]) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("student")
    save_byte_tokenizer(folder)
    tokenizer = ChatTokenizer.load(folder)
    shape = StudentShape(hidden_size=32, heads=2, encoder_layers=1, decoder_layers=1, intermediate_size=48)
    student = build_student(
        shape,
        vocab_size=tokenizer.vocab_size,
        start_token_id=tokenizer.start_token_id,
        end_token_id=tokenizer.end_token_id,
        seed=0,
    )
    samples = []
    for prompt, answer in ANSWERS.items():
        row = Conversation(prompt=(Message(role="user", content=prompt),), reasoning="", answer=answer)
        (pair,) = tokenizer.encode([row])
        assert not isinstance(pair, Exception)
        samples.append([torch.tensor(ids, dtype=torch.int64)[None] for ids in pair])
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    for _ in range(150):
        losses = [student(input_ids=prompt, labels=response).loss for prompt, response in samples]
        loss = torch.stack(losses).mean()
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "the student has not learnt its answers"
    student.save_pretrained(folder)
    (folder / CHAT_FILE).write_bytes(chat_document(thinking=True))
    return folder
