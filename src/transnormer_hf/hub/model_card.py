"""Model cards, all from one template: what a model is, what was measured, how to load it.

    build_glue_card           after training on a GLUE task
    build_training_card       after pre-training, or training on another task
    build_linearized_card     of a pretrained transformer that became a TransNormer
    build_architecture_card   of a saved model of which only the configuration is known
    build_preset_card         of a preset: a configuration without weights

A card states nothing that was not measured or cited, and names no path of the machine.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig, TrainingArguments

from ..model.configuration_transnormer import AUTO_MAP, TransNormerConfig
from ..research import paper
from ..tasks.glue import HUB_DATASET, GlueTask

# Model class -> the Hub's name of what it is for.
PIPELINES = {
    "TransNormerModel": "feature-extraction",
    "TransNormerForCausalLM": "text-generation",
    "TransNormerForMaskedLM": "fill-mask",
    "TransNormerForSequenceClassification": "text-classification",
    "TransNormerForTokenClassification": "token-classification",
    "TransNormerForQuestionAnswering": "question-answering",
    "TransNormerForMultipleChoice": "multiple-choice",
}
# Metrics of GLUE, and the Hub's names where they are not those of `evaluate`.
METRIC_TITLES = {
    "accuracy": "Accuracy",
    "f1": "F1",
    "matthews_correlation": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearmanr": "Spearman correlation",
}
HUB_METRICS = {"pearson": "pearsonr"}
ATTENTION_NAMES = {
    "chunked_attention": "DiagAttention",
    "linear_attention": "NormAttention",
    "hybrid": "both attentions",
    "full_attention": "full attention",
}
BASELINE = "transnormer_hf_baseline"  # model type of `research.baselines`, which this file has no need to import
PACKAGES = ("transnormer-hf", "transformers", "torch", "datasets", "tokenizers", "accelerate", "peft")
UNMEASURED = "They have not been measured."
PEOPLE = "Not made for decisions about people."


def auto_class_of(head: str) -> str:
    return next(name for name, reference in AUTO_MAP.items() if reference.endswith(f".{head}"))


# ---- Cards of a training run ----


@dataclass(frozen=True)
class EvaluatedSplit:
    """One evaluation: `source` says in words where its rows came from, `is_cut` whether it was only the first ones."""

    split: str
    source: str
    rows: int
    is_cut: bool
    metrics: Mapping[str, float]


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
    """The card of a model that was pre-trained, or trained on a task other than GLUE.

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
    auto_class = auto_class_of(next(head for head, tag in PIPELINES.items() if tag == pipeline_tag))
    name = f'"{_model_id(training_args)}"'
    call = _call(f"{auto_class}.from_pretrained", name, is_pinned=ships_code(model))
    return _card_of_run(
        _Run(model, training_args, max_seq_length, base_model, train_source, evaluated, results),
        task=task,
        origin="trained further",
        titles=metric_titles,
        notes=notes,
        loading_code=(
            f"from transformers import AutoTokenizer, {auto_class}\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\nmodel = {call}"
        ),
        output_note=f"A sample of what it says:\n\n```text\n{sample.replace('```', '')}\n```" if sample else "",
        intended_use=f"on {task} with sequences of {max_seq_length} tokens.",
        pipeline_tag=pipeline_tag,
        datasets=[dataset] if dataset else None,
        eval_results=_eval_results(
            evaluated,
            metric_titles,
            task_type=pipeline_tag,
            task_name=task.capitalize(),
            dataset_type=dataset or "other",
            dataset_name="{source}",
        ),
    )


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
    """The card of a model trained on a GLUE task.

    Args:
        task: The task.
        model: The trained model, or peft's wrapper of it.
        official_data: Whether the data are GLUE's own (from the Hub or the official files). Results on others are not
            filed under the GLUE data set.
        training_args, max_seq_length, base_model, train_source, evaluated, results: As in `build_training_card`.
    """
    titles = {metric: METRIC_TITLES[metric] for metric in task.metrics}
    return _card_of_run(
        _Run(model, training_args, max_seq_length, base_model, train_source, evaluated, results),
        task=task.title,
        benchmark=" of the GLUE benchmark",
        origin="fine-tuned",
        titles=titles,
        tags=["glue"],
        loading_code=_glue_loading_code(task, model, f'"{_model_id(training_args)}"'),
        output_note=_labels(model.config)
        if task.labels
        else "The one output is a similarity score from 0 (unrelated) to 5 (the same meaning).",
        intended_use=(
            f"on {task.title}: English {'sentence pairs' if task.texts[1:] else 'sentences'} of at most"
            f" {max_seq_length} tokens; longer ones were cut in training."
        ),
        language="en",
        pipeline_tag="text-classification",
        datasets=[HUB_DATASET] if official_data else None,
        metrics=[HUB_METRICS.get(metric, metric) for metric in task.metrics],
        eval_results=_eval_results(
            evaluated,
            titles,
            task_type="text-classification",
            task_name="Text classification",
            dataset_type=HUB_DATASET if official_data else "other",
            dataset_name=f"GLUE {task.title}" if official_data else f"{task.title}, {{source}}",
            dataset_config=task.name if official_data else None,
        ),
    )


def _glue_loading_code(task: GlueTask, model: Any, name: str) -> str:
    if hasattr(model, "peft_config"):
        arguments = name, f"num_labels={task.num_labels}"
        call = _call("AutoPeftModelForSequenceClassification.from_pretrained", *arguments, is_pinned=False)
        return (
            "from peft import AutoPeftModelForSequenceClassification\nfrom transformers import AutoTokenizer\n\n"
            f"tokenizer = AutoTokenizer.from_pretrained({name})\nmodel = {call}"
        )
    example = '{"text": "One sentence.", "text_pair": "Another one."}' if task.texts[1:] else '"One sentence."'
    raw = ', function_to_apply="none"' if task.is_regression else ""
    call = _call("pipeline", '"text-classification"', f"model={name}", is_pinned=ships_code(model))
    return f"from transformers import pipeline\n\nclassifier = {call}\nprint(classifier({example}{raw}))"


class _Run(NamedTuple):
    """A training run, with the arguments of `build_training_card` that describe it."""

    model: Any
    args: TrainingArguments
    max_seq_length: int
    base_model: str | None
    train_source: str
    evaluated: Sequence[EvaluatedSplit]
    results: Mapping[str, Any]


def _card_of_run(
    run: _Run,
    *,
    task: str,
    benchmark: str = "",
    origin: str,
    titles: Mapping[str, str],
    notes: Sequence[str] = (),
    tags: Sequence[str] = (),
    loading_code: str,
    output_note: str,
    intended_use: str,
    **data: Any,
) -> ModelCard:
    """titles, notes: of the figures; data: what the metadata say beyond what every run has."""
    config, lora = run.model.config, getattr(run.model, "peft_config", {}).get("default")
    architecture, custom_code = describe_architecture(config), ships_code(run.model)
    hub_base = None
    if run.base_model is None:
        origin = "trained from scratch"
    else:
        is_on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", run.base_model) and not Path(run.base_model).exists()
        hub_base = run.base_model if is_on_hub else None
        origin += f" from {hub_base or Path(run.base_model).name}"
    return render_card(
        ModelCardData(
            library_name="peft" if lora else "transformers",
            tags=[config.model_type, *tags, *["custom_code"] * custom_code, *["lora"] * bool(lora)],
            base_model=hub_base,
            model_name=_model_id(run.args).rpartition("/")[2],
            **data,
        ),
        title=f"{architecture} for {task}",
        summary=(
            f"{architecture} with {run.results['parameters'] / 1e6:.2f} M parameters, {origin}"
            f"{' with LoRA adapters' if lora else ''} on {task}{benchmark}."
        ),
        results_table=_results_table(run.evaluated, titles),
        results_note=" ".join([_results_note(run.args), *notes]),
        loading_code=_registration(run.model) + loading_code,
        custom_code=custom_code,
        output_note=output_note,
        intended_use=f"Made to study {architecture} {intended_use}",
        limits=[
            "Measured on no other data than the table above says; expect less on other kinds of data.",
            f"It repeats the biases of its training data. {UNMEASURED}",
            PEOPLE,
        ],
        training_note=_training_note(run),
        hyperparameter_table=markdown_table(["hyperparameter", "value"], _hyperparameters(run, lora).items()),
        environment_table=markdown_table(["", "version"], _environment(run.args).items()),
    )


def _model_id(args: TrainingArguments) -> str:
    """Where the Hub's default puts the model; a run of one of several seeds is named after its sweep."""
    folder = Path(args.output_dir or ".").resolve()
    named = f"{folder.parent.name}-{folder.name}" if folder.name.startswith("seed_") else folder.name
    return args.hub_model_id or named


def ships_code(model: Any) -> bool:
    """Whether a model's code comes with its weights; a baseline's is in this package only."""
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return not type(model).__module__.startswith("transformers.") and model.config.model_type != BASELINE


def _registration(model: Any) -> str:
    """The import in front of the loading code where nothing else finds the model's code."""
    if model.config.model_type == BASELINE:
        return "import transnormer_hf.research.baselines  # the model's code: pip install transnormer-hf\n"
    if hasattr(model, "peft_config") and ships_code(model):
        return "import transnormer_hf  # the base model's code\n"
    return ""


def _eval_results(
    evaluated: Iterable[EvaluatedSplit], titles: Mapping[str, str], dataset_name: str, **fields: Any
) -> list[EvalResult] | None:
    """The entries of the card's `model-index`; `{source}` in dataset_name is where the rows came from."""
    entries = [
        EvalResult(
            dataset_name=dataset_name.format(source=split.source),
            dataset_split=split.split,
            dataset_args={"first_rows": split.rows} if split.is_cut else None,
            metric_type="perplexity" if "perplexity" in name else HUB_METRICS.get(name, name),
            metric_name=titles[name],
            metric_value=round(value, 6),
            **fields,
        )
        for split in evaluated
        for name, value in split.metrics.items()
        if name in titles
    ]
    return entries or None


def _results_table(evaluated: Sequence[EvaluatedSplit], titles: Mapping[str, str]) -> str:
    rows = (
        [
            f"{split.source}{' (first rows only)' if split.is_cut else ''}",
            split.rows,
            *(f"{split.metrics.get(name, float('nan')):.4f}" for name in titles),
        ]
        for split in evaluated
    )
    return markdown_table(["data", "rows", *titles.values()], rows) if evaluated else ""


def _results_note(args: TrainingArguments) -> str:
    note = f"Figures of one training run, with seed {args.seed}."
    if args.load_best_model_at_end:
        note += (
            f" The checkpoint was chosen by {args.metric_for_best_model} on the first of these data sets, which makes"
            " its figures a little too good."
        )
    return note


def _training_note(run: _Run) -> str:
    results = run.results
    rows = f"{results['train_samples']} rows" if "train_samples" in results else "a stream of rows"
    note = f"Trained on {rows} ({run.train_source})"
    if results.get("epoch") is not None:
        note += f" for {results['epoch']:.2f} epochs"
    if results.get("train_loss") is not None:
        note += f", mean training loss {results['train_loss']:.4f}"
    if results.get("train_runtime") is not None:
        note += f", {results['train_runtime']:.0f} s"
    return note + "."


def _hyperparameters(run: _Run, lora: Any) -> dict[str, Any]:
    """What it takes to repeat the training, by the names of the command line."""
    args = run.args
    per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
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
        "max_seq_length": run.max_seq_length,
        "precision": "fp16" if args.fp16 else "bf16" if args.bf16 else "float32",
        "seed": args.seed,
    }
    if lora is not None:
        modules = ", ".join(sorted(lora.target_modules))
        table["LoRA"] = f"r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}, on {modules}"
    return table


def _environment(args: TrainingArguments) -> dict[str, str]:
    """Versions of the packages that matter, and the kind of device."""
    device = torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper()
    return {**package_versions(), "device": f"{args.world_size} x {device}"}


# ---- Cards of a configuration ----


def build_architecture_card(folder: Path, repo_id: str) -> ModelCard:
    """The card of a saved model about which nothing is known but its configuration and the size of its weights."""
    config, head, auto_class, parameters = _read_config(folder)
    return _card_of_config(
        config,
        {"model_name": repo_id.rpartition("/")[2]},
        title=describe_architecture(config),
        summary=f"A `{head}` with {parameters}, of the architecture of {paper.TITLE}.",
        results_table="",
        loading_code=(
            f"from transformers import {auto_class}\n\n"
            "model = " + _call(f"{auto_class}.from_pretrained", f'"{repo_id}"')
        ),
        output_note=_labels(config)
        if PIPELINES[head] in ("text-classification", "token-classification")
        else f"The outputs are those of transformers' {PIPELINES[head]} models.",
        intended_use="What the model was made for was not recorded when it was published.",
        limits=[f"Its outputs are only as good as its training data, whose biases it repeats. {UNMEASURED}", PEOPLE],
        training_note=(
            "The arguments of the training are in `training_args.json`; its data were not recorded."
            if (folder / "training_args.json").exists()
            else "How the model was trained was not recorded when it was published."
        ),
        environment_table=markdown_table(["", "version"], package_versions().items()),
    )


def build_linearized_card(
    folder: Path,
    *,
    name: str,
    source: str,
    source_license: str | None,
    results_table: str,
    results_note: str,
    training_note: str,
    hyperparameters: Mapping[str, Any],
) -> ModelCard:
    """The card of a saved TransNormer that was made of a pretrained transformer.

    Args:
        folder: Where it is saved.
        name: What it will be called.
        source: The transformer: a name on the Hub, or a path, of which the card shows the last part.
        source_license: The licence that the source's card states, None if it states none.
        results_table: What was measured, in Markdown, and `results_note` how.
        training_note: From what it learned; `hyperparameters` how.
    """
    config, head, auto_class, parameters = _read_config(folder)
    is_on_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists()
    source_name = source if is_on_hub else Path(source).resolve().name
    licence = f"the licence of {source_name}, {source_license}, holds" if source_license else "it states no licence"
    return _card_of_config(
        config,
        {"model_name": name, "license": source_license, "base_model": source if is_on_hub else None},
        title=f"{source_name} with linear attention",
        summary=(
            f"A `{head}` with {parameters}, of the architecture of {paper.TITLE}. Its weights are those of"
            f" {source_name} ({licence}), and its attentions learned to give what that model's softmax attentions give."
        ),
        results_table=results_table,
        results_note=results_note,
        loading_code=(
            f"from transformers import AutoTokenizer, {auto_class}\n\n"
            "tokenizer = " + _call("AutoTokenizer.from_pretrained", f'"{name}"') + "\n"
            "model = " + _call(f"{auto_class}.from_pretrained", f'"{name}"')
        ),
        output_note=f"The outputs are those of {source_name}, approximately.",
        intended_use=f"For what {source_name} is for, with attention whose cost is linear in the length of a text.",
        limits=[
            "How close it comes on other texts, and on longer ones, than those of the table has not been measured.",
            f"It repeats the biases of {source_name}. {UNMEASURED}",
            PEOPLE,
        ],
        training_note=training_note,
        hyperparameter_table=markdown_table(["hyperparameter", "value"], hyperparameters.items()),
        environment_table=markdown_table(["", "version"], package_versions().items()),
    )


def build_preset_card(folder: Path, requirements: Sequence[str]) -> ModelCard:
    """The card of a preset, from the configuration in its folder (`scripts/make_model_cards.py` writes them all).

    A preset has no weights. What the paper reports for the model it describes is cited as the paper's, with its table.
    `requirements` are the lines of pyproject.toml, so that a card does not depend on where it was made.
    """
    config, head, auto_class, parameters = _read_config(folder)
    is_decoder = head == "TransNormerForCausalLM"
    architecture = describe_architecture(config)
    classes = dict.fromkeys(reference.rpartition(".")[2] for reference in AUTO_MAP.values())
    other_heads = (name for name in classes if name != "TransNormerConfig")
    positions = "any length, trained at 512" if is_decoder else f"at most {config.max_position_embeddings}"
    words = "words of WikiText-103" if is_decoder else "byte-level BPE"
    return _card_of_config(
        config,
        {"model_name": folder.name, "language": "en", "license": "apache-2.0"},
        title=f"the configuration of a {architecture} {'decoder' if is_decoder else 'encoder'}",
        summary=(
            f"A configuration, without weights: the authors of {paper.TITLE} released none, and this project has"
            f" trained none of this size. `{head}` of it has {parameters} (counted by this project: frozen ones too,"
            " tied ones once)."
        ),
        results_table=_reported_results(config.variant, is_decoder),
        results_note=(
            "**These are not figures of this repository.** They are the paper's, from its Table"
            f" {'4 (WikiText-103, autoregressive)' if is_decoder else '5 (GLUE, fine-tuned)'}, for models that its"
            " authors trained; nobody has repeated them here."
        ),
        loading_code=(
            "import transnormer_hf\n"
            f"from transformers import AutoConfig, {auto_class}\n\n"
            f'config = AutoConfig.from_pretrained("model_cards/{folder.name}")\n'
            f"model = {auto_class}.from_config(config)  # random weights\n\n"
            "# once you have trained it and pushed it:\n"
            "model = " + _call(f"{auto_class}.from_pretrained", f'"your-name/{folder.name}"')
        ),
        output_note=f"The same configuration fits {', '.join(f'`{name}`' for name in other_heads if name != head)}.",
        intended_use=(
            f"To train {architecture} as the paper describes it, with the"
            f" {'language-model' if is_decoder else 'masked-language-model'} objective, and to compare with it."
        ),
        limits=[
            "With random weights its outputs mean nothing.",
            f"`{config.position_embedding}` positions: {positions} tokens.",
            f"The vocabulary of {config.vocab_size:,} ids is that of the paper's {words}; this folder has no"
            " tokenizer.",
        ],
        training_note="Not trained. What the authors' training scripts ask for:",
        hyperparameter_table=markdown_table(["hyperparameter", "value"], paper.TRAINING[head].items()),
        # (name, version required) of lines such as "torch>=2.13"
        environment_table=markdown_table(
            ["", "needed"], (re.findall(r"^([\w-]+)(.*)$", line)[0] for line in requirements)
        ),
    )


def _card_of_config(config: Any, data: Mapping[str, Any], *, summary: str, **fields: Any) -> ModelCard:
    return render_card(
        ModelCardData(
            library_name="transformers",
            pipeline_tag=PIPELINES[config.architectures[0]],
            tags=[config.model_type, "linear-attention", "custom_code"],
            **data,
        ),
        summary=f"{summary}\n\n{_architecture_table(config)}",
        custom_code=True,
        **fields,
    )


def _reported_results(variant: str, is_decoder: bool) -> str:
    """The rows of Table 4 or 5 for the Transformer and this variant."""
    if is_decoder:
        table, columns = paper.TABLE_4, {"validation perplexity": "validation", "test perplexity": "test"}
    else:
        table, columns = paper.TABLE_5, {"QNLI": "qnli", "QQP": "qqp", "SST-2": "sst2", "MRPC (F1)": "mrpc"}
        columns |= {"CoLA (Matthews)": "cola", "mean": "mean"}
    rows = []
    for label, row in {"Transformer": "Vanilla", f"TransNormer {variant.upper()}": variant.upper()}.items():
        mnli = [] if is_decoder else [f"{table['mnli'][row]:.2f} / {table['mnli mismatched'][row]:.2f}"]
        cells = [f"{table[column][row]:.2f}" for column in columns.values()]
        rows.append([label, *mnli, *cells, f"{table['parameters'][row]:.2f} M"])
    return markdown_table(["model", *([] if is_decoder else ["MNLI m / mm"]), *columns, "parameters"], rows)


def _read_config(folder: Path) -> tuple[TransNormerConfig, str, str, str]:
    """A saved configuration, the class of its model, the Auto class that loads it, and its size in words."""
    config = AutoConfig.from_pretrained(folder)
    (head,) = config.architectures
    auto_class = auto_class_of(head)
    return config, head, auto_class, f"{count_parameters(config, auto_class) / 1e6:.2f} M parameters"


def count_parameters(config: Any, auto_class: str) -> int:
    with torch.device("meta"):  # shapes only: nothing is allocated
        return getattr(transformers, auto_class).from_config(config).num_parameters()


def _architecture_table(config: Any) -> str:
    counts = {name: config.layer_types.count(kind) for kind, name in ATTENTION_NAMES.items()}
    layers = ", ".join(f"{count} with {name}" for name, count in counts.items() if count)
    rows = {
        "layers": f"{config.num_hidden_layers}: {layers}",
        "width": f"{config.hidden_size}, {config.num_attention_heads} heads of {config.head_dim}",
        "feed-forward": f"{config.feed_forward.upper()} of width {config.intermediate_size}, {config.hidden_act}",
        "attention": f"blocks of {config.block_size}, {config.diag_activation}; linear, phi = {config.feature_map}",
        "norms": f"{config.norm_type}, {config.norm_placement}-norm",
        "positions": config.position_embedding + (", LRPE" if config.lrpe else ""),
        "vocabulary": f"{config.vocab_size:,}",
    }
    return markdown_table(["architecture", ""], rows.items())


# ---- What all cards are made of ----


def render_card(data: ModelCardData, *, title: str, **fields: Any) -> ModelCard:
    """A card from `model_cards/template.md`, which shows the `fields`; its title begins with the model's name."""
    template = (resources.files(__package__) / "model_card_template.md").read_text(encoding="utf-8")
    return ModelCard.from_template(data, template_str=template, title=f"{data.model_name}: {title}", **fields)


def describe_architecture(config: Any) -> str:
    """ "TransNormer T2" for this project's models, the attentions of a baseline, the model type for others."""
    if config.model_type == TransNormerConfig.model_type:
        return f"TransNormer {config.variant.upper()}"
    if config.model_type == BASELINE:
        attentions = dict.fromkeys(ATTENTION_NAMES.get(name, f"{name} attention") for name in config.layer_types)
        return f"TransNormer's backbone with {' and '.join(attentions)}"
    return config.model_type.upper()


def _call(function: str, *arguments: str, is_pinned: bool = True) -> str:
    """A call over several lines; pinned to a commit where the code comes with the weights."""
    lines = [f"{argument}," for argument in arguments]
    if is_pinned:
        lines += ['revision="COMMIT",  # the full hash of the commit that you have read', "trust_remote_code=True,"]
    return "\n    ".join([f"{function}(", *lines]) + "\n)"


def _labels(config: Any) -> str:
    return f"Labels: {', '.join(config.id2label[number] for number in sorted(config.id2label))}."


def package_versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
