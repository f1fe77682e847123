"""Writes .ci/constraints.txt: one tested version of every package, for each Python that this package supports.

    make constraints                          # the newest that fits the torch that is there
    make constraints TORCH=torch==2.14.0      # with another torch

`make demo` and `make test` install from that file, so that a release of tomorrow cannot break them. Run `make test`
before committing a new one. pip downloads what it resolves: several GB of CUDA, once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# The build of the package itself, which pip does in an environment of its own.
BUILD = ("hatchling", "editables")
HEAD = """\
# Tested versions, written by `make constraints`: `make demo` and `make test` install them.
"""


def find_python(release: str) -> str | None:
    """A Python 3.x of this machine, or None. Those of pyenv come first: on the PATH, it has one that may do nothing."""
    of_pyenv = sorted(Path.home().glob(f".pyenv/versions/{release}.*/bin/python"))
    return str(of_pyenv[-1]) if of_pyenv else shutil.which(f"python{release}")


def resolve(python: str, torch: str) -> dict[str, str]:
    """Name -> version of what pip would install. CUDA's packages are left out: torch asks for them by version."""
    with tempfile.TemporaryDirectory() as folder:
        report, environment = Path(folder) / "report.json", Path(folder) / "environment"
        # Of its own, for pip looks at what is installed.
        subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
        command = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--quiet"]
        # Constraints and wheels of this machine are not the project's.
        own = ("PIP_CONSTRAINT", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL")
        known = {name: value for name, value in os.environ.items() if name not in own}
        subprocess.run(
            [*command, "--dry-run", "--report", str(report), torch, *BUILD, f"{ROOT}[test,train,plot]"],
            check=True,
            env={**known, "PIP_CONFIG_FILE": os.devnull},
        )
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {}
    for package in found:
        name, version = package["metadata"]["name"], package["metadata"]["version"]
        if name != "transnormer-hf" and not name.startswith(("nvidia", "cuda")):
            versions[name.lower().replace("_", "-")] = version.partition("+")[0]
    return versions


def marker(using: list[str]) -> str:
    """The Pythons that a version is for, as a marker; the newest of PYTHONS stands for those after it."""
    first, last = PYTHONS.index(using[0]), PYTHONS.index(using[-1])
    if len(using) != last - first + 1:
        return " or ".join(f'python_version == "{python}"' for python in using)
    bounds = [f'python_version >= "{using[0]}"'] if first else []
    bounds += [f'python_version < "{PYTHONS[last + 1]}"'] if last + 1 < len(PYTHONS) else []
    return " and ".join(bounds)


def write(resolved: Mapping[str, Mapping[str, str]]) -> None:
    """Python -> name -> version, as a file of constraints."""
    pythons: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for python, versions in resolved.items():
        for name, version in versions.items():
            pythons[name][version].append(python)
    lines = [
        f"{name}=={version}" + (f"; {condition}" if (condition := marker(using)) else "")
        for name in sorted(pythons)
        for version, using in pythons[name].items()
    ]
    CONSTRAINTS.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"Wrote {CONSTRAINTS.relative_to(ROOT)}: {len(pythons)} packages for Python {', '.join(PYTHONS)}.")


def main(torch: str) -> None:
    interpreters = {python: find_python(python) for python in PYTHONS}
    resolved = {}
    for python, interpreter in interpreters.items():
        if interpreter is None:
            raise SystemExit(f"make constraints needs Python {', '.join(PYTHONS)}: there is no python{python} here.")
        resolved[python] = resolve(interpreter, torch)
    write(resolved)


if __name__ == "__main__":
    main(*sys.argv[1:])
