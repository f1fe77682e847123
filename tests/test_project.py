"""The project as a whole: versions agree, imports stay light, and the checkout stands alone."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import transnormer_hf
from transnormer_hf.model import configuration_transnormer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "transnormer_hf"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
# The files that save_pretrained copies to the Hub. Where they are loaded, only transformers, what it requires itself,
# and torch are sure to be installed.
MODEL = PACKAGE / "model"
SHIPPED = sorted(MODEL.glob("*_transnormer.py"))
INSTALLED_EVERYWHERE = {"torch", "transformers", "huggingface_hub", "numpy", "safetensors", *sys.stdlib_module_names}
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
REQUIREMENTS = [Requirement(line) for line in importlib.metadata.requires("transnormer-hf") or []]

# Hides packages from the import system as if they were not installed, then imports the modules named on the command
# line. (None in sys.modules would not do: transformers asks importlib.util.find_spec, which then raises.)
IMPORT_WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder

hidden, modules = (argument.split(",") for argument in sys.argv[1:])

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:  # a file of kernels may need triton if it says so; whoever imports it is guarded
        if "triton" not in hidden or "pip install triton" not in str(error):
            raise
"""


def import_without(hidden: list[str], modules: list[str]) -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT, ",".join(hidden), ",".join(modules)]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_package_imports_with_torch_and_transformers_alone():
    import_without(
        ["accelerate", "datasets", "evaluate", "peft", "triton", "sklearn", "scipy", "tensorboard", "matplotlib"],
        ["transnormer_hf", *(f"transnormer_hf.model.{path.stem}" for path in SHIPPED)],
    )


def test_every_module_imports_without_the_extras():
    import_without(
        ["sklearn", "scipy", "tensorboard", "matplotlib", "pytest", "triton"],
        [f"transnormer_hf.{module}" for module in MODULES],
    )


def test_importing_the_package_loads_the_model_alone_and_prints_nothing():
    code = (
        "import sys, transnormer_hf\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('transnormer_hf.')}\n"
        "assert rooms == {'model'}, rooms"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("path", "name"),
    {
        "baselines": "baseline_config",
        "diagnostics": "attention_report",
        "glue": "TASKS",
        "hub": "push_to_hub",
        "sequence_parallel": "make_sequence_parallel",
    }.items(),
)
def test_the_paths_of_earlier_releases_still_work(path, name):
    assert hasattr(importlib.import_module(f"transnormer_hf.{path}"), name)


def imports(tree: ast.AST) -> list[tuple[int, str, list[str]]]:
    """(dots, module, names) of every import statement; `import a.b` counts as (0, "a.b", [])."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_import_only_what_remote_code_can_follow(path):
    for dots, module, names in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if dots == 0:
            assert module.partition(".")[0] in INSTALLED_EVERYWHERE | {"triton"}, f"'{module}' may be missing there"
        else:
            assert dots == 1, f"'from {'.' * dots}{module} import' leaves the folder"
            assert module, f"'from . import {', '.join(names)}' is dropped without a word"
            assert (MODEL / f"{module}.py") in SHIPPED, f"'.{module}' is not shipped"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_import_triton_guarded_or_not_at_all(path):
    """transformers refuses remote code with an import it cannot satisfy, unless a try / except surrounds it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tried = [node for node in ast.walk(tree) if isinstance(node, ast.Try)]
    guarded = {id(child) for node in tried for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) not in guarded and isinstance(node, ast.Import | ast.ImportFrom):
            for dots, module, _ in imports(ast.Module([node], [])):
                assert dots or module.partition(".")[0] != "triton", f"line {node.lineno}: unguarded 'import {module}'"


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert latest is not None
    assert transnormer_hf.__version__ == importlib.metadata.version("transnormer-hf") == latest[1]
    assert transnormer_hf.__version__ == configuration_transnormer.CODE_VERSION  # what config.json records


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_each_requirement_has_one_lower_bound(requirement):
    bounds = [bound for bound in requirement.specifier if bound.operator in (">=", "~=")]
    assert len(bounds) == 1


def test_triton_is_asked_for_by_the_tests_alone():
    """A build of torch for a GPU brings the release that it was made with; the models run on a CPU without it."""
    (triton,) = (requirement for requirement in REQUIREMENTS if requirement.name == "triton")
    assert triton.marker is not None
    for system, extra, is_asked_for in (("Linux", "test", True), ("Linux", "", False), ("Darwin", "test", False)):
        assert triton.marker.evaluate({"platform_system": system, "extra": extra}) is is_asked_for


def test_no_file_points_outside_of_the_checkout():
    folders = ("src", "scripts", "tests", "model_cards", "docs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml")]
    stray = []
    for path in files:
        if not path.is_file() or path.suffix not in {".py", ".md", ".toml", ".json", ""}:
            continue
        text = path.read_text(encoding="utf-8")
        for relative in re.findall(r"(?<![\w./])(?:\.\./)+[\w.-]+", text):
            target = (path.parent / relative).resolve()
            if not (target.is_relative_to(ROOT) and target.exists()):
                stray.append(f"{path.relative_to(ROOT)}: {relative}")
        # A home folder or a mounted work folder is on one machine only.
        absolute = re.findall(r"(?<![\w.~}/)])/(?:home|root|work|Users|mnt)/\w+", text)
        stray += [f"{path.relative_to(ROOT)}: {folder}" for folder in absolute]
    assert not stray


def test_the_readme_names_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", readme)) <= set(targets)
    for script in re.findall(r"\bscripts/\w+\.py", readme):
        assert (ROOT / script).exists(), script


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_explains_itself(script):
    result = subprocess.run([sys.executable, script, "--help"], check=False, capture_output=True, text=True)
    if "No module named 'sentence_transformers'" in result.stderr:
        pytest.skip("train_embeddings.py needs sentence-transformers")
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout.lower()
