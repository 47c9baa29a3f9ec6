"""What the liquid decoder is worth: the same block with other mixers, at equal parameters, steps and data.

Byte-level models of width 128 and two layers read the Python standard library's sources, 256 bytes at a time, and are
judged on held-out files at that length and at four times it; and they recall pairs that they have just seen (MQAR;
Arora et al., Zoology). Every (task, setting, seed) appends its figures to results/student_quality.jsonl and is not run
again; the table is made from that file. Run from the repository's root:

    python -m benchmarks.student_quality [--seeds 3]
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ncps.torch import CfC
from torch import Tensor, nn

from benchmarks.record import RESULTS, Row, Runs, compare, write
from stages.student.config import MiniCodformerConfig
from stages.student.encoder import RotaryEmbedding, rotate
from stages.student.layers import RMSNorm, SwiGLU, split_heads
from stages.student.ltc import LiquidMixer

RUNS = Runs(RESULTS / "student_quality.jsonl")
WIDTH, HEADS, LAYERS, KERNEL = 128, 2, 2, 4
LENGTH, BATCH, STEPS = 256, 8, 300
PAIRS, SYMBOLS, RECALL_BATCH, RECALL_STEPS = 8, 64, 64, 800
RATE, WARMUP = 3e-3, 20
MLP = 344
"""SwiGLU width of the liquid block; the others' is set so that all have its parameters."""


class ConvolvedAttention(nn.Module):
    """Causal attention with rotary positions behind the liquid mixer's convolution, and under its output gate."""

    def __init__(self, config: MiniCodformerConfig) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding=KERNEL - 1, groups=WIDTH, bias=False)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.gate, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.query_norm, self.key_norm, self.head_norm = (RMSNorm(WIDTH // HEADS, 1e-6) for _ in range(3))
        self.rotary = RotaryEmbedding(config)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        steps = hidden_BTD.shape[1]
        sensory_BTD = F.silu(self.conv(hidden_BTD.mT)[..., :steps].mT)
        query, key, value = (split_heads(part, HEADS) for part in self.query_key_value(sensory_BTD).chunk(3, -1))
        rotary = self.rotary(torch.arange(steps)[None], hidden_BTD.dtype)
        query, key = rotate(self.query_norm(query), rotary), rotate(self.key_norm(key), rotary)
        read_BHTE = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        read_BTD = self.head_norm(read_BHTE).transpose(1, 2).flatten(-2)
        out: Tensor = self.out(read_BTD * F.silu(self.gate(hidden_BTD)))
        return out


class Liquid(nn.Module):
    def __init__(self, config: MiniCodformerConfig, layer: int) -> None:
        super().__init__()
        self.mixer = LiquidMixer(config, layer)
        with torch.no_grad():
            nn.init.normal_(self.mixer.gate.weight, std=WIDTH**-0.5)
            self.mixer.initialize()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        mixed: Tensor = self.mixer(hidden_BTD, None, None, hidden_BTD, None)
        return mixed


class Looped(nn.Module):
    """A recurrent network of a library, with a projection of its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.out = network, nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        out: Tensor = self.out(self.network(hidden_BTD)[0])
        return out


def _liquid(**changes: object) -> Callable[[int], nn.Module]:
    return lambda layer: Liquid(_config(**changes), layer)


def _config(**changes: object) -> MiniCodformerConfig:
    return MiniCodformerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, conv_kernel=KERNEL, **changes)


SETTINGS: dict[str, Callable[[int], nn.Module]] = {
    "liquid": _liquid(),
    "liquid, dense": _liquid(wiring="dense"),
    "liquid, vector": _liquid(recurrence="vector"),
    "liquid, delta": _liquid(recurrence="delta"),
    "transformer": lambda _: ConvolvedAttention(_config()),
    "GRU": lambda _: Looped(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "CfC": lambda _: Looped(CfC(WIDTH, WIDTH, backbone_units=WIDTH, backbone_layers=1)),
}


class Model(nn.Module):
    def __init__(self, setting: str, vocabulary: int, mlp: int) -> None:
        super().__init__()
        config = _config(intermediate_size=mlp)
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.mixers = nn.ModuleList(SETTINGS[setting](layer) for layer in range(LAYERS))
        self.mlps = nn.ModuleList(SwiGLU(config) for _ in range(LAYERS))
        self.norms = nn.ModuleList(RMSNorm(WIDTH, 1e-6) for _ in range(2 * LAYERS + 1))

    def forward(self, ids_BT: Tensor) -> Tensor:
        hidden = self.embedding(ids_BT)
        for mixer, mlp, first, second in zip(self.mixers, self.mlps, self.norms[::2], self.norms[1::2], strict=False):
            hidden = hidden + mixer(first(hidden))
            hidden = hidden + mlp(second(hidden))
        logits: Tensor = self.norms[-1](hidden) @ self.embedding.weight.T * WIDTH**-0.5
        return logits


def parameters(model: nn.Module) -> int:
    """Synapses that exist: what a wiring leaves out is no parameter."""
    total = sum(parameter.numel() for parameter in model.parameters())
    absent = (
        module.polarity.eq(0).sum() * len(module.weight) for module in model.modules() if hasattr(module, "polarity")
    )
    return total - int(sum(absent))


def matched(setting: str, vocabulary: int) -> Model:
    """The model of a setting with the parameters of the liquid one, by the width of its feed-forward."""
    goal = parameters(Model("liquid", vocabulary, MLP))
    bare = parameters(Model(setting, vocabulary, 1)) - 3 * WIDTH * LAYERS
    return Model(setting, vocabulary, round((goal - bare) / (3 * WIDTH * LAYERS)))


def train(model: Model, batch: Callable[[int], tuple[Tensor, Tensor]], steps: int) -> None:
    """AdamW with warm-up and cosine; a target below 0 does not count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def corpus() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library's modules; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    held_out = texts[::10]
    return np.concatenate([t for i, t in enumerate(texts) if i % 10]), np.concatenate(held_out)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.stack([text[start : start + length + 1] for start in starts])).long()
    return rows[:, :-1], rows[:, 1:]


@torch.inference_mode()
def nats(model: Model, text: np.ndarray, length: int) -> float:
    """Mean loss a byte over held-out windows of one length; the same bytes at every length."""
    starts = np.arange(0, 96 * 1024, length)
    losses = [
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
        for part in np.array_split(starts, max(1, len(starts) * length // 16_384))
        for inputs, targets in [windows(text, part, length)]
    ]
    return statistics.fmean(losses)


def recall_batch(draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of a key and a value, then the keys again in another order, each with its value to be told."""
    keys = np.stack([draw.permutation(SYMBOLS)[:PAIRS] for _ in range(RECALL_BATCH)])
    values = draw.integers(SYMBOLS, 2 * SYMBOLS, keys.shape)
    order = np.stack([draw.permutation(PAIRS) for _ in range(RECALL_BATCH)])
    asked, told = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
    inputs = np.concatenate(
        [np.stack(pair, 2).reshape(RECALL_BATCH, -1) for pair in ((keys, values), (asked, told))], 1
    )
    targets = np.full_like(inputs, -1)
    targets[:, 2 * PAIRS :: 2] = told
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def read(setting: str, seed: int) -> dict[str, Any]:
    """Train a model to read, and judge it at both lengths."""
    seen, held_out = corpus()
    torch.manual_seed(seed)
    draw, start = np.random.default_rng(seed), time.process_time()
    model = matched(setting, 256)
    train(model, lambda _: windows(seen, draw.integers(0, len(seen) - LENGTH - 1, BATCH), LENGTH), STEPS)
    return {
        "training_seconds": time.process_time() - start,
        "parameters": parameters(model),
        "nats": nats(model, held_out, LENGTH),
        "nats_4x": nats(model, held_out, 4 * LENGTH),
    }


def recall(setting: str, seed: int) -> dict[str, Any]:
    """Train a model to recall; the share of values told right, in percent."""
    torch.manual_seed(seed)
    model, draw = matched(setting, 2 * SYMBOLS), np.random.default_rng(seed)
    train(model, lambda _: recall_batch(draw), RECALL_STEPS)
    with torch.inference_mode():
        inputs, targets = recall_batch(np.random.default_rng(10_000 + seed))
        asked = targets >= 0
        right = (model(inputs).argmax(-1)[asked] == targets[asked]).double().mean().item()
    return {"recall_steps": RECALL_STEPS, "recall": 100 * right}


TASKS: dict[str, Callable[[str, int], dict[str, Any]]] = {"read": read, "recall": recall}
MEASURES = (
    ("read", "nats", f"nats a byte at {LENGTH}"),
    ("read", "nats_4x", f"nats a byte at {4 * LENGTH}"),
    ("recall", "recall", "recall"),
)


def rows() -> Iterator[Row]:
    """The liquid default beside every other setting: means over seeds, and the spread of each."""
    runs = RUNS.finished()
    for setting in SETTINGS:
        for task, name, metric in MEASURES:
            ours, theirs = (
                [facts[name] for facts in runs if (facts["setting"], facts["task"]) == (wanted, task)]
                for wanted in ("liquid", setting)
            )
            if not (ours and theirs):
                continue
            spread = f"±{statistics.stdev(theirs):.2g}, {len(theirs)} seeds" if len(theirs) > 1 else "one seed"
            label = f"{setting}; {spread}"
            unit, more = ("%", True) if name == "recall" else ("nats", False)
            mean = statistics.fmean
            yield compare("liquid", metric, unit, mean(ours), mean(theirs), label, more_is_better=more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = {(facts["task"], facts["setting"], facts["seed"]) for facts in RUNS.finished()}
    for seed in range(arguments.seeds):
        for setting in SETTINGS:
            for task, run in TASKS.items():
                if (task, setting, seed) not in done:
                    facts = {"task": task, "setting": setting, "seed": seed} | run(setting, seed)
                    RUNS.append(facts)
                    print(facts, flush=True)
    write("student_quality", list(rows()), clock="none", packages=("torch", "ncps"), threads=1)


if __name__ == "__main__":
    main()
