"""The list of environments, the tested versions and the report agree with pyproject.toml and the contract tests."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from test_project import REQUIREMENTS

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LINUX = {"platform_system": "Linux", "sys_platform": "linux"}


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The script behind `make test-versions`, with a report of its own."""
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    script = importlib.import_module("versions_report")
    monkeypatch.setattr(script, "REPORT", tmp_path / "compatibility.md")
    return script


def test_every_release_in_the_list_is_allowed_and_the_first_is_the_lower_bound(tool):
    (transformers,) = (requirement for requirement in REQUIREMENTS if requirement.name == "transformers")
    releases = [name for name in tool.entries() if re.fullmatch(r"[\d.]+", name)]
    assert all(map(transformers.specifier.contains, releases))
    assert releases == sorted(releases, key=Version)
    assert f"transformers=={Version(releases[0]).major}.{Version(releases[0]).minor}" in tool.lower_bounds()
    minors = {Version(release).release[:2] for release in releases}
    assert minors == {(5, minor) for minor in range(min(minors)[1], max(minors)[1] + 1)}  # none is left out
    assert {"floors", "newest"} <= set(tool.entries())


def test_the_oldest_torch_of_the_list_is_the_lower_bound(tool):
    (torch,) = (requirement for requirement in REQUIREMENTS if requirement.name == "torch")
    lowest = min((entry["torch"] for entry in tool.entries().values() if "torch" in entry), key=Version)
    assert {str(bound) for bound in torch.specifier} == {f">={lowest.removesuffix('.0')}"}


def test_every_contract_test_counts_for_a_cell_of_the_report(tool):
    tree = ast.parse((ROOT / "tests" / "test_contract.py").read_text(encoding="utf-8"))
    cells = [
        statement.value.args[0].value
        for group in tree.body
        if isinstance(group, ast.ClassDef)
        for statement in group.body
        if isinstance(statement, ast.Assign) and statement.targets[0].id == "pytestmark"
    ]
    assert set(cells) == set(tool.CELLS)
    loose = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")]
    assert loose == []


def test_a_partial_run_keeps_the_other_rows(tool, tmp_path):
    row = tool.Row(["1 / 1"] * len(tool.CELLS) + ["9", "2026-01-02"], ["3.11.7"] * (len(tool.PACKAGES) + 1))
    notes = ["peft: `test`: Error: a | b", "c: d"]
    failed = tool.Row(["0 / 1"] * len(tool.CELLS) + ["9", "2026-01-02"], row.versions, notes)
    tool.write_report({"5.8.1": row, "5.4.0": failed})
    assert tool.read_report() == {"5.4.0": failed, "5.8.1": row}  # in the order of the list
    text = tool.REPORT.read_text()
    tool.write_report(tool.read_report() | {"5.4.0": row})
    assert "Error" in text
    assert "Error" not in tool.REPORT.read_text()
    assert tool.read_report()["5.8.1"] == row


def test_the_tools_have_a_part_of_the_report_that_the_releases_leave_alone(tool, tmp_path, monkeypatch):
    script = importlib.import_module("ecosystem_report")
    monkeypatch.setattr(script, "REPORT", tool.REPORT)
    row = tool.Row(["1 / 1"] * len(tool.CELLS) + ["9", "2026-01-02"], ["3.11.7"] * (len(tool.PACKAGES) + 1))
    tool.write_report({"5.8.1": row})
    cases = """
        <testcase classname="tests.ecosystem.test_a" name="test_a_b[x]"><properties><property name="cell" value="trl"/>
            <property name="measured" value="3e-7"/><property name="left" value="0.5"/></properties></testcase>
        <testcase classname="tests.ecosystem.test_a" name="test_a_b[y]"><properties><property name="cell" value="trl"/>
            <property name="left" value="2"/></properties><failure message="KeyError: 3&#10;more"/></testcase>
        <testcase classname="" name="tests.ecosystem.test_b_c"><skipped message="collection skipped"
            >('b.py', 2, "Skipped: could not import 'b'")</skipped></testcase>
        <testcase classname="" name="tests.ecosystem.test_d"><error message="collection failure">x</error></testcase>
        <testcase classname="tests.ecosystem.test_export" name="test_c"><skipped/></testcase>"""
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    lines = script.read_results(tmp_path / "report.xml")
    script.write_section(script.section(lines, {"trl": "1.2"}, 60))
    text = tool.REPORT.read_text()
    assert "| trl | a b | 1 / 2 | 3e-7; left: 0.5 to 2 |" in text
    assert "| b c | nothing of the file ran: could not import 'b' | 0 / 0, 1 skipped |  |" in text
    assert "| d | nothing of the file ran: an error | 0 / 1 |  |" in text
    assert "- `tests.ecosystem.test_d`: collection failure\n" in text
    assert "in 60 seconds, with trl 1.2." in text
    assert "| export | c | 0 / 0, 1 skipped |  |" in text
    assert "- `test_a_b[y]`: KeyError: 3\n" in text
    tool.write_report(tool.read_report() | {"5.4.0": row})
    assert set(tool.read_report()) == {"5.4.0", "5.8.1"}
    assert tool.REPORT.read_text().partition(tool.TOOLS_HEADING)[2] == text.partition(tool.TOOLS_HEADING)[2]
    script.write_section(script.section({}, {}, 1))
    assert tool.REPORT.read_text().count(tool.TOOLS_HEADING) == 1
    assert set(tool.read_report()) == {"5.4.0", "5.8.1"}


# ---- Tested versions ----


def pinned(python: str) -> dict[str, str]:
    """Name -> version in constraints.txt for a Python on Linux."""
    versions = {}
    for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python, **LINUX}):
                (bound,) = requirement.specifier
                assert bound.operator == "=="
                assert requirement.name not in versions
                versions[requirement.name] = bound.version
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_tested_version_within_its_range(python):
    versions = pinned(python)
    asked = [*REQUIREMENTS, Requirement("editables")]
    for requirement in asked:
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(versions[name]), f"{name}=={versions[name]} is not '{requirement}'"
