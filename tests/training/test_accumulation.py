"""An update is the same however its batch is cut into micro-batches, for every head and for the dual encoder."""

import pytest
import torch
from transformers import Trainer, TrainingArguments, default_data_collator

import transnormer_hf
from transnormer_hf import TransNormerConfig
from transnormer_hf.tasks import lra

SEQ, ROWS, LABELS = 12, 8, 3
IGNORED = -100
# Rows of one update, as (rows per micro-batch, micro-batches); the last one leaves a smaller micro-batch at the end.
CUTS = [(2, 4), (1, 8), (3, 3)]
# How many positions of each row have a label; one row has none.
LABELLED = (1, 9, 2, 12, 0, 11, 3, 8)


def make_rows(head: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, labelled in enumerate(LABELLED):
        shape = (4, SEQ) if head == "MultipleChoice" else (SEQ,)
        row = {"input_ids": torch.randint(3, 50, shape, generator=generator)}
        if head == "QuestionAnswering":
            start = SEQ + 5 if number in (2, 4, 5) else number  # outside of the text: left out
            row |= {"start_positions": torch.tensor(start), "end_positions": torch.tensor(min(start + 2, SEQ + 5))}
        elif head in ("regression", "multi_label"):
            row["labels"] = (
                torch.rand((), generator=generator) if head == "regression" else torch.eye(LABELS)[number % 3]
            )
        elif head in ("TokenClassification", "MaskedLM", "CausalLM"):
            labels = row["input_ids"] % LABELS if head == "TokenClassification" else row["input_ids"].clone()
            row["labels"] = torch.where(torch.arange(SEQ) < labelled, labels, IGNORED)
        else:
            is_ignored = head == "SequenceClassification" and number in (1, 4)
            row["labels"] = torch.tensor(IGNORED if is_ignored else number % LABELS)
        rows.append(row)
    return rows


def make_model(head: str) -> torch.nn.Module:
    torch.manual_seed(0)
    problem_types = {"regression": "regression", "multi_label": "multi_label_classification"}
    config = TransNormerConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=1 if head == "regression" else LABELS,
        problem_type=problem_types.get(head),
    )
    name = "SequenceClassification" if head in problem_types else head
    return getattr(transnormer_hf, f"TransNormerFor{name}")(config)


def update(model, rows, collate, batch_size: int, accumulation: int, folder) -> torch.Tensor:
    """The change of all parameters, one after the other, in one step of SGD."""
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    args = TrainingArguments(
        output_dir=str(folder),
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
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    Trainer(model, args, train_dataset=rows, data_collator=collate).train()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - before


HEADS = [
    "TokenClassification",
    "QuestionAnswering",
    "SequenceClassification",
    "MultipleChoice",
    "MaskedLM",
    "CausalLM",
    "regression",
    "multi_label",
]


@pytest.mark.parametrize("head", HEADS)
def test_an_update_does_not_depend_on_how_its_batch_is_cut(head, tmp_path):
    rows = make_rows(head)
    whole = update(make_model(head), rows, default_data_collator, ROWS, 1, tmp_path)
    assert whole.norm() > 1e-3
    for batch_size, accumulation in CUTS:
        if head == "QuestionAnswering" and ROWS % batch_size:
            continue  # the Trainer counts nothing for this head: it takes the mean over micro-batches
        cut = update(make_model(head), rows, default_data_collator, batch_size, accumulation, tmp_path)
        assert (cut - whole).norm() / whole.norm() < 1e-4, (batch_size, accumulation)


def test_an_update_of_the_dual_encoder_does_not_depend_on_the_cut(tmp_path):
    config = lra.TASKS["retrieval"].config("t1", hidden_size=16, num_hidden_layers=2, norm_type="simple_rms")
    config.attention_norm_type = config.final_norm = "simple_rms"
    texts = [("a", "abc"), ("longer text", "b"), ("xyz", "xyz"), ("q", "r")] * 2
    rows = [{"sequences": tuple(map(lra.encode_text, pair)), "labels": number % 2} for number, pair in enumerate(texts)]

    def model():
        torch.manual_seed(0)
        return lra.DualEncoder(config, "mean")

    whole = update(model(), rows, lra.collate, ROWS, 1, tmp_path)
    for batch_size, accumulation in CUTS:
        cut = update(model(), rows, lra.collate, batch_size, accumulation, tmp_path)
        assert (cut - whole).norm() / whole.norm() < 1e-4, (batch_size, accumulation)


def test_the_loss_of_a_plain_call_is_the_mean_over_what_is_labelled():
    for head in ("TokenClassification", "SequenceClassification"):
        model, batch = make_model(head).eval(), default_data_collator(make_rows(head))
        outputs = model(**batch)
        kept = batch["labels"] != IGNORED
        expected = -outputs.logits.log_softmax(-1)[kept].gather(-1, batch["labels"][kept][:, None]).mean()
        torch.testing.assert_close(outputs.loss, expected)
