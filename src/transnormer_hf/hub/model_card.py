"""The model card of a trained model: what was trained on what, what was measured, how to load it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import TrainingArguments

from ..tasks.glue import HUB_DATASET, GlueTask

# The Hub's names of the metrics, where they are not those of `evaluate`'s GLUE metric.
HUB_METRICS = {"pearson": "pearsonr"}
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}
# The class that loads a model for the task.
AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
}
RIVAL = "transnormer_hf_baseline"  # the model type of `baselines/`
PACKAGES = ("transnormer-hf", "transformers", "torch", "datasets", "tokenizers", "accelerate", "peft")


@dataclass(frozen=True)
class EvaluatedSplit:
    """One evaluation: `source` says in words where its rows came from, `is_cut` whether it was only the first ones."""

    split: str
    source: str
    rows: int
    is_cut: bool
    metrics: Mapping[str, float]


def build_glue_card(
    task: GlueTask,
    *,
    model: Any,
    training_args: TrainingArguments,
    max_seq_length: int,
    base_model: str | None,
    train_source: str,
    official_data: bool,
    evaluated: Sequence[EvaluatedSplit],
    results: Mapping[str, Any],
) -> ModelCard:
    """The card of a model trained on a GLUE task, from `model_cards/template.md`.

    Nothing is stated that was not measured in this run, and no path of the machine is named.

    Args:
        task: The task.
        model: The trained model, or peft's wrapper of it.
        training_args: The arguments it was trained with.
        max_seq_length: Length that inputs were cut to.
        base_model: Checkpoint that was fine-tuned, None after training from scratch.
        train_source: In words, where the training rows came from.
        official_data: Whether the data are GLUE's own (from the Hub or the official files).
        evaluated: The evaluations made after training.
        results: The figures of the run, as in `all_results.json`.
    """
    config = model.config
    lora = getattr(model, "peft_config", {}).get("default")
    trained = model.get_base_model() if lora is not None else model
    custom_code = ships_code(trained)
    hub_base = _hub_name(base_model)
    model_id = training_args.hub_model_id or _folder_name(training_args)  # the Hub's default, too
    architecture = describe_architecture(config)
    origin = (
        f"fine-tuned from {Path(base_model).name if hub_base is None else hub_base}"
        if base_model
        else "trained from scratch"
    )

    data = ModelCardData(
        language="en",
        library_name="peft" if lora else "transformers",
        pipeline_tag="text-classification",
        tags=[config.model_type, "glue", *(["custom_code"] if custom_code else []), *(["lora"] if lora else [])],
        datasets=[HUB_DATASET] if official_data else None,
        base_model=hub_base,
        metrics=[HUB_METRICS.get(name, name) for name in task.metrics],
        model_name=model_id.rpartition("/")[2],
        eval_results=glue_eval_results(task, evaluated, official_data) or None,
    )
    return render_card(
        data,
        title=f"{data.model_name}: {architecture} for {task.title}",
        summary=(
            f"{architecture} with {results['parameters'] / 1e6:.2f} M parameters, {origin}"
            f"{' with LoRA adapters' if lora else ''} on {task.title} of the GLUE benchmark."
        ),
        results_table=markdown_table(
            ["data", "rows", *(METRIC_TITLES[name] for name in task.metrics)],
            (
                [
                    f"{split.source}{' (first rows only)' if split.is_cut else ''}",
                    split.rows,
                    *(f"{split.metrics[name]:.4f}" for name in task.metrics),
                ]
                for split in evaluated
            ),
        )
        if evaluated
        else "",
        results_note=_results_note(training_args),
        loading_code=_loading_code(task, model_id, trained, lora is not None),
        custom_code=custom_code,
        output_note=f"Labels: {', '.join(config.id2label[number] for number in sorted(config.id2label))}."
        if task.labels
        else "The one output is a similarity score from 0 (unrelated) to 5 (the same meaning).",
        intended_use=(
            f"Made to study {architecture} on {task.title}: English"
            f" {'sentence pairs' if task.texts[1:] else 'sentences'} of at most {max_seq_length} tokens; longer ones"
            " were cut in training."
        ),
        limits=[
            "Measured on no other data than the table above says; expect less on other kinds of text.",
            "It repeats the biases of its training data. They have not been measured.",
            "Not made for decisions about people.",
        ],
        training_note=_training_note(train_source, training_args, results),
        hyperparameter_table=markdown_table(
            ["hyperparameter", "value"], hyperparameters(training_args, max_seq_length, lora).items()
        ),
        environment_table=markdown_table(["", "version"], environment(training_args).items()),
    )


def build_training_card(
    *,
    model: Any,
    training_args: TrainingArguments,
    task: str,
    pipeline_tag: str,
    dataset: str | None,
    base_model: str | None,
    train_source: str,
    max_seq_length: int,
    metric_titles: Mapping[str, str],
    evaluated: Sequence[EvaluatedSplit],
    notes: Sequence[str],
    sample: str,
    results: Mapping[str, Any],
) -> ModelCard:
    """The card of a model that was pre-trained, or trained on a task other than GLUE, from the same template.

    Args:
        model: The trained model.
        training_args: The arguments it was trained with.
        task: What it learned, in words: "causal language modelling".
        pipeline_tag: The task's name on the Hub.
        dataset: Name of the data set on the Hub, None for files.
        base_model: Checkpoint that training began with, None for a new model.
        train_source: In words, where the training rows came from.
        max_seq_length: Tokens per row.
        metric_titles: Figure -> what it is, in words; the columns of the table.
        evaluated: The evaluations made after training.
        notes: How the figures were measured.
        sample: Something that the model says, or nothing.
        results: The figures of the run, as in `all_results.json`.
    """
    custom_code = ships_code(model)
    hub_base = _hub_name(base_model)
    model_id = training_args.hub_model_id or _folder_name(training_args)
    architecture = describe_architecture(model.config)
    origin = f"trained further from {hub_base or Path(base_model).name}" if base_model else "trained from scratch"
    tags = [model.config.model_type, *(["custom_code"] if custom_code else [])]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=tags,
        datasets=[dataset] if dataset else None,
        base_model=hub_base,
        model_name=model_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                task_name=task.capitalize(),
                dataset_type=dataset or "other",
                dataset_name=split.source,
                dataset_split=split.split,
                metric_type="perplexity" if "perplexity" in name else name,
                metric_name=metric_titles[name],
                metric_value=round(value, 6),
            )
            for split in evaluated
            for name, value in split.metrics.items()
        ]
        or None,
    )
    return render_card(
        data,
        title=f"{data.model_name}: {architecture} for {task}",
        summary=f"{architecture} with {results['parameters'] / 1e6:.2f} M parameters, {origin} on {task}.",
        results_table=markdown_table(
            ["data", "rows", *metric_titles.values()],
            (
                [split.source, split.rows, *(f"{split.metrics.get(name, float('nan')):.4f}" for name in metric_titles)]
                for split in evaluated
            ),
        )
        if evaluated
        else "",
        results_note=" ".join([_results_note(training_args), *notes]),
        loading_code=(
            f"{_registration(model)}from transformers import AutoTokenizer, {AUTO_CLASSES[pipeline_tag]}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n'
            f'model = {AUTO_CLASSES[pipeline_tag]}.from_pretrained(\n    "{model_id}"{_pin(model)})'
        ),
        custom_code=custom_code,
        output_note=f"A sample of what it says:\n\n```text\n{sample.replace('```', '')}\n```" if sample else "",
        intended_use=f"Made to study {architecture} on {task} with sequences of {max_seq_length} tokens.",
        limits=[
            "Measured on no other data than the table above says; expect less on other kinds of data.",
            "It repeats the biases of its training data. They have not been measured.",
            "Not made for decisions about people.",
        ],
        training_note=_training_note(train_source, training_args, results),
        hyperparameter_table=markdown_table(
            ["hyperparameter", "value"], hyperparameters(training_args, max_seq_length).items()
        ),
        environment_table=markdown_table(["", "version"], environment(training_args).items()),
    )


def render_card(data: ModelCardData, **fields: Any) -> ModelCard:
    """A card from the project's one template, `model_cards/template.md`, which says what `fields` it has."""
    template = (resources.files(__package__) / "model_card_template.md").read_text(encoding="utf-8")
    return ModelCard.from_template(data, template_str=template, **fields)


def glue_eval_results(task: GlueTask, evaluated: Iterable[EvaluatedSplit], official_data: bool) -> list[EvalResult]:
    """The entries of the card's `model-index`. Rows that are not GLUE's own are not filed under the GLUE data set."""
    return [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification",
            dataset_type=HUB_DATASET if official_data else "other",
            dataset_name=f"GLUE {task.title}" if official_data else f"{task.title}, {split.source}",
            dataset_config=task.name if official_data else None,
            dataset_split=split.split,
            dataset_args={"first_rows": split.rows} if split.is_cut else None,
            metric_type=HUB_METRICS.get(name, name),
            metric_name=METRIC_TITLES[name],
            metric_value=round(split.metrics[name], 6),
        )
        for split in evaluated
        for name in task.metrics
    ]


OWN_ATTENTIONS = {
    "chunked_attention": "DiagAttention",
    "linear_attention": "NormAttention",
    "hybrid": "both attentions",
}


def describe_architecture(config: Any) -> str:
    """ "TransNormer T2" for this project's models, the attentions of a rival, the model type for others."""
    if config.model_type == "transnormer_hf":
        return f"TransNormer {config.variant.upper()}"
    if config.model_type == RIVAL:
        attentions = dict.fromkeys(OWN_ATTENTIONS.get(name, f"{name} attention") for name in config.layer_types)
        return f"TransNormer's backbone with {' and '.join(attentions)}"
    return config.model_type.upper()


def hyperparameters(args: TrainingArguments, max_seq_length: int, lora: Any = None) -> dict[str, Any]:
    """What somebody would need to repeat the training, by the names of the command line."""
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
    table = {
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "num_train_epochs": args.num_train_epochs if args.max_steps <= 0 else f"set by max_steps {args.max_steps}",
        "batch size": f"{per_step} ({args.train_batch_size} x {args.world_size} processes"
        f" x {args.gradient_accumulation_steps} accumulated)",
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, betas ({args.adam_beta1}, {args.adam_beta2}),"
        f" epsilon {args.adam_epsilon}",
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "label_smoothing_factor": args.label_smoothing_factor,
        "max_seq_length": max_seq_length,
        "precision": precision,
        "seed": args.seed,
    }
    if lora is not None:
        modules = ", ".join(sorted(lora.target_modules))
        table["LoRA"] = f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}, on {modules}"
    return table


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment(args: TrainingArguments) -> dict[str, str]:
    """Versions of the packages that matter, and the kind of device."""
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper()
    return {**package_versions(), "device": f"{args.world_size} x {device}"}


def _hub_name(base_model: str | None) -> str | None:
    """The name if it is one on the Hub, and not a folder here."""
    if base_model and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) and not Path(base_model).exists():
        return base_model
    return None


def _folder_name(args: TrainingArguments) -> str:
    folder = Path(args.output_dir or ".").resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("seed_") else folder.name


def _results_note(args: TrainingArguments) -> str:
    note = f"Figures of one training run, with seed {args.seed}."
    if args.load_best_model_at_end:
        note += (
            f" The checkpoint was chosen by {args.metric_for_best_model} on the first of these data sets, which makes"
            " its figures a little too good."
        )
    return note


def _training_note(source: str, args: TrainingArguments, results: Mapping[str, Any]) -> str:
    rows = f"{results['train_samples']} rows" if "train_samples" in results else "a stream of rows"
    note = f"Trained on {rows} ({source})"
    if results.get("epoch") is not None:
        note += f" for {results['epoch']:.2f} epochs"
    if results.get("train_loss") is not None:
        note += f", mean training loss {results['train_loss']:.4f}"
    if results.get("train_runtime") is not None:
        note += f", {results['train_runtime']:.0f} s"
    return note + "."


def ships_code(model: Any) -> bool:
    """Whether a model's code lies beside its weights; a rival's is in this package only."""
    return _is_ours(model) and not _is_rival(model)


def _is_ours(model: Any) -> bool:
    return not type(model).__module__.startswith("transformers.")


def _registration(model: Any) -> str:
    """The line before all others where a model's code is in this package only."""
    return "import transnormer_hf  # the model's code: pip install transnormer-hf\n" if _is_rival(model) else ""


def _is_rival(model: Any) -> bool:
    return model.config.model_type == RIVAL


def _pin(model: Any) -> str:
    """The arguments after a model's name."""
    if not ships_code(model):
        return ",\n"
    return ',\n    revision="COMMIT",  # the full hash of the commit that you have read\n    trust_remote_code=True,\n'


def _loading_code(task: GlueTask, model_id: str, model: Any, is_adapter: bool) -> str:
    example = '{"text": "One sentence.", "text_pair": "Another one."}' if task.texts[1:] else '"One sentence."'
    if is_adapter:
        register = "import transnormer_hf  # the base model's code\n" if _is_ours(model) else ""
        return (
            f"{register}from peft import AutoPeftModelForSequenceClassification\n"
            "from transformers import AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{model_id}")\n'
            "model = AutoPeftModelForSequenceClassification.from_pretrained(\n"
            f'    "{model_id}", num_labels={task.num_labels}\n'
            ")"
        )
    raw = ', function_to_apply="none"' if task.is_regression else ""
    return (
        f"{_registration(model)}from transformers import pipeline\n\n"
        f'classifier = pipeline(\n    "text-classification",\n    model="{model_id}"{_pin(model)})\n'
        f"print(classifier({example}{raw}))"
    )


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
