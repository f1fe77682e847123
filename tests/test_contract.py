"""The contract with transformers: what must hold on every supported release, in values.

`make test-versions` runs this file in one environment per release and turns the cells below into docs/compatibility.md.
The models have large random weights, where a lost state shows in the second token.
"""

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers.utils import logging

from transnormer_hf import (
    TransNormerCache,
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerModel,
)
from transnormer_hf.model.configuration_transnormer import CACHE_NAME
from transnormer_hf.model.modeling_transnormer import CacheError

pytestmark = pytest.mark.contract

DIAG, NORM, BOTH = "chunked_attention", "linear_attention", "hybrid"
LAYERS = {"diag, norm": [DIAG, NORM], "norm, diag": [NORM, DIAG], "diag": [DIAG, DIAG], "norm": [NORM, NORM]}
LAYERS |= {"hybrid": [BOTH, BOTH], "norm, full": [NORM, "full_attention"]}
VOCABULARY, PROMPT, NEW = 61, 13, 12


def cell(name):
    """The column of docs/compatibility.md that a test counts for."""
    return pytest.mark.cell(name)


def make_model(layers="diag, norm", variant="t2", seed=0, **fields):
    torch.manual_seed(seed)
    config = TransNormerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_types=LAYERS[layers],
        variant=variant,
        block_size=4,
        position_embedding="none",
        initializer_range=0.6,
        is_causal=True,
        **fields,
    )
    model = TransNormerForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=VOCABULARY, pad_token_id=1
    )
    return model


def padded_prompts():
    input_ids = torch.randint(3, VOCABULARY, (3, PROMPT))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :6] = 0  # more than a block
    attention_mask[2, :1] = 0
    return {"input_ids": input_ids.where(attention_mask.bool(), 1), "attention_mask": attention_mask}


def greedy_without_cache(model, input_ids, attention_mask=None, new_tokens=NEW):
    """Greedy decoding by whole forwards, written out: nothing of `generate` takes part in it."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids, attention_mask=mask, use_cache=False).logits[:, -1]
            input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), 1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return input_ids


class TestImport:
    pytestmark = cell("import")

    def test_importing_prints_nothing(self):
        command = [sys.executable, "-W", "error:::transnormer_hf", "-c", "import transnormer_hf"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    @pytest.mark.parametrize("model_class", [TransNormerModel, TransNormerForCausalLM])
    def test_the_cache_has_both_names(self, model_class):
        assert {"cache", "past_key_values"} <= set(inspect.signature(model_class.forward).parameters)

    def test_names_are_those_of_the_installed_release(self):
        fields = transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__
        assert CACHE_NAME in fields
        assert TransNormerConfig.keys_to_ignore_at_inference == [CACHE_NAME]
        assert TransNormerForCausalLM._skip_keys_device_placement == [CACHE_NAME]


class TestForwardAndBackward:
    pytestmark = cell("forward and backward")

    @pytest.mark.parametrize("variant", ["t1", "t2"])
    @pytest.mark.parametrize("layers", LAYERS)
    def test_both_backends_give_the_same_loss_and_gradients(self, layers, variant):
        results = []
        for backend in ("eager", "torch"):
            model, inputs = make_model(layers, variant, backend=backend), padded_prompts()
            torch.manual_seed(1)
            has_context = inputs["attention_mask"].roll(1, 1) * inputs["attention_mask"]
            labels = inputs["input_ids"].where(has_context.bool(), -100)
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            results.append((loss, *(parameter.grad for parameter in model.parameters())))
            torch.manual_seed(0)
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)

    def test_nothing_is_warned_of_in_normal_use(self):
        model, inputs = make_model(), padded_prompts()
        messages = []

        class Recorder(logging.logging.Handler):
            def emit(self, record):
                messages.append(record.getMessage())

        recorder = Recorder(logging.logging.WARNING)
        logger = logging.get_logger("transformers")
        logger.addHandler(recorder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", module="torch")
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
                model(**inputs, use_cache=True)
                model.generate(**inputs, max_new_tokens=3)
        finally:
            logger.removeHandler(recorder)
        assert messages == []


class TestGenerate:
    pytestmark = cell("generate = no-cache generate")

    @pytest.mark.parametrize("variant", ["t1", "t2"])
    @pytest.mark.parametrize("layers", LAYERS)
    def test_greedy_tokens_of_a_left_padded_batch(self, layers, variant):
        model, inputs = make_model(layers, variant), padded_prompts()
        expected = greedy_without_cache(model, **inputs)
        assert model.generate(**inputs).equal(expected)
        assert model.generate(**inputs, use_cache=False).equal(expected)

    @pytest.mark.parametrize("layers", LAYERS)
    def test_beams(self, layers):
        model, inputs = make_model(layers), padded_prompts()
        beams = {"num_beams": 3, "max_new_tokens": 6}
        assert model.generate(**inputs, **beams).equal(model.generate(**inputs, **beams, use_cache=False))

    @pytest.mark.parametrize("layers", LAYERS)
    def test_chunked_prefill(self, layers):
        model, inputs = make_model(layers), padded_prompts()
        assert model.generate(**inputs, prefill_chunk_size=5).equal(greedy_without_cache(model, **inputs))

    @pytest.mark.parametrize("name", ["past_key_values", "cache"])
    @pytest.mark.parametrize("make_cache", [TransNormerCache, lambda config: DynamicCache(config=config)])
    def test_either_name_carries_the_state_from_forward_to_forward(self, make_cache, name):
        model, input_ids = make_model(), padded_prompts()["input_ids"][:1]
        with torch.no_grad():
            whole = model(input_ids, use_cache=False).logits
            cache = make_cache(model.config)
            first = model(input_ids[:, :7], **{name: cache})
            assert first[CACHE_NAME] is cache
            steps = [model(input_ids[:, [column]], **{name: cache}).logits for column in range(7, PROMPT)]
        torch.testing.assert_close(torch.cat((first.logits, *steps), 1), whole, rtol=1e-3, atol=1e-3)

    def test_a_conversation_goes_on_from_its_state(self):
        model, inputs = make_model(), padded_prompts()
        turn = model.generate(**inputs, return_dict_in_generate=True, max_new_tokens=4)
        question = torch.cat((turn.sequences, torch.randint(3, VOCABULARY, (3, 5))), 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, question.shape[1] - PROMPT), value=1)
        options = {"attention_mask": mask, CACHE_NAME: turn[CACHE_NAME]}
        assert model.generate(question, **options).equal(greedy_without_cache(model, question, mask))


class TestAssisted:
    pytestmark = cell("assisted")

    @pytest.mark.parametrize("layers", LAYERS)
    def test_with_an_assistant_that_is_often_wrong(self, layers):
        model, assistant = make_model(layers), make_model(layers)
        with torch.no_grad():
            for parameter in assistant.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        input_ids = padded_prompts()["input_ids"][:1]
        output = model.generate(input_ids, assistant_model=assistant)
        assert output.equal(greedy_without_cache(model, input_ids))

    @pytest.mark.parametrize("layers", LAYERS)
    def test_prompt_lookup(self, layers):
        model = make_model(layers)
        input_ids = torch.randint(3, VOCABULARY, (1, 4)).repeat(1, 5)
        assert model.generate(input_ids, prompt_lookup_num_tokens=3).equal(greedy_without_cache(model, input_ids))


class TestStatic:
    pytestmark = cell("static")

    @pytest.mark.parametrize("layers", LAYERS)
    def test_a_static_cache_gives_the_same_tokens(self, layers):
        model, inputs = make_model(layers), padded_prompts()
        expected = greedy_without_cache(model, **inputs)
        assert model.generate(**inputs, cache_implementation="static").equal(expected)
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
        assert model.generate(**inputs, **{CACHE_NAME: cache}).equal(expected)


LOAD_WITHOUT_THE_PACKAGE = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transnormer_hf", "triton"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM

folder, prompt = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
for _ in range(2):  # what is saved again loads again
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=61, pad_token_id=1)
    folder += "-again"
    model.save_pretrained(folder)
assert "transnormer_hf" not in sys.modules
print(json.dumps(tokens.tolist()))
"""


class TestSaving:
    pytestmark = cell("save and remote load")

    def test_a_saved_folder_generates_the_same_without_the_package(self, tmp_path):
        model, input_ids = make_model(), padded_prompts()["input_ids"][:1]
        model.save_pretrained(tmp_path / "model")
        command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, tmp_path / "model", json.dumps(input_ids.tolist())]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr[-4000:]
        assert json.loads(result.stdout.splitlines()[-1]) == greedy_without_cache(model, input_ids).tolist()

    def test_with_the_package_the_folder_needs_no_trust(self, tmp_path):
        model, inputs = make_model(), padded_prompts()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(loaded) is TransNormerForCausalLM
        assert loaded(**inputs).logits.equal(model(**inputs).logits)


class TestTrainer:
    pytestmark = cell("Trainer")

    def test_trains_and_predicts_with_the_default_of_use_cache(self, tmp_path):
        pytest.importorskip("accelerate")
        from transformers import Trainer, TrainingArguments

        model = make_model()
        assert model.config.use_cache
        rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, VOCABULARY, (8, 9))]
        arguments = TrainingArguments(
            tmp_path, max_steps=4, learning_rate=0.01, report_to=[], disable_tqdm=True, use_cpu=True,
            per_device_train_batch_size=4, per_device_eval_batch_size=8,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        predictions = trainer.predict(rows).predictions
        assert predictions.shape == (8, 9, VOCABULARY)

    def test_gradient_checkpointing_gives_the_same_gradients(self):
        gradients = []
        for checkpointing in (False, True):
            model = make_model().train()
            if checkpointing:
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable()
            torch.manual_seed(0)
            input_ids = torch.randint(3, VOCABULARY, (2, 9))
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


class TestPeft:
    pytestmark = cell("peft")

    @pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own use
    def test_lora_trains_and_merges_to_the_same_tokens(self):
        peft = pytest.importorskip("peft")
        model = make_model()
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
        trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
        assert {name.split(".")[-4] for name in trainable} == {"q_proj", "v_proj"}
        inputs = padded_prompts()
        adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        tokens = adapted.eval().generate(**inputs)
        merged = adapted.merge_and_unload()
        assert tokens.equal(greedy_without_cache(merged, **inputs))


class TestLoud:
    """The next rename must not give wrong text."""

    pytestmark = cell("generate = no-cache generate")

    def test_two_different_caches_under_both_names_are_refused(self):
        model, input_ids = make_model(), padded_prompts()["input_ids"]
        caches = {name: TransNormerCache(model.config) for name in ("cache", "past_key_values")}
        with pytest.raises(ValueError, match="two names of one argument"):
            model(input_ids, **caches)
        one = caches["cache"]
        assert model(input_ids, cache=one, past_key_values=one)[CACHE_NAME] is one

    def test_a_cache_under_an_unknown_name_is_refused(self):
        model, input_ids = make_model(), padded_prompts()["input_ids"]
        for network in (model, model.model):
            with pytest.raises(ValueError, match=f"as 'memory'.*transformers {transformers.__version__}"):
                network(input_ids, memory=TransNormerCache(model.config))

    def test_a_host_that_hands_the_cache_over_under_an_invented_name_is_stopped(self, monkeypatch):
        prepare = TransNormerForCausalLM.prepare_inputs_for_generation

        def rename(self, *args, **kwargs):
            inputs = prepare(self, *args, **kwargs)
            return {"memory" if name == CACHE_NAME else name: value for name, value in inputs.items()}

        monkeypatch.setattr(TransNormerForCausalLM, "prepare_inputs_for_generation", rename)
        with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*use_cache=False"):
            make_model().generate(**padded_prompts())

    @pytest.mark.parametrize("hide_from", ["the model", "the next step"])
    def test_a_state_that_does_not_advance_is_noticed(self, monkeypatch, hide_from):
        """As if a release had another name in its outputs, or dropped what it does not know."""
        host = transformers.GenerationMixin
        if hide_from == "the model":
            prepare = host.prepare_inputs_for_generation

            def drop(self, *args, **kwargs):
                return {name: value for name, value in prepare(self, *args, **kwargs).items() if name != CACHE_NAME}

            monkeypatch.setattr(host, "prepare_inputs_for_generation", drop)
        else:
            update = host._update_model_kwargs_for_generation

            def drop(self, outputs, model_kwargs, *args, **kwargs):
                kwargs_after = update(self, outputs, model_kwargs, *args, **kwargs)
                return kwargs_after | {CACHE_NAME: TransNormerCache(self.config)}

            monkeypatch.setattr(host, "_update_model_kwargs_for_generation", drop)
        for inputs in (padded_prompts(), {"input_ids": padded_prompts()["input_ids"][:1]}):
            with pytest.raises(RuntimeError, match=f"transformers {transformers.__version__}.*use_cache=False"):
                make_model().generate(**inputs)

    def test_a_mask_for_tokens_of_which_there_is_no_state_is_refused(self):
        model, inputs = make_model(), padded_prompts()
        with pytest.raises(CacheError, match="13 columns for 1 tokens"):
            model(inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"])

    def test_a_tensor_that_nobody_reads_is_refused(self):
        model, input_ids = make_model(), padded_prompts()["input_ids"]
        with pytest.raises(TypeError, match="unexpected tensor 'segment_ids'"):
            model(input_ids, segment_ids=torch.zeros_like(input_ids))
        for name in ("token_type_ids", "cache_position"):  # what transformers hands to every model
            model(input_ids, **{name: torch.zeros_like(input_ids)})

    def test_is_causal_against_the_model_is_refused(self):
        model, input_ids = make_model(), padded_prompts()["input_ids"]
        with pytest.raises(ValueError, match="is_causal=False was given to a model that was built with is_causal=True"):
            model(input_ids, is_causal=False)
