#!/usr/bin/env python
"""Write a TransNormer as ONNX for any batch size and length, and check it in onnxruntime against the model.

    python scripts/export_onnx.py --model outputs/demo --output outputs/demo.onnx
    python scripts/export_onnx.py --model outputs/mlm --task feature-extraction --output mlm.onnx --time 128 512 2048

--model is a folder or a repository; its head is the one that was saved, unless --task names another. Inputs are
input_ids and attention_mask, with padding on either side, and token_type_ids if the model has them. A causal model is
written without its state: its logits of a whole text. --time compares the seconds of a forward with PyTorch and with a
BERT of the same size in onnxruntime. Needs onnxscript and onnxruntime.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, BertConfig, BertModel, PreTrainedModel

import transnormer_hf  # noqa: F401  registers the Auto classes

TASKS = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "text-generation": "AutoModelForCausalLM",
}
OUTPUTS = {"feature-extraction": ["last_hidden_state"], "question-answering": ["start_logits", "end_logits"]}

# Batch size and length of the inputs that the check runs: one token, one row, beside a block's end, several blocks.
CHECKED_SIZES = ((1, 1), (1, 7), (3, 63), (3, 64), (2, 65), (5, 200), (2, 700))
TOLERANCE = 1e-4  # of the largest difference, relative to the largest output


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or repository of a TransNormer")
    parser.add_argument("--task", choices=TASKS, help="the head; default: that of the saved model")
    parser.add_argument("--output", required=True, type=Path, help="the .onnx file to write")
    parser.add_argument("--time", nargs="+", type=int, default=[], metavar="LENGTH", help="compare times")
    options = parser.parse_args(arguments)
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        task = options.task or saved_task(options.model)
        model = getattr(transformers, TASKS[task]).from_pretrained(options.model, dtype=torch.float32).eval()
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    export(model, task, options.output)
    difference = largest_difference(model, task, options.output)
    print(f"{options.output}: {task}, largest difference from the model {difference:.1e} of the largest output")
    if not difference <= TOLERANCE:
        sys.exit(f"error: {difference:.1e} is more than {TOLERANCE:.0e}; the file is not the model.")
    if options.time:
        torch.set_num_threads(1)
        for line in comparisons(model, task, options.output, options.time):
            print(line)


def saved_task(name: str) -> str:
    """The task whose head was saved, by the configuration's `architectures`. Raises ValueError if there is none."""
    architectures = AutoConfig.from_pretrained(name).architectures or []
    heads = {f"TransNormer{auto.removeprefix('Auto').removeprefix('Model')}": task for task, auto in TASKS.items()}
    heads["TransNormerModel"] = heads.pop("TransNormer")
    for architecture in architectures:
        if architecture in heads:
            return heads[architecture]
    raise ValueError(f"{name} was saved as {architectures}; name the head with --task, one of {', '.join(TASKS)}.")


def make_inputs(model: PreTrainedModel, task: str, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens, (batch, seq) or for multiple choice (batch, 2, seq), with padding left, right and nowhere."""
    shape = (batch_size, 2, length) if task == "multiple-choice" else (batch_size, length)
    input_ids = torch.randint(model.config.vocab_size, shape)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, ..., : length // 3] = 0
    if batch_size > 1:
        attention_mask[1, ..., length - length // 4 :] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if getattr(model.config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(model.config.type_vocab_size, shape)
    return inputs


def export(model: PreTrainedModel, task: str, path: Path) -> None:
    """Writes the model with dynamic batch size, length and, for multiple choice, number of choices."""
    inputs = make_inputs(model, task, 2, 96)
    names = ("batch", "choices", "length") if task == "multiple-choice" else ("batch", "length")
    shapes = {name: dict(enumerate(names)) for name in inputs}
    outputs = OUTPUTS.get(task, ["logits"])
    program = torch.onnx.export(
        model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, output_names=outputs, verbose=False
    )
    assert program is not None
    program.save(path)


def session(path: Path) -> Callable[[dict[str, torch.Tensor]], list[torch.Tensor]]:
    """The file as a function of the model's inputs, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    runner = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in runner.run(None, {k: v.numpy() for k, v in inputs.items()})]

    return run


@torch.no_grad()
def largest_difference(model: PreTrainedModel, task: str, path: Path) -> float:
    """Between file and model over CHECKED_SIZES, relative to the largest output. Outputs of padding do not count."""
    run, worst = session(path), 0.0
    is_learned = model.config.position_embedding == "learned"
    longest = model.config.max_position_embeddings if is_learned else max(length for _, length in CHECKED_SIZES)
    for batch_size, length in CHECKED_SIZES:
        inputs = make_inputs(model, task, batch_size, min(length, longest))
        expected = model(**inputs, use_cache=False)
        for name, found in zip(OUTPUTS.get(task, ["logits"]), run(inputs), strict=True):
            difference = found - expected[name]
            if found.shape[:2] == inputs["input_ids"].shape:  # an output per token
                is_real = inputs["attention_mask"].bool()
                difference = difference[is_real]
            worst = max(worst, float(difference.abs().max() / expected[name].abs().max()))
    return worst


def comparisons(model: PreTrainedModel, task: str, path: Path, lengths: Sequence[int], runs: int = 9) -> Iterator[str]:
    """For each length, medians of the process time of one text without padding; each run calls all in turn."""
    config = model.config
    bert_config = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads, intermediate_size=4 * config.hidden_size,
        max_position_embeddings=max(512, *lengths),
    )  # fmt: skip
    bert, bert_path = BertModel(bert_config).eval(), path.with_suffix(".bert.onnx")
    export(bert, "feature-extraction", bert_path)
    of_file, of_bert = session(path), session(bert_path)
    bert_path.unlink()
    for length in lengths:
        inputs, bert_inputs = make_inputs(model, task, 1, length), make_inputs(bert, "feature-extraction", 1, length)
        for given in (inputs, bert_inputs):
            given["attention_mask"].fill_(1)
        ways: dict[str, Callable[..., Any]] = {
            "onnxruntime": partial(of_file, inputs),
            "PyTorch": partial(model, **inputs, use_cache=False),
            "BERT in onnxruntime": partial(of_bert, bert_inputs),
            "BERT in PyTorch": partial(bert, **bert_inputs),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        with torch.inference_mode():
            for _ in range(runs + 1):  # the first is for warming up
                for name, call in ways.items():
                    begin = time.process_time()
                    call()
                    seconds[name].append(time.process_time() - begin)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        yield f"{length} tokens: " + ", ".join(f"{name} {1000 * median:.1f} ms" for name, median in medians.items())


if __name__ == "__main__":
    main()
