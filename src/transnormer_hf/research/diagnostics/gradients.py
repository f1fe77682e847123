"""Why linear attention trains badly: gradients of attention weights, of NormAttention, and over a training run.

Section 3 of "The Devil in Linear Transformer": with p_ij = f(s_ij) / sum_k f(s_ik),
dp_ij/ds_ik = f'(s_ik)/f(s_ik) · (1{j=k} p_ij - p_ij p_ik). For softmax f'/f is 1 and no entry exceeds 1/4; for scaled
linear attention f'/f is 1/s_ik, which has no bound as the scores shrink (Prop. 3.1).
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.files import write_atomically


def softmax_jacobian(scores: torch.Tensor) -> torch.Tensor:
    """dp_ij/ds_ik of p = softmax(s): 1{j=k} p_ij - p_ij p_ik. (..., seq) to (..., seq, seq), rows j, columns k."""
    return _centred(scores.softmax(-1))


def scaled_linear_jacobian(scores: torch.Tensor) -> torch.Tensor:
    """dp_ij/ds_ik of p = s / sum(s): (1{j=k} p_ij - p_ij p_ik) / s_ik. (..., seq) to (..., seq, seq).

    Raises ValueError where a score is 0, by which the formula divides.
    """
    if (scores == 0).any():
        raise ValueError("scores has zeros; the gradient's factor 1/s needs all scores different from 0.")
    return _centred(scores / scores.sum(-1, keepdim=True)) / scores[..., None, :]


def _centred(weights: torch.Tensor) -> torch.Tensor:
    return torch.diag_embed(weights) - weights[..., :, None] * weights[..., None, :]


def shrinking_score_gradients(score: float, seq_len: int) -> dict[str, float]:
    """Proposition 3.1 at one score: all of q_i and k_j have phi = x0, so every score of seq_len tokens is |x0|².

    Then p_ij = 1/n and the largest |dp_ij/ds_ik| is (1/n)(1 - 1/n) / |x0|² for scaled linear attention, without bound
    as |x0|² goes to 0; softmax stays at (1/n)(1 - 1/n) <= 1/4. Returns "score", "linear" and "softmax" (both by
    autograd), and "linear_closed_form".

    Raises ValueError unless score > 0 and seq_len >= 2.
    """
    if not score > 0:
        raise ValueError(f"score={score} is |x0|² and must be greater than 0.")
    if seq_len < 2:
        raise ValueError(f"seq_len={seq_len}: a weight among fewer than 2 tokens is constant.")
    scores = torch.full((seq_len,), score, dtype=torch.float64)
    linear = torch.autograd.functional.jacobian(lambda s: s / s.sum(), scores)
    softmax = torch.autograd.functional.jacobian(lambda s: s.softmax(-1), scores)
    return {
        "score": score,
        "linear": linear.abs().max().item(),
        "linear_closed_form": (1 - 1 / seq_len) / seq_len / score,
        "softmax": softmax.abs().max().item(),
    }


class ScoreGradientBound(NamedTuple):
    """Bounds on |dL/ds_ij| of NormAttention; `paper` is None if the paper has none."""

    tight: float
    paper: float | None


def norm_attention_gradient_bound(
    gradient_norm: float, value_norm: float, head_dim: int, eps: float, eps_inside: bool
) -> ScoreGradientBound:
    """Bounds on |dL/ds_ij| for O = Norm(S V), whatever the scores S.

    gradient_norm: c1, the largest 2-norm of a row of dL/dO. value_norm: c2, the largest 2-norm of a row of V.

    eps_inside=True is the paper's norm, x / sqrt(ms(x) + eps) (`norm_type="rms"`). Eq. 15 bounds its gradient by
    3 c1 c2 d / (2 sqrt(eps)). Ours is c1 c2 / sqrt(eps): the Jacobian of this norm is symmetric with eigenvalues
    between 0 and 1/sqrt(eps). eps_inside=False is that of the released code, x / (rms(x) + eps) ("simple_rms"): its
    eigenvalues go up to 1/eps, so the bound is c1 c2 / eps, reached by S = 0 (ours; the paper does not treat it).
    """
    if not eps > 0:
        raise ValueError(f"eps={eps} must be greater than 0: without it there is no bound.")
    if not eps_inside:
        return ScoreGradientBound(gradient_norm * value_norm / eps, None)
    tight = gradient_norm * value_norm / eps**0.5
    return ScoreGradientBound(tight, 1.5 * tight * head_dim)


def measure_norm_attention_gradient(
    scores: torch.Tensor, value: torch.Tensor, output_gradient: torch.Tensor, eps: float, eps_inside: bool
) -> tuple[float, ScoreGradientBound]:
    """The largest |dL/ds_ij| of O = Norm(S V) by autograd, and its bounds.

    scores: (seq, seq), value and output_gradient (dL/dO): (seq, head_dim); computed in float64.
    """
    scores, value, output_gradient = (t.detach().double() for t in (scores, value, output_gradient))
    scores.requires_grad_()
    summed = scores @ value  # (seq, head_dim)
    if eps_inside:
        output = summed * (summed.square().mean(-1, keepdim=True) + eps).rsqrt()
    else:
        rms = torch.linalg.vector_norm(summed, dim=-1, keepdim=True) * summed.shape[-1] ** -0.5
        output = summed / (rms + eps)
    (gradient,) = torch.autograd.grad(output, scores, output_gradient)
    bound = norm_attention_gradient_bound(
        output_gradient.norm(dim=-1).max().item(), value.norm(dim=-1).max().item(), value.shape[-1], eps, eps_inside
    )
    return gradient.abs().max().item(), bound


class GradientDeviationCallback(TrainerCallback):
    """The relative standard deviation of gradients over training (Table 2).

    g_t is the 2-norm of the gradient of all trainable parameters together before optimizer step t, and the figure is
    the standard deviation of g_t (unbiased) over its mean, from step `skip_steps` on. The paper defines neither the
    quantity nor the parameters: this definition is ours. The Trainer clips first, so only with `max_grad_norm=0`, the
    paper's setting, are the norms those of the raw gradients. A resumed run has only the norms since it was resumed.

    At the end of training, the figure, the norms and the definition are written to `gradient_deviation.json`.
    """

    definition = "std / mean over optimizer steps of the 2-norm of the gradient of all trainable parameters"

    def __init__(self, skip_steps: int = 0):
        if skip_steps < 0:
            raise ValueError(f"skip_steps={skip_steps} must be at least 0.")
        self.skip_steps = skip_steps
        self.norms: list[float] = []

    @property
    def relative_deviation(self) -> float:
        """NaN before the second step that counts, where all gradients are 0, and after one that is not finite."""
        norms = self.norms[self.skip_steps :]
        if len(norms) < 2 or not all(map(math.isfinite, norms)) or not (mean := statistics.fmean(norms)):
            return float("nan")
        return statistics.stdev(norms) / mean

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.norms = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [p.grad.detach() for p in kwargs["model"].parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            deviation = self.relative_deviation
            report = {
                "relative_deviation": deviation if deviation == deviation else None,
                "definition": self.definition,
                "skip_steps": self.skip_steps,
                "max_grad_norm": args.max_grad_norm,
                "norms": self.norms,
            }
            write_atomically(Path(args.output_dir) / "gradient_deviation.json", json.dumps(report) + "\n")
