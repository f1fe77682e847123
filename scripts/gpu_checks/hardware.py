"""What Triton's interpreter cannot show: rounding over a long context, waits of the host, memory that nobody wrote."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transnormer_hf import diag_attention, norm_attention, simple_rms_norm
from transnormer_hf.model.ops_transnormer import with_segments
from transnormer_hf.model.reference_transnormer import attention_metadata

from .correctness import LIMITS, compare, make_inputs, make_lrpe, make_mask
from .rows import DTYPES, FAIL, MEASURED, OK, SKIPPED, Recorder, worst_error
from .training import make_model

GROUPS = [("long context", "bf16"), ("long context", "fp16"), ("waits",), ("memory",), ("many elements",)]


def check_hardware(record: Recorder, group: str, dtype: str = "") -> None:
    if group == "long context":
        check_long_context(record, dtype)
    elif group == "waits":
        check_waits(record)
        check_operations_of_packed_rows(record)
    elif group == "memory":
        check_mixed_dtypes(record)
        check_empty_sequences(record)
        check_same_bits(record)
    else:
        check_many_elements(record)


def check_long_context(record: Recorder, dtype: str) -> None:
    """Causal, half precision, batch · heads = 128, positive features and values with a mean: nothing cancels.

    Tensor cores round towards zero, so an error that builds up shows in sums of one sign. The truth is the chunked
    form in float64, for two of the heads.
    """
    num_heads, head_dim = (1, 16) if record.tiny else (128, 64)
    lengths = (70,) if record.tiny else (4096, 16384, 65536)
    for seq_len in lengths:
        name = f"3a: causal backward, {dtype}, {seq_len} tokens, batch · heads = {num_heads}"
        with record.guard(name):
            size = 1, seq_len, num_heads, head_dim
            # 1 + elu is exp below zero: features of about 0.02 keep the sums within float16
            means = {"query": -4.0, "key": -4.0, "value": 1.0}
            normal: dict[str, Any] = {"dtype": DTYPES[dtype], "device": record.device}
            leaves = [(torch.randn(size, **normal) * 0.5 + mean).transpose(1, 2) for mean in means.values()]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            upstream = (torch.randn(size, **normal) + 1).transpose(1, 2) / 64
            wide = [leaf[:, :2].detach().double().requires_grad_() for leaf in leaves]
            found = []
            for tensors, backend in ((leaves, "triton"), (wide, "torch")):
                output, _ = norm_attention(*tensors, causal=True, feature_map="1+elu", backend=backend)
                gradient = upstream[:, : output.shape[1]].to(output.dtype)
                gradients = torch.autograd.grad(output, tensors, gradient)
                found.append([t[:, :2].detach() for t in (output, *gradients)])
            names = ("output", "d query", "d key", "d value")
            errors = {key: relative_errors(*pair) for key, *pair in zip(names, *found, strict=True)}
            worst = max(errors, key=errors.__getitem__)
            record.judge(name, errors[worst], LIMITS[dtype], of=worst, errors=errors)
            del leaves, wide, found, output, gradients, upstream


def relative_errors(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative error of each stretch of an eighth of the tokens, by its 2-norm; the largest one."""
    return max(
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(found.chunk(8, dim=2), truth.chunk(8, dim=2), strict=True)
    )


def check_waits(record: Recorder) -> None:
    """How often the host waits for the device."""
    batch_size, seq_len, head_dim = (2, 5, 16) if record.tiny else (3, 300, 64)
    mask = make_mask(batch_size, seq_len, record.device)
    tensors = make_inputs(batch_size, 1, seq_len, head_dim, torch.bfloat16, record.device, views=False)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    lrpe = make_lrpe(head_dim, record.device)
    options: dict[str, Any] = {"causal": True, "lrpe": lrpe, "attention_mask": mask, "backend": "triton"}
    model = make_model(record, "t2", "triton")
    tokens = torch.randint(3, 60, (batch_size, seq_len), device=record.device)

    def decode() -> None:
        with torch.no_grad():
            model(tokens[:, :1], past_key_values=cache, use_cache=True)

    runs: dict[str, Callable[[], Any]] = {
        "norm_attention with a mask": lambda: norm_attention(*leaves, **options)[0].sum().backward(),
        "diag_attention with a mask": lambda: diag_attention(*leaves, block_size=64, **options).sum().backward(),
        "a model's training step without a mask": lambda: model(tokens).logits.float().sum().backward(),
        "a model's training step with a mask": lambda: model(tokens, attention_mask=mask).logits.sum().backward(),
        "a decoding step": decode,
    }
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    for what, run in runs.items():
        name = f"3b: waits of the host, {what}"
        with record.guard(name):
            run()
            if record.device.type == "cpu":
                record.add(name, SKIPPED, reason="needs a GPU")
                continue
            waits = waits_of(run)
            record.add(name, FAIL if waits else OK, error=sum(waits.values()), limit=0, where=waits)


def waits_of(run: Callable[[], Any]) -> dict[str, int]:
    """Where the host waited for the device, and how often."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)))


def check_mixed_dtypes(record: Recorder) -> None:
    """Two of three inputs are float32: nothing of them may be rounded to the third's bfloat16."""
    for narrow in ("query", "key"):
        for causal in (False, True):
            name = f"3c: a bf16 {narrow} beside fp32{', causal' if causal else ''}"
            with record.guard(name):
                sizes = 1, 1 if record.tiny else 2, 20 if record.tiny else 300, 32
                tensors = make_inputs(*sizes, torch.float32, record.device, views=False)
                rounded = tensors[narrow].bfloat16()
                tensors[narrow] = rounded.float()

                def run(backend: str, inputs: dict[str, Any]) -> dict[str, Any]:
                    inputs = dict(inputs)
                    if backend == "triton":
                        inputs[narrow] = inputs[narrow].bfloat16()  # noqa: B023
                    output, state = norm_attention(**inputs, causal=causal, return_state=True, backend=backend)  # noqa: B023
                    return {"output": output, "state": state}

                errors = compare(run, tensors)
                del errors[f"d {narrow}"]  # has the dtype of its input
                worst = max(errors, key=errors.__getitem__)
                record.judge(name, errors[worst], LIMITS["fp32"], of=worst, errors=errors)


def check_empty_sequences(record: Recorder) -> None:
    """Their state is the one that was given, or zero, whatever lay in the memory before."""
    for kind in ("no tokens", "an empty packed sequence"):
        for given in (False, True):
            name = f"3d: state of {kind}, {'one' if given else 'none'} given"
            with record.guard(name):
                seq_len = 0 if kind == "no tokens" else 20
                sizes = 1, 2, seq_len, 32
                tensors = make_inputs(*sizes, torch.bfloat16, record.device, views=False)
                boundaries = torch.tensor([0, 7, 7, 20], device=record.device) if seq_len else None
                initial = torch.randn(3 if seq_len else 1, 2, 32, 32, device=record.device) if given else None
                fill_free_memory_with_nan(record)
                _, state = norm_attention(
                    **tensors, causal=True, cu_seqlens=boundaries, initial_state=initial, return_state=True,
                    backend="triton",
                )  # fmt: skip
                assert state is not None
                empty = 1 if seq_len else 0
                expected = torch.zeros_like(state[empty]) if initial is None else initial[empty]
                error = (state[empty] - expected).abs().max().item()
                record.judge(name, error, 0.0)


def fill_free_memory_with_nan(record: Recorder) -> None:
    """So that what a kernel does not write is seen: torch hands the same memory out again."""
    for size in (1 << 12, 1 << 16, 1 << 20):
        blocks = [torch.full((size,), float("nan"), device=record.device) for _ in range(4)]
        del blocks


class CountOperations(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def check_operations_of_packed_rows(record: Recorder) -> None:
    """Small operations of torch that packing adds to every layer: the segments must be found once for all of them."""
    name = "3e: torch operations that packed rows add to a layer of NormAttention, forward and backward"
    with record.guard(name):
        seq_len = 20 if record.tiny else 700
        boundaries = torch.tensor([0, 7, 7, seq_len], device=record.device)
        counts, lrpe = {}, make_lrpe(32, record.device)
        for packed in (False, True):
            metadata = attention_metadata(1, seq_len, record.device, cu_seqlens=boundaries if packed else None)
            metadata = with_segments(metadata)  # as a model does, once per forward
            for layers in (1, 3):
                tensors = make_inputs(1, 1, seq_len, 32, torch.bfloat16, record.device, views=False)
                leaves = [tensor.requires_grad_() for tensor in tensors.values()]
                with CountOperations() as operations:
                    value = leaves[2]
                    for _ in range(layers):
                        options: dict[str, Any] = {"lrpe": lrpe, "metadata": metadata, "backend": "triton"}
                        value, _ = norm_attention(leaves[0], leaves[1], value, causal=True, **options)
                    value.sum().backward()
                counts[packed, layers] = operations.count
        added = [(counts[packed, 3] - counts[packed, 1]) / 2 for packed in (False, True)]
        if record.device.type == "cpu":  # there the table of segments belongs to the interpreter, and is made per call
            record.add(name, MEASURED, plain=added[0], packed=added[1])
        else:
            record.judge(name, added[1] - added[0], 2.0, plain=added[0], packed=added[1])


def check_same_bits(record: Recorder) -> None:
    """Two runs give the same bits: no sum depends on which program comes first."""
    sizes = 1, 1 if record.tiny else 4, 20 if record.tiny else 3000, 16 if record.tiny else 64
    theta, householder = make_lrpe(sizes[-1], record.device)
    tensors = make_inputs(*sizes, torch.bfloat16, record.device, views=False)
    leaves = [*(tensor.requires_grad_() for tensor in tensors.values()), theta.requires_grad_()]
    runs = {
        "norm_attention": lambda q, k, v, theta: norm_attention(
            q, k, v, causal=True, feature_map="1+elu", lrpe=(theta, householder), backend="triton"
        )[0],
        "diag_attention": lambda q, k, v, theta: diag_attention(
            q, k, v, causal=True, block_size=64, lrpe=(theta, householder), backend="triton"
        ),
    }
    for what, run in runs.items():
        name = f"same bits in two runs: {what}"
        with record.guard(name):
            first, second = (
                [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]
                for output in (run(*leaves), run(*leaves))
            )
            differ = sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
            record.judge(name, differ, 0)


def check_many_elements(record: Recorder) -> None:
    """More than 2^31 elements in a tensor: the last head, or the last tokens, must come out right."""
    num_heads, head_dim = (2, 16) if record.tiny else (64, 64)
    seq_len = 40 if record.tiny else 2**31 // (num_heads * head_dim) + 4096
    name = f"tensors of {num_heads * head_dim * seq_len:,} elements"
    limit = LIMITS["bf16"]
    with record.guard(name), torch.no_grad():
        needed = 6 * 2 * num_heads * head_dim * seq_len
        if record.device.type == "cuda" and torch.cuda.mem_get_info()[0] < needed:
            record.add(name, SKIPPED, reason=f"needs {needed / 2**30:.0f} GiB of free memory")
            return
        size = 1, seq_len, num_heads, head_dim
        inputs = [
            torch.empty(size, device=record.device, dtype=torch.bfloat16).normal_().transpose(1, 2) for _ in range(3)
        ]
        output, state = norm_attention(*inputs, causal=True, return_state=True, backend="triton")
        wide = [tensor[:, -1:].float() for tensor in inputs]
        truth, truth_state = norm_attention(*wide, causal=True, return_state=True, backend="torch")
        assert state is not None
        assert truth_state is not None
        record.judge(f"norm_attention, {name}: output", relative_errors(output[:, -1:], truth), limit)
        record.judge(f"norm_attention, {name}: state", worst_error(state[:, -1:], truth_state), limit)
        del output, truth
        output = diag_attention(*inputs, block_size=64, causal=True, backend="triton")
        begin = (seq_len - 1) // 64 * 64
        wide = [tensor[:, -1:, begin:].double() for tensor in inputs]
        truth = diag_attention(*wide, block_size=64, causal=True, backend="eager")
        record.judge(f"diag_attention, {name}", worst_error(output[:, -1:, begin:], truth), limit)
        del output
        rows = inputs[0].transpose(1, 2).flatten(2)
        truth = simple_rms_norm(rows[:, -3:].double(), backend="eager")
        record.judge(
            f"simple_rms_norm, {name}", worst_error(simple_rms_norm(rows, backend="triton")[:, -3:], truth), limit
        )
