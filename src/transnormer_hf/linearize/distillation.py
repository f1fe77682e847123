"""A TransNormer learns from the model whose weights it was given: each attention by itself, then all layers together.

The teacher is the same TransNormer with "full_attention" in every layer, which computes what the source model does. In
*attention transfer* one forward of the teacher gives what enters each attention and what leaves it; the student's
attention of that layer takes the same input and learns to give the same output. No layer sees another's errors, so all
of them learn at once, and none passes gradients to another. LoLCATs (arXiv:2410.10254, Section 3.1) trains feature maps
this way; here projections and positions learn as well. *Joint distillation* then lets the whole student run and
compares hidden states, and the logits of a language model.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..model.modeling_transnormer import TransNormerAttention
from ..model.reference_transnormer import AttentionMetadata
from ..training.files import replacing

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
# Sum over real tokens of a squared error (or another loss), and what to divide it by.
Ratio = tuple[torch.Tensor, torch.Tensor]
Losses = Callable[[Batch], Mapping[str, Ratio]]

# An attention this close to its teacher's, as the ratio of squared errors, computes the same but for rounding.
EXACT = 1e-8
LENGTH_GROUP = 16  # batches that share a range of lengths, so that little of a batch is padding


# ---- Texts ----


class TextBatches:
    """Tokenised texts in padded batches, whose order follows from the seed and the number of the step alone.

    So a resumed run goes on with the batch that an uninterrupted one would see.

    Args:
        rows: Token ids of each text, with special tokens.
        batch_size: Texts per batch; at most as many as there are.
        pad_token_id: What fills the shorter ones.
        device: Where the batches are wanted.
        seed: Of the order.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        batch_size: int,
        pad_token_id: int,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ):
        if not rows:
            raise ValueError("rows: got none, there must be at least one text to learn from.")
        self.rows, self.batch_size = rows, min(batch_size, len(rows))
        self.pad_token_id, self.device, self.seed = pad_token_id, device, seed
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        """Number of batches in an epoch; rows that do not fill one wait for the next epoch."""
        return len(self.rows) // self.batch_size

    def batch(self, step: int) -> Batch:
        """`input_ids` and `attention_mask`, (batch_size, seq), of step 0, 1, ..."""
        epoch, number = divmod(step, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        return self._pad([self.rows[row] for row in self._order[number].tolist()])

    def in_order(self) -> Iterator[Batch]:
        """Every row once, the shortest first."""
        rows = sorted(self.rows, key=len)
        for start in range(0, len(rows), self.batch_size):
            yield self._pad(rows[start : start + self.batch_size])

    def holding(self, tokens: int) -> Iterator[Batch]:
        """The batches from step 0 on, until they hold so many real tokens."""
        step = 0
        while tokens > 0:
            batch = self.batch(step)
            yield batch
            step, tokens = step + 1, tokens - int(batch["attention_mask"].sum())

    def _shuffle(self, epoch: int) -> torch.Tensor:
        """Row numbers (batches, batch_size): of each group of random rows, batches of similar length."""
        generator = torch.Generator().manual_seed(2**20 * self.seed + epoch)
        order = torch.randperm(len(self.rows), generator=generator)
        lengths = torch.tensor([len(row) for row in self.rows])
        groups = [group[lengths[group].argsort(stable=True)] for group in order.split(LENGTH_GROUP * self.batch_size)]
        batches = torch.cat(groups)[: len(self) * self.batch_size].view(len(self), self.batch_size)
        return batches[torch.randperm(len(self), generator=generator)]

    def _pad(self, rows: Sequence[Sequence[int]]) -> Batch:
        longest = max(map(len, rows))
        input_ids = torch.tensor([[*row, *[self.pad_token_id] * (longest - len(row))] for row in rows])
        lengths = torch.tensor([[len(row)] for row in rows])  # (batch, 1)
        batch = {"input_ids": input_ids, "attention_mask": (torch.arange(longest) < lengths).long()}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


# ---- What a teacher shows ----


@dataclass
class Attended:
    """One attention of one forward: input and output, each (batch, seq, hidden_size), and where the tokens stand."""

    inputs: torch.Tensor
    metadata: AttentionMetadata
    outputs: torch.Tensor


@contextmanager
def recorded_attention(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[dict[int, Attended]]:
    """Within the block, each forward of a TransNormer leaves here what the attentions of `layers` took and gave.

    The output is that of the branch, before the residual is added; a pre-norm model's input has passed the norm.
    """
    records: dict[int, Attended] = {}

    def record(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], result: tuple[torch.Tensor, Any]) -> None:
            records[layer] = Attended(arguments[0], arguments[1], result[0])

        return hook

    handles = [attention_of(model, layer).register_forward_hook(record(layer)) for layer in layers]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def attention_of(model: PreTrainedModel, layer: int) -> TransNormerAttention:
    """The attention of a layer of a TransNormer with any head, or without one."""
    return model.base_model.layers[layer].self_attn


def squared_error(student: torch.Tensor, teacher: torch.Tensor, attention_mask: torch.Tensor) -> Ratio:
    """Sums over the real tokens of |student - teacher|^2 and of |teacher|^2.

    student, teacher: (batch, seq, channels); attention_mask: (batch, seq), 0 for padding.
    """
    is_real = attention_mask.bool()
    difference, reference = (student - teacher)[is_real].float(), teacher[is_real].float()  # (tokens, channels)
    return difference.square().sum(), reference.square().sum()


@torch.no_grad()
def evaluate(losses: Losses, texts: TextBatches) -> dict[str, float]:
    """The ratio of each name over all texts."""
    sums: dict[str, Ratio] = {}
    for batch in texts.in_order():
        for name, (error, reference) in losses(batch).items():
            known = sums.get(name, (torch.zeros_like(error), torch.zeros_like(reference)))
            sums[name] = known[0] + error, known[1] + reference
    return {name: float(error / reference) for name, (error, reference) in sums.items()}


# ---- Training ----


@dataclass(frozen=True)
class Stage:
    """What learns, from what, and for how long.

    Attributes:
        name: Of the progress bar.
        parts: What learns. Each has a loss of its own, and keeps the weights of its own best held-out error.
        losses: The loss of each part on a batch.
        train, held_out: The texts to learn from and to choose by.
        learning_rate: The highest of one cycle: it rises over the first tenth and falls to 0 as a cosine.
        max_steps, max_minutes: Whichever ends first; None is no limit. Only the time of training steps counts.
        eval_steps: Held-out errors, and a checkpoint, after so many steps, and at the end.
        checkpoint: File to resume from and to write; None for neither.
        settings: What must be the same for a resumed run to be one run.
    """

    name: str
    parts: Mapping[str, nn.Module]
    losses: Losses
    train: TextBatches
    held_out: TextBatches
    learning_rate: float
    max_steps: int | None = None
    max_minutes: float | None = None
    eval_steps: int = 50
    checkpoint: Path | None = None
    settings: Mapping[str, Any] | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        shares = [0.0]
        if self.max_steps is not None:
            shares.append(step / self.max_steps if self.max_steps else 1.0)
        if self.max_minutes is not None:
            shares.append(seconds / (60 * self.max_minutes))
        return min(max(shares), 1.0)


@dataclass(frozen=True)
class StageResult:
    """Held-out error of each part before the first step and with the weights that were kept, and what it took."""

    before: dict[str, float]
    after: dict[str, float]
    steps: int
    minutes: float


def one_cycle(progress: float) -> float:
    """Factor of the learning rate: up over the first tenth, then half a cosine down to 0."""
    if progress < 0.1:
        return (progress + 1e-3) / (0.1 + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.1) / 0.9))


def run_stage(stage: Stage) -> StageResult:
    """Train the parts of a stage, and leave each with the weights of its lowest held-out error, those before included.

    Nothing else should ask for gradients: parts do so while they learn.

    Raises:
        ValueError: the checkpoint is one of other settings.
    """
    for part in stage.parts.values():
        part.requires_grad_(True)
    parameters = [parameter for part in stage.parts.values() for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=0.0)
    state = _load(stage, optimizer) if stage.checkpoint is not None and stage.checkpoint.exists() else None
    if state is None:
        errors = evaluate(stage.losses, stage.held_out)
        state = {"step": 0, "seconds": 0.0, "before": errors, "errors": errors, "best": {}}
        _keep_best(stage, state)
    first = state["step"]
    bar = tqdm(total=stage.max_steps, initial=first, desc=stage.name)
    bar.set_postfix_str(_describe(state["errors"]))
    while (progress := stage.progress(state["step"], state["seconds"])) < 1:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * one_cycle(progress)
        losses = stage.losses(stage.train.batch(state["step"]))
        sum(error / reference for error, reference in losses.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        state["seconds"] += time.perf_counter() - began
        bar.update()
        if state["step"] % stage.eval_steps == 0 or stage.progress(state["step"], state["seconds"]) == 1:
            state["errors"] = evaluate(stage.losses, stage.held_out)
            _keep_best(stage, state)
            bar.set_postfix_str(_describe(state["errors"]))
            if stage.checkpoint is not None:
                _save(stage, optimizer, state)
    bar.close()
    for name, part in stage.parts.items():
        part.load_state_dict(state["best"][name]["weights"])
        part.requires_grad_(False)
    after = {name: best["error"] for name, best in state["best"].items()}
    return StageResult(state["before"], after, state["step"], state["seconds"] / 60)


def _keep_best(stage: Stage, state: dict[str, Any]) -> None:
    for name, part in stage.parts.items():
        error = state["errors"][name]
        if name not in state["best"] or error < state["best"][name]["error"]:
            weights = {key: tensor.clone() for key, tensor in part.state_dict().items()}
            state["best"][name] = {"error": error, "weights": weights}


def _describe(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.3g}" for name, error in errors.items())


def _save(stage: Stage, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    weights = {name: part.state_dict() for name, part in stage.parts.items()}
    whole = {**state, "weights": weights, "optimizer": optimizer.state_dict(), "settings": dict(stage.settings or {})}
    with replacing(stage.checkpoint or "") as temporary:
        torch.save(whole, temporary)


def _load(stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = torch.load(stage.checkpoint or "", map_location="cpu", weights_only=True)
    known, given = state.pop("settings"), dict(stage.settings or {})
    for name in {**known, **given}:
        if known.get(name) != given.get(name):
            raise ValueError(
                f"{stage.checkpoint} was written with {name}={known.get(name)!r}, and {name}={given.get(name)!r} was"
                " given: resume with the same arguments, or begin anew in another folder."
            )
    for name, part in stage.parts.items():
        part.load_state_dict(state["weights"][name])
    optimizer.load_state_dict(state.pop("optimizer"))
    del state["weights"]
    logger.info("%s: going on from step %d of %s.", stage.name, state["step"], stage.checkpoint)
    return state


# ---- Attention transfer ----


def attention_losses(teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int]) -> Losses:
    """The loss of each layer's attention, "layer 3" and so on: from the teacher's input to the teacher's output."""

    def losses(batch: Batch) -> dict[str, Ratio]:
        with torch.no_grad(), recorded_attention(teacher, layers) as records:
            teacher.base_model(**batch, use_cache=False)
        return {
            f"layer {layer}": squared_error(
                attention_of(student, layer)(shown.inputs, shown.metadata)[0], shown.outputs, batch["attention_mask"]
            )
            for layer, shown in records.items()
        }

    return losses


@torch.no_grad()
def scale_output_projections(
    teacher: PreTrainedModel, student: PreTrainedModel, layers: Sequence[int], batches: Iterable[Batch]
) -> None:
    """Closed form: bring what enters each output projection to the root mean square that it has in the teacher.

    The norm of NormAttention makes it 1, whatever it was. So the weights of the projection, which were copied, take the
    ratio of the two over all real tokens of some batches.

    A least squares fit of the projection, on 12,000 tokens, starts at two thirds of the error, and 300 steps later it
    is behind in all layers but the first (all-MiniLM-L6-v2, all six layers linear).
    """
    contexts: dict[tuple[str, int], torch.Tensor] = {}  # (whose, layer) -> (batch, seq, hidden_size)

    def keep(place: tuple[str, int]) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            contexts[place] = arguments[0]

        return hook

    places = {
        (whose, layer): attention_of(model, layer).out_proj
        for whose, model in (("teacher", teacher), ("student", student))
        for layer in layers
    }
    handles = [projection.register_forward_pre_hook(keep(place)) for place, projection in places.items()]
    squares = dict.fromkeys(places, 0.0)
    try:
        for batch in batches:
            with recorded_attention(teacher, layers) as records:
                teacher.base_model(**batch, use_cache=False)
            for layer, shown in records.items():
                attention_of(student, layer)(shown.inputs, shown.metadata)
            for place, context in contexts.items():
                squares[place] += float(context[batch["attention_mask"].bool()].double().square().sum())
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        scale = (squares["teacher", layer] / squares["student", layer]) ** 0.5
        places["student", layer].weight.mul_(scale)


# ---- Joint distillation ----


def joint_losses(teacher: PreTrainedModel, student: PreTrainedModel) -> Losses:
    """One loss, "student": the whole student's hidden states after each layer, and what a language model predicts.

    The squared errors of the layers, each relative to its teacher's, are averaged. For a language model, the mean over
    tokens of KL(teacher || student) is added.
    """
    is_language_model = teacher.get_output_embeddings() is not None

    def losses(batch: Batch) -> dict[str, Ratio]:
        options = {**batch, "output_hidden_states": True, "use_cache": False}
        with torch.no_grad():
            wanted = teacher(**options)
        given = student(**options)
        is_real = batch["attention_mask"].bool()
        pairs = list(zip(given.hidden_states[1:], wanted.hidden_states[1:], strict=True))
        ratios = (squared_error(ours, theirs, is_real) for ours, theirs in pairs)
        loss = torch.stack([error / reference for error, reference in ratios]).mean()
        if is_language_model:
            ours, theirs = (output.logits[is_real].float().log_softmax(-1) for output in (given, wanted))
            loss = loss + F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        tokens = is_real.sum()
        return {"student": (loss * tokens, tokens)}

    return losses


@torch.no_grad()
def compare(teacher: PreTrainedModel, student: PreTrainedModel, texts: TextBatches) -> dict[str, float]:
    """How close a whole student comes to its teacher.

    Returns:
        `hidden_states`, the relative squared error of the last ones; of a causal language model also `perplexity`, the
        student's own, per token.
    """
    is_causal = student.can_generate()

    def losses(batch: Batch) -> dict[str, Ratio]:
        wanted, given = (model.base_model(**batch, use_cache=False).last_hidden_state for model in (teacher, student))
        ratios = {"hidden_states": squared_error(given, wanted, batch["attention_mask"])}
        if is_causal:
            is_predicted = batch["attention_mask"][:, 1:].bool()
            logits = student.get_output_embeddings()(given[:, :-1][is_predicted]).float()  # (tokens, vocab_size)
            nll = F.cross_entropy(logits, batch["input_ids"][:, 1:][is_predicted], reduction="sum")
            ratios["perplexity"] = nll, is_predicted.sum()
        return ratios

    figures = evaluate(losses, texts)
    if is_causal:
        figures["perplexity"] = math.exp(figures["perplexity"])
    return figures
