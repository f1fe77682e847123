"""Folders and repositories with code of an earlier release get this package's, and keep their weights."""

import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hub_server import READ_TOKEN
from huggingface_hub import HfApi
from test_push import REPO, TAG, server  # noqa: F401
from test_remote_code import SHIPPED, tiny_config
from transformers import AutoConfig
from transformers.utils import logging

import push_to_hub as script
from transnormer_hf import TransNormerForCausalLM
from transnormer_hf.hub import HubError, refresh_folder, refresh_repository
from transnormer_hf.hub.remote_code import check_remote_code
from transnormer_hf.hub.staging import shipped_code
from transnormer_hf.model.configuration_transnormer import AUTO_MAP, CODE_VERSION, without_former_defaults

ROOT = Path(__file__).parents[2]
# Before the package had rooms: 20 files, one of which is gone, and no version in config.json.
OLD_COMMIT = "40b3c5aaf922fe3a5c9939fd93c0834bb82d08ba"
SAVE_WITH_OLD_CODE = """
import sys, torch, transnormer_hf as package
torch.manual_seed(0)
sizes = dict(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, block_size=4)
tokens = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
config = package.TransNormerConfig(**sizes, **tokens, is_causal=True, initializer_range=0.5)
package.TransNormerForCausalLM(config).save_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def old_model(tmp_path_factory) -> Path:
    """A causal model that an earlier commit of this package saved, with its code."""
    root = tmp_path_factory.mktemp("old")
    archive = ["git", "archive", "--output", root / "source.tar", OLD_COMMIT, "src/transnormer_hf"]
    if subprocess.run(archive, check=False, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"this checkout has no history back to {OLD_COMMIT}")
    with tarfile.open(root / "source.tar") as source:
        source.extractall(root, filter="data")
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", SAVE_WITH_OLD_CODE, root / "model"]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert len(list((root / "model").glob("*_transnormer.py"))) == 20
    assert "features_transnormer.py" not in SHIPPED
    return root / "model"


@pytest.fixture
def old_folder(old_model, tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in old_model.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def new_folder(tmp_path) -> Path:
    torch.manual_seed(0)
    TransNormerForCausalLM(tiny_config(is_causal=True, initializer_range=0.5)).save_pretrained(tmp_path / "new")
    return tmp_path / "new"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_refreshed(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    """This package's code and nothing else of it, a complete configuration, every other file as it was."""
    code = {path.name: path.read_bytes() for path in shipped_code()}
    assert {name: after[name] for name in after if name.endswith(".py")} == code
    config = without_former_defaults(json.loads(before["config.json"]))
    assert json.loads(after["config.json"]) == config | {"auto_map": AUTO_MAP, "transnormer_version": CODE_VERSION}
    rest = {name for name in before if not name.endswith(".py")} - {"config.json"}
    assert "model.safetensors" in rest
    assert {name: after[name] for name in rest} == {name: before[name] for name in rest}


def test_a_folder_of_an_earlier_release_gets_this_code(old_folder, capsys):
    before = contents(old_folder)
    script.main(["--refresh_code", "--model_dir", str(old_folder)])
    printed = capsys.readouterr().out
    assert "removed  features_transnormer.py" in printed
    assert "written  config.json" in printed
    assert_refreshed(before, contents(old_folder))
    assert check_remote_code(old_folder)["class"] == "TransNormerForCausalLM"

    after = contents(old_folder)
    assert refresh_folder(old_folder).written == []
    assert contents(old_folder) == after


def test_a_repository_of_an_earlier_release_gets_this_code_in_one_commit(server, old_folder, capsys):  # noqa: F811
    api = HfApi(endpoint=server.url)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=old_folder)
    before, commits = server.files(REPO), len(server.repositories[REPO].commits)
    uploaded = server.uploaded_bytes
    script.main(["--refresh_code", "--repo_id", REPO])
    assert f"Tag: {TAG}" in capsys.readouterr().out
    assert len(server.repositories[REPO].commits) == commits + 1
    assert server.uploaded_bytes == uploaded  # the weights were not sent again
    assert server.repositories[REPO].tags == {TAG: server.repositories[REPO].branches["main"]}
    assert_refreshed(before, server.files(REPO))

    assert refresh_repository(REPO).commit is None
    assert len(server.repositories[REPO].commits) == commits + 1


def test_a_pull_request_and_a_missing_right(server, old_folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr("transnormer_hf.hub.refresh.check_remote_code", lambda folder: {})
    api = HfApi(endpoint=server.url)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=old_folder)
    before = server.files(REPO)
    with pytest.raises(HubError, match="may not write"):
        refresh_repository(REPO, token=READ_TOKEN)
    done = refresh_repository(REPO, create_pr=True)
    assert done.commit is not None
    assert done.commit.pr_url.endswith("/discussions/1")
    assert server.files(REPO) == before
    assert_refreshed(before, server.files(REPO, "refs/pr/1"))


def test_a_repository_that_changes_in_the_meantime_is_left_alone(server, old_folder, monkeypatch):  # noqa: F811
    api = HfApi(endpoint=server.url)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=old_folder)

    def somebody_pushes(folder):
        api.upload_file(repo_id=REPO, path_in_repo="README.md", path_or_fileobj=b"new")

    monkeypatch.setattr("transnormer_hf.hub.refresh.check_remote_code", somebody_pushes)
    with pytest.raises(HubError, match="others keep changing the repository"):
        refresh_repository(REPO)
    assert "features_transnormer.py" in server.files(REPO)


def test_weights_that_do_not_work_with_this_code_leave_the_folder_as_it_was(new_folder):
    config = json.loads((new_folder / "config.json").read_text()) | {"hidden_size": 32}
    del config["transnormer_version"]
    (new_folder / "config.json").write_text(json.dumps(config))
    (new_folder / "old_transnormer.py").write_text("old")
    before = contents(new_folder)
    with pytest.raises(ValueError, match="does not load by remote code"):
        refresh_folder(new_folder)
    assert contents(new_folder) == before


def test_code_that_loses_the_state_is_found_out(new_folder):
    """The remote check, for what this package ships passes it."""
    with (new_folder / "modeling_transnormer.py").open("a") as modeling:
        modeling.write(
            "\n\n_receive = receive\n\n\ndef receive(*args, **kwargs):\n"
            "    return [None for _ in _receive(*args, **kwargs)]\n"
        )
    with pytest.raises(ValueError, match="generation with a state and without differ"):
        check_remote_code(new_folder)


def test_a_folder_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        refresh_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a model of type 'bert'"):
        refresh_folder(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--refresh_code"],
        ["--refresh_code", "--model_dir", "out", "--repo_id", REPO],
        ["--refresh_code", "--model_dir", "out", "--create_pr"],
        ["--refresh_code", "--repo_id", REPO, "--private"],
        ["--model_dir", "out"],
    ],
)
def test_the_command_line_says_what_goes_together(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "error: --" in capsys.readouterr().err


# ---- What a folder says of its code ----


def load_config(folder: Path, caplog) -> list[str]:
    """The messages of loading a configuration, in a fresh memory of those that are given once."""
    logger = logging.get_logger("transformers")
    logging.logging.Logger.warning_once.cache_clear()
    logger.addHandler(caplog.handler)
    try:
        AutoConfig.from_pretrained(folder)
        AutoConfig.from_pretrained(folder)
        return [record.getMessage() for record in caplog.records]
    finally:
        logger.removeHandler(caplog.handler)
        caplog.clear()


def test_a_folder_with_older_code_says_so_once(new_folder, caplog):
    assert json.loads((new_folder / "config.json").read_text())["transnormer_version"] == CODE_VERSION
    assert load_config(new_folder, caplog) == []
    for recorded in ("0.0.9", None):
        config = json.loads((new_folder / "config.json").read_text()) | {"transnormer_version": recorded}
        (new_folder / "config.json").write_text(json.dumps(config))
        (message,) = load_config(new_folder, caplog)
        assert f"older than the installed {version('transnormer-hf')}" in message
        assert "--refresh_code" in message


def test_presets_have_no_code_that_could_be_old(caplog):
    assert load_config(ROOT / "model_cards" / "transnormer-t1-base", caplog) == []
