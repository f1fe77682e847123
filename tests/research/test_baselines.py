"""The baselines: each against a definition written here from its paper, and all of them as models."""

import math

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

from transnormer_hf import TransNormerConfig
from transnormer_hf.model.reference_transnormer import attention_metadata
from transnormer_hf.research.baselines import (
    MIXERS,
    BaselineConfig,
    BaselineForCausalLM,
    baseline_config,
    register_mixer,
)
from transnormer_hf.research.baselines.elu import EluMixer
from transnormer_hf.research.baselines.log_normal import PUBLISHED_CONSTANTS, fit_constants, moment_matching_constants
from transnormer_hf.research.baselines.mixer import CHUNK_SIZE
from transnormer_hf.research.baselines.performer import favor_directions

BATCH, HEADS, SEQ, HEAD_DIM, MAX_LENGTH = 2, 2, 11, 4, 16
FIELDS = {
    "vocab_size": 40,
    "hidden_size": HEADS * HEAD_DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": MAX_LENGTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
}
of_each_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))
of_each_mode = pytest.mark.parametrize("mode", ["average", "learnable_scale", "learnable_ratio"])
both_directions = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def make_config(mixer, **fields):
    return baseline_config(TransNormerConfig(**FIELDS | fields), mixer)


def make_mixer(name, head_dim=HEAD_DIM, **options):
    config = TransNormerConfig(**FIELDS | {"hidden_size": HEADS * head_dim})
    return MIXERS[name](config, **options).double().eval()


def random_states(batch=BATCH, seq=SEQ, head_dim=HEAD_DIM, scale=1.0):
    return [scale * torch.randn(batch, HEADS, seq, head_dim, dtype=torch.float64) for _ in range(3)]


def run(mixer, query, key, value, causal, attention_mask=None):
    metadata = attention_metadata(query.shape[0], query.shape[2], query.device, attention_mask)
    return mixer(query, key, value, metadata, causal)


# Definitions, one query and one key at a time. Each gives the score of a pair, up to a factor per query.


def softmax_score(q, k, i, j, **_):
    return math.exp(q @ k / math.sqrt(len(q)))


def elu_score(q, k, i, j, **_):
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    return float(phi(q) @ phi(k))


def performer_score(q, k, i, j, **_):
    """The estimate of exp(q·k / sqrt(d)): a mean over random directions w."""
    directions = favor_directions(HEAD_DIM, max(1, int(HEAD_DIM * math.log(HEAD_DIM))), 0)
    total = 0.0
    for w in directions.T:
        total += math.exp(w @ q / HEAD_DIM**0.25 - q @ q / 2 / HEAD_DIM**0.5) * math.exp(
            w @ k / HEAD_DIM**0.25 - k @ k / 2 / HEAD_DIM**0.5
        )
    return total / directions.shape[1]


def cosformer_score(q, k, i, j, length, **_):
    return float(q.clamp(min=0) @ k.clamp(min=0)) * math.cos(math.pi / 2 * (i - j) / length)


def log_normal_score(q, k, i, j, alpha, beta, **_):
    return float((alpha[i] * q).exp() @ (beta[j] * k).exp())


def log_normal_scales(query, key, causal, row):
    """alpha and beta of each token: from all numbers of the batch, or from this row's up to the token."""
    a, b = moment_matching_constants(query.shape[-1])
    alphas, betas = [], []
    for t in range(query.shape[2]):
        seen_query, seen_key = (s[row, :, : t + 1] if causal else s for s in (query, key))
        query_std, key_std = (seen.flatten().std(correction=1) for seen in (seen_query, seen_key))
        matched = torch.sqrt((query_std**2 * key_std**2 - b) / (2 * a))
        alphas.append(matched / query_std)
        betas.append(matched / key_std)
    return alphas, betas


DEFINITIONS = {
    "softmax": softmax_score,
    "1+elu": elu_score,
    "performer": performer_score,
    "cosformer": cosformer_score,
    "lln": log_normal_score,
}


def attend_by_definition(name, query, key, value, causal):
    output = torch.zeros_like(value)
    length = MAX_LENGTH if causal else query.shape[2]
    for row in range(query.shape[0]):
        alpha, beta = log_normal_scales(query, key, causal, row) if name == "lln" else (None, None)
        for head in range(query.shape[1]):
            for i in range(query.shape[2]):
                seen = range(i + 1) if causal else range(query.shape[2])
                scores = [
                    DEFINITIONS[name](
                        query[row, head, i], key[row, head, j], i, j, length=length, alpha=alpha, beta=beta
                    )
                    for j in seen
                ]
                for j, score in zip(seen, scores, strict=True):
                    if score:  # relu may leave a query nothing
                        output[row, head, i] += score / sum(scores) * value[row, head, j]
    return output


@both_directions
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_output_is_that_of_the_definition(name, causal):
    states = random_states()
    expected = attend_by_definition(name, *states, causal)
    torch.testing.assert_close(run(make_mixer(name), *states, causal), expected)


@both_directions
@of_each_mode
def test_log_normal_with_diag_combines_both(mode, causal):
    states = random_states(seq=HEAD_DIM * 2 + 3)  # the tail is a block of its own
    mixer = make_mixer("lln_diag", mode=mode)
    parameters = dict(mixer.named_parameters())
    assert len(parameters) == ["average", "learnable_ratio", "learnable_scale"].index(mode)
    for parameter in parameters.values():
        assert parameter.shape == (1, HEADS, 1, HEAD_DIM)
        assert (parameter == 0.5).all()
        torch.nn.init.uniform_(parameter)
    blocks = []
    for start in range(0, states[0].shape[2], HEAD_DIM):
        q, k, v = (s[:, :, start : start + HEAD_DIM] for s in states)
        scores = q @ k.mT / math.sqrt(HEAD_DIM)
        if causal:
            scores += torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu(1)
        blocks.append(scores.softmax(-1) @ v)
    diag, linear = torch.cat(blocks, 2), attend_by_definition("lln", *states, causal)
    r, p = parameters.get("ratio", 0.5), parameters.get("scale", 0.5)
    expected = {
        "average": 0.5 * (linear + diag),
        "learnable_scale": r * linear + p * diag,
        "learnable_ratio": r * linear + (1 - r) * diag,
    }[mode]
    torch.testing.assert_close(run(mixer, *states, causal), expected)


@both_directions
@of_each_mixer
def test_map_times_values_is_the_output(mixer, causal):
    """Also over several chunks of the causal form, and where padding stands in front."""
    query, key, value = random_states(seq=CHUNK_SIZE + 10)
    mask = torch.ones(BATCH, query.shape[2], dtype=torch.long)
    mask[0, :7] = 0
    attend = make_mixer(mixer)
    attend.config.max_position_embeddings = query.shape[2]
    metadata = attention_metadata(BATCH, query.shape[2], query.device, mask)
    weights = attend.attention_map(query, key, metadata, causal)
    is_real = mask[:, None, :, None].bool()
    rows_sum = weights.sum(-1, keepdim=True).masked_select(is_real)
    # relu may leave a query nothing
    torch.testing.assert_close(rows_sum, (rows_sum > 0).to(rows_sum) if mixer == "cosformer" else rows_sum * 0 + 1)
    output = attend(query, key, value, metadata, causal)
    expected = weights @ (value * is_real)
    torch.testing.assert_close(output * is_real, expected * is_real)


@both_directions
@of_each_mixer
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(mixer, causal, side):
    """One row in the batch, for the bidirectional moments of "lln" are those of the whole batch."""
    states = random_states(batch=1)
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 2)}[side]
    padded = [F.pad(s, (0, 0, left, right), value=7.0) for s in states]
    mask = F.pad(torch.ones(1, SEQ, dtype=torch.long), (left, right))
    attend = make_mixer(mixer)
    output = run(attend, *padded, causal, mask)
    assert output.isfinite().all()
    torch.testing.assert_close(output[:, :, left : left + SEQ], run(attend, *states, causal))


@both_directions
@of_each_mixer
def test_row_of_padding_is_finite_forward_and_backward(mixer, causal):
    states = [s.requires_grad_() for s in random_states()]
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1] = 0
    run(make_mixer(mixer), *states, causal, mask)[0].sum().backward()
    assert all(s.grad.isfinite().all() for s in states)


@of_each_mixer
def test_causal_form_does_not_see_the_future(mixer):
    states = random_states()
    attend = make_mixer(mixer)
    shortened = run(attend, *(s[:, :, : SEQ // 2] for s in states), True)
    louder = [torch.cat((s[:, :, : SEQ // 2], 300 * s[:, :, SEQ // 2 :]), 2) for s in states]
    changed = run(attend, *louder, True)[:, :, : SEQ // 2]
    torch.testing.assert_close(changed, shortened)


@of_each_mixer
def test_causal_rows_do_not_depend_on_the_batch(mixer):
    states = random_states()
    together = run(make_mixer(mixer), *states, True)
    alone = run(make_mixer(mixer), *(s[1:] for s in states), True)
    torch.testing.assert_close(together[1:], alone)


@both_directions
@of_each_mixer
def test_large_inputs_stay_finite(mixer, causal):
    states = [s.float().requires_grad_() for s in random_states(scale=30.0)]
    output = run(make_mixer(mixer).float(), *states, causal)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(s.grad.isfinite().all() for s in states)


def test_performer_estimates_softmax():
    query, key, value = random_states(scale=0.7)
    exact = run(make_mixer("softmax"), query, key, value, False)
    few, many = (
        (run(make_mixer("performer", num_features=count), query, key, value, False) - exact).norm() / exact.norm()
        for count in (16, 4096)
    )
    assert many < 0.2
    assert many < few / 4


def test_performer_directions_are_orthogonal_with_the_lengths_of_gaussians():
    directions = favor_directions(32, 64, 0)
    block = directions[:, :32]
    gram = block.T @ block
    torch.testing.assert_close(gram, gram.diag().diag())
    assert directions.square().sum(0).mean().item() == pytest.approx(32, rel=0.15)
    many = favor_directions(4, 4000, 0)
    torch.testing.assert_close(many.mean(1), torch.zeros(4).double(), atol=0.1, rtol=0)  # no side is preferred
    assert not torch.equal(directions, favor_directions(32, 64, 1))


def test_constants_at_64_are_the_published_ones_and_the_fit_agrees():
    assert moment_matching_constants(64) == PUBLISHED_CONSTANTS[64]
    a, b = fit_constants(64)
    assert a == pytest.approx(PUBLISHED_CONSTANTS[64][0], rel=0.05)
    assert b == pytest.approx(PUBLISHED_CONSTANTS[64][1], rel=0.15)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_log_normal_scores_have_the_variance_of_softmax_scores(head_dim):
    """The promise of moment matching, within the range of the fit."""
    query, key, _ = random_states(batch=1, seq=400, head_dim=head_dim, scale=1.0)
    attend = make_mixer("lln", head_dim)
    metadata = attention_metadata(1, 400, query.device)
    alpha_q, beta_k = attend.exponents(query, key, metadata, False)
    log_scores = (alpha_q[:, :, :, None] + beta_k[:, :, None]).logsumexp(-1)
    softmax_variance = (query.std() * key.std()) ** 2
    assert log_scores.var().item() == pytest.approx(softmax_variance.item(), rel=0.15)


def test_no_gradient_flows_through_the_moments():
    query, key, _ = (s.requires_grad_() for s in random_states())
    attend = make_mixer("lln")
    metadata = attention_metadata(BATCH, SEQ, query.device)
    scaled, _ = attend.exponents(query, key, metadata, False)
    (gradient,) = torch.autograd.grad(scaled.sum(), query)
    assert (gradient - gradient.flatten()[0]).abs().max() == 0  # alpha, the same everywhere


# As models


@both_directions
@of_each_mixer
def test_model_runs_by_its_definition_as_well(mixer, causal):
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = auto_class.from_config(make_config(mixer)).eval()
    ids = torch.randint(3, 40, (BATCH, SEQ))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    fast = model(ids, attention_mask=mask).logits
    model.config.backend = "eager"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], fast[mask.bool()])
    outputs = model(ids, attention_mask=mask, labels=ids, output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(BATCH, HEADS, SEQ, SEQ)] * 2
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@both_directions
@of_each_mixer
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_packed_sequences_do_not_see_each_other(mixer, causal, backend):
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = auto_class.from_config(make_config(mixer, backend=backend)).eval()
    first, second = torch.randint(3, 40, (1, 4)), torch.randint(3, 40, (1, 7))
    packed = model(torch.cat((first, second), 1), position_ids=torch.tensor([[*range(4), *range(7)]])).logits
    padded = torch.cat((F.pad(first, (0, 3), value=1), second))
    logits = model(padded, attention_mask=torch.tensor([[1] * 4 + [0] * 3, [1] * 7])).logits
    torch.testing.assert_close(packed[0], torch.cat((logits[0, :4], logits[1])))


@of_each_mixer
def test_saves_and_loads_without_code_beside_it(mixer, tmp_path):
    model = AutoModelForMaskedLM.from_config(make_config(mixer)).eval()
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    ids = torch.randint(3, 40, (1, SEQ))
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_learned_ratio_comes_back_from_its_folder(tmp_path):
    base = TransNormerConfig(**FIELDS)
    model = AutoModel.from_config(baseline_config(base, "lln_diag", mode="learnable_scale"))
    with torch.no_grad():
        model.layers[0].self_attn.mixer.scale.uniform_()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again.layers[0].self_attn.mixer.scale, model.layers[0].self_attn.mixer.scale)
    assert (again.layers[1].self_attn.mixer.ratio == 0.5).all()


def test_half_precision_and_autocast_are_close_to_float32():
    for mixer in MIXERS:
        model = AutoModelForMaskedLM.from_config(make_config(mixer, initializer_range=0.02)).eval()
        ids = torch.randint(3, 40, (1, SEQ))
        exact = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(ids).logits.float(), exact, atol=0.05, rtol=0.05)
        torch.testing.assert_close(model.bfloat16()(ids).logits.float(), exact, atol=0.05, rtol=0.05)


def test_parameters_are_those_of_the_backbone_without_lrpe():
    base = TransNormerConfig(**FIELDS | {"lrpe": False})
    ours = AutoModelForMaskedLM.from_config(base).num_parameters()
    for mixer in MIXERS:
        assert AutoModelForMaskedLM.from_config(baseline_config(base, mixer)).num_parameters() == ours


def test_layers_may_mix_baselines_and_our_own_attentions():
    layer_types = ["softmax", "linear_attention", "1+elu", "chunked_attention"]
    config = BaselineConfig(**FIELDS | {"num_hidden_layers": 4, "layer_types": layer_types})
    model = AutoModelForMaskedLM.from_config(config)
    assert [getattr(layer.self_attn, "name", None) for layer in model.model.layers] == ["softmax", None, "1+elu", None]
    assert model(torch.randint(3, 40, (1, SEQ))).logits.isfinite().all()


def test_mixer_is_chosen_by_name_and_changed_on_loading(tmp_path):
    BaselineConfig(**FIELDS, mixer="performer").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layer_types == ["performer"] * 2
    BaselineConfig(**FIELDS | {"max_position_embeddings": 512, "position_embedding": "none"}).save_pretrained(tmp_path)
    changed = AutoConfig.from_pretrained(tmp_path, mixer="cosformer")
    assert changed.max_position_embeddings == 512  # the M of cosFormer, which the logits depend on
    assert (changed.mixer, changed.layer_types) == ("cosformer", ["cosformer"] * 2)


def test_another_baseline_is_one_more_class():
    try:

        @register_mixer("squared")
        class Squared(EluMixer):
            def features(self, query, key, metadata, causal):
                return query.square(), key.square()

        model = AutoModelForMaskedLM.from_config(make_config("squared"))
        assert isinstance(model.model.layers[0].self_attn.mixer, Squared)
    finally:
        MIXERS.pop("squared", None)


def test_generation_runs_the_whole_text_at_every_step():
    model = AutoModelForCausalLM.from_config(make_config("lln", pad_token_id=1)).eval()
    ids = torch.randint(3, 40, (1, 4))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for length in range(4, 8):
        assert model(generated[:, :length]).logits[0, -1].argmax() == generated[0, length]


def test_trains_through_the_trainer(tmp_path):
    model = AutoModelForMaskedLM.from_config(make_config("cosformer"))
    ids = torch.randint(3, 40, (8, SEQ))
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row), "unused": 1} for row in ids]
    arguments = TrainingArguments(tmp_path, max_steps=20, learning_rate=0.01, report_to=[], use_cpu=True, seed=0)
    losses = [entry["loss"] for entry in _train(model, arguments, rows) if "loss" in entry]
    assert losses[-1] < losses[0] - 1


def _train(model, arguments, rows):
    arguments.logging_steps = 1
    arguments.disable_tqdm = True
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return trainer.state.log_history


def test_bad_input_is_named():
    with pytest.raises(StrictDataclassError, match=r"mixer='flash' is not known; choose one of .*'softmax'"):
        make_config("flash")
    base = TransNormerConfig(**FIELDS)
    with pytest.raises(StrictDataclassError, match=r"'width'.*performer knows num_features, seed"):
        baseline_config(base, "performer", width=3)
    with pytest.raises(ValueError, match="num_features=0"):
        make_mixer("performer", num_features=0)
    with pytest.raises(ValueError, match=r"mode='sum' is not known; choose one of 'average'"):
        make_mixer("lln_diag", mode="sum")
    model = BaselineForCausalLM(make_config("softmax"))
    ids = torch.randint(3, 40, (1, SEQ))
    with pytest.raises(ValueError, match="pass use_cache=False"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match=f"max_position_embeddings={MAX_LENGTH}"):
        run(make_mixer("cosformer"), *random_states(seq=MAX_LENGTH + 1), True)
    without_length = {"max_position_embeddings": None, "position_embedding": "none"}
    model = BaselineForCausalLM(make_config("cosformer", **without_length))
    with pytest.raises(ValueError, match=r"max_position_embeddings=1048576.*to the longest input"):
        model(ids)
