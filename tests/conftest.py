import logging
import os

# Before anything imports transformers or triton: no test reaches for the network, kernels run in the interpreter.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import transnormer_hf  # noqa: F401  (registers the Auto classes)


def pytest_collection_modifyitems(items):
    """The report of a run (--junitxml) says which cell of docs/compatibility.md a contract test counts for."""
    for item in items:
        for mark in item.iter_markers("cell"):
            item.user_properties.append(("cell", *mark.args))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_level():
    """The scripts set it, and some tests call their `main`."""
    logger = logging.getLogger("transnormer_hf")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def articles() -> str:
    """Six articles in the form of WikiText: a title, sections, blank lines."""
    subjects = ["cat", "dog", "owl", "fox", "hen", "bee"]
    return "".join(
        f" = The {name} = \n \n The {name} is an animal . Every {name} sleeps {number} hours . \n \n"
        f" = = Food = = \n \n A {name} eats {number} times a day and a {name} drinks water . \n"
        for number, name in enumerate(subjects, start=3)
    )


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory, articles):
    """Folder of a small byte-level tokenizer with <|endoftext|> and <mask>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([articles], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", mask_token="<mask>"
    )
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def pretraining_arguments(byte_tokenizer, articles, tmp_path):
    """Command line of a short pre-training from scratch; keyword arguments replace or (None) remove options."""
    text = tmp_path / "text.txt"
    text.write_text(articles)

    def build(*flags: str, **changes) -> list[str]:
        options = {
            "model_type": "transnormer_hf",
            "config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,block_size=8",
            "tokenizer_name": byte_tokenizer,
            "train_file": text,
            "validation_file": text,
            "test_file": text,
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        options |= changes
        pairs = ((f"--{name}", str(value)) for name, value in options.items() if value is not None)
        return [*flags, *(part for pair in pairs for part in pair)]

    return build
