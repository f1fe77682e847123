"""Whole models: training as with the torch backend, generation as without a cache, torch.compile and CUDA graphs."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM, diag_attention, norm_attention

from .correctness import make_inputs, make_lrpe, make_mask
from .rows import SKIPPED, Recorder

VARIANTS = ("t1", "t2")
GROUPS = [*((variant, autocast) for variant in VARIANTS for autocast in (False, True)), ("t1",), ("t2",)]
COMPILED = [*((variant, masked) for variant in VARIANTS for masked in (False, True)), ("graphs",), ("inference",)]
TINY_COMPILED = [("t2", True), ("graphs",), ("inference",)]


def make_model(record: Recorder, variant: str, backend: str) -> TransNormerForCausalLM:
    """A small causal model with DiagAttention in its first layers and NormAttention in the others; equal weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "block_size": 32}
    if record.tiny:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "block_size": 4}
    config = TransNormerConfig(
        vocab_size=64,
        variant=variant,
        max_position_embeddings=1024,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        backend=backend,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )
    return TransNormerForCausalLM(config).to(record.device)


def make_batches(record: Recorder, steps: int, batch_size: int, seq_len: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sequences x' = (a x + c) mod 61, each with an a and a c of its own; in every other batch one has padding."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        factor, shift, column = (torch.randint(low, 61, (batch_size, 1), generator=generator) for low in (2, 0, 0))
        columns = [column]
        for _ in range(seq_len - 1):
            columns.append((columns[-1] * factor + shift) % 61)
        tokens = (torch.cat(columns, 1) + 3).to(record.device)
        mask = torch.ones_like(tokens)
        if step % 2:
            mask[0, : seq_len // 3] = 0
        yield {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def check_training(record: Recorder, variant: str, autocast: bool | None = None) -> None:
    if autocast is None:
        generate_as_without_cache(record, variant)
    else:
        train_as_torch_does(record, variant, autocast)


def train_as_torch_does(record: Recorder, variant: str, autocast: bool) -> None:
    """The same losses step by step, from the same weights on the same batches."""
    steps, batch_size, seq_len = (2, 2, 9) if record.tiny else (20, 8, 300)
    kind = "bf16 autocast" if autocast else "fp32"
    name = f"training {variant}, {kind}"
    with record.guard(name):
        losses: dict[str, list[float]] = {}
        first_gradient: dict[str, torch.Tensor] = {}
        for backend in ("torch", "triton"):
            model = make_model(record, variant, backend)
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            losses[backend] = []
            for batch in make_batches(record, steps, batch_size, seq_len):
                with torch.autocast(record.device.type, torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
                first_gradient.setdefault(backend, flat_gradient(model))
                optimizer.step()
                optimizer.zero_grad()
                losses[backend].append(loss.item())
        error = distance(first_gradient["triton"], first_gradient["torch"])
        record.judge(f"{name}: first gradient", error, 5e-2 if autocast else 1e-4)
        apart = max(abs(a - b) for a, b in zip(losses["triton"], losses["torch"], strict=True))
        record.judge(f"{name}: losses of {steps} steps", apart, 0.1 if autocast else 1e-2, losses=losses)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).double().norm() / truth.double().norm()).item()


def generate_as_without_cache(record: Recorder, variant: str) -> None:
    """Logits after a prompt with padding, token by token with the cache, against those of the whole text at once."""
    name = f"generation {variant}"
    with record.guard(name), torch.no_grad():
        model = make_model(record, variant, "triton").eval()
        prompt, new = (5, 4) if record.tiny else (290, 24)
        tokens = torch.randint(3, 64, (2, prompt), device=record.device)
        mask = torch.ones_like(tokens)
        mask[0, : prompt // 3] = 0
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
        generated = model.generate(
            tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
        text = generated.sequences
        whole_mask = torch.cat((mask, mask.new_ones(2, new)), 1)
        truth = model(text, attention_mask=whole_mask, use_cache=False).logits[:, prompt - 1 : -1]
        record.judge(f"{name}: logits with the cache", distance(torch.stack(generated.logits, 1), truth), 1e-4)
        whole = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
        record.judge(f"{name}: tokens that differ without the cache", (whole != text).sum().item(), 0)


# torch.compile and CUDA graphs


def check_compiled(record: Recorder, what: str, masked: bool = False) -> None:
    if what == "graphs":
        capture_ops(record)
    elif what == "inference":
        compile_inference(record)
    else:
        compile_training(record, what, masked)


def compile_training(record: Recorder, variant: str, masked: bool) -> None:
    name = f"torch.compile, training step of {variant}{', with a mask' if masked else ''}"
    with record.guard(name):
        model = make_model(record, variant, "triton")
        *_, batch = make_batches(record, 2, 2, 9 if record.tiny else 300)
        if not masked:
            del batch["attention_mask"]

        def loss_of() -> torch.Tensor:
            return model(**batch).loss

        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager" if record.tiny else "inductor")
        losses, gradients = [], []
        begin = 0.0
        for function in (loss_of, compiled):
            model.zero_grad()
            begin = time.monotonic()
            loss = function()
            loss.backward()
            losses.append(loss.item())
            gradients.append(flat_gradient(model))
        error = max(abs(losses[1] - losses[0]), distance(gradients[1], gradients[0]))
        record.judge(name, error, 1e-3, compile_seconds=time.monotonic() - begin)


def compile_inference(record: Recorder) -> None:
    """mode="reduce-overhead": CUDA graphs made by torch."""
    name = 'torch.compile, mode="reduce-overhead", forward with a mask'
    if record.device.type == "cpu":
        record.add(name, SKIPPED, reason="needs a GPU")
        return
    with record.guard(name), torch.no_grad():
        model = make_model(record, "t2", "triton").eval()
        *_, batch = make_batches(record, 2, 2, 300)
        del batch["labels"]
        expected = model(**batch, use_cache=False).logits
        compiled = torch.compile(model, mode="reduce-overhead")
        for _ in range(3):
            found = compiled(**batch, use_cache=False).logits.clone()
        record.judge(name, distance(found, expected), 1e-3)


def capture_ops(record: Recorder) -> None:
    """Forward and backward of both attentions in a CUDA graph, replayed on other numbers."""
    sizes = (2, 1, 5, 16) if record.tiny else (3, 2, 300, 64)
    mask, lrpe = make_mask(sizes[0], sizes[2], record.device), make_lrpe(sizes[3], record.device)
    for masked in (False, True):
        options = {"causal": True, "lrpe": lrpe, "backend": "triton", "attention_mask": mask if masked else None}
        runs: dict[str, Callable[..., torch.Tensor]] = {
            "norm_attention": lambda *inputs, options=options: norm_attention(*inputs, **options)[0],
            "diag_attention": lambda *inputs, options=options: diag_attention(*inputs, block_size=64, **options),
        }
        for what, run in runs.items():
            name = f"CUDA graph of {what}{', with a mask' if masked else ''}"
            with record.guard(name):
                tensors = make_inputs(*sizes, torch.bfloat16, record.device, views=False)
                leaves = [tensor.requires_grad_() for tensor in tensors.values()]

                def both(leaves: list[torch.Tensor] = leaves, run: Any = run) -> list[torch.Tensor]:
                    output = run(*leaves)
                    return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

                both()
                if record.device.type == "cpu":
                    record.add(name, SKIPPED, reason="needs a GPU")
                else:
                    record.judge(name, replay_differs(both, leaves), 0)


def replay_differs(run: Callable[[], list[torch.Tensor]], leaves: list[torch.Tensor]) -> int:
    """How many results of a replayed graph differ from those of a plain run on the same numbers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for leaf in leaves:
            leaf.normal_()
    graph.replay()
    return sum(not torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
