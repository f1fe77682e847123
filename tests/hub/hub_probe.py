"""Run by test_hub.py in a process of its own that knows HF_ENDPOINT and cannot import this package.

Loads a classifier from the repository named on the command line, at the revision named there, and runs the pipeline.
Prints one JSON line.
"""

import json
import sys

from remote_code_probe import Refuse

sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402


def main(repo_id: str, revision: str, text: str) -> None:
    options = {"revision": revision, "trust_remote_code": True}
    model = AutoModelForSequenceClassification.from_pretrained(repo_id, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(repo_id, **options)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
    classifier = pipeline("text-classification", model=repo_id, **options)
    report = {"logits": logits.tolist(), "pipeline": classifier(text), "module": type(model).__module__}
    print(json.dumps({**report, "imported": sorted({"transnormer_hf", "triton"} & set(sys.modules))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
