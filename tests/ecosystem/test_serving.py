"""`scripts/serve.py`: transformers' own server, through OpenAI's client, answers what `generate` says."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from transnormer_hf import TransNormerConfig, TransNormerForCausalLM

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytestmark = [pytest.mark.ecosystem, pytest.mark.cell("transformers serve")]

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "scripts" / "serve.py"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
PROMPT = "Every owl sleeps"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def make_tokenizer(text):
    """One token per word, so that any sequence of tokens is a text that streams word by word."""
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *sorted(set(text.split()))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[PAD]", unk_token="[UNK]", chat_template=TEMPLATE
    )


def make_model(kind, vocab_size):
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "Llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64))
    return TransNormerForCausalLM(TransNormerConfig(**sizes, position_embedding="none", block_size=4))


@pytest.fixture(scope="module", params=["TransNormer", "Llama"])
def served(request, articles, tmp_path_factory):
    """(folder, address) of a model behind the server."""
    folder = tmp_path_factory.mktemp("served") / "model"
    tokenizer = make_tokenizer(articles)
    tokenizer.save_pretrained(folder)
    model = make_model(request.param, len(tokenizer))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVE), str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(600):
            if server.poll() is not None:
                raise RuntimeError(server.stderr.read())
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served[1], api_key="none", max_retries=0, timeout=120) as client:
        yield client


def generated(folder, prompt, max_new_tokens=12):
    """What `generate` says after a text, in this process."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model_class = LlamaForCausalLM if "llama" in (folder / "config.json").read_text() else TransNormerForCausalLM
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = model_class.from_pretrained(folder).eval().generate(inputs, max_new_tokens=max_new_tokens)
    assert output.shape[1] == inputs.shape[1] + max_new_tokens
    return tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)


def test_a_completion_is_what_generate_says(served, client, record_property):
    answer = client.completions.create(model=str(served[0]), prompt=PROMPT, max_tokens=12)
    assert answer.choices[0].text == generated(served[0], PROMPT)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    record_property("tokens equal", 12)


def test_a_chat_is_what_generate_says_after_the_template(served, client, record_property):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model=str(served[0]), messages=chat, max_tokens=12)
    prompt = f"system: Be brief.\nuser: {PROMPT}\nassistant:"
    assert answer.choices[0].message.content == generated(served[0], prompt)
    record_property("tokens equal", 12)


def test_a_stream_brings_the_same_in_parts(served, client, record_property):
    chat = [{"role": "user", "content": PROMPT}]
    parts = client.chat.completions.create(model=str(served[0]), messages=chat, max_tokens=20, stream=True)
    texts = [part.choices[0].delta.content for part in parts if part.choices]
    assert len([text for text in texts if text]) > 5
    assert "".join(text or "" for text in texts) == generated(served[0], f"user: {PROMPT}\nassistant:", 20)
    record_property("tokens equal", 20)
    record_property("parts", len([text for text in texts if text]))
    parts = client.completions.create(model=str(served[0]), prompt=PROMPT, max_tokens=12, stream=True)
    assert "".join(part.choices[0].text for part in parts) == generated(served[0], PROMPT)


def test_the_model_is_listed(served, client):
    assert [model.id for model in client.models.list()] == [str(served[0])]


def test_transformers_chat_talks_to_it(served, tmp_path):
    folder, address = served
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", str(folder), address]
    command += ["max_new_tokens=12", "do_sample=False"]
    options = {"input": f"{PROMPT}\nn\n!exit\n", "capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    # It asks this machine through the Hub's client.
    online = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    result = subprocess.run(command, env=ENVIRONMENT | online | {"COLUMNS": "400"}, **options)
    assert result.returncode == 0, result.stderr
    assert generated(folder, f"user: {PROMPT}\nassistant:") in " ".join(result.stdout.split())


def test_continuous_batching_is_refused_by_name(tmp_path):
    command = [sys.executable, str(SERVE), str(tmp_path), "--continuous-batching"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert "--continuous-batching pages keys and values" in result.stderr
