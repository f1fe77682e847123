"""Which files of a model's folder go to the Hub: all that the model needs, no secrets, a valid card. No network."""

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, metadata_load

from ..model.configuration_transnormer import AUTO_MAP, TransNormerConfig
from ..training.files import replacing
from .model_card import PIPELINES, build_architecture_card

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
CODE = ("*_transnormer.py",)
TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
RESULTS = ("*_results.json", "training_args.json")
PAGES = ("README.md", "LICENSE*", "*.png", "*.svg")
SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
PUBLISHED = ("config.json", "generation_config.json", *WEIGHTS, *CODE, *TOKENIZER, *RESULTS, *PAGES, *SENTENCES)
# Of the modules that sentence-transformers runs after the model, each in a folder of its own.
MODULE_FILES = ("*.json", "*.safetensors")

# What a training run leaves beside its model, and why it stays where it is.
LEFT_OUT = {
    "checkpoint-*": "a checkpoint of the training",
    "optimizer*": "the optimizer's state",
    "scheduler*": "the optimizer's state",
    "scaler*": "the optimizer's state",
    "rng_state*": "the optimizer's state",
    "trainer_state.json": "a log",
    "runs": "a log",
    "logs": "a log",
    "*.log": "a log",
    "events.out.tfevents.*": "a log",
    "training_args.bin": "a pickle; what it says goes into training_args.json",
    "*.bin": "a pickle",
    "*.pt": "a pickle",
    "*.pth": "a pickle",
    "*.ckpt": "a pickle",
}
SECRET_FILES = (
    ".env",
    ".env.*",
    "*.env",
    ".netrc",
    "*.pem",
    "*.key",
    "id_rsa*",
    "id_ed25519*",
    ".git-credentials",
    "token",
)
SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_\w{50,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": r"\bAIza[\w-]{35}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{40,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


def stage(model_dir: Path, staging: Path, repo_id: str, token: str | bool | None) -> dict[str, str]:
    """Link the files to publish into the empty folder `staging`; return the others, name -> why they stay.

    `token` is the user's; no file may contain it.

    Raises:
        ValueError: a file is missing, a secret is among the files, or the card's metadata are not valid.
    """
    if not model_dir.is_dir():
        raise ValueError(f"model_dir={str(model_dir)!r} is not a folder.")
    refuse_secret_files(model_dir)
    modules = stage_modules(model_dir, staging)
    left_out = {}
    for path in sorted(model_dir.iterdir()):
        reason = next((why for pattern, why in LEFT_OUT.items() if fnmatch.fnmatch(path.name, pattern)), None)
        if reason is None and path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in PUBLISHED):
            (staging / path.name).symlink_to(path.resolve())
        elif path.name not in modules:
            left_out[path.name + "/" * path.is_dir()] = reason or "not a file of a model"
    check_model(model_dir, staging)

    if "training_args.bin" in left_out and not (staging / "training_args.json").exists():
        try:
            arguments = read_training_args(model_dir / "training_args.bin")
        except Exception as error:  # pickles of other versions fail in many ways; the model needs none of them
            left_out["training_args.bin"] = f"a pickle that was not read: {error}"
        else:
            (staging / "training_args.json").write_text(json.dumps(arguments, indent=2) + "\n", encoding="utf-8")

    given = staging / "README.md"
    card = read_card(given) if given.exists() else build_architecture_card(staging, repo_id)
    card = complete_card(card, config_of(staging), repo_id)
    given.unlink(missing_ok=True)
    card.save(given)
    refuse_secrets(staging, token)
    return left_out


def stage_modules(model_dir: Path, staging: Path) -> list[str]:
    """Link the modules that sentence-transformers runs after the model; return the names of their folders.

    Raises:
        ValueError: a module is not there, or holds a file that is not published: without it the embeddings would be
            others.
    """
    if (model_dir / "model_head.pkl").exists():
        raise ValueError(
            f"model_dir={str(model_dir)!r} holds a classifier of SetFit, model_head.pkl, and pickles are not published:"
            " use SetFit's own push_to_hub."
        )
    if not (model_dir / "modules.json").is_file():
        return []
    listed = json.loads((model_dir / "modules.json").read_text(encoding="utf-8"))
    folders = [module["path"] for module in listed if module["path"]]
    for folder in folders:
        if Path(folder).name != folder or not (model_dir / folder).is_dir():
            raise ValueError(f"modules.json names {folder!r}, which is no folder of {model_dir}: save the model again.")
        for path in sorted((model_dir / folder).rglob("*")):
            if path.is_dir():
                continue
            name = path.relative_to(model_dir)
            if not any(fnmatch.fnmatch(path.name, pattern) for pattern in MODULE_FILES):
                raise ValueError(
                    f"{name} belongs to a module of sentence-transformers, and only {' and '.join(MODULE_FILES)} are"
                    " published: save the model again, or use its own push_to_hub."
                )
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).symlink_to(path.resolve())
    return folders


def staged_files(staging: Path) -> dict[str, Path]:
    """Name in the repository -> file, in order."""
    return {path.relative_to(staging).as_posix(): path for path in sorted(staging.rglob("*")) if not path.is_dir()}


def shipped_code() -> list[Path]:
    """The files of code that go with every checkpoint, as this package has them."""
    return sorted((Path(__file__).parents[1] / "model").glob(CODE[0]))


def replace_code(folder: Path) -> tuple[list[str], list[str]]:
    """Bring the code in a model's folder to that of this package; returns the names of what was written and removed.

    Files are written one by one, each as a whole. Those of an older layout, which nothing imports any more, go last.
    """
    written = []
    for source in shipped_code():
        target = folder / source.name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            with replacing(target) as temporary:  # a link is replaced, not written through
                shutil.copyfile(source, temporary)
            written.append(source.name)
    names = {source.name for source in shipped_code()}
    stale = sorted(path for path in folder.glob(CODE[0]) if path.name not in names)
    for path in stale:
        path.unlink()
    return written, [path.name for path in stale]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def check_model(model_dir: Path, staging: Path) -> None:
    """Raise ValueError unless the folder holds one whole TransNormer model with its code."""
    names = {path.name for path in staging.iterdir()}
    if "config.json" not in names:
        hint = (
            " It holds an adapter: publish that with peft's push_to_hub, or the model after merge_and_unload()."
            if (model_dir / "adapter_config.json").exists()
            else " Give a folder that save_pretrained wrote."
        )
        raise ValueError(f"model_dir={str(model_dir)!r} has no config.json.{hint}")
    config = config_of(staging)
    if config.get("model_type") != TransNormerConfig.model_type:
        raise ValueError(
            f"model_dir={str(model_dir)!r} holds a model of type {config.get('model_type')!r}, not"
            f" {TransNormerConfig.model_type!r}: publish it with its own push_to_hub."
        )
    if {"model.safetensors", "model.safetensors.index.json"} <= names:
        raise ValueError(
            f"model_dir={str(model_dir)!r} holds the weights twice, whole and in shards, and model.safetensors would be"
            " loaded: remove the older ones."
        )
    needed = {f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    if index := names & {"model.safetensors.index.json"}:
        needed |= set(json.loads((staging / index.pop()).read_text(encoding="utf-8"))["weight_map"].values())
    else:
        needed.add("model.safetensors")
    missing = sorted(needed - names)
    auto_map = config.get("auto_map") or {}  # earlier releases name fewer classes
    if not auto_map or not auto_map.items() <= AUTO_MAP.items():
        missing.append("auto_map in config.json")
    if len(config.get("architectures") or []) != 1:
        missing.append("architectures in config.json")
    if missing:
        raise ValueError(
            f"model_dir={str(model_dir)!r} lacks {', '.join(missing)}: save the model with save_pretrained, with"
            " transnormer_hf imported."
        )


def refuse_secret_files(model_dir: Path) -> None:
    """Raise ValueError if a file anywhere in the folder is one that people keep secrets in."""
    for path in sorted(model_dir.rglob("*")):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in SECRET_FILES):
            raise ValueError(
                f"{path.relative_to(model_dir)} looks like a file of secrets: take it out of {model_dir}; nothing was"
                " sent."
            )


def refuse_secrets(staging: Path, token: str | bool | None) -> None:
    """Raise ValueError if a text to publish contains a key; the message says where, never what."""
    for name, path in staged_files(staging).items():
        if path.suffix == ".safetensors":
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        found = {kind: re.search(pattern, text) for kind, pattern in SECRETS.items()}
        if isinstance(token, str):
            found["your own token"] = re.search(re.escape(token), text)
        for kind, match in found.items():
            if match is not None:
                number = text.count("\n", 0, match.start()) + 1
                raise ValueError(
                    f"{name}, line {number}, contains what looks like {kind}: take it out (and revoke it, if it"
                    " was ever shared); nothing was sent."
                )


def read_training_args(path: Path) -> dict[str, Any]:
    """The arguments in the Trainer's training_args.bin, without tokens and without paths of this machine.

    Raises:
        ValueError: the pickle refers to more than classes of transformers and accelerate; nothing of it was run.
    """
    trusted = (
        "transformers.training_args",
        "transformers.trainer_utils.",
        "transformers.trainer_pt_utils.",
        "accelerate.",
    )
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    foreign = [name for name in names if not name.startswith(trusted)]
    if foreign:
        raise ValueError(f"it needs {', '.join(foreign)}")
    classes = [getattr(import_module(module), name) for module, _, name in (name.rpartition(".") for name in names)]
    with torch.serialization.safe_globals(classes):
        arguments = torch.load(path, weights_only=True).to_dict()
    return {
        name: value
        for name, value in json.loads(json.dumps(arguments, default=str)).items()
        if not name.endswith(("_dir", "_token")) and not (isinstance(value, str) and os.path.isabs(value))
    }


# ---- The card ----


def read_card(path: Path) -> ModelCard:
    """A card with valid metadata.

    Raises:
        ValueError: they are not valid; the message says what is wrong.
    """
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # yaml, the model-index and a missing field raise errors of three kinds
        raise ValueError(f"README.md: its metadata are not valid ({type(error).__name__}: {error}).") from error
    problems = []
    parsed: Any = card.data
    data = metadata_load(path) or {}  # as written: the class makes a list of letters out of a word
    for name in ("tags", "datasets"):
        if not isinstance(data.get(name, []), list):
            problems.append(f"{name} must be a list, not {data[name]!r}")
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                problems.append(f"{name} {value!r} is not a name on the Hub")
    for result in parsed.eval_results or []:
        if not isinstance(result.metric_value, int | float):
            problems.append(f"the value {result.metric_value!r} of {result.metric_type} in model-index is not a number")
    if problems:
        raise ValueError(f"README.md: its metadata are not valid ({'; '.join(problems)}).")
    return card


def complete_card(card: ModelCard, config: Mapping[str, Any], repo_id: str) -> ModelCard:
    """Fill in the metadata that loading needs, where the card lacks them, and name the repository in its code."""
    data: Any = card.data
    data.library_name = data.library_name or "transformers"
    data.pipeline_tag = data.pipeline_tag or PIPELINES.get(config["architectures"][0])
    tags = data.tags or []
    data.tags = [*tags, *(tag for tag in (TransNormerConfig.model_type, "custom_code") if tag not in tags)]
    named = 'SentenceTransformer("sentence_transformers_model_id"'  # in the card that sentence-transformers writes
    card.text = card.text.replace(f"{named})", f'SentenceTransformer("{repo_id}", trust_remote_code=True)')
    if data.model_name:  # the scripts write their folder's name where the repository was not known yet
        blocks = re.split(r"(```python\n.*?```)", card.text, flags=re.DOTALL)
        card.text = "".join(
            block.replace(f'"{data.model_name}"', f'"{repo_id}"') if block.startswith("```python") else block
            for block in blocks
        )
        data.model_name = repo_id.rpartition("/")[2]
    return card
