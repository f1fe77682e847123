"""Forward and gradients of the public ops against their definitions in float64, on inputs of three dtypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from transnormer_hf import diag_attention, norm_attention, simple_rms_norm
from transnormer_hf.model.reference_transnormer import attention_metadata

from .rows import DTYPES, FAIL, OK, Recorder, token_errors, worst_error

# Of `worst_error`. To round the results alone costs 3e-4 in float16 and 3e-3 in bfloat16.
LIMITS = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 2e-2}
# theta's gradient sums numbers of both signs, each multiplied by its position
THETA_FACTOR = 5
# The gradient of relu jumps where a score is zero, and rounding puts a few scores on the other side: then the median
# of the tokens counts, and theta's gradient, a sum over all of them, gets a limit of its own.
RELU_THETA_LIMIT = 0.15
GROUPS = [
    *((op, dtype, dim) for dim in (128, 64, 32) for dtype in ("bf16", "fp32", "fp16") for op in ("norm", "diag")),
    ("norm", "bf16", 40),  # padded to a power of two
    ("diag", "bf16", 96),
    ("rms", "all", 0),
]
TINY_GROUPS = [("norm", "fp32", 16), ("diag", "fp32", 16), ("rms", "all", 0)]


class Case(NamedTuple):
    """One use of an attention. tiny_len: tokens in the tiny run, which leaves it out where this is None."""

    name: str
    batch_size: int = 2
    num_heads: int = 2
    seq_len: int = 257
    tiny_len: int | None = None
    lrpe: bool = True
    mask: bool = False
    packed: bool = False
    states: bool = False
    views: bool = False
    options: dict[str, Any] = {}


def blocks(block_size: int, **options: Any) -> dict[str, Any]:
    return {"block_size": block_size, "causal": True} | options


NORM_CASES = (
    Case("plain", lrpe=False, num_heads=3, options={"feature_map": "identity"}),
    Case("1+elu, LRPE, several segments", seq_len=1061, tiny_len=45, options={"feature_map": "1+elu"}),
    Case("elu, LRPE, mask", 3, seq_len=391, tiny_len=22, mask=True, options={"feature_map": "elu"}),
    Case("shorter than a segment, mask", 3, seq_len=63, mask=True, options={"feature_map": "elu"}),
    Case("packed, states", 1, seq_len=733, tiny_len=30, packed=True, states=True, options={"feature_map": "1+elu"}),
    Case("states, offset", seq_len=300, states=True, options={"feature_map": "1+elu"}),
    Case("one token, state", seq_len=1, states=True, options={"feature_map": "1+elu"}),
    Case("odd strides", seq_len=65, views=True, options={"feature_map": "1+elu"}),
    Case("empty", seq_len=0, tiny_len=0, states=True, options={"feature_map": "1+elu"}),
)
DIAG_CASES = (
    Case("softmax 64", lrpe=False, num_heads=3, options=blocks(64, causal=False)),
    Case("softmax 64, causal, LRPE", seq_len=321, tiny_len=30, options=blocks(64)),
    Case("relu 64, causal, LRPE, mask", 3, seq_len=200, tiny_len=20, mask=True, options=blocks(64, activation="relu")),
    Case("relu 16, LRPE", seq_len=131, options=blocks(16, causal=False, activation="relu")),
    Case("softmax 48, causal, LRPE, packed", 1, seq_len=400, packed=True, options=blocks(48)),
    Case("softmax 33, LRPE, odd strides", seq_len=131, views=True, options=blocks(33, causal=False)),
    Case("softmax 256, causal, LRPE, mask", 3, seq_len=600, tiny_len=24, mask=True, options=blocks(256)),
    Case("empty", seq_len=0, tiny_len=0, options=blocks(64)),
)


def check_correctness(record: Recorder, op: str, dtype: str, head_dim: int) -> None:
    if op == "rms":
        check_simple_rms_norm(record)
        return
    for case in NORM_CASES if op == "norm" else DIAG_CASES:
        if record.tiny:
            if case.tiny_len is None:
                continue
            case = case._replace(seq_len=case.tiny_len, num_heads=1, batch_size=2 if case.mask else 1)
        for causal in (False, True) if op == "norm" else (None,):
            if causal is not None:
                case = case._replace(options=case.options | {"causal": causal})
            suffix = ", causal" if causal else ""
            check_case(record, op, dtype, head_dim, case._replace(name=f"{case.name}{suffix}"))
    if op == "diag":
        check_dropout(record, dtype, head_dim)


def check_case(record: Recorder, op: str, dtype: str, head_dim: int, case: Case) -> None:
    name = f"{op} {dtype} D{head_dim}: {case.name}"
    with record.guard(name):
        seq_len, device = case.seq_len, record.device
        sizes = case.batch_size, case.num_heads, seq_len, head_dim
        tensors = make_inputs(*sizes, DTYPES[dtype], device, case.views)
        theta, householder = make_lrpe(head_dim, device)
        if case.lrpe:
            tensors["theta"] = theta
        options, mask, num_states = dict(case.options), None, case.batch_size
        if case.mask:
            mask = options["attention_mask"] = make_mask(case.batch_size, seq_len, device)
        if case.packed:
            options["cu_seqlens"] = make_boundaries(seq_len, device)
            num_states = len(options["cu_seqlens"]) - 1
        elif case.states:
            options["metadata"] = attention_metadata(case.batch_size, seq_len, device, position_offset=77)
        if case.states:
            tensors["initial_state"] = torch.randn(num_states, case.num_heads, head_dim, head_dim, device=device) * 0.1

        def run(backend: str, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs = dict(inputs)
            lrpe = None
            if case.lrpe:
                lrpe = inputs["theta"], householder.to(inputs.pop("theta").dtype)
            if op == "diag":
                return {"output": diag_attention(**inputs, **options, lrpe=lrpe, backend=backend)}
            output, state = norm_attention(**inputs, **options, lrpe=lrpe, return_state=case.states, backend=backend)
            return {"output": output} | ({"state": state} if state is not None else {})

        is_relu = case.options.get("activation") == "relu"
        errors = compare(run, tensors, mask, is_relu)
        limits = dict.fromkeys(errors, LIMITS[dtype])
        if case.lrpe:
            limits["d theta"] = RELU_THETA_LIMIT if is_relu else THETA_FACTOR * LIMITS[dtype]
        worst = max(errors, key=lambda key: errors[key] / limits[key] if errors[key] == errors[key] else float("inf"))
        record.judge(name, errors[worst], limits[worst], of=worst, errors=errors)


def compare(
    run: Callable[[str, dict[str, Any]], dict[str, Any]],
    tensors: dict[str, Any],
    mask: torch.Tensor | None = None,
    is_relu: bool = False,
) -> dict[str, float]:
    """`worst_error` of each result of the kernels and of each gradient, against the definition in float64.

    run: (backend, inputs) to results. mask: outputs at padding are undefined and get no gradient. is_relu: the
    gradients of query and key may jump at single tokens, so their median counts.
    """
    generator = torch.Generator().manual_seed(1)
    upstream: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    for backend in ("triton", "eager"):
        wide = backend == "eager"
        inputs = {name: (t.double() if wide else t).detach().requires_grad_() for name, t in tensors.items()}
        results = run(backend, inputs)
        if mask is not None:
            results["output"] = results["output"].masked_fill(~mask.bool()[:, None, :, None], 0)
        for key, result in results.items():
            if key not in upstream:
                upstream[key] = torch.randn(result.shape, generator=generator).to(result)  # rounded once, for both
        gradients = torch.autograd.grad(
            list(results.values()), list(inputs.values()), [upstream[key].to(t.dtype) for key, t in results.items()]
        )
        both = results | {f"d {name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
        found.append({key: tensor.detach() for key, tensor in both.items()})
    errors = {key: worst_error(found[0][key], truth) for key, truth in found[1].items()}
    if is_relu:
        errors |= {key: token_errors(found[0][key], found[1][key]).median().item() for key in ("d query", "d key")}
    return {key: float(f"{error:.2e}") for key, error in errors.items()}


def make_inputs(
    batch_size: int, num_heads: int, seq_len: int, head_dim: int, dtype: torch.dtype, device: torch.device, views: bool
) -> dict[str, Any]:
    """query, key, value as projections give them, or views that are not aligned and not even contiguous."""
    sizes, extra = (batch_size, seq_len, num_heads), 3 if views else 0
    tensors = {}
    for name in ("query", "key", "value"):
        wide = torch.randn(*sizes, head_dim + extra, device=device).to(dtype)
        tensors[name] = (wide[..., 1 : head_dim + 1] if views else wide).transpose(1, 2)
    if views:
        tensors["value"] = tensors["value"].mT.contiguous().mT
    return tensors


def make_lrpe(head_dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    theta = 10000 ** (-torch.arange(head_dim // 2, device=device) / (head_dim // 2))
    return theta, torch.nn.functional.normalize(torch.randn(head_dim, device=device), dim=0)


def make_mask(batch_size: int, seq_len: int, device: torch.device) -> torch.Tensor:
    """Padding in front, behind, and in front and in the middle."""
    mask = torch.ones(batch_size, seq_len, dtype=torch.long, device=device)
    mask[0, : seq_len // 3] = 0
    mask[1, seq_len - seq_len // 4 :] = 0
    mask[2:, :2] = 0
    mask[2:, seq_len // 2 : seq_len // 2 + 3] = 0
    return mask


def make_boundaries(seq_len: int, device: torch.device) -> torch.Tensor:
    """Packed sequences, one of them empty; the tokens behind the last boundary belong to none of them."""
    first = seq_len // 70 + 3
    return torch.tensor([0, first, first, seq_len // 5, seq_len // 2, seq_len - 2], device=device)


def check_dropout(record: Recorder, dtype: str, head_dim: int) -> None:
    """The map keeps as much as it should, and is the same in the backward pass: <dO, M V> = <M^T dO, V>."""
    for block_size in (64, 128):
        name = f"diag {dtype} D{head_dim}: dropout, blocks of {block_size}"
        with record.guard(name):
            sizes = 2, 4, 60 if record.tiny else 300, head_dim
            tensors = make_inputs(*sizes, DTYPES[dtype], record.device, views=False)
            tensors["value"] = torch.ones_like(tensors["value"]).requires_grad_()
            output = diag_attention(**tensors, block_size=block_size, causal=False, dropout_p=0.3, backend="triton")
            gradient = torch.randn_like(output)
            (value_gradient,) = torch.autograd.grad(output, tensors["value"], gradient)
            products = output.double() * gradient.double()
            error = abs(products.sum() - value_gradient.double().sum()).item() / products.norm().item()
            mean = output.double().mean().item()
            fits = error < 10 * LIMITS[dtype] and abs(mean - 1) < 0.05
            record.add(name, OK if fits else FAIL, error=error, limit=10 * LIMITS[dtype], mean_of_ones=mean)


def check_simple_rms_norm(record: Recorder) -> None:
    shapes = [(5, 768)] if record.tiny else [(3, 7, 64), (130, 768), (33, 1000), (9, 5000), (70, 12288)]
    for dtype in DTYPES:
        for shape in shapes:
            name = f"rms {dtype} {shape}"
            with record.guard(name):
                tensors = {"hidden_states": torch.randn(shape, device=record.device).to(DTYPES[dtype])}

                def run(backend: str, inputs: dict[str, Any]) -> dict[str, Any]:
                    return {"output": simple_rms_norm(**inputs, backend=backend)}

                errors = compare(run, tensors)
                worst = max(errors, key=errors.__getitem__)
                record.judge(name, errors[worst], LIMITS[dtype], of=worst, errors=errors)
