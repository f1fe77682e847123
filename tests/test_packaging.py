"""What pip installs works by itself: the wheel, built from the sdist, in an environment without the extras."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Run by the clean environment: the package is the installed one, and the extras cannot be imported.
USE = """
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("sklearn", "scipy", "tensorboard", "matplotlib", "pytest", "triton")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import torch, transnormer_hf
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

environment, folder = map(Path, sys.argv[1:])
assert Path(transnormer_hf.__file__).is_relative_to(environment), transnormer_hf.__file__
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is transnormer_hf.TransNormerForCausalLM
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 31, (4, 9))]
arguments = TrainingArguments(folder / "out", max_steps=1, report_to=[], disable_tqdm=True, use_cpu=True)
before = [parameter.detach().clone() for parameter in model.parameters()]
Trainer(model, arguments, train_dataset=rows).train()
assert any(not now.equal(then) for now, then in zip(model.parameters(), before))
prompt = rows[0]["input_ids"][None]
options = dict(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=1)
tokens = model.eval().generate(prompt, **options)
assert tokens.shape == (1, 14)
assert tokens.equal(model.generate(prompt, use_cache=False, **options))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built as a user's pip does it from the sdist, without a network."""
    folder = tmp_path_factory.mktemp("build")
    build = [sys.executable, "-m", "hatchling", "build", "-d"]
    subprocess.run([*build, folder, "-t", "sdist"], check=True, cwd=ROOT, capture_output=True)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    subprocess.run([*build, folder, "-t", "wheel"], check=True, cwd=source, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    package = ROOT / "src" / "transnormer_hf"
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix in {".py", ".md"}}
    assert set(names) == {f"transnormer_hf/{path.relative_to(package).as_posix()}" for path in files}


def test_the_wheel_alone_loads_trains_and_generates(wheel, tmp_path):
    from transnormer_hf import TransNormerConfig, TransNormerForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "block_size": 4}
    config = TransNormerConfig(**sizes, is_causal=True, initializer_range=0.5)
    TransNormerForCausalLM(config).save_pretrained(tmp_path / "model")

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # The dependencies are those of the running environment; a .pth file in there, such as that of an editable install
    # of this package, is not followed.
    (packages,) = environment.glob("lib/python*/site-packages")
    folders = {Path(path) for path in sys.path if Path(path).name == "site-packages"}
    (packages / "dependencies.pth").write_text("\n".join(map(str, folders)))
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-W", "error:::transnormer_hf", "-c", USE, environment, tmp_path / "model"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=known)
    assert result.returncode == 0, result.stderr[-4000:]


def test_hatchling_is_there():
    """The extra "test" brings it; without it, the tests above would only say that a command failed."""
    assert importlib.util.find_spec("hatchling")
