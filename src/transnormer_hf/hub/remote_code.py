"""Check, in a process of its own, that a folder loads where only transformers and torch are installed."""

import importlib.abc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HIDDEN = ("transnormer_hf", "triton")  # triton: a machine without a GPU may not have it
SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
TIME_LIMIT = 900  # seconds; a model of 100 M parameters takes about ten


def check_remote_code(folder: str | os.PathLike) -> dict[str, Any]:
    """Load a folder with `trust_remote_code=True` in a process that cannot import this package, and run it once.

    The process is offline and sees no token.

    Returns:
        {"class": name of the model class, "parameters": their number, "tokenizer": class name or None}.

    Raises:
        ValueError: it does not load, a weight is missing, unexpected or of another shape, or an output is not finite.
    """
    with tempfile.TemporaryDirectory() as home:
        environment = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
        environment |= {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for cache in ("HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH"):
            environment.pop(cache, None)
        source = Path(__file__).read_text(encoding="utf-8")
        result = subprocess.run(
            [sys.executable, "-c", source, str(Path(folder).resolve())],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
            cwd=home,
            timeout=TIME_LIMIT,
        )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise ValueError(
            f"{folder} does not load by remote code in a process without this package: {lines[-1]}. Save it again with"
            " save_pretrained, with transnormer_hf imported."
        )
    return json.loads(result.stdout.splitlines()[-1])


class Refuse(importlib.abc.MetaPathFinder):
    """An import system without some packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str) -> None:
    sys.meta_path.insert(0, Refuse())
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    (architecture,) = config.architectures
    (auto_class,) = (name for name, reference in config.auto_map.items() if reference.endswith(f".{architecture}"))
    model, loading = getattr(transformers, auto_class).from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"the weights do not fit the model: {wrong}")
    shape = (1, 2, 8) if auto_class == "AutoModelForMultipleChoice" else (1, 8)
    with torch.no_grad():
        output = model.eval()(input_ids=torch.arange(16).reshape(2, 8)[: shape[-2]].reshape(shape) % config.vocab_size)
    if not output[0].isfinite().all():
        raise ValueError("the outputs are not finite")
    tokenizer = None
    if (Path(folder) / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size}")
    print(
        json.dumps(
            {
                "class": type(model).__name__,
                "parameters": model.num_parameters(),
                "tokenizer": tokenizer and type(tokenizer).__name__,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
