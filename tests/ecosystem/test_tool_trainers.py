"""TRL, SetFit and captum with a TransNormer: values beside what the model gives by itself, and beside a stock model."""

import pytest
import torch
from datasets import Dataset
from test_remote_code import WORDS, tiny_config, word_tokenizer
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from transnormer_hf import TransNormerForCausalLM, TransNormerForSequenceClassification

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # TRL's
]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
TRAINING = {"learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
TRAINING |= {"max_steps": 20, "per_device_train_batch_size": 4, "disable_tqdm": True, "bf16": False}
of_both = pytest.mark.parametrize("kind", ["TransNormer", "stock"])


@pytest.fixture
def tokenizer():
    tokenizer = word_tokenizer()
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def causal_model(kind):
    torch.manual_seed(0)
    fields = {"position_embedding": "none", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if kind == "TransNormer":
        return TransNormerForCausalLM(tiny_config(is_causal=True, **fields))
    return LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="sdpa"))


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@of_both
@pytest.mark.cell("TRL")
def test_supervised_tuning_of_padded_texts_learns(kind, tokenizer, tmp_path, record_property):
    trl = pytest.importorskip("trl")
    rows = Dataset.from_dict({"text": ["the film is good", "what film is bad bad bad"] * 20})
    arguments = trl.SFTConfig(str(tmp_path), **TRAINING, max_length=16)
    found = losses(trl.SFTTrainer(causal_model(kind), arguments, train_dataset=rows, processing_class=tokenizer))
    assert found[-1] < 0.7 * found[0]
    record_property("measured", f"{kind}: loss {found[0]:.2f} to {found[-1]:.2f}")


@pytest.mark.cell("TRL")
def test_supervised_tuning_of_packed_texts_has_the_loss_of_the_same_texts_apart(tokenizer, record_property):
    pytest.importorskip("trl")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model, texts = causal_model("TransNormer").eval(), ["the film is good", "what film is bad bad bad", "is good"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    packed = [{"input_ids": [token for row in ids for token in row], "seq_lengths": [len(row) for row in ids]}]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator(packed)
    with torch.no_grad():
        together = model(**batch, use_cache=False).loss
        apart = [model(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in ids]
    expected = sum(apart) / sum(len(row) - 1 for row in ids)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)
    record_property("measured", f"loss within {(together - expected).abs().item():.0e}")


@of_both
@pytest.mark.cell("TRL")
def test_preferences_are_learned(kind, tokenizer, tmp_path, record_property):
    trl = pytest.importorskip("trl")
    rows = {"prompt": ["the film is"] * 8, "chosen": [" good"] * 8, "rejected": [" bad"] * 8}
    model = causal_model(kind)
    model.save_pretrained(tmp_path / "model")  # from which TRL loads its reference
    model = type(model).from_pretrained(tmp_path / "model")
    arguments = trl.DPOConfig(str(tmp_path), **TRAINING, max_length=16)
    dataset = Dataset.from_dict(rows)
    found = losses(trl.DPOTrainer(model, None, arguments, train_dataset=dataset, processing_class=tokenizer))
    assert found[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: model and reference are the same
    assert found[-1] < 0.5
    record_property("measured", f"{kind}: loss 0.69 to {found[-1]:.2f}")


@of_both
@pytest.mark.cell("TRL")
def test_a_reward_model_learns(kind, tokenizer, tmp_path, record_property):
    """TRL passes use_cache=False to the classification head."""
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    if kind == "TransNormer":
        model = TransNormerForSequenceClassification(tiny_config(position_embedding="none", num_labels=1))
    else:
        model = BertForSequenceClassification(BertConfig(**SIZES, num_labels=1))
    chosen, rejected = ["the film is good", "good film"] * 8, ["the film is bad", "bad"] * 8
    rows = Dataset.from_dict({"chosen": chosen, "rejected": rejected})
    arguments = trl.RewardConfig(str(tmp_path), **TRAINING, max_length=16)
    found = losses(trl.RewardTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer))
    assert found[-1] < 0.5 * found[0]
    record_property("measured", f"{kind}: loss {found[0]:.2f} to {found[-1]:.2f}")


@of_both
@pytest.mark.cell("captum")
def test_integrated_gradients_add_up_to_the_difference_of_the_logits(kind, record_property):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    if kind == "TransNormer":
        model = TransNormerForSequenceClassification(tiny_config(pooling="mean", initializer_range=0.2))
    else:
        model = BertForSequenceClassification(BertConfig(**SIZES, initializer_range=0.2))
    model = model.eval().double()
    ids = torch.randint(5, len(WORDS), (1, 9))
    embeddings = model.get_input_embeddings()(ids).detach()

    def logit(embeddings):
        return model(inputs_embeds=embeddings).logits[:, 0]

    method = captum.IntegratedGradients(logit)
    _, gap = method.attribute(embeddings, 0 * embeddings, n_steps=400, return_convergence_delta=True)
    difference = (logit(embeddings) - logit(0 * embeddings)).abs().item()
    assert abs(gap.item()) < 0.02 * difference
    record_property("measured", f"{kind}: gap {abs(gap.item()) / difference:.0e} of the difference")


@pytest.mark.cell("SetFit")
def test_setfit_learns_from_eight_texts_and_its_folder_is_not_pushed_without_its_head(tmp_path, record_property):
    setfit = pytest.importorskip("setfit")
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegression

    from transnormer_hf import TransNormerModel
    from transnormer_hf.hub import push_to_hub

    TransNormerModel(tiny_config(position_embedding="none")).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    texts = ["the film is good", "good film", "is good", "what good"]
    texts += [text.replace("good", "bad") for text in texts]
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    body = SentenceTransformer(str(tmp_path / "model"))
    model = setfit.SetFitModel(model_body=body, model_head=LogisticRegression(C=1e4))
    model.fit(texts, labels, num_epochs=1)
    right = sum(int(found) == wanted for found, wanted in zip(model.predict(texts), labels, strict=True))
    assert right == len(texts)
    record_property("measured", f"{right} of {len(texts)} texts")
    model.save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="SetFit's own push_to_hub"):
        push_to_hub(tmp_path / "saved", "user/film")
