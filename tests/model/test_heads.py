"""The heads: losses and labels, pooling, tied and resized embeddings, and training through the Trainer."""

import json

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from transnormer_hf import (
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
)
from transnormer_hf.model.modeling_transnormer import pool

VOCABULARY, BATCH, SEQ = 40, 3, 9
HEADS = (
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerForQuestionAnswering,
    TransNormerForMultipleChoice,
)
LM_HEADS = (TransNormerForCausalLM, TransNormerForMaskedLM)
of_each_head = pytest.mark.parametrize("model_class", HEADS, ids=lambda head: head.__name__.removeprefix("TransNormer"))
of_each_lm_head = pytest.mark.parametrize("model_class", LM_HEADS, ids=["causal LM", "masked LM"])


def make_config(**fields):
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "block_size": 4,
        "max_position_embeddings": 16,
        "initializer_range": 0.2,
    }
    return TransNormerConfig(**defaults | fields)


def make_model(model_class, **fields):
    return model_class(make_config(**fields)).eval()


ENCODER_HEADS = [TransNormerModel, *(head for head in HEADS if head is not TransNormerForCausalLM)]


@pytest.mark.parametrize("model_class", ENCODER_HEADS, ids=lambda head: head.__name__.removeprefix("TransNormer"))
def test_token_types_add_a_learned_vector_to_the_embeddings(model_class):
    model = make_model(model_class, type_vocab_size=2)
    input_ids = make_ids(BATCH, 4, SEQ) if model_class is TransNormerForMultipleChoice else make_ids(BATCH, SEQ)
    types = (torch.arange(SEQ) > 4).long().expand_as(input_ids)
    backbone = getattr(model, "model", model)
    token_vectors = backbone.embed_tokens(input_ids)
    with torch.no_grad():
        backbone.embed_token_types.weight[0].zero_()  # the type of those that are not told
        expected = model(inputs_embeds=token_vectors + backbone.embed_token_types.weight[types])[0]
        assert_close = torch.testing.assert_close
        assert_close(model(input_ids, token_type_ids=types)[0], expected)
        assert_close(model(input_ids)[0], model(input_ids, token_type_ids=torch.zeros_like(types))[0])
        assert (model(input_ids)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "function"), [("tanh", torch.tanh), ("gelu", F.gelu), ("linear", lambda x: x)])
def test_the_activation_of_the_classification_head(name, function):
    head = make_model(TransNormerForSequenceClassification, classifier_activation=name).classifier
    pooled = torch.randn(BATCH, 16)
    torch.testing.assert_close(head(pooled), head.out_proj(function(head.dense(pooled))))


def make_ids(*shape):
    return torch.randint(3, VOCABULARY, shape)


def make_inputs(model_class, num_labels=3):
    """Inputs with labels for a head, a batch of BATCH rows or questions."""
    if model_class is TransNormerForMultipleChoice:
        return {"input_ids": make_ids(BATCH, 4, SEQ), "labels": torch.tensor([0, 3, 1])}
    inputs = {"input_ids": make_ids(BATCH, SEQ)}
    if model_class is TransNormerForQuestionAnswering:
        return inputs | {"start_positions": torch.tensor([0, 3, 8]), "end_positions": torch.tensor([1, 3, 8])}
    if model_class is TransNormerForSequenceClassification:
        return inputs | {"labels": torch.tensor([0, 2, 1])}
    labels = torch.randint(num_labels if model_class is TransNormerForTokenClassification else VOCABULARY, (BATCH, SEQ))
    labels[0, :2] = -100
    return inputs | {"labels": labels}


SHAPES = {
    TransNormerForCausalLM: (BATCH, SEQ, VOCABULARY),
    TransNormerForMaskedLM: (BATCH, SEQ, VOCABULARY),
    TransNormerForSequenceClassification: (BATCH, 3),
    TransNormerForTokenClassification: (BATCH, SEQ, 3),
    TransNormerForMultipleChoice: (BATCH, 4),
}


@of_each_head
class TestEveryHead:
    def test_trains_every_parameter(self, model_class):
        model = make_model(model_class, num_labels=3).train()
        outputs = model(**make_inputs(model_class))
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        assert outputs.loss.dim() == 0
        untrained = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert untrained == []

    def test_gives_logits_of_its_shape_and_no_loss_without_labels(self, model_class):
        model, inputs = make_model(model_class, num_labels=3), make_inputs(model_class)
        outputs = model(inputs["input_ids"])
        assert "loss" not in outputs
        if model_class is TransNormerForQuestionAnswering:
            assert outputs.start_logits.shape == outputs.end_logits.shape == (BATCH, SEQ)
        else:
            assert outputs.logits.shape == SHAPES[model_class]

    def test_hands_on_hidden_states_and_maps(self, model_class):
        model, inputs = make_model(model_class, backend="eager"), make_inputs(model_class)
        outputs = model(inputs["input_ids"], output_hidden_states=True, output_attentions=True)
        rows = inputs["input_ids"].flatten(0, -2).shape[0]
        assert [tuple(states.shape) for states in outputs.hidden_states] == [(rows, SEQ, 16)] * 3
        assert [tuple(weights.shape) for weights in outputs.attentions] == [(rows, 2, SEQ, SEQ)] * 2

    def test_takes_use_cache_and_token_types_from_whoever_passes_them(self, model_class):
        model, inputs = make_model(model_class, num_labels=3), make_inputs(model_class)
        expected, extra = model(**inputs), {"token_type_ids": torch.ones_like(inputs["input_ids"])}
        torch.testing.assert_close(model(**inputs, **extra, use_cache=False).loss, expected.loss, rtol=0, atol=0)

    def test_gives_a_tuple_on_request(self, model_class):
        model, inputs = make_model(model_class, num_labels=3), make_inputs(model_class)
        expected, actual = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(actual, tuple)
        assert torch.equal(actual[0], expected.loss)
        assert torch.equal(actual[1], expected[1])

    def test_takes_embeddings_in_place_of_ids(self, model_class):
        model = make_model(model_class, num_labels=3, scale_embedding=True)
        inputs = make_inputs(model_class)
        expected = model(**inputs)
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        actual = model(**inputs)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual[1], expected[1])

    def test_survives_saving_and_loading(self, model_class, tmp_path):
        model, inputs = make_model(model_class, num_labels=3), make_inputs(model_class)
        model.save_pretrained(tmp_path)
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(loaded(**inputs).loss, model(**inputs).loss)
        base, info = TransNormerModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert torch.equal(base.embed_tokens.weight, model.get_input_embeddings().weight)

    def test_ignores_right_padding(self, model_class):
        model, inputs = make_model(model_class, num_labels=3), make_inputs(model_class)
        expected = model(**inputs)[1]
        padded = F.pad(inputs["input_ids"], (0, 5), value=1)
        mask = F.pad(torch.ones_like(inputs["input_ids"]), (0, 5))
        actual = model(padded, attention_mask=mask)[0]
        if actual.shape != expected.shape:
            actual = actual[:, :SEQ]
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class TestLanguageModels:
    def test_the_causal_loss_is_that_of_the_next_token(self):
        model, inputs = make_model(TransNormerForCausalLM), make_inputs(TransNormerForCausalLM)
        outputs = model(**inputs)
        expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)

    def test_the_masked_loss_is_that_of_the_labelled_tokens(self):
        model, inputs = make_model(TransNormerForMaskedLM), make_inputs(TransNormerForMaskedLM)
        outputs = model(**inputs)
        labelled = inputs["labels"] != -100
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[labelled], inputs["labels"][labelled]))

    @of_each_lm_head
    def test_losses_divide_by_the_items_of_the_whole_batch(self, model_class):
        model, inputs = make_model(model_class), make_inputs(model_class)
        labels = inputs["labels"][:, 1:] if model_class is TransNormerForCausalLM else inputs["labels"]
        count = (labels != -100).sum()
        loss, shared = model(**inputs).loss, model(**inputs, num_items_in_batch=4 * count).loss
        torch.testing.assert_close(shared, loss / 4)

    def test_a_causal_model_is_causal_whatever_it_is_configured_from(self):
        config = make_config(is_causal=False)
        model = TransNormerForCausalLM(config)
        assert model.config.is_causal
        assert model.model.layers[0].self_attn.options["causal"]
        assert not config.is_causal

    @pytest.mark.parametrize(
        ("kept", "columns"),
        [(0, list(range(SEQ))), (1, [8]), (3, [6, 7, 8]), (torch.tensor([0, 4]), [0, 4])],
        ids=["all", "last", "last three", "chosen"],
    )
    def test_logits_to_keep(self, kept, columns):
        model, input_ids = make_model(TransNormerForCausalLM), make_ids(BATCH, SEQ)
        torch.testing.assert_close(model(input_ids, logits_to_keep=kept).logits, model(input_ids).logits[:, columns])

    @of_each_lm_head
    def test_the_head_is_tied_to_the_embeddings(self, model_class, tmp_path):
        model = make_model(model_class)
        model.save_pretrained(tmp_path)
        for each in (model, model_class.from_pretrained(tmp_path)):
            assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
        untied = make_model(model_class, tie_word_embeddings=False)
        assert untied.get_output_embeddings().weight is not untied.get_input_embeddings().weight

    @of_each_lm_head
    @pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
    @pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 10])
    def test_the_vocabulary_can_be_resized(self, model_class, is_tied, size, tmp_path):
        model, input_ids = make_model(model_class, tie_word_embeddings=is_tied), make_ids(1, SEQ).clamp(max=size - 1)
        common = min(size, VOCABULARY)
        before = model(input_ids).logits[..., :common]
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
        if model_class is TransNormerForMaskedLM:
            assert model.get_output_embeddings().bias.shape == (size,)
        model.save_pretrained(tmp_path)
        for each in (model, model_class.from_pretrained(tmp_path)):
            outputs = each(input_ids, labels=input_ids)
            assert outputs.logits.shape == (1, SEQ, size)
            torch.testing.assert_close(outputs.logits[..., :common], before)
            assert outputs.loss.isfinite()


class TestSequenceClassification:
    @pytest.mark.parametrize(
        ("labels", "num_labels", "problem_type", "loss"),
        [
            (torch.tensor([0, 2, 1]), 3, "single_label_classification", F.cross_entropy),
            (
                torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]),
                3,
                "multi_label_classification",
                F.binary_cross_entropy_with_logits,
            ),
            (torch.tensor([0.5, -1.0, 2.0]), 1, "regression", lambda x, y: F.mse_loss(x[:, 0], y)),
        ],
        ids=["single label", "multi label", "regression"],
    )
    def test_the_problem_type_follows_the_labels_unless_given(self, labels, num_labels, problem_type, loss):
        for fields in ({}, {"problem_type": problem_type}):
            model = make_model(TransNormerForSequenceClassification, num_labels=num_labels, **fields)
            outputs = model(make_ids(3, SEQ), labels=labels)
            torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
            assert model.config.problem_type == problem_type

    def test_regression_of_several_numbers_has_to_be_given(self):
        labels = torch.randn(3, 3)
        model = make_model(TransNormerForSequenceClassification, num_labels=3, problem_type="regression")
        outputs = model(make_ids(3, SEQ), labels=labels)
        torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels))

    @pytest.mark.parametrize(
        ("pooling", "is_causal"),
        [
            ("first", False),
            ("mean", False),
            ("last", False),
            ("mean", True),
            ("last", True),
            (None, True),
            (None, False),
        ],
    )
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_pooling_takes_real_tokens(self, pooling, is_causal, side):
        model = make_model(TransNormerForSequenceClassification, pooling=pooling, is_causal=is_causal)
        input_ids = make_ids(2, SEQ)
        expected = torch.cat((model(input_ids[:1, :4]).logits, model(input_ids[1:]).logits))
        mask = torch.ones(2, SEQ, dtype=torch.long)
        mask[0, 4:] = 0
        if side == "left":
            input_ids[0], mask[0] = input_ids[0].roll(SEQ - 4), mask[0].flip(0)
        torch.testing.assert_close(model(input_ids, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)

    def test_a_causal_model_pools_a_token_that_has_seen_the_text(self):
        model = make_model(TransNormerForSequenceClassification, is_causal=True)
        assert model.config.pooling == "last"
        input_ids = make_ids(1, SEQ).expand(2, -1).clone()
        input_ids[1, 1:] = (input_ids[1, 1:] + 1) % 40
        one, other = model(input_ids).logits
        assert not torch.allclose(one, other)
        with pytest.raises(StrictDataclassError, match="pooling='first' with is_causal=True"):
            make_model(TransNormerForSequenceClassification, is_causal=True, pooling="first")

    def test_a_causal_language_model_becomes_such_a_classifier(self, tmp_path):
        make_model(TransNormerForCausalLM).save_pretrained(tmp_path)
        assert TransNormerForSequenceClassification.from_pretrained(tmp_path).config.pooling == "last"
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("transnormer_version", None)  # as version 0.1.0 wrote it
        (tmp_path / "config.json").write_text(json.dumps(config | {"pooling": "first"}))
        assert TransNormerForSequenceClassification.from_pretrained(tmp_path).config.pooling == "last"

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("pooling", ["first", "mean", "last"])
    def test_a_traced_or_exported_classifier_takes_other_sizes(self, pooling):
        model = make_model(TransNormerForSequenceClassification, pooling=pooling, position_embedding="sinusoidal")

        class Logits(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, input_ids, attention_mask):
                return self.model(input_ids, attention_mask=attention_mask).logits

        def inputs(batch_size, length):
            mask = torch.ones(batch_size, length, dtype=torch.long)
            mask[0, 3:] = 0
            return torch.randint(3, 40, (batch_size, length)), mask

        sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=512)}
        exported = torch.export.export(Logits(), inputs(2, 9), dynamic_shapes=(sizes, sizes)).module()
        traced = torch.jit.trace(Logits(), inputs(2, 9), check_trace=False)
        for other in (inputs(5, 9), inputs(3, 31)):
            torch.testing.assert_close(exported(*other), Logits()(*other))
        other = inputs(5, 9)
        torch.testing.assert_close(traced(*other), Logits()(*other))

    def test_pooling_an_empty_row_is_finite(self):
        hidden_states, mask = torch.randn(2, 4, 8), torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]])
        expected = {"first": hidden_states[1, 1], "last": hidden_states[1, 2], "mean": hidden_states[1, 1:3].mean(0)}
        for pooling, of_second_row in expected.items():
            pooled = pool(hidden_states, mask, pooling)
            assert pooled.isfinite().all()
            torch.testing.assert_close(pooled[1], of_second_row)

    def test_a_new_number_of_labels_gives_a_new_classifier(self, tmp_path):
        make_model(TransNormerForMaskedLM).save_pretrained(tmp_path)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=5, output_loading_info=True
        )
        assert model(make_ids(2, SEQ)).logits.shape == (2, 5)
        assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
        assert model(make_ids(2, SEQ)).logits.shape == (2, 2)

    @pytest.mark.parametrize(("given", "expected"), [(None, 0.3), (0.0, 0.0), (0.7, 0.7)])
    def test_classifier_dropout_is_that_of_the_model_unless_given(self, given, expected):
        model = make_model(TransNormerForSequenceClassification, hidden_dropout_prob=0.3, classifier_dropout=given)
        assert model.classifier.dropout.p == expected


def test_token_classification_leaves_unlabelled_tokens_out():
    model = make_model(TransNormerForTokenClassification, num_labels=3)
    inputs = make_inputs(TransNormerForTokenClassification)
    outputs, labelled = model(**inputs), inputs["labels"] != -100
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits[labelled], inputs["labels"][labelled]))


class TestQuestionAnswering:
    def test_the_loss_is_the_mean_of_both_ends(self):
        model, inputs = make_model(TransNormerForQuestionAnswering), make_inputs(TransNormerForQuestionAnswering)
        outputs = model(**inputs)
        start = F.cross_entropy(outputs.start_logits, inputs["start_positions"])
        end = F.cross_entropy(outputs.end_logits, inputs["end_positions"])
        torch.testing.assert_close(outputs.loss, (start + end) / 2)

    def test_answers_outside_of_the_text_are_left_out(self):
        model, inputs = make_model(TransNormerForQuestionAnswering), make_inputs(TransNormerForQuestionAnswering)
        inputs["start_positions"][0] = inputs["end_positions"][0] = SEQ + 50
        kept = {name: values[1:] for name, values in inputs.items()}
        torch.testing.assert_close(model(**inputs).loss, model(**kept).loss)


def test_multiple_choice_scores_every_choice_by_itself():
    model, inputs = make_model(TransNormerForMultipleChoice), make_inputs(TransNormerForMultipleChoice)
    mask = torch.ones_like(inputs["input_ids"])
    mask[:, 1, 6:] = 0
    outputs = model(**inputs, attention_mask=mask)
    shorter = model(inputs["input_ids"][:, 1:2, :6])
    torch.testing.assert_close(outputs.logits[:, 1:2], shorter.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, inputs["labels"]))


class TestTrainer:
    """Gradient accumulation over four batches is one step on a batch four times as large."""

    def step(self, model_class, rows, batch_size, accumulation, output_dir):
        torch.manual_seed(0)
        model = make_model(
            model_class,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=output_dir,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}

    @pytest.mark.parametrize(
        "model_class",
        [TransNormerForSequenceClassification, TransNormerForTokenClassification, *LM_HEADS],
        ids=["sequences", "tokens", "causal LM", "masked LM"],
    )
    def test_gradient_accumulation(self, model_class, tmp_path):
        rows = []
        for index in range(8):
            input_ids = make_ids(SEQ)
            labels = {
                TransNormerForSequenceClassification: torch.tensor(index % 3),
                TransNormerForTokenClassification: torch.randint(3, (SEQ,)),
            }.get(model_class, input_ids.clone())
            if model_class in LM_HEADS:
                labels[: index + 1] = -100  # the language models weigh by tokens, however they are spread
            rows.append({"input_ids": input_ids, "labels": labels})
        accumulated = self.step(model_class, rows, 2, 4, tmp_path)
        at_once = self.step(model_class, rows, 8, 1, tmp_path)
        for name, change in at_once.items():
            torch.testing.assert_close(accumulated[name], change, rtol=1e-3, atol=1e-6, msg=name)
        assert max(change.abs().max() for change in at_once.values()) > 1e-2
