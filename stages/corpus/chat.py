"""How conversations were rendered into prompts: `chat.json`, which travels with a tokenizer to wherever it is used.

A student must be asked as it was trained: Qwen3's template, for one, writes another prompt with thinking switched off.
"""

from __future__ import annotations

import json
from pathlib import Path

from stages.errors import StageError

CHAT_FILE = "chat.json"


def chat_document(*, thinking: bool) -> bytes:
    """The bytes of chat.json."""
    return (json.dumps({"thinking": thinking}) + "\n").encode()


def read_thinking(folder: Path) -> bool:
    """Whether prompts were rendered with thinking. Raises StageError where the folder does not say."""
    path = folder / CHAT_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        thinking = document["thinking"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(
            f"{path} does not say how prompts were rendered: {error!r}",
            hint="copy it from the folder teacher/ of the shards that the student was trained from",
        ) from error
    return bool(thinking)
