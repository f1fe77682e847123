"""The loss of language models without logits: equal to the loss of the logits, and never in need of all of them."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.loss.loss_utils import ForCausalLMLoss

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM, TransNormerForMaskedLM
from transnormer_hf.model import modeling_transnormer
from transnormer_hf.model.modeling_transnormer import linear_cross_entropy, token_cross_entropy

VOCABULARY, BATCH, SEQ = 97, 3, 50
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's
LM_HEADS = (TransNormerForCausalLM, TransNormerForMaskedLM)
of_each_lm_head = pytest.mark.parametrize("model_class", LM_HEADS, ids=["causal LM", "masked LM"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """64 tokens at a time, so that the tokens below make several chunks."""
    monkeypatch.setattr(modeling_transnormer, "LOGITS_AT_A_TIME", 1)


def make_model(model_class, **fields):
    """In training, but without dropout: two forwards are to agree."""
    torch.manual_seed(0)
    defaults = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    defaults |= {"block_size": 8, "max_position_embeddings": SEQ, "initializer_range": 0.3}
    defaults |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return model_class(TransNormerConfig(**defaults | fields)).train()


def make_batch(share=0.9):
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (BATCH, SEQ))
    return {"input_ids": input_ids, "labels": torch.where(torch.rand(BATCH, SEQ) < share, input_ids, -100)}


def step(model, **inputs):
    """The outputs, and the gradients by name."""
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_steps(model, rtol=1e-6, atol=1e-7, **inputs):
    """With and without logits: equal losses and gradients."""
    expected, expected_grads = step(model, **inputs, skip_logits=False)
    outputs, grads = step(model, **inputs)
    assert outputs.logits is None
    assert expected.logits.shape == (BATCH, SEQ, VOCABULARY)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=rtol, atol=atol)
    assert grads.keys() == expected_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        scale = expected_grads[name].abs().max().item()
        torch.testing.assert_close(grad, expected_grads[name], rtol=rtol, atol=atol + rtol * scale)


# ---- Equal to the loss of the logits ----


@of_each_lm_head
@pytest.mark.parametrize("share", [1.0, 0.9, 0.15])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(300)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_the_logits(model_class, share, num_items):
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    assert_equal_steps(make_model(model_class), rtol=2e-6, **make_batch(share), **options)


@of_each_lm_head
@pytest.mark.parametrize("num_items", [None, 0, 5])
def test_a_batch_without_labels_has_a_loss_of_zero_and_changes_nothing(model_class, num_items):
    """With logits, the mean over no label is NaN."""
    outputs, grads = step(make_model(model_class), **make_batch(0.0), num_items_in_batch=num_items)
    assert outputs.loss == 0
    assert grads
    assert not any(grad.any() for grad in grads.values())


def test_in_float64_they_agree_to_its_last_digits():
    linear, labels = torch.nn.Linear(32, VOCABULARY).double(), make_batch()["labels"]
    states = torch.randn(BATCH, SEQ, 32).double().requires_grad_()
    inputs = (states, linear.weight, linear.bias)
    expected = F.cross_entropy(linear(states).flatten(0, 1), labels.flatten())
    actual = token_cross_entropy(linear, states, labels)
    tolerance = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(actual, expected, **tolerance)
    grads = torch.autograd.grad(actual, inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs), **tolerance)


@of_each_lm_head
@pytest.mark.parametrize("is_tied", [True, False])
def test_untied_and_checkpointed_models_have_the_same_gradients(model_class, is_tied):
    model = make_model(model_class, tie_word_embeddings=is_tied)
    assert_equal_steps(model, rtol=2e-6, **make_batch())
    expected = step(model, **make_batch())[1]
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # the method has two names
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(step(model, **make_batch())[1], expected)


def test_labels_that_are_shifted_already():
    batch = make_batch()
    batch["shift_labels"] = batch["labels"].roll(3, 1)
    model = make_model(TransNormerForCausalLM)
    assert_equal_steps(model, rtol=2e-6, **batch)
    assert model(**batch).loss != model(batch["input_ids"], labels=batch["labels"]).loss


def test_packed_rows():
    position_ids = torch.cat((torch.arange(20), torch.arange(SEQ - 20))).expand(BATCH, -1)
    for model_class in LM_HEADS:
        assert_equal_steps(make_model(model_class), rtol=2e-6, **make_batch(), position_ids=position_ids)


@of_each_lm_head
def test_micro_batches_add_up_to_one(model_class):
    model, batch = make_model(model_class), make_batch(0.5)
    labels = batch["labels"][:, 1:] if model_class is TransNormerForCausalLM else batch["labels"]
    count = (labels != -100).sum()
    expected = step(model, **batch)[1]
    model.zero_grad()
    for row in range(BATCH):
        part = {name: values[row : row + 1] for name, values in batch.items()}
        model(**part, num_items_in_batch=count).loss.backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@of_each_lm_head
def test_a_frozen_head_gets_no_gradient_and_passes_one_on(model_class):
    model = make_model(model_class, tie_word_embeddings=False)
    expected = step(model, **make_batch())[1]
    model.lm_head.requires_grad_(False)
    grads = step(model, **make_batch())[1]
    assert not any(name.startswith("lm_head") for name in grads)
    torch.testing.assert_close(grads, {name: grad for name, grad in expected.items() if name in grads})


def test_a_graph_may_be_gone_through_twice():
    model = make_model(TransNormerForCausalLM)
    loss = model(**make_batch()).loss
    weight = model.lm_head.weight
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, weight)
    torch.testing.assert_close(second, 3 * first)


def test_there_is_no_second_derivative():
    model = make_model(TransNormerForCausalLM)
    with pytest.raises(RuntimeError, match=r"no second derivative; pass skip_logits=False"):
        torch.autograd.grad(model(**make_batch()).loss, model.lm_head.weight, create_graph=True)


# ---- Half precision ----


def error(loss_and_grads, expected):
    return max((a.double() - b).norm() / b.norm() for a, b in zip(loss_and_grads, expected, strict=True))


@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "half the parameters"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_the_truth_than_the_logits(is_autocast, dtype):
    torch.manual_seed(0)
    linear, states = torch.nn.Linear(32, VOCABULARY).double(), torch.randn(BATCH, SEQ, 32).double()
    labels = make_batch()["labels"]

    def run(loss, linear, states):
        states = states.clone().requires_grad_()
        value = loss(linear, states)
        return value.detach(), *torch.autograd.grad(value, (states, linear.weight, linear.bias))

    def of_logits(linear, states):
        return F.cross_entropy(linear(states).float().flatten(0, 1), labels.flatten())

    def of_chunks(linear, states):
        return token_cross_entropy(linear, states, labels)

    truth = run(of_chunks, linear, states)
    kind = torch.float32 if is_autocast else dtype
    linear, states = linear.to(kind), states.to(kind)
    with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        expected, actual = run(of_logits, linear, states), run(of_chunks, linear, states)
    assert actual[0].dtype == torch.float32
    assert [x.dtype for x in actual[1:]] == [kind] * 3
    assert error(actual, truth) <= 1.5 * error(expected, truth) + 1e-6 < 0.02


def test_float16_does_not_round_small_gradients_to_zero():
    """Divided by the tokens of a large update before the products, the gradients would be too small for float16."""
    linear, states = torch.nn.Linear(32, VOCABULARY), torch.randn(1, SEQ, 32, requires_grad=True)
    labels = make_batch()["labels"][:1]
    (expected,) = torch.autograd.grad(token_cross_entropy(linear, states, labels, 10**7), states)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = token_cross_entropy(linear, states, labels, 10**7)
    (actual,) = torch.autograd.grad(loss * 2**16, states)
    torch.testing.assert_close(actual / 2**16, expected, rtol=0.02, atol=1e-9)


# ---- What is computed, and for which tokens ----


def softmax_rows_and_largest_input(run):
    """Of how many rows a softmax was taken, and the size of the largest tensor that an operator of torch was given."""
    with torch.profiler.profile(record_shapes=True) as profile:
        run()
    events = [(event.name, [shape for shape in event.input_shapes if shape]) for event in profile.events()]
    rows = sum(math.prod(shapes[0][:-1]) for name, shapes in events if name == "aten::_log_softmax")
    whole = [shape for _, shapes in events for shape in shapes if all(isinstance(size, int) for size in shape)]
    return rows, max(map(math.prod, whole))


@of_each_lm_head
@pytest.mark.parametrize("is_training", [True, False])
def test_logits_exist_for_a_chunk_of_labelled_tokens_at_a_time(model_class, is_training):
    vocab_size, batch = 500, make_batch(0.8)
    model = make_model(model_class, vocab_size=vocab_size).train(is_training)
    rows, largest = softmax_rows_and_largest_input(lambda: model(**batch, skip_logits=False).loss.backward())
    assert (rows, largest) == (BATCH * SEQ, BATCH * SEQ * vocab_size)
    rows, largest = softmax_rows_and_largest_input(lambda: model(**batch, skip_logits=True).loss.backward())
    labels = batch["labels"][:, 1:] if model_class is TransNormerForCausalLM else batch["labels"]
    assert rows == (labels != -100).sum()
    assert largest == 64 * vocab_size


@of_each_lm_head
def test_logits_are_there_when_asked_for(model_class):
    model, batch = make_model(model_class), make_batch()
    logits = model(batch["input_ids"]).logits
    assert model(**batch).logits is None
    assert torch.equal(model(**batch, skip_logits=False).logits, logits)
    assert model.eval()(**batch, skip_logits=True).logits is None
    outputs = model(**batch)  # an evaluation may want to see them
    torch.testing.assert_close(outputs.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, model(**batch, skip_logits=True).loss)
    assert model(batch["input_ids"], skip_logits=True).logits is not None  # there is no loss without labels


@of_each_lm_head
def test_the_loss_of_every_token(model_class):
    model, batch = make_model(model_class), make_batch()
    labels = batch["labels"]
    if model_class is TransNormerForCausalLM:
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(model(batch["input_ids"]).logits.mT, labels, reduction="none")
    losses = model(**batch, reduction="none").loss
    assert not losses.requires_grad
    torch.testing.assert_close(losses, expected)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels have shape \(3, 49\); those of these hidden states have \(3, 50\)"):
        make_model(TransNormerForMaskedLM)(make_batch()["input_ids"], labels=make_batch()["labels"][:, 1:])


# ---- Where more happens than a product with the weight ----


def double_logits(module, args, output):
    return 2 * output


@of_each_lm_head
def test_hooks_on_the_last_projection_are_called(model_class):
    model, batch = make_model(model_class), make_batch()
    before = model(**batch).loss
    model.get_output_embeddings().register_forward_hook(double_logits)
    outputs = model(**batch)
    expected = model.loss_function(logits=outputs.logits, labels=batch["labels"], vocab_size=VOCABULARY)
    torch.testing.assert_close(outputs.loss, expected)
    assert (outputs.loss - before).abs() > 0.01


@of_each_lm_head
def test_a_projection_of_another_class_is_called(model_class):
    class Quiet(torch.nn.Linear):
        def forward(self, hidden_states):
            return 0 * super().forward(hidden_states)

    model = make_model(model_class, tie_word_embeddings=False)
    model.set_output_embeddings(Quiet(16, VOCABULARY))
    torch.testing.assert_close(model(**make_batch()).loss, torch.tensor(float(VOCABULARY)).log())


@of_each_lm_head
def test_a_loss_of_the_users_own_gets_the_logits(model_class):
    model, batch = make_model(model_class), make_batch(1.0)
    assert model(**batch, ignore_index=5).logits is not None
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() + vocab_size
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, outputs.logits.sum() + VOCABULARY)


def test_lora_on_the_head_is_part_of_the_loss():
    peft = pytest.importorskip("peft")
    model = make_model(TransNormerForCausalLM, tie_word_embeddings=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    batch = make_batch()
    outputs = adapted(**batch)
    expected = ForCausalLMLoss(adapted(batch["input_ids"]).logits, batch["labels"], VOCABULARY)
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    assert all(p.grad.abs().max() > 0 for name, p in adapted.named_parameters() if "lora" in name)


# ---- torch.compile ----


@of_each_lm_head
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_step_serves_every_length_and_number_of_labels(model_class, backend):
    torch.compiler.reset()
    model, counter = make_model(model_class), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length, share in ((50, 0.9), (33, 0.2), (40, 0.0)):
        batch = {name: values[:, :length].clone() for name, values in make_batch(share).items()}
        expected, expected_grads = step(model, **batch, num_items_in_batch=torch.tensor(9))
        outputs, grads = step(compiled, **batch, num_items_in_batch=torch.tensor(9))
        torch.testing.assert_close(outputs.loss, expected.loss)
        torch.testing.assert_close({k.removeprefix("_orig_mod."): v for k, v in grads.items()}, expected_grads)
    assert counter.frame_count == 1


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, False, False]])
def test_the_operator_is_one_to_torch(needs):
    inputs = [torch.randn(SEQ, 16), torch.randn(VOCABULARY, 16), torch.randn(VOCABULARY)]
    inputs = [tensor.requires_grad_(need) for tensor, need in zip(inputs, needs, strict=True)]
    labels = make_batch()["labels"][0]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(linear_cross_entropy, (*inputs, labels, needs), test_utils=tests)
