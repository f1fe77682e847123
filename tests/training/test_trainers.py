"""The Trainer's arguments in our trainers: smoothing, what evaluation looks at, and values that are refused."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, default_data_collator

from transnormer_hf import (
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForSequenceClassification,
)
from transnormer_hf.training.fine_tuning import CardTrainer
from transnormer_hf.training.losses import IGNORED, aligned_loss, next_token_loss, squared_error
from transnormer_hf.training.predictions import check_finite, labels_of, logits_of
from transnormer_hf.training.pretraining import PretrainingTrainer, collate
from transnormer_hf.training.trainer_arguments import check_trainer_arguments

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def arguments(folder, **changes) -> TrainingArguments:
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), **options, dataloader_pin_memory=False, **changes)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The formula: (1 - epsilon) of the label's -log p and epsilon of the mean over classes, where there is a label."""
    total, number = 0.0, 0
    for row, label in zip(logits.flatten(0, -2), labels.flatten().tolist(), strict=True):
        if label != IGNORED:
            log_p = row - row.exp().sum().log()
            total, number = total - (1 - epsilon) * log_p[label] - epsilon * log_p.mean(), number + 1
    return total / number


# ---- Label smoothing ----


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("is_named", [False, True])
def test_aligned_labels_are_smoothed(smoothing, is_named, tmp_path):
    model = TransNormerForCausalLM(TransNormerConfig(**SMALL)).eval()
    input_ids = torch.randint(3, 50, (4, 12))
    labels = input_ids.roll(-1, 1)
    labels[0, 3:] = labels[:, -1] = IGNORED
    options = {"compute_loss_func": aligned_loss} if is_named else {}
    trainer = PretrainingTrainer(model, arguments(tmp_path, label_smoothing_factor=smoothing), **options)
    batch = {"input_ids": input_ids, "labels": labels, "shift_labels": labels}
    loss = trainer.compute_loss(model, batch)
    torch.testing.assert_close(loss, smoothed(model(input_ids).logits, labels, smoothing))


def test_only_masked_places_are_smoothed(tmp_path):
    model = TransNormerForMaskedLM(TransNormerConfig(**SMALL)).eval()
    input_ids = torch.randint(3, 50, (4, 12))
    labels = torch.where(torch.rand(4, 12) < 0.3, input_ids, IGNORED)
    for trainer in (PretrainingTrainer, CardTrainer):
        loss = trainer(model, arguments(tmp_path, label_smoothing_factor=0.2)).compute_loss(
            model, {"input_ids": input_ids, "labels": labels.clone()}
        )
        torch.testing.assert_close(loss, smoothed(model(input_ids).logits, labels, 0.2))


def test_labels_of_a_causal_model_are_shifted_before_they_are_smoothed(tmp_path):
    model = TransNormerForCausalLM(TransNormerConfig(**SMALL)).eval()
    input_ids = torch.randint(3, 50, (4, 12))
    logits = model(input_ids).logits
    trainer = CardTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    loss = trainer.compute_loss(model, {"input_ids": input_ids, "labels": input_ids})
    torch.testing.assert_close(loss, smoothed(logits[:, :-1], input_ids[:, 1:], 0.1))
    plain = next_token_loss(SimpleNamespace(logits=logits), input_ids)
    torch.testing.assert_close(plain, model(input_ids, labels=input_ids).loss)


@pytest.mark.parametrize(("trainer_class", "warns"), [(Trainer, True), (CardTrainer, False)])
def test_the_stock_trainer_is_told_that_it_smooths_the_wrong_labels(trainer_class, warns, tmp_path, caplog):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (4, 12))]
    for smoothing in (0.0, 0.1):
        caplog.clear()
        args = arguments(tmp_path, label_smoothing_factor=smoothing, max_steps=1)
        trainer_class(TransNormerForCausalLM(TransNormerConfig(**SMALL)), args, train_dataset=rows).train()
        assert ("transformers shifts the labels only for the causal models" in caplog.text) is (warns and smoothing > 0)


def test_smoothed_losses_of_micro_batches_add_up():
    logits, labels = torch.randn(5, 6, 9), torch.randint(9, (5, 6))
    labels[0, 1:] = labels[3, :4] = IGNORED
    count = (labels != IGNORED).sum()
    parts = [
        aligned_loss(SimpleNamespace(logits=logits[cut]), labels[cut], count, label_smoothing=0.3)
        for cut in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    torch.testing.assert_close(sum(parts), smoothed(logits, labels, 0.3))


def test_an_update_without_labels_changes_nothing():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = torch.full((2, 3), IGNORED)
    for count in (None, torch.tensor(0)):
        loss = aligned_loss(SimpleNamespace(logits=logits), labels, count)
        assert loss.item() == 0.0
        loss.backward()
        assert not logits.grad.any()


def test_smoothing_a_loss_that_has_no_classes_is_refused(tmp_path):
    model = TransNormerForSequenceClassification(TransNormerConfig(**SMALL, num_labels=1))
    with pytest.raises(ValueError, match=r"--label_smoothing_factor 0\.1 has no meaning for the loss 'squared_error'"):
        CardTrainer(model, arguments(tmp_path, label_smoothing_factor=0.1), compute_loss_func=squared_error)


@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_model_of_transformers_that_ignores_the_count_is_trained_as_on_one_batch(num_labels, tmp_path):
    """Bert's own loss is a mean over the micro-batch, which the Trainer takes for a share of the whole."""
    rows = [
        {
            "input_ids": torch.randint(3, 50, (8,)),
            "labels": torch.tensor(number / 8 if num_labels == 1 else number % num_labels),
        }
        for number in range(8)
    ]
    changes = []
    for batch_size, accumulation in ((8, 1), (2, 4), (3, 3)):
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(
                **SMALL,
                intermediate_size=16,
                num_labels=num_labels,
                hidden_dropout_prob=0,
                attention_probs_dropout_prob=0,
            )
        )
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0}
        options |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": accumulation}
        CardTrainer(
            model,
            arguments(tmp_path, per_device_train_batch_size=batch_size, **options),
            train_dataset=rows,
            compute_loss_func=squared_error if num_labels == 1 else aligned_loss,
        ).train()
        changes.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before)
    assert changes[0].norm() > 1e-3
    for change in changes[1:]:
        assert (change - changes[0]).norm() / changes[0].norm() < 1e-4


# ---- What evaluation looks at ----


class Rows(Dataset):
    def __init__(self, number: int, label: int):
        self.number, self.label = number, label

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": torch.full((4,), 5 + index), "labels": torch.tensor(self.label)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataloader_drop_last": True},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"eval_use_gather_object": True},
    ],
)
def test_every_evaluation_sees_the_rows_that_it_was_given(options, tmp_path):
    model = TransNormerForSequenceClassification(TransNormerConfig(**SMALL, num_labels=2))
    seen = []

    def collect(prediction):
        assert len(logits_of(prediction.predictions)) == len(labels_of(prediction.label_ids))
        seen.append(labels_of(prediction.label_ids).tolist())
        return {}

    args = arguments(tmp_path, per_device_eval_batch_size=4, **options)
    rows = {"a": Rows(10, 0), "b": Rows(3, 1)}
    trainer = CardTrainer(model, args, eval_dataset=rows, compute_metrics=collect, data_collator=default_data_collator)
    trainer.evaluate()
    trainer.evaluate(Rows(5, 1))
    trainer.evaluate(Rows(6, 0))
    assert seen == [[0] * 10, [1] * 3, [1] * 5, [0] * 6]
    assert len(logits_of(trainer.predict(Rows(7, 1)).predictions)) == 7
    assert args.dataloader_drop_last is options.get("dataloader_drop_last", False)
    assert args.dataloader_persistent_workers is options.get("dataloader_persistent_workers", False)
    assert not multiprocessing.active_children()  # no worker outlives its evaluation


@pytest.mark.parametrize("options", [{}, {"eval_do_concat_batches": False}, {"eval_accumulation_steps": 1}])
def test_perplexities_do_not_depend_on_how_batches_are_kept(options, tmp_path):
    rows = [
        {"input_ids": np.arange(5, 17) + number, "labels": np.where(np.arange(12) < 3 * number + 1, 7, IGNORED)}
        for number in range(5)
    ]
    model = TransNormerForCausalLM(TransNormerConfig(**SMALL)).eval()
    args = arguments(tmp_path, per_device_eval_batch_size=2, label_smoothing_factor=0.3, **options)
    metrics = PretrainingTrainer(model, args, eval_dataset=rows, data_collator=collate).evaluate()
    batch = collate(rows)
    expected = smoothed(model(batch["input_ids"]).logits, batch["labels"], 0.0)
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["eval_tokens"] == 1 + 4 + 7 + 10 + 12


# ---- Without logits ----


@pytest.mark.parametrize("model_class", [TransNormerForCausalLM, TransNormerForMaskedLM])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pretraining_needs_logits_for_smoothing_only(model_class, smoothing, tmp_path):
    model = model_class(TransNormerConfig(**SMALL, hidden_dropout_prob=0.0)).eval()
    shapes = []
    rows = [{"input_ids": np.arange(5, 17) + n, "labels": np.where(np.arange(12) < 3, 7, IGNORED)} for n in range(4)]
    batch = collate(rows)
    expected = smoothed(model(batch["input_ids"]).logits, batch["labels"], smoothing)
    trainer = PretrainingTrainer(model, arguments(tmp_path, label_smoothing_factor=smoothing), eval_dataset=rows)
    for count in (12, 48):
        loss, outputs = trainer.compute_loss(model, dict(batch), True, torch.tensor(count))
        torch.testing.assert_close(loss, expected * 12 / count)
        shapes.append(outputs.logits is None)
    assert shapes == [not smoothing] * 2


@pytest.mark.parametrize("is_loss_only", [True, False])
def test_an_evaluation_of_the_loss_alone_needs_no_logits(is_loss_only, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 50, (4, 12))]
    model = TransNormerForCausalLM(TransNormerConfig(**SMALL)).eval()
    trainer = CardTrainer(model, arguments(tmp_path), data_collator=default_data_collator)
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits is None))
    loss, logits, _ = trainer.prediction_step(model, default_data_collator(rows), is_loss_only)
    assert seen == [is_loss_only]
    assert (logits is None) == is_loss_only
    ids = torch.stack([row["input_ids"] for row in rows])
    torch.testing.assert_close(loss, model(ids, labels=ids).loss)


# ---- Predictions that are no numbers ----


def test_rows_that_are_no_numbers_are_named():
    values = np.ones((9, 2))
    check_finite(values, "SST-2")
    check_finite(np.arange(3), "SST-2")
    check_finite(np.ones((0, 2)), "SST-2")
    values[[1, 4], 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"SST-2: .* in 2 of 9 rows \(row 2, 5\): it has diverged, and nothing was"):
        check_finite(values, "SST-2")
    with pytest.raises(ValueError, match=r"in 9 of 9 rows \(row 1, 2, 3, 4, 5, \.\.\.\)"):
        check_finite(np.full((9, 3), np.nan), "SST-2")


def test_a_diverged_language_model_has_no_perplexity(tmp_path):
    rows = [{"input_ids": np.full(6, 5 + number), "labels": np.full(6, 7)} for number in range(4)]
    model = TransNormerForCausalLM(TransNormerConfig(**SMALL, tie_word_embeddings=False))
    model.model.embed_tokens.weight.data[7] = float("nan")  # of the third row
    args = arguments(tmp_path, per_device_eval_batch_size=2)
    with pytest.raises(ValueError, match=r"Evaluation \(eval\): .* in 1 of 4 rows \(row 3\)"):
        PretrainingTrainer(model, args, eval_dataset=rows, data_collator=collate).evaluate()


# ---- Values that are refused ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_train_epochs": 0},
            r"--num_train_epochs 0 must be more than 0; to evaluate without training, leave --do",
        ),
        ({"num_train_epochs": float("nan")}, r"--num_train_epochs nan must be more than 0"),
        ({"max_steps": 0}, r"--max_steps 0 must be at least 1; leave it out to train for --num_train_epochs"),
        ({"label_smoothing_factor": 1.0}, r"--label_smoothing_factor 1\.0 must be at least 0 and less than 1"),
        ({"gradient_accumulation_steps": 0}, r"--gradient_accumulation_steps 0 must be at least 1"),
        ({"per_device_eval_batch_size": 0}, r"--per_device_eval_batch_size 0 must be at least 1"),
        ({"eval_accumulation_steps": 0}, r"--eval_accumulation_steps 0 must be at least 1"),
        ({"seed": -1}, r"--seed -1 must be at least 0"),
        ({"seed": 2**32}, r"--seed 4294967296 must be at most 4294967295"),
        ({"save_steps": 0}, r"--save_steps 0 must be more than 0; to have none, give the strategy no"),
        ({"neftune_noise_alpha": -1.0}, r"--neftune_noise_alpha -1\.0 must be at least 0"),
        ({"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0}, r"--dataloader_prefetch_factor 0 must be at"),
        ({"dataloader_persistent_workers": True}, r"--dataloader_persistent_workers needs --dataloader_num_workers"),
        (
            {"prediction_loss_only": True},
            r"--prediction_loss_only True is not supported, as .*: leave it out or give F",
        ),
        ({"batch_eval_metrics": True}, r"--batch_eval_metrics True is not supported, as the figures are those of a wh"),
        ({"include_for_metrics": ["loss"]}, r"--include_for_metrics \['loss'\] is not supported, .*: leave it out\."),
        ({"label_names": ["targets"]}, r"--label_names \['targets'\] is not supported, .*or give \['labels'\]"),
    ],
)
def test_an_argument_without_effect_is_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_trainer_arguments(arguments(tmp_path, do_train=True, **options))


def test_without_training_or_with_a_number_of_steps_no_epoch_is_asked_for(tmp_path):
    check_trainer_arguments(arguments(tmp_path, num_train_epochs=0))
    check_trainer_arguments(arguments(tmp_path, num_train_epochs=0, max_steps=1, do_train=True))
    check_trainer_arguments(arguments(tmp_path, label_names=["labels"], do_train=True))
