"""README.md and docs/*.md: their Python runs as it stands, and what they link to and name is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import link_lines

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHIPPED = ROOT / "src" / "transnormer_hf" / "model"

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run_python(code: str, folder: Path) -> None:
    """In a process of its own that knows no Hub, in an empty folder with the presets in it."""
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=folder, env=env
    )
    assert result.returncode == 0, result.stderr


def test_the_readmes_python_runs_as_it_stands(tmp_path):
    found = blocks(ROOT / "README.md", "python")
    assert len(found) == 3
    run_python("\n".join(found), tmp_path)
    assert {path.name for path in SHIPPED.glob("*_transnormer.py")} <= {
        path.name for path in (tmp_path / "outputs" / "tiny").iterdir()
    }


def test_the_first_example_has_ten_lines_and_needs_none_of_the_others():
    first = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in first.splitlines() if line]) <= 10


@pytest.mark.slow
def test_the_guides_python_runs_as_it_stands(tmp_path):
    found = blocks(ROOT / "docs" / "guides.md", "python")
    assert len(found) >= 6
    run_python("\n".join(found), tmp_path)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_names_every_file_that_is_saved_with_a_model():
    table = re.findall(r"`(\w+_transnormer\.py)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(table) == {path.name for path in SHIPPED.glob("*_transnormer.py")}


def test_links_into_the_code_point_at_the_lines_they_name():
    link_lines.main(["--check"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(link_lines.LINK.findall(readme)) == len(re.findall(r"\.py#L", readme)) >= 7


def test_lines_that_moved_are_found_and_links_brought_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(link_lines, "ROOT", tmp_path)
    code, page = tmp_path / "code.py", tmp_path / "README.md"
    code.write_text("\n\n    return x @ y  # here\n")
    page.write_text('See [the product](code.py#L1 "return x @ y").\n')
    with pytest.raises(SystemExit, match=r"link_lines\.py"):
        link_lines.main(["--check"])
    link_lines.main([])
    assert page.read_text() == 'See [the product](code.py#L3 "return x @ y").\n'
    link_lines.main(["--check"])
    for lines in ("return y\n", "return x @ y\nreturn x @ y\n"):  # no such line, and two
        code.write_text(lines)
        with pytest.raises(ValueError, match="return x @ y"):
            link_lines.main([])


@of_each_page
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)", text):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if fragment and target.suffix == ".md":
            assert fragment in anchors(target), link


@of_each_page
def test_images_and_figures_are_there_and_small(page):
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / image).stat().st_size < 2**20, image


@of_each_page
def test_only_commands_and_modules_that_exist_are_named(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = "\n".join([*blocks(page, "bash"), *re.findall(r"`[^`\n]+`", text)])
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", commands)) <= set(targets)
    for script in re.findall(r"\b(?:scripts|docs|tests)/[\w/]+\.py", text):
        assert (ROOT / script).exists(), script
    for module in set(re.findall(r"\btransnormer_hf(?:\.[a-z_]+)+", text)):
        path = ROOT / "src" / module.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").exists() or is_attribute(module), module


def is_attribute(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return hasattr(__import__(module, fromlist=[attribute]), attribute)
