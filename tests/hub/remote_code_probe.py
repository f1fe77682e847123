"""Run by test_remote_code.py in a process of its own, where neither this package nor triton can be imported.

Loads every head from its folder with trust_remote_code, repeats the forward that the test recorded, saves again, and
runs the pipelines. Prints one JSON line.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transnormer_hf", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import pipeline  # noqa: E402
from transformers.pipelines import SUPPORTED_TASKS  # noqa: E402

PIPELINES = {
    "text-classification": ("AutoModelForSequenceClassification", "the film is good"),
    "fill-mask": ("AutoModelForMaskedLM", "the [MASK] is good"),
    "text-generation": ("AutoModelForCausalLM", "the film"),
    "token-classification": ("AutoModelForTokenClassification", "the film is good"),
    "question-answering": ("AutoModelForQuestionAnswering", {"question": "what", "context": "the film is good"}),
}


def largest_difference(model, recorded) -> float:
    with torch.no_grad():
        output = model(recorded["input_ids"])
    return (output[0] - recorded["output"]).abs().max().item()


def main(root: Path) -> None:
    report = {"differences": {}, "modules": {}, "resaved_files": {}, "resaved_differences": {}, "pipelines": {}}
    recordings = {folder.name: load_file(folder / "recorded.safetensors") for folder in root.iterdir()}
    for name, recorded in recordings.items():
        auto_class = getattr(transformers, name)
        model = auto_class.from_pretrained(root / name, trust_remote_code=True).eval()
        report["differences"][name] = largest_difference(model, recorded)
        report["modules"][name] = type(model).__module__
        again = root.parent / f"again-{name}"
        model.save_pretrained(again)
        report["resaved_files"][name] = sorted(file.name for file in again.glob("*.py"))
        model = auto_class.from_pretrained(again, trust_remote_code=True).eval()
        report["resaved_differences"][name] = largest_difference(model, recorded)
    # one folder serves every head
    for name in recordings:
        getattr(transformers, name).from_pretrained(root / "AutoModel", trust_remote_code=True)
    for task, (name, text) in PIPELINES.items():
        if task not in SUPPORTED_TASKS:  # transformers 5 has taken "question-answering" away; the head remains
            continue
        result = pipeline(task, model=str(root / name), trust_remote_code=True)(text)
        report["pipelines"][task] = str(result)
    report["imported"] = sorted({"transnormer_hf", "triton"} & set(sys.modules))
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
