"""Set up this checkout: `python3 requirements/install.py`. Standard library only; needs Python 3.9 or newer to run.

Creates .venv with Python 3.11, installs the hashed requirements for what the machine has (CUDA or CPU), installs the
project itself. No DeepSpeed op is compiled: training uses none. A second run finds everything in place.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TOOLS = ROOT / ".tools"
STAMP = VENV / "installed-requirements.sha256"


def main() -> None:
    target = _target()
    requirements = ROOT / "requirements" / f"{target}.txt"
    fingerprint = _fingerprint(requirements)
    if STAMP.is_file() and STAMP.read_text() == fingerprint:
        print(f"set-up: .venv is up to date ({target})")
        return
    uv = uv_program()
    if not PYTHON.is_file():
        _run("create .venv with Python 3.11", [*uv, "venv", "--quiet", "--python", "3.11", str(VENV)])
    _run(
        f"install {_count(requirements)} locked packages for {target}",
        [
            *uv,
            "pip",
            "install",
            "--quiet",
            "--python",
            str(PYTHON),
            "--require-hashes",
            "--no-deps",
            "--compile-bytecode",
        ]
        + (["--torch-backend", "cpu"] if target == "cpu" and not wheel_folders() else [])
        + [word for folder in wheel_folders() for word in ("--find-links", folder)]
        + ["--requirements", str(requirements)],
    )
    _run(
        "install the project itself",
        [*uv, "pip", "install", "--quiet", "--python", str(PYTHON), "--no-deps", "--no-build-isolation"]
        + ["--editable", str(ROOT)],
    )
    STAMP.write_text(fingerprint)
    print("set-up: done")


def _target() -> str:
    """`TARGET=cpu|cuda` if given, else cuda where the NVIDIA driver answers."""
    asked = os.environ.get("TARGET", "")
    if asked not in ("", "cpu", "cuda"):
        _fail(f"TARGET is {asked!r}", "it can be cpu or cuda; leave it out to choose by what the machine has")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        _fail(f"{platform.system()} on {platform.machine()}", "the locked requirements are for Linux on x86-64")
    if asked:
        print(f"set-up: target {asked}, as TARGET says")
        return asked
    driver = shutil.which("nvidia-smi")
    answers = driver is not None and subprocess.run([driver, "-L"], capture_output=True, check=False).returncode == 0
    target = "cuda" if answers else "cpu"
    print(f"set-up: target {target}: {'the NVIDIA driver answers' if answers else 'no NVIDIA driver here'}")
    return target


def uv_program() -> list[str]:
    """uv of the pinned version from the package registry, in .tools; nothing outside the checkout is touched."""
    program = TOOLS / "bin" / "uv"
    if not program.is_file():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--require-hashes"]
        _run("fetch uv", [*pip, "--target", str(TOOLS), "--requirement", str(ROOT / "requirements" / "uv.txt")])
    return [str(program)]


def wheel_folders() -> list[str]:
    """Folders of wheels that pip is configured with, which uv does not read."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True, check=False
    ).stdout
    words = [*configured.split(), *os.environ.get("PIP_FIND_LINKS", "").split()]
    return list(dict.fromkeys(word for word in words if Path(word).is_dir()))


def _fingerprint(requirements: Path) -> str:
    facts = [requirements.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()


def _count(requirements: Path) -> int:
    return sum("==" in line for line in requirements.read_text().splitlines())


def _run(what: str, command: list[str]) -> None:
    print(f"set-up: {what} …", flush=True)
    start = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, check=False)
    if result.returncode:
        _fail(f"could not {what} (exit code {result.returncode})", "its own message is above; run `make setup` again")
    print(f"set-up: {what}: {time.monotonic() - start:.0f} s", flush=True)


def _fail(message: str, hint: str) -> None:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
