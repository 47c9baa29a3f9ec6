"""Compile the hashed requirements of each target anew from pyproject.toml: `make lock`. Needs the package registry."""

from __future__ import annotations

import subprocess

from install import ROOT, uv_program, wheel_folders

REQUIREMENTS = ROOT / "requirements"
PLATFORM = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]


def main() -> None:
    for target in ("cpu", "cuda"):
        extras = [word for extra in (target, "demo", "dev") for word in ("--extra", extra)]
        special = ["--overrides", str(REQUIREMENTS / "cpu-overrides.txt")] if target == "cpu" else []
        special += [word for folder in wheel_folders() for word in ("--find-links", folder)] if target == "cpu" else []
        subprocess.run(
            [*uv_program(), "pip", "compile", "pyproject.toml", *extras, *special, *PLATFORM]
            + ["--generate-hashes", "--no-header", "--quiet", "--output-file", f"requirements/{target}.txt"],
            cwd=ROOT,
            check=True,
        )
        print(f"lock: requirements/{target}.txt")


if __name__ == "__main__":
    main()
