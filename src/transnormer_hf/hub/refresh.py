"""Bring the code saved with a model to that of this package: in a folder, or in a repository of the Hub in one commit.

Every checkpoint carries the code of the day it was saved, and runs it where this package is not installed: with a later
release of transformers, that code may no longer load, or no longer be right.

refresh_folder("outputs/sst2")
refresh_repository("user/transnormer-sst2")
"""

import fnmatch
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, snapshot_download

from ..model.configuration_transnormer import AUTO_MAP, CODE_VERSION, TransNormerConfig, without_former_defaults
from ..training.files import write_atomically
from .push import HubError, check_target, explained, retry, tag_version
from .remote_code import check_remote_code
from .staging import CODE, PUBLISHED, config_of, replace_code


@dataclass(frozen=True)
class Refreshment:
    """What was changed: names of files `written` and `removed`; for a repository the commit and its tag.

    Both names are empty, and there is no commit, where the code was that of this package already.
    """

    written: list[str]
    removed: list[str]
    commit: CommitInfo | None = None
    tag: str | None = None


def refresh_folder(model_dir: str | os.PathLike) -> Refreshment:
    """Replace the code in a folder that `save_pretrained` wrote by this package's. The weights are not touched.

    The result is tried on a copy first, in a process without this package: it loads, and a causal model generates from
    its state what it generates without.

    Raises:
        ValueError: the folder holds no TransNormer, or its weights do not work with this code. Nothing was changed.
    """
    folder = Path(model_dir)
    with tempfile.TemporaryDirectory() as copy:
        stage_refreshed(folder, Path(copy))
        check_remote_code(copy)
        written, removed = replace_code(folder)
        config = (Path(copy) / "config.json").read_text(encoding="utf-8")
    if config != (folder / "config.json").read_text(encoding="utf-8"):
        write_atomically(folder / "config.json", config)  # last: it says that the code beside it is new
        written = ["config.json", *written]
    return Refreshment(written, removed)


def refresh_repository(
    repo_id: str, *, revision: str | None = None, create_pr: bool = False, token: str | None = None
) -> Refreshment:
    """Replace the code in a repository of the Hub by this package's, in one commit with a tag of its own.

    The repository is downloaded and checked as `refresh_folder` does; only code and config.json are sent. If somebody
    else changes the repository in the meantime, the Hub refuses the commit.

    Args:
        repo_id: "user/name".
        revision: Branch to refresh. Default: main.
        create_pr: Open a pull request against main.
        token: Default: that of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: an argument is wrong, the repository holds no TransNormer, or its weights do not work with this
            code. Nothing was sent.
        HubError: there is no token, the token may not write, or the Hub keeps failing.
    """
    check_target(repo_id, revision, create_pr)
    api = HfApi(token=token or get_token(), library_name="transnormer-hf")
    if api.token is None:
        raise HubError(f"No token to push to {repo_id} with: log in with `hf auth login`, or set HF_TOKEN.")
    with tempfile.TemporaryDirectory() as copy:
        staging = Path(copy)
        with explained(f"nothing of {repo_id} was changed", repo_id):
            head = retry(lambda: api.model_info(repo_id, revision=revision))
            snapshot = retry(
                lambda: snapshot_download(
                    repo_id, revision=head.sha, allow_patterns=list(PUBLISHED), token=api.token, endpoint=api.endpoint
                )
            )
        written, removed = stage_refreshed(Path(snapshot), staging)
        check_remote_code(staging)
        if not (written or removed):
            return Refreshment([], [])
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, (staging / name).read_bytes()) for name in written),
            *(CommitOperationDelete(name) for name in removed),
        ]
        with explained(f"all of {repo_id} was changed or nothing, in one commit", repo_id):
            commit = retry(
                lambda: api.create_commit(
                    repo_id,
                    operations,
                    commit_message=f"Code of transnormer-hf {CODE_VERSION}",
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=None if create_pr else head.sha,
                ),
                statuses=(429, 503),
                transport=False,
            )
    if create_pr:
        return Refreshment(written, removed, commit)
    with explained(f"{commit.commit_url} is complete, only its tag is missing", repo_id):
        return Refreshment(written, removed, commit, tag_version(api, repo_id, commit.oid))


def stage_refreshed(folder: Path, staging: Path) -> tuple[list[str], list[str]]:
    """Fill the empty folder `staging` with a model's files, weights as links, and this package's code.

    Returns the names of the files that differ from those of `folder`, and of those that are no longer there.

    Raises:
        ValueError: `folder` does not hold a TransNormer.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model_dir={str(folder)!r} has no config.json: give a folder that save_pretrained wrote.")
    config: dict[str, Any] = config_of(folder)
    if config.get("model_type") != TransNormerConfig.model_type:
        raise ValueError(
            f"{folder} holds a model of type {config.get('model_type')!r}, not {TransNormerConfig.model_type!r}: its"
            " code is not this package's."
        )
    for path in folder.iterdir():
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in PUBLISHED):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in CODE):
                shutil.copyfile(path, staging / path.name)  # what of it is stale, is deleted
            else:
                (staging / path.name).symlink_to(path.resolve())
    written, removed = replace_code(staging)
    refreshed = without_former_defaults(config) | {
        "auto_map": {**config.get("auto_map", {}), **AUTO_MAP},
        "transnormer_version": CODE_VERSION,
    }
    if refreshed != config:
        write_atomically(staging / "config.json", json.dumps(refreshed, indent=2, sort_keys=True) + "\n")
        written = ["config.json", *written]
    return written, removed
