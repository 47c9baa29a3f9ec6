"""What every room's tests share: the real teacher, fetched once a machine, a quiet engine, and a tiny finished run."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Wall time is measured in benchmarks/, never asserted in tests: a busy machine must not fail a property.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# A shell that starts the suite in the background has its children ignore Ctrl-C, which some tests send to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The demo's teacher, SmolLM2-135M-Instruct, as a Hugging Face folder."""
    from pipeline.assets import teacher_folder
    from stages.events import silent

    return teacher_folder("demo:smollm2-135m-instruct", None, silent)


@pytest.fixture(scope="session")
def standing_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny as a finished run leaves it: real shards of a made-up teacher, an untrained student, all reports.

    Shared, so only to be read: `finished_run` is a copy.
    """
    from pipeline.measured import model_sha256
    from pipeline.recipe import load
    from pipeline.run import RunFolder
    from shards.reader import ShardSet
    from stages.distill.evaluate import evaluate_model
    from stages.distill.export import export_model
    from stages.distill.losses.table import what_kl_is
    from stages.student.model import build_student
    from stages.student.shape import StudentShape

    run = RunFolder(tmp_path_factory.mktemp("place") / "runs" / "tiny")
    run.adopt(dataclasses.replace(load("smollm2-demo"), name="tiny"))
    _write_shards(run.shards)
    shards = ShardSet(run.shards)
    student = build_student(
        StudentShape(hidden_size=32, heads=2, encoder_layers=1, decoder_layers=2, intermediate_size=48),
        vocab_size=shards.contract.vocab_size,
        start_token_id=shards.contract.start_token_id,
        end_token_id=shards.contract.end_token_id,
        seed=0,
    )
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    result = {"finished": True, "steps": 3, "positions": 96, "seconds": 1.5, "ranks": 1, "precision": "fp32"}
    totals = shards.manifest.totals()
    result |= {"cached": totals, "kl_is": what_kl_is(shards.contract.selection)}
    report = {"untrained": None, "validation": None}
    export_model(run.final_model, student, weights, shards, {"identity": {}, "result": {**result, **report}})
    validation = dataclasses.asdict(evaluate_model(run.final_model, shards))
    run.report("teacher_cache", {**totals, "captured": totals["positions"], "seconds": 2.0, "where": str(run.shards)})
    run.report("distill", {**result, "untrained": {**validation, "kl": 9.0}, "validation": validation})
    samples = [{"prompt": "1 + 1?", "answer": "3", "label": "2"}]
    made_from = {"model_sha256": model_sha256(run)}
    run.report("evaluate", {"validation": validation, "samples": samples, "made_from": made_from})
    return run.path


@pytest.fixture(scope="session")
def serve() -> Callable[..., AbstractContextManager[str]]:
    """Serves an application on loopback, in a thread of this process: `with serve(app) as address`."""
    return _serving


@contextmanager
def _serving(app: Any, send_buffer: int | None = None) -> Iterator[str]:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        if send_buffer is not None:  # of every connection: what the kernel takes from the server unread
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def nfs_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks as NFSv4 gives them: for oneself only of what is open for writing."""
    flock = fcntl.flock

    def lock(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock)


@pytest.fixture(scope="session")
def save_byte_tokenizer() -> Callable[..., None]:
    return _save_tokenizer


@pytest.fixture
def finished_run(standing_run: Path, tmp_path: Path) -> Path:
    """A copy of `standing_run` to write in: <somewhere>/runs/tiny."""
    return shutil.copytree(standing_run, tmp_path / "runs" / "tiny")


def _write_shards(folder: Path) -> None:
    """Sealed train and dev shards with a tokenizer of bytes; the teacher's distributions are random but true ones."""
    from shards.contract import AttentionSpec, Contract, Selection
    from shards.manifest import begin, seal
    from shards.writer import write_shard
    from stages.corpus.chat import CHAT_FILE, chat_document
    from stages.corpus.tokenizer import ChatTokenizer

    teacher = folder / "teacher"
    teacher.mkdir(parents=True)
    _save_tokenizer(teacher)
    (teacher / CHAT_FILE).write_bytes(chat_document(thinking=False))
    tokenizer = ChatTokenizer.load(teacher, thinking=False)
    contract = Contract(
        codec="topk-planes/1",
        teacher="made-up/teacher",
        teacher_fingerprint="a" * 64,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        start_token_id=tokenizer.start_token_id,
        end_token_id=tokenizer.end_token_id,
        selection=Selection(kind="topk", k=8),
        attention=AttentionSpec(layers=(2, 5), top_m=4),
        corpus_fingerprint="c" * 64,
        engine="numpy 2",
        dtype="float32+float32",
    )
    begin(folder, contract)
    infos = [
        write_shard(folder, f"{split}-00000", split, contract, [_record(tokenizer, n) for n in numbers])
        for split, numbers in (("train", range(4)), ("dev", range(4, 6)))
    ]
    seal(folder, contract, infos)


def _record(tokenizer, number: int):  # type: ignore[no-untyped-def]
    from shards.record import AttentionSummary, Record
    from stages.corpus.rows import Conversation, Message

    question = Message(role="user", content=f"What is {number} + {number}? 多少？")
    answer = Conversation(prompt=(question,), reasoning="", answer=f"It is {2 * number}. <b>&")
    ((prompt, response),) = tokenizer.encode([answer])
    rng = np.random.default_rng(number)
    logits_NV = rng.normal(size=(response.size, tokenizer.vocab_size)) * 3
    logits_NV[np.arange(response.size), response] += 6  # the teacher often agrees with the label
    logprobs_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    ids_NK = np.argsort(-logprobs_NV, axis=1, kind="stable")[:, :8]
    kept_NK = np.take_along_axis(logprobs_NV, ids_NK, 1)
    share_LNP = rng.dirichlet(np.full(prompt.size + 1, 0.3), size=(2, response.size))
    keys_LNP = share_LNP[..., 1:-1]  # key 0 is the sink, the last share the response's own
    best_LNM = np.argsort(-keys_LNP, axis=-1, kind="stable")[..., :4]
    return Record(
        sample_id=f"sample-{number}",
        prompt_ids_P=prompt,
        response_ids_R=response,
        first_position=0,
        ids_NK=ids_NK.astype(np.int32),
        logprobs_NK=kept_NK.astype(np.float32),
        log_tail_N=np.log(-np.expm1(np.logaddexp.reduce(kept_NK, axis=1))).astype(np.float32),
        entropy_N=(-(np.exp(logprobs_NV) * logprobs_NV).sum(1)).astype(np.float32),
        attention=AttentionSummary(
            positions_LNM=(best_LNM + 1).astype(np.int32),
            weights_LNM=np.take_along_axis(keys_LNP, best_LNM, -1).astype(np.float32),
            sink_LN=share_LNP[..., 0].astype(np.float32),
            prompt_LN=keys_LNP.sum(-1).astype(np.float32),
            entropy_LN=(-(share_LNP * np.log(share_LNP + 1e-30)).sum(-1)).astype(np.float32),
        ),
    )


def _save_tokenizer(folder: Path, words: str = "one two three four") -> None:
    """Bytes and little more, so that one character of Chinese is several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([words] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=TEMPLATE,
    ).save_pretrained(str(folder))
