"""Positions and masks told twice: where `position_ids` are given they rule, and padding changes nothing wherever it is.

The reference is each row's text alone, without a column of padding.
"""

import pytest
import torch
from test_cache import LAYER_MIXES, tiny_model

from transnormer_hf import TransNormerCache, TransNormerModel

# A row each: padding on the left, between two turns (over a block of 4), on the right, all of it, and none.
MASK = torch.tensor(
    [
        [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
)
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)  # as `generate` passes them
each_mix = pytest.mark.parametrize("mix", LAYER_MIXES)


def make_ids():
    return torch.randint(3, 50, MASK.shape).where(MASK.bool(), 1)


def alone(model, input_ids, row, **options):
    text = input_ids[row, MASK[row].bool()][None]
    return model(text, use_cache=False, **options)


@each_mix
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("position_embedding", ["none", "sinusoidal", "learned"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_padded_dialogue_equals_the_dialogue_alone(mix, variant, position_embedding, is_causal):
    config = tiny_model(mix, variant, position_embedding=position_embedding).config
    config.is_causal = is_causal
    network = TransNormerModel(config).double().eval()
    input_ids = make_ids()
    with torch.no_grad():
        hidden = network(input_ids, attention_mask=MASK, position_ids=POSITIONS, use_cache=False).last_hidden_state
        for row in range(len(MASK)):
            expected = network(input_ids[row, MASK[row].bool()][None], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[row, MASK[row].bool()], expected)


@each_mix
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("cuts", [[14], [6, 8], [3, 4, 7], [9, 1, 1, 3], [1] * 14])
def test_a_padded_dialogue_in_turns_through_a_state(mix, variant, cuts):
    """Turn by turn, each padded to the longest of the batch: the state of a row stands where its text stands."""
    model, input_ids = tiny_model(mix, variant).double(), make_ids()
    cache, logits, seen = TransNormerCache(model.config), [], 0
    with torch.no_grad():
        for length in cuts:
            columns = slice(seen, seen + length)
            mask = MASK[:, : columns.stop]
            options = {"attention_mask": mask, "position_ids": POSITIONS[:, columns], "past_key_values": cache}
            logits.append(model(input_ids[:, columns], **options).logits)
            seen = columns.stop
        logits = torch.cat(logits, 1)
        for row in range(len(MASK)):
            expected = alone(model, input_ids, row).logits[0]
            torch.testing.assert_close(logits[row, MASK[row].bool()], expected)


@each_mix
def test_generation_goes_on_from_padded_turns(mix):
    model, input_ids = tiny_model(mix), make_ids()
    input_ids, mask = input_ids[[0, 1, 3, 4]], MASK[[0, 1, 3, 4]]
    options = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": 50, "pad_token_id": 1}
    together = model.generate(input_ids, attention_mask=mask, **options)
    for row, tokens in enumerate(together):
        text = input_ids[row, mask[row].bool()][None]
        assert model.generate(text, **options)[0, text.shape[1] :].equal(tokens[-7:])


@each_mix
def test_positions_may_begin_anywhere(mix):
    """LRPE of NormAttention is relative; blocks and absolute embeddings begin where the positions say."""
    model = tiny_model(mix).double()
    input_ids = torch.randint(3, 50, (2, 12))
    with torch.no_grad():
        whole = model(torch.cat((input_ids, input_ids), 1), use_cache=False)
        positions = torch.arange(6, 18).expand(2, -1)
        shifted = model(input_ids, position_ids=positions, use_cache=False).logits
        eager = tiny_model(mix, backend="eager").double()
        eager.load_state_dict(model.state_dict())
        torch.testing.assert_close(shifted, eager(input_ids, position_ids=positions, use_cache=False).logits)
        with_mask = model(input_ids, attention_mask=torch.ones(2, 12), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(shifted, with_mask)
        if mix != "norm":
            assert not torch.allclose(shifted, whole.logits[:, :12])


def test_positions_that_jump_are_refused_beside_a_mask():
    model, input_ids = tiny_model(), make_ids()
    with pytest.raises(ValueError, match="position_ids must count up by one"):
        model(input_ids, attention_mask=MASK, position_ids=POSITIONS * 2)


def test_maps_come_in_the_order_of_the_input():
    model, input_ids = tiny_model("diag, norm", backend="eager").double(), make_ids()
    options = {"use_cache": False, "output_attentions": True}
    with torch.no_grad():
        maps = model(input_ids, attention_mask=MASK, position_ids=POSITIONS, **options).attentions
        for row in range(len(MASK)):
            real = MASK[row].bool()
            expected = alone(model, input_ids, row, output_attentions=True).attentions
            for of_batch, of_row in zip(maps, expected, strict=True):
                torch.testing.assert_close(of_batch[row][:, real][:, :, real], of_row[0])
