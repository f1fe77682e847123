"""The baselines: each against a definition written here from its paper, and all of them as models."""

import math
import random

import numpy as np
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
from transnormer_hf.research.baselines.mixer import CHUNK_SIZE, make_attention
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
# So small that a text of SEQ tokens has several blocks, chunks and landmarks.
OPTIONS = {
    "bigbird": {"block_size": 1, "num_random_blocks": 1},
    "flash": {"query_size": 4, "chunk_size": 4},
    "flash_quad": {"query_size": 4},
    "informer": {"factor": 2},
    "linformer": {"projected_length": 3},
    "local": {"window": 4},
    "nystromformer": {"num_landmarks": 4},
    "reformer": {"chunk_size": 2},
    "skyformer": {"num_samples": 6},
    "transformer_ls": {"window": 2, "num_landmarks": 3, "chunk_size": 2},
}
WITHOUT_MAP = [name for name in MIXERS if not MIXERS[name].has_map]
MEANS = ("1+elu", "bigbird", "cosformer", "informer", "lln", "lln_diag", "local", "performer", "softmax")
FORMS = [
    (name, causal) for name in sorted(MIXERS) for causal in (False, True) if MIXERS[name].has_causal_form >= causal
]
of_each_mixer = pytest.mark.parametrize("mixer", sorted(MIXERS))
of_each_form = pytest.mark.parametrize(
    ("mixer", "causal"), FORMS, ids=[f"{name}-{'causal' if causal else 'bidirectional'}" for name, causal in FORMS]
)
of_each_causal_form = pytest.mark.parametrize("mixer", [name for name, causal in FORMS if causal])
of_each_mode = pytest.mark.parametrize("mode", ["average", "learnable_scale", "learnable_ratio"])
both_directions = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def make_config(mixer, **fields):
    return baseline_config(TransNormerConfig(**FIELDS | fields), mixer, **OPTIONS.get(mixer, {}))


def make_mixer(name, head_dim=HEAD_DIM, **options):
    config = TransNormerConfig(**FIELDS | {"hidden_size": HEADS * head_dim})
    return MIXERS[name](config, **options).double().eval()


def make_layer_attention(name, causal, **fields):
    """The attention of a model's layer; its weights are large enough to tell what it attends to."""
    attention = make_attention(make_config(name, is_causal=causal, **fields), name).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return attention


def random_hidden_states(batch=BATCH, seq=SEQ, scale=1.0):
    return scale * torch.randn(batch, seq, HEADS * HEAD_DIM, dtype=torch.float64)


def attend(attention, hidden_states, mask=None, output_attentions=False):
    metadata = attention_metadata(*hidden_states.shape[:2], hidden_states.device, mask)
    output, weights = attention(hidden_states, metadata, output_attentions=output_attentions)
    return (output, weights) if output_attentions else output


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


def log_normal_scales(query, key, causal, row, moments):
    """alpha and beta of each token: from all numbers of the batch or row, or from this row's up to the token."""
    a, b = moment_matching_constants(query.shape[-1])
    alphas, betas = [], []
    for t in range(query.shape[2]):
        seen_query, seen_key = (
            s[row, :, : t + 1] if causal else s[row] if moments == "row" else s for s in (query, key)
        )
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


def attend_by_definition(name, query, key, value, causal, moments="row"):
    output = torch.zeros_like(value)
    length = MAX_LENGTH if causal else query.shape[2]
    for row in range(query.shape[0]):
        alpha, beta = log_normal_scales(query, key, causal, row, moments) if name == "lln" else (None, None)
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


def test_moments_of_the_batch_are_those_of_the_authors():
    states = random_states()
    states[0][1] *= 3
    expected = attend_by_definition("lln", *states, False, moments="batch")
    torch.testing.assert_close(run(make_mixer("lln", moments="batch"), *states, False), expected)
    torch.testing.assert_close(
        run(make_mixer("lln_diag", moments="batch"), *states, False) * 2
        - run(make_mixer("lln_diag"), *states, False) * 2,
        expected - attend_by_definition("lln", *states, False),
    )


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


@of_each_form
def test_map_times_values_is_the_output(mixer, causal):
    """Also over several chunks of the causal form, and where padding stands in front."""
    seq = CHUNK_SIZE + 10
    attention = make_layer_attention(mixer, causal, max_position_embeddings=seq)
    hidden_states = random_hidden_states(seq=seq)
    mask = torch.ones(BATCH, seq, dtype=torch.long)
    mask[0, :7] = mask[1, 40] = 0
    is_real = mask.bool()
    output, weights = attend(attention, hidden_states, mask, output_attentions=True)
    torch.testing.assert_close(output[is_real], attend(attention, hidden_states, mask)[is_real])
    if mixer in WITHOUT_MAP:
        assert weights is None
        return
    assert weights.shape == (BATCH, 1 if "flash" in mixer else HEADS, seq, seq)
    if mixer in MEANS:
        sums = weights.sum(-1).transpose(1, 2)[is_real]
        # relu may leave a query nothing
        torch.testing.assert_close(sums, (sums > 0).to(sums) if mixer == "cosformer" else torch.ones_like(sums))
    assert (weights[0, :, 7:, :7] == 0).all()
    assert (weights[1, ..., 40] == 0).all()
    if causal:
        assert (weights[0, :, 7:].triu(8) == 0).all()
        assert (weights[1].triu(1) == 0).all()


@of_each_form
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(mixer, causal, side):
    """At every length that padding leaves: no block, chunk or landmark has to be full."""
    attention = make_layer_attention(mixer, causal)
    for seq in range(1, SEQ + 1):
        hidden_states = random_hidden_states(batch=1, seq=seq)
        left = {"left": SEQ + 1 - seq, "right": 0, "both": (SEQ + 1 - seq) // 2}[side]
        right = SEQ + 1 - seq - left
        padded = F.pad(hidden_states, (0, 0, left, right), value=7.0)
        mask = F.pad(torch.ones(1, seq, dtype=torch.long), (left, right))
        output = attend(attention, padded, mask)
        assert output.isfinite().all()
        alone = attend(attention, hidden_states)
        assert alone.isfinite().all()
        torch.testing.assert_close(output[:, left : left + seq], alone)


@of_each_mixer
def test_outputs_at_padding_are_no_larger_than_those_of_real_tokens(mixer):
    """Nobody reads them, but batch norm counts them in."""
    base = TransNormerConfig(
        vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=128,
        initializer_range=0.1, norm_type="batch", norm_placement="pre", position_embedding="sinusoidal",
    )  # fmt: skip
    model = AutoModel.from_config(baseline_config(base, mixer)).train()
    outputs = []
    model.layers[0].self_attn.register_forward_hook(lambda module, inputs, output: outputs.append(output[0]))
    lengths = torch.tensor([128, 20, 35, 50, 65, 80, 95, 110])
    for ids in torch.randint(3, 40, (4, 8, 128)):
        mask = (torch.arange(128) < lengths[:, None]).long()
        model(ids * mask + (1 - mask), attention_mask=mask)
        sizes = outputs.pop().norm(dim=-1)  # (batch, seq)
        assert sizes[mask == 0].max() < 4 * sizes[mask == 1].max()


@of_each_form
def test_row_of_padding_is_finite_forward_and_backward(mixer, causal):
    hidden_states = random_hidden_states().requires_grad_()
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[1] = 0
    attend(make_layer_attention(mixer, causal), hidden_states, mask)[0].sum().backward()
    assert hidden_states.grad.isfinite().all()


@of_each_causal_form
def test_causal_form_does_not_see_the_future(mixer):
    """Nor how long the text will be, also beyond max_position_embeddings."""
    attention = make_layer_attention(mixer, True, **({} if mixer == "cosformer" else {"max_position_embeddings": 7}))
    hidden_states = random_hidden_states()
    shortened = attend(attention, hidden_states[:, : SEQ // 2])
    louder = torch.cat((hidden_states[:, : SEQ // 2], 300 * hidden_states[:, SEQ // 2 :]), 1)
    torch.testing.assert_close(attend(attention, louder)[:, : SEQ // 2], shortened)


@pytest.mark.parametrize("mixer", [name for name in MIXERS if not MIXERS[name].has_causal_form])
def test_causal_model_of_a_bidirectional_mixer_is_refused(mixer):
    with pytest.raises(ValueError, match=f"mixer='{mixer}' is defined for bidirectional.*choose one of .*'performer'"):
        AutoModelForCausalLM.from_config(make_config(mixer))


@of_each_form
def test_rows_do_not_depend_on_the_batch(mixer, causal):
    """Neither on louder neighbours nor on longer ones."""
    attention = make_layer_attention(mixer, causal)
    hidden_states = random_hidden_states(3) * torch.tensor([1.0, 3.0, 0.3])[:, None, None]
    mask = torch.ones(3, SEQ, dtype=torch.long)
    mask[2, 5:] = 0
    together = attend(attention, hidden_states, mask)
    for row, length in enumerate([SEQ, SEQ, 5]):
        alone = attend(attention, hidden_states[row : row + 1, :length])
        torch.testing.assert_close(together[row : row + 1, :length], alone)


@of_each_form
def test_training_and_evaluation_are_one_function_without_global_random_state(mixer, causal):
    attention, hidden_states = make_layer_attention(mixer, causal), random_hidden_states()
    evaluated = attend(attention, hidden_states)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    trained = attend(attention.train(), hidden_states)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    torch.testing.assert_close(trained, evaluated, atol=0, rtol=0)


@of_each_form
def test_large_inputs_stay_finite(mixer, causal):
    hidden_states = random_hidden_states(scale=30.0).float().requires_grad_()
    output = attend(make_layer_attention(mixer, causal).float(), hidden_states)
    output.sum().backward()
    assert output.isfinite().all()
    assert hidden_states.grad.isfinite().all()


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
    assert (gradient - gradient[:, :1, :1, :1]).abs().max() == 0  # alpha, the same everywhere in a row


# As models


@of_each_form
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
    if mixer not in WITHOUT_MAP:
        shape = (BATCH, 1 if "flash" in mixer else HEADS, SEQ, SEQ)
        assert [tuple(weights.shape) for weights in outputs.attentions] == [shape] * 2
    outputs.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@of_each_form
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
    for mixer in MIXERS.keys() - {"flash", "flash_quad", "linformer", "reformer", "transformer_ls"}:
        assert AutoModelForMaskedLM.from_config(baseline_config(base, mixer)).num_parameters() == ours


def test_a_baseline_keeps_what_its_backbone_was_given_apart_from_attentions():
    given = {"pooling": "mean", "classifier_dropout": 0.3, "intermediate_size": 48, "max_position_embeddings": 96}
    base = TransNormerConfig(**FIELDS | given)
    of_baseline = baseline_config(base, "performer").to_dict()
    changed = {name for name, value in base.to_dict().items() if of_baseline[name] != value}
    assert changed == {"model_type", "layer_types", "use_cache"}
    causal = TransNormerConfig(**FIELDS | {"is_causal": True})
    assert baseline_config(causal, "performer").pooling == "last"


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
    with pytest.raises(StrictDataclassError, match=r"mixer='mamba' is not known; choose one of .*'softmax'"):
        make_config("mamba")
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
    assert make_config("cosformer", **without_length).max_position_embeddings == 512
