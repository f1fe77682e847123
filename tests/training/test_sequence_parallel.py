"""Sequence parallelism: slices on 2 and 4 gloo ranks give what one process gives, forward and backward."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from transformers import AutoModelForMaskedLM

from transnormer_hf import (
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
    TransNormerModel,
    norm_attention,
)
from transnormer_hf.research.baselines import baseline_config
from transnormer_hf.training.sequence_parallel import (
    make_sequence_parallel,
    sequence_parallel_metadata,
    sequence_parallel_norm_attention,
)

BATCH, HEADS, SEQ, HEAD_DIM = 3, 2, 23, 4
BOUNDARIES = {2: [0, 9, 23], 4: [0, 9, 10, 17, 23]}  # slices of different lengths, one of a single token
BLOCK_SIZE = 8


def masks() -> dict[str, torch.Tensor | None]:
    """Padding to the right and inside, to the left beyond the first slice, and everywhere."""
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, 19:] = 0
    mask[0, [3, 12]] = 0
    mask[1, :11] = 0
    mask[2] = 0
    return {"no mask": None, "mask": mask}


def cases() -> Iterator[tuple[bool, str, bool, str, torch.dtype]]:
    for causal in (True, False):
        for name in masks():
            yield causal, "1+elu", True, name, torch.float64
        yield causal, "elu", True, "mask", torch.float32
        yield causal, "identity", False, "no mask", torch.bfloat16


def inputs(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """query, key, value, theta, householder; and the gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, HEADS, SEQ, HEAD_DIM)
    query, key, value, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    theta = torch.rand(HEAD_DIM // 2, generator=generator, dtype=torch.float64)
    householder = torch.nn.functional.normalize(torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64), dim=0)
    return [tensor.to(dtype) for tensor in (query, key, value, theta, householder)], [grad.to(dtype)]


def attend_to_slice(world_size: int) -> list[list[torch.Tensor]]:
    """The output and the gradients of this rank's slice, for each case."""
    begin, end = BOUNDARIES[world_size][dist.get_rank() :][:2]
    results = []
    for causal, feature_map, has_lrpe, mask_name, dtype in cases():
        (*qkv, theta, householder), (grad,) = inputs(dtype)
        mask = masks()[mask_name]
        qkv = [tensor[:, :, begin:end].requires_grad_() for tensor in qkv]
        theta.requires_grad_()
        output = sequence_parallel_norm_attention(
            *qkv,
            causal=causal,
            feature_map=feature_map,
            lrpe=(theta, householder) if has_lrpe else None,
            attention_mask=None if mask is None else mask[:, begin:end],
        )
        output.backward(real(grad, mask)[:, :, begin:end])
        results.append([output.detach(), *(tensor.grad for tensor in (*qkv, *([theta] * has_lrpe)))])
    return results


def real(tensor: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros in place of padding, whose outputs are undefined."""
    return tensor if mask is None else tensor * mask[:, None, :, None].to(tensor.dtype)


@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_on_ranks_give_what_one_process_gives(world_size):
    by_rank = run_ranks(attend_to_slice, world_size, world_size)
    for number, (causal, feature_map, has_lrpe, mask_name, dtype) in enumerate(cases()):
        # bfloat16 is compared with the exact result, as both ways round on their own
        wide = torch.promote_types(dtype, torch.float32)
        (*qkv, theta, householder), (grad,) = ([t.to(wide) for t in given] for given in inputs(dtype))
        mask = masks()[mask_name]
        for tensor in (*qkv, theta):
            tensor.requires_grad_()
        lrpe = (theta, householder) if has_lrpe else None
        expected, _ = norm_attention(*qkv, causal=causal, feature_map=feature_map, lrpe=lrpe, attention_mask=mask)
        expected.backward(real(grad, mask))
        parts = list(zip(*(rank[number] for rank in by_rank), strict=True))  # tensors of all ranks
        output, *grads = [torch.cat(part, 2) for part in parts[:4]]
        pairs = [(real(output, mask), real(expected.detach(), mask)), *zip(grads, (t.grad for t in qkv), strict=True)]
        if has_lrpe:
            pairs.append((sum(parts[4]), theta.grad))
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
        for got, exact in pairs:
            assert got.dtype == dtype
            assert (got - exact).abs().max() <= tolerance * exact.abs().max()


# ---- A whole model ----

ROWS, LENGTH = 2, 32
MODELS = {
    "causal T2": (TransNormerForCausalLM, {"variant": "t2", "position_embedding": "sinusoidal"}),
    "bidirectional T1": (TransNormerForMaskedLM, {"variant": "t1", "is_causal": False}),
}


def model_and_batch(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model_class, fields = MODELS[name]
    config = TransNormerConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        block_size=BLOCK_SIZE,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **fields,
    )
    batch = {
        "input_ids": torch.randint(3, 20, (ROWS, LENGTH)),
        "attention_mask": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "labels": torch.randint(0, 20, (ROWS, LENGTH)),
    }
    batch["attention_mask"][1, 27:] = 0
    batch["labels"][1, 27:] = -100
    return model_class(config).double().train(), batch


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.zero_grad()
    targets = batch["labels"] if "shift_labels" not in batch else batch["shift_labels"]
    batch = batch | {"num_items_in_batch": torch.tensor(1.0)} if "shift_labels" in batch else batch
    outputs = model(**batch, skip_logits=False)
    logits = outputs.logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    if "shift_labels" in batch:
        assert torch.allclose(outputs.loss.double(), loss, rtol=1e-5)  # the model's own loss, summed
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def shifted(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The labels of a causal model beside the tokens that predict them."""
    shift_labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return batch | {"shift_labels": shift_labels.contiguous()}


def train_on_slice(checkpointing: bool) -> list[list[torch.Tensor]]:
    """The loss and the gradients of each model, summed over the ranks."""
    results = []
    size = LENGTH // dist.get_world_size()
    for name in MODELS:
        model, batch = model_and_batch(name)
        batch = shifted(batch) if "causal" in name else batch
        make_sequence_parallel(model)
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its newer name
        begin = size * dist.get_rank()
        tensors = loss_and_gradients(
            model, {key: value[:, begin : begin + size].contiguous() for key, value in batch.items()}
        )
        for tensor in tensors:
            dist.all_reduce(tensor)
        results.append(tensors)
    return results


@pytest.mark.parametrize(("world_size", "checkpointing"), [(2, False), (4, True)])
def test_a_model_on_slices_has_the_loss_and_gradients_of_the_whole(world_size, checkpointing):
    by_rank = run_ranks(train_on_slice, world_size, checkpointing)
    for name, *results in zip(MODELS, *by_rank, strict=True):
        model, batch = model_and_batch(name)
        expected = loss_and_gradients(model, shifted(batch) if "causal" in name else batch)
        for rank in results:
            torch.testing.assert_close(rank, expected, atol=1e-6, rtol=1e-6)


# ---- What cannot work says so ----


def messages() -> list[str]:
    """The errors of calls that cannot work; each must come on all ranks, or the others would wait for ever."""
    model, batch = model_and_batch("causal T2")
    make_sequence_parallel(model)
    half = {key: value[:, : LENGTH // 2] for key, value in batch.items()}
    left_padded = torch.ones(ROWS, LENGTH // 2, dtype=torch.long)
    if dist.get_rank() == 0:
        left_padded[1, :3] = 0
    learned, _ = model_and_batch("bidirectional T1")
    calls = [
        lambda: model(batch["input_ids"][:, : LENGTH // 2 + 1]),
        lambda: model(half["input_ids"], attention_mask=left_padded),
        lambda: model(half["input_ids"], position_ids=torch.arange(LENGTH // 2)[None]),
        lambda: model.eval()(half["input_ids"], use_cache=True),
        lambda: make_sequence_parallel(learned)(batch["input_ids"]),
    ]
    texts = []
    for call in calls:
        with pytest.raises(ValueError, match=r".+") as error:
            call()
        texts.append(str(error.value))
    return texts


def test_what_cannot_work_is_refused_on_all_ranks():
    first, second = run_ranks(messages, 2)
    assert first == second
    odd, left, positions, cache, long = first
    assert "the slice of rank 1 begins at positions [17, 17], inside of a block" in odd
    assert "the slice of rank 1 begins at positions [16, 13], inside of a block" in left
    assert "block_size=8" in left
    assert "position_ids was given to a sequence-parallel model" in positions
    assert "use_cache=False" in cache
    assert "the slices have 64 tokens together and max_position_embeddings=32" in long


def test_without_a_process_group_the_error_says_how_to_get_one():
    tensors = torch.zeros(3, 1, 1, 4, 2)
    with pytest.raises(ValueError, match="accelerate launch"):
        sequence_parallel_norm_attention(*tensors, causal=True)


def test_a_head_that_pools_over_the_sequence_is_refused():
    config = TransNormerConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="TransNormerForSequenceClassification, which pools"):
        make_sequence_parallel(TransNormerForSequenceClassification(config))


def test_a_model_with_batch_norm_is_refused():
    config = TransNormerConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, norm_type="batch"
    )
    with pytest.raises(ValueError, match='norm of type "batch", over the tokens of all ranks'):
        make_sequence_parallel(TransNormerForMaskedLM(config))


def positions_of_slices(boundaries: list[int], mask: torch.Tensor | None) -> torch.Tensor:
    begin, end = list(pairwise(boundaries))[dist.get_rank()]
    part = None if mask is None else mask[:, begin:end]
    metadata = sequence_parallel_metadata(BATCH, end - begin, torch.device("cpu"), part)
    return metadata.positions.expand(BATCH, -1).clone()


@pytest.mark.parametrize("name", masks())
def test_positions_go_on_from_slice_to_slice(name):
    mask = masks()[name]
    positions = torch.cat(run_ranks(positions_of_slices, 2, BOUNDARIES[2], mask), 1)  # (batch, seq)
    leading = 0 if mask is None else (mask.cumsum(1) == 0).sum(1, keepdim=True)
    expected = (torch.arange(SEQ) - leading).expand(BATCH, -1)
    seen = expected >= 0  # in front of the first token positions mean nothing
    assert torch.equal(positions[seen], expected[seen])


def test_a_model_with_other_attentions_is_refused():
    config = TransNormerConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(ValueError, match="has a MixerAttention, whose tokens meet those of other ranks"):
        make_sequence_parallel(AutoModelForMaskedLM.from_config(baseline_config(config, "softmax")))


def test_the_parallel_model_has_the_parameters_of_the_model():
    model, _ = model_and_batch("causal T2")
    model.model.embed_tokens.requires_grad_(False)
    before = dict(model.named_parameters())
    parallel = make_sequence_parallel(model)
    assert parallel is model
    assert {name: id(part) for name, part in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert model.state_dict().keys() == model_and_batch("causal T2")[0].state_dict().keys()
    backbone = make_sequence_parallel(model_and_batch("causal T2")[0].model)
    assert isinstance(backbone, TransNormerModel)
