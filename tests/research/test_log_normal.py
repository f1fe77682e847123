"""Linear Log-Normal Attention: what its paper proves, and where the authors' code fails in float32."""

import json

import pytest
import torch

import log_normal
from transnormer_hf import TransNormerConfig
from transnormer_hf.model.reference_transnormer import attention_metadata
from transnormer_hf.research.baselines import MIXERS
from transnormer_hf.research.baselines.log_normal import moment_matching_constants
from transnormer_hf.research.diagnostics import attention_temperature, row_entropy

TOKENS, HEAD_DIM = 200, 64


def make_states(sigma, count=2, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, tokens, HEAD_DIM)
    return [sigma * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def make_mixer(name="lln"):
    config = TransNormerConfig(hidden_size=HEAD_DIM, num_attention_heads=1, attention_probs_dropout_prob=0.0)
    return MIXERS[name](config)


def attention_map(name, query, key):
    return make_mixer(name).attention_map(query, key, attention_metadata(1, query.shape[2], query.device), False)


@pytest.mark.parametrize("name", ["softmax", "lln"])
def test_entropy_rises_and_variance_falls_with_temperature(name):
    """The two theorems: of log p_ij and of p_ij the variance falls, and the entropy of a row rises.

    The temperature of a map is 1 / (std(q) std(k)), so it is set by the scale of queries and keys.
    """
    query, key = make_states(1.0)
    entropies, log_variances, variances = [], [], []
    for temperature in (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0):
        weights = attention_map(name, query / temperature**0.5, key / temperature**0.5)
        entropies.append(row_entropy(weights).mean().item())
        log_variances.append((1 / attention_temperature(weights) ** 2).mean().item())
        variances.append(weights.var().item())
    assert entropies == sorted(entropies)
    assert log_variances == sorted(log_variances, reverse=True)
    assert variances == sorted(variances, reverse=True)
    assert entropies[-1] - entropies[0] > 1  # bits: the range is not flat


def test_entropy_of_softmax_rises_with_temperature_row_by_row():
    """The theorem holds for every row of scores, whatever their distribution."""
    scores = torch.randn(1, 1, 30, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    entropies = []
    for temperature in torch.linspace(0.3, 5, 20):
        weights = (scores / temperature).softmax(-1)
        entropies.append(row_entropy(weights)[0, 0])
    assert (torch.stack(entropies).diff(dim=0) > 0).all()


def released_attention(query, key, value):
    """The authors' formula: keys are guarded by one maximum of all tokens and channels, the sum by 1e-8."""
    a, b = moment_matching_constants(HEAD_DIM)
    query_std, key_std = query.std(), key.std()
    matched = ((query_std**2 * key_std**2 - b) / (2 * a)) ** 0.5
    query, key = query * matched / query_std, key * matched / key_std
    query = (query - query.amax(-1, keepdim=True)).exp()
    key = (key - key.amax((-2, -1), keepdim=True)).exp()
    return query @ (key.mT @ value) / ((query * key.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize(("sigma", "theirs_at_least"), [(1.0, 0.0), (1.5, 5e-6), (2.0, 1e-3), (3.0, 0.3)])
def test_float32_is_exact_where_the_released_code_is_not(sigma, theirs_at_least):
    """Why features are guarded one by one: under one maximum for all, whole features fall below 1e-8, and out.

    Errors against float64 without guards, as a share of the largest output. At sigma 1 both agree.
    """
    query, key, value = make_states(sigma, 3)
    value = value / sigma
    a, b = moment_matching_constants(HEAD_DIM)
    matched = ((query.std() * key.std()).square() - b).div(2 * a).sqrt()
    scores = (query * matched / query.std()).exp() @ (key * matched / key.std()).exp().mT
    exact = scores / scores.sum(-1, keepdim=True) @ value
    metadata = attention_metadata(1, TOKENS, query.device)
    states = [states.float() for states in (query, key, value)]
    ours, theirs = (
        ((output - exact).abs().max() / exact.abs().max()).item()
        for output in (make_mixer()(*states, metadata, False), released_attention(*states))
    )
    assert ours < 1e-5
    assert theirs >= theirs_at_least
    if sigma == 1:
        assert theirs < 1e-5


def test_without_matched_moments_alpha_and_beta_are_one():
    query, key, value = make_states(1.5, 3)
    config = TransNormerConfig(hidden_size=HEAD_DIM, num_attention_heads=1, attention_probs_dropout_prob=0.0)
    mixer = MIXERS["lln"](config, moments="none")
    scores = query.exp() @ key.exp().mT
    wanted = scores / scores.sum(-1, keepdim=True) @ value
    found = mixer(query, key, value, attention_metadata(1, TOKENS, query.device), False)
    torch.testing.assert_close(found, wanted)


def test_matched_moments_give_the_variance_of_softmax(tmp_path, capsys):
    """The script's third table; without the matching the variance is a sixteenth of that of softmax or less."""
    options = ["--scales", "1", "1.5", "2", "--tokens", "200", "--head_dims", "64", "--output_dir", str(tmp_path)]
    report = log_normal.main(options)
    for row in report["matching"]:
        variance, scale = row["variance"], row["scale"]
        assert variance["softmax"] == pytest.approx(scale**4, rel=0.1)
        assert variance["lln"] == pytest.approx(variance["softmax"], rel=0.25)
        assert variance["lln, alpha = beta = 1"] < variance["softmax"] / 16
    first, *_, last = report["concentration"]
    for name in ("softmax", "lln", "performer", "kernelized"):  # these follow the temperature
        assert last["entropy"][name] < first["entropy"][name] - 2
    for name in ("1+elu", "cosformer"):  # these do not
        assert last["entropy"][name] > first["entropy"][name] - 0.1
    assert json.loads((tmp_path / "log_normal.json").read_text()) == report
    assert (tmp_path / "log_normal.md").read_text() == capsys.readouterr().out[:-1]


def test_the_script_refuses_what_it_cannot_measure(capsys):
    for arguments, message in (
        (["--scales", "0"], "--scales 0.0: must be greater than 0."),
        (["--tokens", "1"], "--tokens 1: must be at least 2."),
        (["--head_dims", "64", "1"], "--head_dims 1: must be at least 2."),
    ):
        with pytest.raises(SystemExit):
            log_normal.main(arguments)
        assert message in capsys.readouterr().err
