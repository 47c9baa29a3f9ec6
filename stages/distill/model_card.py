"""The README of a finished model: what it is, how it is loaded, how it was trained and how far it got."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.contract import Contract

_MEASURES = {
    "kl": "KL(teacher, student), nats",
    "cross_entropy": "cross-entropy, nats",
    "perplexity": "perplexity",
    "top1_agreement": "top-1 agreement with the teacher",
    "top5_agreement": "teacher's best token in the student's five",
}


def model_card(contract: Contract, parameters: int, result: Mapping[str, Any]) -> str:
    """Markdown with the front matter that model hubs read. `result` is a finished `TrainResult` as a dict."""
    return f"""---
library_name: transformers
tags:
- minicodformer
- knowledge-distillation
---

# MiniCodformer

A student of {parameters:,} parameters, distilled offline from `{contract.teacher}`: a Transformer encoder over the
prompt, and a decoder whose memory is a liquid time-constant network of fixed size, so that a token costs the same
however many came before it.

## Use

```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
messages = [{{"role": "user", "content": "..."}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(prompt["input_ids"], max_new_tokens=128)[0], skip_special_tokens=True))
```

torch and transformers are enough. `trust_remote_code` runs the modelling files of this folder. Assisted decoding is
refused: a recurrent state cannot be taken back to an earlier token.

## Training

{result["steps"]:,} steps over {result["positions"]:,} positions in {result["precision"]}, on the teacher's recorded
distributions ({contract.selection.kind}).

## Quality on the held-out split

{_quality(result["untrained"], result["validation"])}
"""


def _quality(untrained: Mapping[str, float] | None, trained: Mapping[str, float] | None) -> str:
    if untrained is None or trained is None:
        return "Not measured: the training data had no held-out split."
    rows = [f"| {label} | {untrained[name]:.4g} | {trained[name]:.4g} |" for name, label in _MEASURES.items()]
    caption = f"Means over {trained['positions']:,} positions; the KL is a lower bound over the ids that were kept."
    return "\n".join([caption, "", "| measure | before training | after |", "|---|---:|---:|", *rows])
