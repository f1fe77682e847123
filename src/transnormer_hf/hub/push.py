"""Publish a model on the Hub, with all it needs and nothing else; read results back from its card.

push_to_hub("outputs/sst2", "user/transnormer-sst2")   # a folder
push_model(model, "user/transnormer-sst2")             # a model in memory
load_metric_table("user/transnormer-sst2")
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers.utils import logging

from .model_card import build_architecture_card
from .remote_code import check_remote_code
from .staging import CODE, WEIGHTS, config_of, stage, staged_files

logger = logging.get_logger(__name__)

ATTEMPTS = 4
RETRIED = (408, 409, 412, 429, 500, 502, 503, 504)
# huggingface_hub 2 speaks through httpx2, 1 through httpx.
TRANSPORT_ERRORS: tuple[type[Exception], ...] = (
    *(import_module(name).TransportError for name in ("httpx2", "httpx") if find_spec(name)),
    json.JSONDecodeError,  # something between here and the Hub answers in its place
)
# Errors of HTTP, of an upload in a thread (RuntimeError) or in hf_xet (OSError), and of the connection.
FAILURES: tuple[type[Exception], ...] = (HfHubHTTPError, RuntimeError, OSError, *TRANSPORT_ERRORS)

Result = TypeVar("Result")


class HubError(RuntimeError):
    """The Hub refused or could not be reached. The message says what was done, what was not, and what would help."""


@dataclass(frozen=True)
class UploadPlan:
    """What goes to the Hub: `files` (name -> size in bytes), and what stays, `left_out` (name -> why)."""

    files: Mapping[str, int]
    left_out: Mapping[str, str]
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def size(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class Publication:
    """A finished push. `tag` is None for a pull request, `pull_request` (its address) None for anything else."""

    repo_id: str
    commit: CommitInfo
    tag: str | None
    pull_request: str | None


# ---- Push ----


def push_to_hub(
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Publication:
    """Publish a saved model: weights, configuration, code, tokenizer, card, results, training arguments; of a
    `SentenceTransformer` also its modules.

    Everything goes up in one commit: a push that dies leaves the repository as it was, and the same call resumes it.
    The commit gets the first free tag of v0.1.0, v0.1.0-1, ... (the version of the code in it).

    Args:
        model_dir: Folder that `save_pretrained` or the Trainer wrote.
        repo_id: "user/name"; created where it does not exist.
        private: Whether to create it private.
        revision: Branch to push to, created where it does not exist. Default: main.
        create_pr: Open a pull request against main.
        token: Default: that of `hf auth login` or HF_TOKEN. It is neither printed nor written anywhere.
        commit_message: Title of the commit.
        commit_description: Text below it.

    Raises:
        ValueError: an argument or the folder is wrong: a file is missing, a file contains a secret, the card's metadata
            are invalid, or the model does not load by remote code. Nothing was sent.
        HubError: there is no token, the token may not write, or the Hub keeps failing.
    """
    check_target(repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        api = HfApi(token=token or get_token(), library_name="transnormer-hf")
        stage(Path(model_dir), staging, repo_id, api.token)
        if api.token is None:
            raise HubError(f"No token to push to {repo_id} with: log in with `hf auth login`, or set HF_TOKEN.")
        check_remote_code(staging)

        with explained(f"{repo_id} could not be created", repo_id):
            retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
            if private and not retry(lambda: api.model_info(repo_id)).private:
                raise ValueError(f"private=True, but {repo_id} exists and is public: make it private first.")
            if revision is not None:
                retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        with explained(f"nothing of {repo_id} was changed", repo_id):
            message = commit_message or f"Upload {config_of(staging)['architectures'][0]}"
            commit = send(api, repo_id, staging, revision, create_pr, message, commit_description)
        if create_pr:
            return Publication(repo_id, commit, None, commit.pr_url)
        with explained(f"{commit.commit_url} is complete, only its tag is missing; the same call sets it", repo_id):
            return Publication(repo_id, commit, tag_version(api, repo_id, commit.oid), None)


def plan_upload(
    model_dir: str | os.PathLike, repo_id: str, *, revision: str | None = None, create_pr: bool = False
) -> UploadPlan:
    """What `push_to_hub` would send, after every check that needs no network.

    Raises:
        ValueError: as in `push_to_hub`.
    """
    check_target(repo_id, revision, create_pr)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        left_out = stage(Path(model_dir), staging, repo_id, get_token())
        check_remote_code(staging)
        files = {name: path.stat().st_size for name, path in staged_files(staging).items()}
        return UploadPlan(files, left_out, ModelCard.load(staging / "README.md").data.to_dict())


def push_model(
    model: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
) -> CommitInfo:
    """Publish a model in memory as `push_to_hub` does a folder; the arguments are those of `model.push_to_hub`.

    transformers' own `model.push_to_hub` gives a repository that loads as well, but with an empty card, no tag and no
    check. Here, the card is written from the configuration, unless the repository already has one. The tokenizer is
    pushed by itself: `tokenizer.push_to_hub(repo_id)`.
    """
    api = HfApi(token=token if isinstance(token, str) else None)
    if "/" not in repo_id:
        with explained("nothing was sent", repo_id):
            repo_id = f"{retry(api.whoami)['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        with explained("nothing was sent", repo_id):
            card = published_card(api, repo_id, revision) or build_architecture_card(Path(folder), repo_id)
        data: Any = card.data
        known = data.tags or []
        data.tags = [
            *known,
            *(tag for tag in ([tags] if isinstance(tags, str) else tags or []) if tag not in known),
        ]
        card.save(Path(folder) / "README.md")
        return push_to_hub(
            folder,
            repo_id,
            private=private,
            revision=revision,
            create_pr=create_pr,
            token=token if isinstance(token, str) else None,
            commit_message=commit_message,
            commit_description=commit_description,
        ).commit


def load_metric_table(
    repo_id: str | os.PathLike, *, revision: str | None = None, token: str | None = None
) -> list[dict[str, Any]]:
    """The results in the card of a repository or a local folder, one row per figure.

    Returns:
        Rows with task, dataset, config, split, metric, name, value and args (None where the card does not say).

    Raises:
        ValueError: the card's `model-index` is not valid.
    """
    path = Path(repo_id) / "README.md"
    if not path.is_file():
        path = Path(hf_hub_download(str(repo_id), "README.md", revision=revision, token=token))
    data: Any = ModelCard.load(path).data
    return [
        {
            "task": result.task_type,
            "dataset": result.dataset_type,
            "config": result.dataset_config,
            "split": result.dataset_split,
            "metric": result.metric_type,
            "name": result.metric_name,
            "value": result.metric_value,
            "args": result.dataset_args,
        }
        for result in data.eval_results or []
    ]


def check_target(repo_id: str, revision: str | None, create_pr: bool) -> None:
    """Raise ValueError unless the arguments name a repository and a branch that can be pushed to."""
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} must be of the form user/name.")
    if create_pr and revision is not None:
        raise ValueError(f"create_pr opens a pull request against main: leave revision={revision!r} out.")
    if revision is not None and (re.fullmatch(r"[0-9a-f]{40}", revision) or revision.startswith("refs/")):
        raise ValueError(f"revision={revision!r} must be the name of a branch: a commit cannot be pushed to.")


def published_card(api: HfApi, repo_id: str, revision: str | None) -> ModelCard | None:
    """The card that the repository has, None where there is no such repository, branch or card yet."""
    try:
        return ModelCard.load(api.hf_hub_download(repo_id, "README.md", revision=revision))
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError):
        return None


# ---- Requests ----


def send(
    api: HfApi,
    repo_id: str,
    staging: Path,
    revision: str | None,
    create_pr: bool,
    message: str,
    description: str | None,
) -> CommitInfo:
    """One commit that adds every file of `staging` and deletes the weights and code that they replace.

    A lost answer does no harm: the next attempt finds its files in place and nothing left to commit. (A pull request is
    sent only once, or it would be opened twice.)

    `HfApi.upload_folder` with its `delete_patterns` is not used: it sends a folder in several commits where hf_xet is
    installed, so that a push that dies could leave new code beside old weights.
    """
    files = staged_files(staging)

    def commit() -> CommitInfo:
        head = api.model_info(repo_id, revision=revision)
        present = (sibling.rfilename for sibling in head.siblings or [])
        replaced = filter_repo_objects(present, allow_patterns=[*WEIGHTS, *CODE])
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, str(path.resolve())) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in replaced if name not in files),
            ],
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else head.sha,
        )

    def attempt() -> CommitInfo:
        try:
            return commit()
        except (OSError, RuntimeError) as error:
            # huggingface_hub 2 uploads through Xet alone; where its servers are out of reach, LFS may not be.
            if isinstance(error, HfHubHTTPError) or constants.HF_HUB_DISABLE_XET or status_of(error):
                raise
            logger.warning("Upload through Xet failed (%s): falling back to LFS.", error)
        with without_xet():
            return commit()

    return retry(attempt, statuses=(429, 503) if create_pr else RETRIED, transport=not create_pr)


@contextmanager
def without_xet() -> Iterator[None]:
    """huggingface_hub as with HF_HUB_DISABLE_XET=1, which it reads once, when it is imported."""
    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def tag_version(api: HfApi, repo_id: str, commit: str) -> str:
    """Tag a commit with the package's version, with a number behind it if that tag is another commit's."""
    from .. import __version__

    while True:
        taken = {tag.name: tag.target_commit for tag in retry(lambda: api.list_repo_refs(repo_id)).tags}
        names = [f"v{__version__}", *(f"v{__version__}-{number}" for number in range(1, len(taken) + 1))]
        for name in names:
            if taken.get(name) == commit:
                return name
        free = next(name for name in names if name not in taken)
        try:
            retry(partial(api.create_tag, repo_id, tag=free, revision=commit), statuses=(429, 500, 502, 503, 504))
        except HfHubHTTPError as error:
            if status_of(error) != 409:  # somebody else took the name in between
                raise
        else:
            return free


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, through the errors that it was raised from."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None


def is_transport_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, TRANSPORT_ERRORS):
            return True
        error = error.__cause__
    return False


def retry(call: Callable[[], Result], *, statuses: tuple[int, ...] = RETRIED, transport: bool = True) -> Result:
    """Call again after a failure that may pass, up to ATTEMPTS times in all.

    huggingface_hub retries uploads and downloads itself, by `http_backoff`; this is for the methods of HfApi that send
    their request once (create_repo, model_info, create_branch, create_commit, create_tag). `http_backoff` takes a URL
    in place of a method, and would send a refused commit again with the same parent.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except FAILURES as error:
            passes = status_of(error) in statuses or (transport and is_transport_error(error))
            if not passes or attempt == ATTEMPTS:
                raise
            wait = 2.0 ** (attempt - 1)
            response = getattr(error, "response", None)
            after = response.headers.get("Retry-After", "") if response is not None else ""
            if after.isdigit():
                wait = min(float(after), 300.0)
            logger.warning("The Hub: %s; again in %.0f s.", str(error).splitlines()[0], wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


@contextmanager
def explained(state: str, repo_id: str) -> Iterator[None]:
    """Turn an error of huggingface_hub into a HubError that says what was done, what went wrong and what would help."""
    try:
        yield
    except FAILURES as error:
        if isinstance(error, HubError):
            raise
        status = status_of(error)
        if status == 401:
            cause = "the Hub does not know this token: log in again with `hf auth login`, or renew HF_TOKEN"
        elif status == 403:
            cause = (
                f"this token may not write to {repo_id}: use one with the role 'write' for {repo_id.partition('/')[0]},"
                " or propose the files with create_pr"
            )
        elif status == 404:
            cause = "there is no such repository or branch, or this token may not see it"
        elif status == 409 or status == 412:
            cause = "others keep changing the repository at the same time: push again when they are done"
        elif status == 429:
            cause = "the Hub asks for fewer requests: wait some minutes, then repeat the call"
        elif status is not None and status >= 500:
            cause = f"the Hub fails (status {status}): repeat the call later, what has arrived is not sent again"
        elif status is not None:
            cause = f"the Hub refused (status {status}): {str(error).strip().splitlines()[-1]}"
        elif isinstance(error, json.JSONDecodeError):
            cause = f"something between here and the Hub ({constants.ENDPOINT}) answers in its place, perhaps a proxy"
        elif is_transport_error(error):
            cause = (
                f"the connection to {constants.ENDPOINT} broke ({type(error).__name__}): repeat the call, what has"
                " arrived is not sent again"
            )
        else:
            cause = str(error)
        raise HubError(f"Push to {repo_id}: {state}; {cause}.") from error


__all__ = ["HubError", "Publication", "UploadPlan", "load_metric_table", "plan_upload", "push_model", "push_to_hub"]
