"""T1 and T3 again and again: ranks killed wherever they are, run after run, come to the undisturbed run's bits."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.events import Progress

StartRanks = Callable[..., Any]

OFTEN = {"checkpoint_every": 2, "validate_every": 4}
FLUSHES = 25
"""Of a whole run: its five checkpoints flush five times each."""


def killed(start: Callable[[int], Any], rng: random.Random, way: str) -> Any:
    """Start the ranks and have them killed in one of three ways, unless they finish before."""
    if way == "inside a save":
        return start(rng.randrange(1, FLUSHES + 1)).join()
    ranks = start(0)
    last, pause = rng.randrange(1, 9), rng.uniform(0.0, 1.5)
    heard = []
    while (said := ranks.hear()) is not None:
        heard.append(said)
        if way == "at a moment":
            time.sleep(pause)
        if way == "at a moment" or (isinstance(said, Progress) and said.stage == "distill" and said.done >= last):
            ranks.kill()
            break
    outcome = ranks.join()
    outcome.events[:0] = heard
    return outcome


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("world", "deaths"), [(1, 30), (2, 10)])
def test_T1_T3_killed_again_and_again_the_bits_are_those_of_an_undisturbed_run(
    world: int, deaths: int, start_ranks: StartRanks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = start_ranks(tmp_path / "undisturbed", world, **OFTEN).join()
    assert truth.result.finished
    rng = random.Random(world)
    died: Counter[str] = Counter()
    runs = starts = steps = 0
    while died.total() < deaths:
        runs += 1
        folder = tmp_path / f"run-{runs}"

        def start(flush: int, folder: Path = folder) -> Any:
            return start_ranks(folder, world, die_at_flush=flush, **OFTEN)

        while not (folder / "final_model").exists():
            way = rng.choice(("inside a save", "after a step", "at a moment"))
            outcome = killed(start, rng, way) if died.total() < deaths else start(0).join()
            starts += 1
            died[way] += outcome.result is None
            assert outcome.error is None
            steps += len(outcome.losses)
            assert all(loss == truth.losses[step] for step, loss in outcome.losses.items())
        assert outcome.weights.keys() == truth.weights.keys()
        assert all(torch.equal(outcome.weights[name], tensor) for name, tensor in truth.weights.items())
    with capsys.disabled():
        ways = ", ".join(f"{count} {way}" for way, count in sorted(died.items()))
        print(
            f"\n{world} ranks: {died.total()} deaths ({ways}) in {runs} runs, {starts} starts, {steps} steps compared"
        )
