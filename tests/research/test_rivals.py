"""Each rival of the paper against numbers of an independent definition, and at the paper's size.

`golden/rivals.safetensors` has outputs of quadratic definitions in float64 that were written from the papers' equations
and agree with the authors' released code to 1e-6, on the waves below as inputs and weights.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from transnormer_hf import TransNormerConfig
from transnormer_hf.model.reference_transnormer import attention_metadata
from transnormer_hf.research import paper
from transnormer_hf.research.baselines import MIXERS, BaselineConfig, paper_row_config
from transnormer_hf.research.baselines.mixer import make_attention
from transnormer_hf.research.baselines.rows import Rows, nth_token
from transnormer_hf.research.baselines.seeded import seeded_normal, seeded_uniform

GOLDEN = Path(__file__).parent / "golden" / "rivals.safetensors"
HEADS, HEAD_DIM, SEQ, REAL = 2, 4, 20, 13  # the second of two rows has REAL tokens, then padding
WIDTH = HEADS * HEAD_DIM
# The name in the fixture -> mixer, whether it is causal, max_position_embeddings, options.
MIXER_FORMS = {
    "kernelized": ("kernelized", False, {}),
    "kernelized, causal": ("kernelized", True, {}),
    "linformer": ("linformer", False, {"projected_length": 3}),
    "nystromformer": ("nystromformer", False, {"num_landmarks": 4}),
    "nystromformer, few tokens": ("nystromformer", False, {"num_landmarks": 16}),
    "skyformer": ("skyformer", False, {"num_samples": 6}),
    "local": ("local", False, {"window": 4}),
    "local, causal": ("local", True, {"window": 4}),
}
LAYER_FORMS = {
    "flash_quad": ("flash_quad", False, 32, {"query_size": 6}),
    "flash_quad, causal, scale norm": ("flash_quad", True, 32, {"query_size": 6, "norm_type": "scale"}),
    "flash": ("flash", False, 32, {"query_size": 6, "chunk_size": 4}),
    "flash, causal, scale norm": ("flash", True, 32, {"query_size": 6, "norm_type": "scale", "chunk_size": 4}),
    "transformer_ls": ("transformer_ls", False, 32, {"window": 4, "num_landmarks": 3}),
    "transformer_ls, causal": ("transformer_ls", True, 32, {"window": 4, "chunk_size": 3}),
}


def waves(*shape, start=0.0):
    """Numbers between -1 and 1 without visible order, the same everywhere."""
    return torch.sin(start + 0.9 * torch.arange(math.prod(shape), dtype=torch.float64) ** 1.3).view(shape)


def fill_with_waves(module):
    with torch.no_grad():
        for start, (_, parameter) in enumerate(sorted(module.named_parameters())):
            parameter.copy_(waves(*parameter.shape, start=start))


def padded_metadata():
    mask = torch.ones(2, SEQ, dtype=torch.long)
    mask[1, REAL:] = 0
    return Rows(attention_metadata(2, SEQ, mask.device, mask), 2, SEQ).metadata


def query_key_value():
    return [1.5 * waves(2, HEADS, SEQ, HEAD_DIM, start=start) for start in (1, 2, 3)]


def make_mixer(name, options):
    config = TransNormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=32)
    mixer = MIXERS[name](config, **options).double()
    fill_with_waves(mixer)
    return mixer


def make_layer_attention(name, causal, longest, options):
    config = BaselineConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=longest,
        is_causal=causal,
        mixer=name,
        mixer_options={name: options},
    )
    attention = make_attention(config, name).double()
    fill_with_waves(attention)
    return attention


def assert_golden(name, output):
    """Scales of the outputs are 0.1 to 30."""
    expected = load_file(GOLDEN)[name].double()
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", MIXER_FORMS)
def test_mixer_gives_the_numbers_of_the_definition(name):
    mixer_name, causal, options = MIXER_FORMS[name]
    output = make_mixer(mixer_name, options)(*query_key_value(), padded_metadata(), causal)
    assert_golden(name, output[1, :, :REAL])


@torch.no_grad()
@pytest.mark.parametrize("name", LAYER_FORMS)
def test_layer_gives_the_numbers_of_the_definition(name):
    output, _ = make_layer_attention(*LAYER_FORMS[name])(waves(2, SEQ, WIDTH), padded_metadata())
    assert_golden(name, output[1, :REAL])


@torch.no_grad()
def test_flash_quad_beyond_its_positions_gives_the_numbers_of_the_definition():
    attention = make_layer_attention("flash_quad", False, 8, {"query_size": 6})
    metadata = attention_metadata(1, REAL, torch.device("cpu"))
    assert_golden("flash_quad, long", attention(waves(1, REAL, WIDTH), metadata)[0][0])
    # a short row beside a long one keeps its bias
    short, _ = attention(waves(1, SEQ, WIDTH)[:, :7], attention_metadata(1, 7, torch.device("cpu")))
    mask = torch.tensor([[1] * 7 + [0] * 13, [1] * SEQ])
    both, _ = attention(waves(1, SEQ, WIDTH).expand(2, -1, -1), attention_metadata(2, SEQ, mask.device, mask))
    torch.testing.assert_close(both[0, :7], short[0])


@torch.no_grad()
def test_bigbird_gives_the_numbers_of_the_definition():
    mixer = make_mixer("bigbird", {"block_size": 2, "num_random_blocks": 1})
    states = [states[:1, :, :16] for states in query_key_value()]
    output = mixer(*states, attention_metadata(1, 16, torch.device("cpu")), False)
    assert_golden("bigbird", output[0])


def test_bigbird_draws_other_blocks_of_the_text():
    mixer = make_mixer("bigbird", {"block_size": 4, "num_random_blocks": 3})
    mask = torch.ones(2, 80, dtype=torch.long)
    mask[1, 50:] = 0  # 13 blocks, the last of 2 tokens
    visible = mixer.visible_blocks(attention_metadata(2, 80, mask.device, mask), 80, HEADS)
    for row, blocks in ((0, 20), (1, 13)):
        assert not visible[row, :, :blocks, blocks:].any()
        for block in range(1, blocks - 1):
            fixed = {0, block - 1, block, block + 1, blocks - 1}
            assert visible[row, :, block, list(fixed)].all()
            assert (visible[row, :, block].sum(-1) == len(fixed) + 3).all()
        assert visible[row, :, [0, blocks - 1], :blocks].all()
    assert not torch.equal(visible[0, 0], visible[0, 1])


@torch.no_grad()
@pytest.mark.parametrize("num_hashes", [1, 3])
def test_reformer_is_that_of_transformers(num_hashes):
    """Where that one is right: whole chunks, no padding, and the buckets given."""
    seq, chunk_size, buckets = 32, 4, 16
    mixer = make_mixer("reformer", {"chunk_size": chunk_size, "num_hashes": num_hashes})
    config = ReformerConfig(
        hidden_size=2 * WIDTH,
        num_attention_heads=HEADS,
        attention_head_size=HEAD_DIM,
        lsh_attn_chunk_length=chunk_size,
        num_hashes=num_hashes,
        num_buckets=buckets,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=False,
    )
    theirs = LSHSelfAttention(config, 0).double()
    theirs.query_key, theirs.value = Part(0), Part(1)
    query, value = (waves(2, HEADS, seq, HEAD_DIM, start=start) for start in (1, 2))
    hidden_states = torch.cat([states.transpose(1, 2).flatten(2) for states in (query, value)], -1)
    of_tokens = mixer.buckets(query, torch.ones(2, seq, dtype=torch.bool))  # (batch, heads, hashes, seq)
    assert of_tokens.unique().numel() > buckets // 2
    rounds = (of_tokens + buckets * torch.arange(num_hashes)[:, None]).flatten(2)
    expected = theirs(hidden_states, buckets=rounds).hidden_states.unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
    torch.testing.assert_close(mixer(query, query, value, attention_metadata(2, seq, query.device), False), expected)


class Part(torch.nn.Module):
    """One half of the channels, in place of a projection."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, states):
        return states.chunk(2, -1)[self.index]


@torch.no_grad()
def test_informer_is_its_definition():
    """Query by query: the sampled scores, the selection, then softmax or the mean."""
    mixer = make_mixer("informer", {"factor": 2})
    query, key, value = query_key_value()
    metadata = padded_metadata()
    output = mixer(query, key, value, metadata, False)
    for row, length in ((0, SEQ), (1, REAL)):
        number = min(2 * math.ceil(math.log(length)), length)
        for head in range(HEADS):
            q, k, v = (states[row, head, :length] for states in (query, key, value))
            sparsity = []
            for i in range(length):
                share = [seeded_uniform(0, torch.tensor(i), torch.tensor(draw)).item() for draw in range(number)]
                scores = torch.stack([q[i] @ k[int(part * length)] / math.sqrt(HEAD_DIM) for part in share])
                sparsity.append(scores.max() - scores.sum() / length)
            selected = torch.stack(sparsity).topk(number).indices.tolist()
            assert 0 < number < length
            for i in range(length):
                weights = (
                    (k @ q[i] / math.sqrt(HEAD_DIM)).softmax(0) if i in selected else torch.full((length,), 1 / length)
                )
                torch.testing.assert_close(output[row, head, i], weights.double() @ v)


@torch.no_grad()
def test_skyformer_with_every_token_in_its_sample_is_near_kernelized_attention():
    """What it estimates; the sample of 64 of 20 tokens has nearly all of them."""
    states, metadata = query_key_value(), padded_metadata()
    exact = make_mixer("kernelized", {})(*states, metadata, False)[1, :, :REAL]
    few, many = (
        (make_mixer("skyformer", {"num_samples": count, "gamma": 1e-3})(*states, metadata, False)[1, :, :REAL] - exact)
        for count in (4, 64)
    )
    assert many.norm() < 0.05 * exact.norm()
    assert few.norm() > 4 * many.norm()


def test_seeded_numbers_are_uniform_normal_and_without_correlation():
    places = torch.arange(200)[:, None], torch.arange(200)
    uniform, normal = seeded_uniform(3, *places), seeded_normal(3, *places)
    assert (uniform >= 0).all()
    assert (uniform < 1).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(uniform)  # between places of the first index
    assert correlation.fill_diagonal_(0).abs().max() < 0.4
    assert correlation.mean().abs() < 0.01
    assert not torch.equal(uniform, seeded_uniform(4, *places))
    assert torch.equal(uniform[:50, :50], seeded_uniform(3, torch.arange(50)[:, None], torch.arange(50)))


def test_tokens_are_counted_without_the_zeros_of_the_mask():
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])
    metadata = Rows(attention_metadata(2, 5, mask.device, mask), 2, 5).metadata
    assert nth_token(metadata, 5, torch.tensor([[0, 1, 2], [0, 1, 4]])).tolist() == [[0, 2, 3], [0, 1, 4]]


@pytest.mark.parametrize(
    ("mixer", "row"),
    [("softmax", "Vanilla"), ("flash_quad", "FLASH-quad"), ("flash", "FLASH"), ("transformer_ls", "LS")],
)
def test_rows_of_the_paper_have_its_parameters(mixer, row):
    """Millions, to the digits that the paper gives."""
    for causal, table, auto_class in (
        (True, paper.TABLE_4, AutoModelForCausalLM),
        (False, paper.TABLE_5, AutoModelForMaskedLM),
    ):
        with torch.device("meta"):
            model = auto_class.from_config(paper_row_config(mixer, causal))
        assert round(model.num_parameters() / 1e6, 2) == table["parameters"][row]


def test_numbers_of_parameters_are_those_of_the_released_code():
    """To the unit; FLASH's have 256 a layer less, a table of biases that theirs never uses."""
    released = {
        ("transformer_ls", True): 159_461_904,
        ("transformer_ls", False): 128_277_081,
        ("flash_quad", True): 153_513_728 - 10 * 256,
        ("flash_quad", False): 127_111_233 - 24 * 256,
        ("flash", True): 153_518_848 - 10 * 256,
        ("flash", False): 127_123_521 - 24 * 256,
    }
    for (mixer, causal), number in released.items():
        with torch.device("meta"):
            model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(
                paper_row_config(mixer, causal)
            )
        assert model.num_parameters() == number


def test_flash_is_all_of_its_layer():
    config = BaselineConfig(
        vocab_size=40, hidden_size=WIDTH, num_attention_heads=1, num_hidden_layers=2, mixer="flash_quad",
        hidden_dropout_prob=0.0, norm_placement="pre",
    )  # fmt: skip
    model = AutoModelForMaskedLM.from_config(config)
    fill_with_waves(model.model.layers[0])
    layer, hidden_states = model.model.layers[0], waves(1, SEQ, WIDTH).float()
    metadata = attention_metadata(1, SEQ, hidden_states.device)
    added, _ = layer.self_attn(hidden_states, metadata)
    torch.testing.assert_close(layer(hidden_states, metadata=metadata), hidden_states + added)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"self_attn"}


def test_bad_options_are_named():
    for name, options, expected in (
        ("linformer", {"projected_length": 0}, "projected_length=0"),
        ("nystromformer", {"num_landmarks": 0}, "num_landmarks=0"),
        ("skyformer", {"num_samples": 3}, "num_samples=3: half are queries and half keys"),
        ("local", {"window": 0}, "window=0"),
        ("bigbird", {"block_size": 0}, "block_size=0"),
        ("informer", {"factor": 0}, "factor=0"),
        ("reformer", {"chunk_size": 0}, "chunk_size=0"),
        ("flash_quad", {"norm_type": "rms"}, "norm_type='rms' is not known; choose one of 'layer', 'scale'"),
        ("flash_quad", {"query_size": 5}, "query_size=5"),
        ("flash", {"chunk_size": 0}, "chunk_size=0"),
        ("transformer_ls", {"window": 0}, "window=0"),
        ("lln", {"moments": "token"}, "moments='token' is not known; choose one of 'row', 'batch', 'none'"),
    ):
        with pytest.raises(ValueError, match=expected):
            make_layer_attention(name, False, 32, options)
    with pytest.raises(ValueError, match="moments='batch' with is_causal=True"):
        make_layer_attention("lln", True, 32, {"moments": "batch"})
    with pytest.raises(ValueError, match="mixer='linformer' has no row in Tables 4 and 5; choose one of softmax"):
        paper_row_config("linformer", causal=False)
    states = [waves(1, HEADS, 33, HEAD_DIM) for _ in range(3)]
    with pytest.raises(ValueError, match="the input has 33 tokens and max_position_embeddings=32"):
        make_mixer("linformer", {})(*states, attention_metadata(1, 33, torch.device("cpu")), False)
