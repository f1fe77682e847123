"""Runs the tests beside the tools around transformers and writes the second part of docs/compatibility.md.

    make test-ecosystem
    .venv/bin/python .ci/ecosystem_report.py --use /opt/tools/bin/python   # a Python that has the tools

The environment is .venvs/ecosystem, with the packages of ecosystem.txt over those of the running Python. It stays, and
is made anew when that list changes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from versions_report import ENVIRONMENTS, REPORT, ROOT, TOOLS_HEADING, make_environment

REQUIREMENTS = ROOT / ".ci" / "ecosystem.txt"
TIME_LIMIT = 1800  # seconds; quiet cores need less than half of it
ASK_VERSIONS = """
import json, sys
from importlib.metadata import PackageNotFoundError, version

def ask(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return ""

print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
"""
EXPLANATION = """
Written by `make test-ecosystem`: each line is a test, most of them beside a stock model of the same size, with what it
measured; a range is over the runs of the test. The releases are pinned in `.ci/ecosystem.txt`.
"""
ON_PAPER = "| vLLM | [what a plugin needs](serving.md#vllm-on-paper), on paper and not promised | – | nothing was run |"


@dataclass
class Line:
    """The runs of one test: outcomes, texts and numbers that it recorded, and the message of each failure."""

    outcomes: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    numbers: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def measured(self) -> str:
        """The texts, then the range of each number."""
        ranges = []
        for name, values in self.numbers.items():
            lowest, highest = f"{min(values):.2g}", f"{max(values):.2g}"
            ranges.append(f"{name}: {lowest}" + f" to {highest}" * (lowest != highest))
        return "; ".join([*self.texts, *ranges])


def environment() -> Path:
    """The Python of the environment, built where it is missing or out of date.

    Raises:
        Skipped: a package is not to be had here.
    """
    folder = ENVIRONMENTS / "ecosystem"
    installed = folder / REQUIREMENTS.name
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted:
        print("Setting up .venvs/ecosystem (once, a few minutes) ...", flush=True)
        make_environment("ecosystem", {"requirements": ["--requirement", str(REQUIREMENTS)]})
        installed.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def run_tests(python: Path, report: Path, chosen: Sequence[str]) -> int:
    """pytest's exit status; `report` is the file for its results."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [python, "-m", "pytest", "-m", "ecosystem", *(chosen or ["tests/ecosystem"]), "-p", "no:cacheprovider"]
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    command += ["-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]  # the newer one has no properties of a test
    return subprocess.run(command, check=False, cwd=ROOT, env=variables, timeout=TIME_LIMIT).returncode


def read_results(report: Path) -> dict[tuple[str, str], Line]:
    """(tool, test as a sentence) -> its runs. The tool is the test's mark cell(...), or the name of its file.

    What a test records as "measured" is a text, and a number under any other name. A file without its tool is one line
    that says so.
    """
    lines: dict[tuple[str, str], Line] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        properties = [(entry.get("name"), entry.get("value") or "") for entry in case.iter("property")]
        cells = [value for name, value in properties if name == "cell"]
        module = (case.get("classname") or "").rpartition(".")[2].removeprefix("test_")
        sentence = (case.get("name") or "").partition("[")[0].removeprefix("test_").replace("_", " ")
        skipped = case.find("skipped")
        if not module:  # the file as a whole: it was skipped, or cannot be imported
            module = sentence.rpartition(".test ")[2]
            # A tuple as Python prints it: ('file', line, "Skipped: why")
            why = (skipped.text or "").rpartition("Skipped: ")[2][:-2] if skipped is not None else "an error"
            sentence = f"nothing of the file ran: {why}"
        line = lines.setdefault((cells[0] if cells else module, sentence), Line())
        failure = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        line.outcomes.append("failed" if failure is not None else "skipped" if skipped is not None else "passed")
        for name, value in properties:
            if name == "measured" and value not in line.texts:
                line.texts.append(value)
            elif name not in ("measured", "cell"):
                line.numbers.setdefault(name or "", []).append(float(value))
        if failure is not None:
            message = (failure.get("message") or "failed").splitlines()[0]
            line.failures.append(f"`{case.get('name')}`: {message[:300]}")
    return lines


def section(lines: Mapping[tuple[str, str], Line], versions: Mapping[str, str], seconds: float) -> str:
    """The second part of the report, in Markdown."""
    rows = []
    for tool, sentence in sorted(lines, key=lambda key: key[0].lower()):
        line = lines[tool, sentence]
        skipped = line.outcomes.count("skipped")
        passed = f"{line.outcomes.count('passed')} / {len(line.outcomes) - skipped}"
        passed += f", {skipped} skipped" * bool(skipped)
        rows.append(f"| {tool} | {sentence} | {passed} | {line.measured()} |")
    rows.append(ON_PAPER)
    releases = ", ".join(f"{name} {version}" for name, version in versions.items())
    failures = [f"- {failure}" for line in lines.values() for failure in line.failures]
    parts = [
        TOOLS_HEADING,
        EXPLANATION,
        "| tool | what holds | passed | measured |\n|---|---|---|---|",
        *rows,
        f"\nOn {date.today().isoformat()}, in {seconds:.0f} seconds, with {releases}.",
        *(["\nWhat failed:\n", *failures] if failures else []),
    ]
    return "\n".join(parts) + "\n"


def write_section(text: str) -> None:
    before = REPORT.read_text(encoding="utf-8").partition(TOOLS_HEADING)[0].rstrip("\n")
    REPORT.write_text(f"{before}\n\n{text}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the tests beside the tools around transformers.")
    parser.add_argument("--use", type=Path, metavar="PYTHON", help="a Python that has the tools")
    parser.add_argument("tests", nargs="*", help="files or tests; the report is then only printed")
    options = parser.parse_args()
    python = options.use or environment()
    report = ENVIRONMENTS / "ecosystem.xml"
    start = time.monotonic()
    status = run_tests(python, report, options.tests)
    if not report.exists():
        sys.exit(f"pytest ended with status {status} and wrote no report.")
    lines = read_results(report)
    tools = re.findall(r"^([\w.-]+)==", REQUIREMENTS.read_text(encoding="utf-8").partition("\n\n")[0], re.MULTILINE)
    versions = json.loads(subprocess.check_output([python, "-c", ASK_VERSIONS, *tools], text=True))
    text = section(lines, versions, time.monotonic() - start)
    if options.tests:
        print(text)
    else:
        write_section(text)
        print(f"Wrote {REPORT.relative_to(ROOT)}.")
    sys.exit(status)


if __name__ == "__main__":
    main()
