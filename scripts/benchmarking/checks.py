"""What a model must show on a short input before it is timed."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .contenders import EVERYTHING, Contender
from .runs import Setting, build, first_line, infer, make_batch, prefill, train

# Relative errors, in the 2-norm over all logits and over all gradients.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1}
CHECKED_LENGTH = 256  # divisible by what the models ask for: landmarks, blocks, windows


def check(names: Sequence[str], setting: Setting) -> tuple[list[str], list[dict[str, Any]]]:
    """The models that are what they say they are, and a row with the reason for each of the others.

    Raises SystemExit where a model of ours is wrong.
    """
    right, skipped = [], []
    for name in names:
        contender = EVERYTHING[name]
        try:
            error = find_error(contender, setting)
        except Exception as raised:  # whatever a model of transformers may raise
            if contender.define is not None:
                raise
            error = f"it raised {type(raised).__name__}: {first_line(raised)}"
        if error is None:
            right.append(name)
        elif contender.define is not None:
            raise SystemExit(f"{name}: {error}; nothing was timed.")
        else:
            skipped.append({"model": name, "skipped": error})
    return right, skipped


def find_error(contender: Contender, setting: Setting) -> str | None:
    """What is wrong with a model's results on a short input, or None."""
    model = build(contender, setting, CHECKED_LENGTH)
    batch = make_batch(setting, CHECKED_LENGTH, batch_size=1)
    logits, gradients = logits_and_gradients(model, batch)
    if not (logits.isfinite().all() and gradients.isfinite().all()):
        return "logits or gradients are not finite"
    if contender.define is not None:
        definition = copy.deepcopy(model).double()
        contender.define(definition)
        for what, result, truth in zip(
            ("logits", "gradients"), (logits, gradients), logits_and_gradients(definition, batch), strict=True
        ):
            error = ((result - truth).norm() / truth.norm()).item()
            if not error < TOLERANCES[setting.dtype]:
                return f"{what} differ from the definition by {error:.1e}, more than {TOLERANCES[setting.dtype]:g}"

    model.eval()
    half = CHECKED_LENGTH // 2 + 1  # within a block
    changed = batch["input_ids"].clone()
    changed[:, half:] = changed[:, half:].flip(1)
    logits = infer(model, batch).double()
    moved = (infer(model, {"input_ids": changed}).double() - logits)[:, :half].norm() / logits[:, :half].norm()
    if contender.causal and moved > 1e-5:
        return f"it is meant to be causal, and later tokens move the logits of earlier ones by {moved:.1e}"
    if not contender.causal and moved <= 1e-5:
        return "it is meant to be bidirectional, and later tokens do not reach earlier ones"

    if contender.cache is not None:
        cache = prefill(model, None, batch["input_ids"][:, :half])
        with torch.inference_mode():
            for column in range(half, half + 3):
                step = model(batch["input_ids"][:, column : column + 1], past_key_values=cache, use_cache=True)
        error = ((step.logits[:, 0] - logits[:, half + 2]).norm() / logits[:, half + 2].norm()).item()
        if not error < TOLERANCES[setting.dtype]:
            return f"decoding differs from the full forward by {error:.1e}"
    return None


def logits_and_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradients of all parameters in one vector, float64."""
    model.train()
    logits = infer(model, {"input_ids": batch["input_ids"]})
    train(model, batch)
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in model.parameters()
    ]
    model.zero_grad()
    return logits.double(), torch.cat([gradient.flatten().double() for gradient in gradients])
