"""Runs the contract tests in one environment per entry of versions.toml and writes docs/compatibility.md.

    make test-versions
    make test-versions ONLY='5.8.1 floors'                 # the other rows stay as they are
    .venv/bin/python .ci/versions_report.py --use 'torch 2.11=/opt/gpu/bin/python'

An environment is a folder of .venvs/ whose packages shadow those of the running Python, so that it takes seconds to
make and no second torch. One that needs another torch or Python is skipped, with the reason in its row, where that
torch would be a CUDA build of several GB; `--use` names a Python that has it.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from constraints import find_python
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ENTRIES = ROOT / ".ci" / "versions.toml"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
ENVIRONMENTS = ROOT / ".venvs"
REPORT = ROOT / "docs" / "compatibility.md"
CPU_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
TIME_LIMIT = 1800  # seconds per environment; quiet cores need less than 180
LOWER_BOUNDS = (">=", "~=", "==")

CELLS = (
    "import",
    "forward and backward",
    "generate = no-cache generate",
    "assisted",
    "static",
    "save and remote load",
    "Trainer",
    "peft",
)
PACKAGES = ("torch", "triton", "transformers", "huggingface_hub", "tokenizers", "accelerate", "peft", "datasets")
ASK_VERSIONS = f"""
import json, platform
from importlib.metadata import PackageNotFoundError, version

def ask(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"

print(json.dumps([platform.python_version(), *map(ask, {PACKAGES})]))
"""

# What follows it is that of ecosystem_report.py.
TOOLS_HEADING = "## Tools around transformers"
HEAD = """# Compatibility

Written by `make test-versions`: the contract tests (`pytest -m contract`) in one environment per row, tests passed of
tests run in each cell. The environments are listed in `.ci/versions.toml`.
"""


class Skipped(Exception):
    """This machine cannot make the environment; the message says why."""


@dataclass
class Row:
    """One row of both tables: `cells` and `versions` as they are printed, and a note per failed test."""

    cells: Sequence[str]
    versions: Sequence[str]
    notes: Sequence[str] = field(default_factory=list)


# ---- Environments ----


def entries() -> dict[str, dict[str, Any]]:
    """Name -> settings, in the order of the report."""
    listed = tomllib.loads(ENTRIES.read_text(encoding="utf-8"))
    releases = {release: {"requirements": [f"transformers=={release}"]} for release in listed.pop("transformers")}
    return releases | listed


def lower_bounds() -> list[str]:
    """The lower bounds of pyproject.toml as exact versions, without torch.

    Raises:
        SystemExit: a requirement has none, or several.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = []
    for requirement in map(Requirement, project["dependencies"]):
        lowest = [bound.version for bound in requirement.specifier if bound.operator in LOWER_BOUNDS]
        if len(lowest) != 1:
            raise SystemExit(f"pyproject.toml: '{requirement}' needs one lower bound such as '{requirement.name}>=1'.")
        if requirement.name != "torch":
            pinned.append(f"{requirement.name}=={lowest[0]}")
    return pinned


def pip_install(python: Path, *arguments: str) -> None:
    """Install with the pip of the running Python into the environment of another.

    Raises:
        Skipped: pip failed; the message is the last line that it printed.
    """
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise Skipped(errors[-1].removeprefix("ERROR: "))


def install_torch(python: Path, release: str) -> None:
    """The CPU build. torch alone comes from PyTorch's index, for each package costs several tries where it is away."""
    options = ["--no-deps", "--timeout", "5", "--retries", "0", "--index-url", CPU_INDEX]
    try:
        pip_install(python, *options, f"torch=={release}")
    except Skipped as error:
        raise Skipped(f"no CPU build of torch {release} for this Python is to be had here") from error


def make_environment(name: str, settings: Mapping[str, Any]) -> Path:
    """Build the environment of an entry anew; returns its Python.

    Raises:
        Skipped: a Python or a package is not to be had here.
    """
    folder = ENVIRONMENTS / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    other_python = settings.get("python")
    interpreter = find_python(other_python) if other_python else sys.executable
    if interpreter is None:
        raise Skipped(f"there is no python{other_python} here")
    subprocess.run([interpreter, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    requirements = [*settings.get("requirements", ())]
    if settings.get("floors"):
        requirements += lower_bounds()
    if other_python:
        (pin,) = re.findall(r"^torch==([\d.]+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
        install_torch(python, pin)
        pip_install(python, "--constraint", str(CONSTRAINTS), "--editable", f"{ROOT}[test]")
        return python
    # Behind the environment's own packages, so that pip and Python see those of .venv where it has none.
    (packages / "base.pth").write_text(f"{ROOT / 'src'}\n{base_packages()}\n", encoding="utf-8")
    torch = settings.get("torch", version("torch").partition("+")[0])
    if "torch" in settings:
        install_torch(python, torch)
    constraint = folder / "torch.txt"
    constraint.write_text(f"torch=={torch}\n", encoding="utf-8")
    if requirements:
        upgrade = ["--upgrade"] if settings.get("newest") else []
        pip_install(python, "--constraint", str(constraint), *upgrade, *requirements)
    return python


def base_packages() -> Path:
    """The folder of packages of the running Python, where pytest lies too."""
    import pytest

    return Path(pytest.__file__).parents[1]


# ---- Tests ----


def run_contract(python: Path, report: Path) -> Row:
    """Run the contract tests with a Python of some environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    versions = json.loads(subprocess.check_output([python, "-c", ASK_VERSIONS], env=environment, text=True))
    command = [python, "-m", "pytest", "-m", "contract", "tests/test_contract.py", "-p", "no:cacheprovider", "-q"]
    report.unlink(missing_ok=True)
    start = time.monotonic()
    result = subprocess.run(
        [*command, f"--junitxml={report}"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=TIME_LIMIT,
    )
    seconds = f"{time.monotonic() - start:.0f}"
    cells, notes = read_results(report) if report.exists() else (["failed"] * len(CELLS), [])
    if result.returncode not in (0, 1):
        lines = (result.stdout + result.stderr).strip().splitlines() or ["no output"]
        cells, notes = ["failed"] * len(CELLS), [next((line for line in lines if line.startswith("E ")), lines[-1])]
    return Row([*cells, seconds, date.today().isoformat()], versions, notes)


def read_results(report: Path) -> tuple[list[str], list[str]]:
    """The cells, and a note for each failed test, from a junit report in which tests name their cell."""
    outcomes: dict[str, list[str]] = {cell: [] for cell in CELLS}
    notes = []
    for case in ElementTree.parse(report).iter("testcase"):
        names = [entry.get("value") for entry in case.iter("property") if entry.get("name") == "cell"]
        failure = case.find("failure")
        if failure is None:
            failure = case.find("error")
        outcome = "failed" if failure is not None else "skipped" if case.find("skipped") is not None else "passed"
        if not names or names[0] is None:
            raise SystemExit(f"{case.get('classname')}.{case.get('name')} has no mark cell(...).")
        outcomes[names[0]].append(outcome)
        if failure is not None:
            lines = (failure.get("message") or "failed").splitlines()
            errors = [line for line in lines if re.match(r"\w+Error: (?!Traceback)", line)]  # perhaps of a subprocess
            notes.append(f"{names[0]}: `{case.get('name')}`: {[*lines[:1], *errors][-1][:300]}")
    cells = []
    for results in outcomes.values():
        skipped = results.count("skipped")
        ran = len(results) - skipped
        cells.append(f"{results.count('passed')} / {ran}" + f", {skipped} skipped" * bool(skipped))
    return cells, notes


# ---- Report ----


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_report() -> dict[str, Row]:
    """The rows of the last report, by name."""
    rows: dict[str, Row] = {}
    if not REPORT.exists():
        return rows
    for line in REPORT.read_text(encoding="utf-8").partition(TOOLS_HEADING)[0].splitlines():
        if line.startswith("| ") and not line.startswith("| environment"):
            name, *cells = cells_of(line)
            if name in rows:
                rows[name].versions = cells
            else:
                rows[name] = Row(cells, [])
        elif found := re.match(r"- \*\*(.+?)\*\*: (.*)", line):
            rows[found[1]].notes = [*rows[found[1]].notes, found[2]]
    return rows


def write_report(rows: Mapping[str, Row]) -> None:
    def table(header: Sequence[str], lines: Mapping[str, Sequence[str]]) -> list[str]:
        return [
            f"| {' | '.join(['environment', *header])} |",
            "|" + "---|" * (len(header) + 1),
            *(f"| {' | '.join([name, *cells])} |" for name, cells in lines.items()),
        ]

    ordered = {name: rows[name] for name in entries() if name in rows}
    notes = [f"- **{name}**: {note}" for name, row in ordered.items() for note in row.notes]
    lines = [
        HEAD,
        *table([*CELLS, "seconds", "date"], {name: row.cells for name, row in ordered.items()}),
        "",
        "What was installed in each:",
        "",
        *table(["Python", *PACKAGES], {name: row.versions for name, row in ordered.items()}),
    ]
    if notes:
        lines += ["", "What failed, and why a row was skipped:", "", *notes]
    REPORT.parent.mkdir(exist_ok=True)
    _, heading, tools = (REPORT.read_text(encoding="utf-8") if REPORT.exists() else "").partition(TOOLS_HEADING)
    lines += ["", heading + tools.rstrip("\n")] if heading else []
    REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the contract tests on every supported release of transformers.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="entries of versions.toml; the other rows stay")
    parser.add_argument(
        "--use", action="append", default=[], metavar="NAME=PYTHON", help="run an entry with a Python that is there"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments in .venvs/")
    options = parser.parse_args()
    known, ready = entries(), dict(pair.split("=", 1) for pair in options.use)
    for name in [*(options.only or ()), *ready]:
        if name not in known:
            parser.error(f"{name!r} is not in versions.toml, which has {', '.join(known)}.")
    failed = []
    for name in options.only or known:
        print(f"{name} ...", end=" ", flush=True)
        skipped = ["skipped"] * (len(CELLS) + 1) + [date.today().isoformat()]
        try:
            python = Path(ready[name]) if name in ready else make_environment(name, known[name])
        except Skipped as reason:
            before = read_report().get(name)
            if before is not None and before.cells[0] != "skipped":
                print(f"skipped ({reason}); its row of {before.cells[-1]} stays")
                continue
            row = Row(skipped, ["–"] * (len(PACKAGES) + 1), [f"skipped: {reason}"])
            print(f"skipped: {reason}")
        else:
            ENVIRONMENTS.mkdir(exist_ok=True)
            row = run_contract(python, ENVIRONMENTS / f"{name.replace(' ', '-')}.xml")
            failed += [name] if row.notes else []
            print("; ".join(f"{cell} {result}" for cell, result in zip(CELLS, row.cells, strict=False)))
        write_report(read_report() | {name: row})  # read again: another run may have written other rows
        if not options.keep:
            shutil.rmtree(ENVIRONMENTS / name.replace(" ", "-"), ignore_errors=True)
    print(f"Wrote {REPORT.relative_to(ROOT)} on Python {platform.python_version()}.")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
