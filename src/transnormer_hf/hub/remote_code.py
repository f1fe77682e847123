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
    """Load a folder with `trust_remote_code=True` in a process that cannot import this package, and run it.

    A causal language model also generates a few tokens from its state, which must have the logits of a whole forward.
    The process is offline and sees no token.

    Returns:
        {"class": name of the model class, "parameters": their number, "tokenizer": class name or None}.

    Raises:
        ValueError: it does not load, a weight is missing, unexpected or of another shape, an output is not finite, or
            generation with a state differs from generation without.
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
            f"{folder} does not load by remote code in a process without this package: {lines[-1].strip().rstrip('.')}."
            " Save it again with save_pretrained, with transnormer_hf imported."
        )
    return json.loads(result.stdout.splitlines()[-1])


class Refuse(importlib.abc.MetaPathFinder):
    """An import system without some packages."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check_generation(model: Any) -> None:
    """Raise ValueError unless greedy decoding with a state has the logits of one forward without.

    In float32, and by logits: where two tokens are about as likely, rounding alone may choose the other one.
    """
    import torch

    prompt = torch.arange(3, 10)[None] % model.config.vocab_size
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        steps = model.float().generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=True,
            **options,
        )
        whole = model(steps.sequences, use_cache=False).logits[:, prompt.shape[1] - 1 : -1]  # (1, 8, vocabulary)
    difference = (torch.stack(steps.logits, 1) - whole).abs().max().item()
    if not difference <= 1e-3 * whole.std().item():
        raise ValueError(f"generation with a state and without differ by {difference:.3g} in the logits")


def main(folder: str) -> None:
    sys.meta_path.insert(0, Refuse())
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    (architecture,) = config.architectures
    auto_class = next(name for name, reference in config.auto_map.items() if reference.endswith(f".{architecture}"))
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
    if auto_class == "AutoModelForCausalLM":
        check_generation(model)
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
