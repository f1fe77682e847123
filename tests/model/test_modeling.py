"""The base model: padding, packing, causality, maps, precision, compilation, and what it refuses."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, set_seed

from transnormer_hf import TransNormerCache, TransNormerConfig, TransNormerForCausalLM, TransNormerModel
from transnormer_hf.model import modeling_transnormer
from transnormer_hf.model.configuration_transnormer import CACHE_NAME
from transnormer_hf.model.modeling_transnormer import (
    TransNormerDiagAttention,
    TransNormerLRPE,
    TransNormerNormAttention,
    make_norm,
)

VOCABULARY, BLOCK = 50, 4
DIAG, NORM, HYBRID, FULL = "chunked_attention", "linear_attention", "hybrid", "full_attention"
ORDERS = {
    "paper": [DIAG, NORM],
    "reversed": [NORM, DIAG],
    "all Diag": [DIAG, DIAG],
    "all Norm": [NORM, NORM],
    "hybrid": [HYBRID, NORM],
    "full": [NORM, FULL],
}
FORMS = {  # placement of the norms and absolute positions, as they occur together
    "post-norm, learned": {"norm_placement": "post", "position_embedding": "learned"},
    "pre-norm, sinusoidal": {
        "norm_placement": "pre",
        "position_embedding": "sinusoidal",
        "final_norm": "simple_rms",
        "embedding_norm": "none",
        "scale_embedding": True,
    },
    "pre-norm, none": {"norm_placement": "pre", "position_embedding": "none"},
}

variants = pytest.mark.parametrize("variant", ["t1", "t2"])
orders = pytest.mark.parametrize("layer_types", ORDERS.values(), ids=ORDERS.keys())
directions = pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
backends = pytest.mark.parametrize("backend", ["eager", "torch"])


def make_model(model_class=TransNormerModel, **fields):
    """A tiny model whose biases are not zero, so that padding left in anywhere shows."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "layer_types": [DIAG, NORM],
        "block_size": BLOCK,
        "max_position_embeddings": 16,
        "initializer_range": 0.1,
    }
    fields = defaults | fields
    model = model_class(TransNormerConfig(**{"num_hidden_layers": len(fields["layer_types"])} | fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


def make_ids(*shape):
    return torch.randint(3, VOCABULARY, shape)


def last_hidden_state(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs).last_hidden_state


def packed_positions(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


class TestPadding:
    """Sequences of one token to three blocks and one, each alone and in every kind of company."""

    LENGTHS = [*range(1, 3 * BLOCK + 2), BLOCK + 3]
    LONGEST = max(LENGTHS)
    TOLERANCE = 1e-5

    @staticmethod
    def batches(sequences):
        """Model inputs by the kind of batch, with the row and columns where each sequence lies."""
        lengths, longest = [len(ids) for ids in sequences], max(map(len, sequences))
        columns = torch.arange(longest)
        for side in ("right", "left"):
            starts = [0 if side == "right" else longest - length for length in lengths]
            input_ids = make_ids(len(sequences), longest)
            for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
                input_ids[row, start : start + len(ids)] = ids
            first, size = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
            mask = ((columns >= first) & (columns < first + size)).long()
            places = [(row, slice(s, s + n)) for row, (s, n) in enumerate(zip(starts, lengths, strict=True))]
            yield f"padded on the {side}", {"input_ids": input_ids, "attention_mask": mask}, places
        for row in (0, BLOCK, len(sequences) - 2):
            ids, pad = sequences[row], 3
            alone = {"input_ids": nn.functional.pad(ids, (pad, 0))[None]}
            alone["attention_mask"] = (torch.arange(pad + len(ids)) >= pad)[None]
            yield "alone, padded on the left", alone, [None] * row + [(0, slice(pad, None))]

        ends = torch.tensor([0, *lengths]).cumsum(0)
        in_one_row = [(0, slice(a, b)) for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
        one_row = {"input_ids": torch.cat(sequences)[None], "position_ids": packed_positions(lengths)}
        yield "packed by position_ids", one_row, in_one_row
        yield "packed by cu_seq_lens_q", one_row | {"cu_seq_lens_q": ends.int()}, in_one_row
        ones = {"attention_mask": torch.ones_like(one_row["input_ids"])}
        yield "packed by position_ids, a mask of ones", one_row | ones, in_one_row
        yield "packed by cu_seq_lens_q, a mask of ones", one_row | ones | {"cu_seq_lens_q": ends.int()}, in_one_row
        # two sequences to a row: the lengths are 1, 2, ..., 13 and 7
        by_length = sorted(range(len(sequences)), key=lambda index: lengths[index])
        pairs = [(by_length[i], by_length[-1 - i]) for i in range(len(sequences) // 2)]
        several_rows = {
            "input_ids": torch.stack([torch.cat([sequences[i] for i in pair]) for pair in pairs]),
            "position_ids": torch.cat([packed_positions([lengths[i] for i in pair]) for pair in pairs]),
        }
        places = {}
        for row, (early, late) in enumerate(pairs):
            places[early], places[late] = (row, slice(0, lengths[early])), (row, slice(lengths[early], None))
        yield "packed in several rows", several_rows, [places[index] for index in range(len(sequences))]

    @variants
    @orders
    @directions
    @forms
    def test_changes_nothing_for_real_tokens(self, variant, layer_types, is_causal, form):
        model = make_model(variant=variant, layer_types=layer_types, is_causal=is_causal, **form)
        self.assert_company_changes_nothing(model, self.TOLERANCE)

    @variants
    @directions
    def test_changes_nothing_but_the_rounding(self, variant, is_causal):
        model = make_model(variant=variant, layer_types=[DIAG, NORM, HYBRID, FULL], is_causal=is_causal).double()
        self.assert_company_changes_nothing(model, tolerance=1e-11)

    def assert_company_changes_nothing(self, model, tolerance):
        sequences = [make_ids(length) for length in self.LENGTHS]
        expected = [last_hidden_state(model, ids[None])[0] for ids in sequences]
        for kind, inputs, places in self.batches(sequences):
            outputs = last_hidden_state(model, **inputs)
            for alone, place in zip(expected, places, strict=False):
                if place is not None:
                    difference = (outputs[place] - alone).abs().max().item()
                    assert difference < tolerance, f"{kind}, length {len(alone)}: {difference:.1e}"

    @variants
    @directions
    @backends
    def test_a_row_of_padding_is_finite_and_leaves_the_others_alone(self, variant, is_causal, backend):
        model = make_model(variant=variant, layer_types=[DIAG, NORM, HYBRID], is_causal=is_causal, backend=backend)
        input_ids, mask = make_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
        mask[0, :2] = 0
        alone = last_hidden_state(model, input_ids[[0, 2]], attention_mask=mask[[0, 2]])
        mask[1] = 0
        outputs = model(input_ids, attention_mask=mask).last_hidden_state
        assert outputs.isfinite().all()
        torch.testing.assert_close(outputs[[0, 2]], alone)
        outputs.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    @variants
    @directions
    @backends
    def test_what_stands_in_padding_does_not_matter(self, variant, is_causal, backend):
        model = make_model(variant=variant, layer_types=[DIAG, NORM, HYBRID], is_causal=is_causal, backend=backend)
        mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1, 0, 0]])
        input_ids = make_ids(2, 10)
        other_ids = torch.where(mask == 1, input_ids, make_ids(2, 10))
        outputs, others = (last_hidden_state(model, ids, attention_mask=mask) for ids in (input_ids, other_ids))
        assert torch.equal(outputs[mask == 1], others[mask == 1])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
    def test_masks_of_any_dtype_mean_the_same(self, dtype):
        model, input_ids = make_model(), make_ids(1, 6)
        mask = torch.tensor([[0, 1, 1, 1, 1, 0]])
        expected = last_hidden_state(model, input_ids, attention_mask=mask)
        assert torch.equal(last_hidden_state(model, input_ids, attention_mask=mask.to(dtype)), expected)

    @directions
    @forms
    @pytest.mark.parametrize("variant_and_layers", [("t1", [DIAG, NORM, HYBRID]), ("t2", [NORM, NORM])])
    def test_an_interior_zero_keeps_its_place_and_contributes_nothing(self, variant_and_layers, is_causal, form):
        """Against a run without a mask in which the projections of those tokens are made zero by hand.

        A zero key has no weight for T1 (elu(0) = relu(0) = 0); for phi = 1 + elu it takes a zero value.
        """
        variant, layer_types = variant_and_layers
        model = make_model(variant=variant, layer_types=layer_types, is_causal=is_causal, **form)
        input_ids, mask = make_ids(2, 11), torch.ones(2, 11, dtype=torch.long)
        mask[0, [1, 5, 6]] = 0
        mask[1, 4:8] = 0  # a whole block
        masked = last_hidden_state(model, input_ids, attention_mask=mask)

        for module in model.modules():
            if isinstance(module, TransNormerDiagAttention | TransNormerNormAttention):
                for projection in (module.k_proj, module.v_proj):
                    projection.register_forward_hook(lambda _module, _inputs, output: output * mask[..., None])
        by_hand = last_hidden_state(model, input_ids)
        torch.testing.assert_close(masked[mask == 1], by_hand[mask == 1], rtol=0, atol=self.TOLERANCE)

    @directions
    def test_an_interior_zero_takes_no_share_of_a_softmax(self, is_causal):
        """Without any positions a block with a gap is the shorter block of the tokens that are there."""
        fields = {"layer_types": [DIAG, DIAG], "lrpe": False, "position_embedding": "none"}
        model = make_model(variant="t2", is_causal=is_causal, **fields)
        input_ids = make_ids(1, 2 * BLOCK)
        mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1]])
        masked = last_hidden_state(model, input_ids, attention_mask=mask)[mask == 1]
        blocks = [last_hidden_state(model, input_ids[:, columns])[0] for columns in ([0, 2, 3], [6, 7])]
        torch.testing.assert_close(masked, torch.cat(blocks), rtol=0, atol=self.TOLERANCE)

    @directions
    @backends
    @pytest.mark.parametrize("packed", [False, True])
    def test_a_forward_waits_for_no_value_on_the_device(self, is_causal, backend, packed):
        """Tensors on "meta" have no values, so that looking at one raises."""
        model = make_model(layer_types=[DIAG, NORM, HYBRID], is_causal=is_causal, backend=backend).to("meta")
        input_ids = torch.empty(2, 9, dtype=torch.long, device="meta")
        if packed:
            inputs = {"cu_seq_lens_q": torch.empty(4, dtype=torch.int32, device="meta")}
        else:
            inputs = {"attention_mask": torch.empty(2, 9, dtype=torch.long, device="meta")}
        assert last_hidden_state(model, input_ids, **inputs).shape == (2, 9, 16)


@pytest.mark.parametrize(
    ("ids", "padding_idx"),
    [
        ({"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, 1),
        ({"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}, None),  # GPT-2's tokenizer pads with eos
        ({"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": [5, 2]}, None),
        ({"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}, None),
        ({"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 2}, None),
    ],
)
def test_a_pad_token_that_begins_or_ends_texts_is_learned(ids, padding_idx):
    embedding = make_model(**ids).embed_tokens
    assert embedding.padding_idx == padding_idx
    token = ids["pad_token_id"]
    if token is not None:
        embedding(torch.tensor([token])).sum().backward()
        assert bool(embedding.weight.grad[token].any()) == bool(embedding.weight[token].any()) == (padding_idx is None)


class TestCausality:
    @variants
    @orders
    @backends
    def test_a_later_token_changes_no_earlier_logit(self, variant, layer_types, backend):
        model = make_model(TransNormerForCausalLM, variant=variant, layer_types=layer_types, backend=backend)
        input_ids = make_ids(1, 3 * BLOCK + 1)
        with torch.no_grad():
            logits = model(input_ids).logits
            for changed in range(input_ids.shape[1]):
                other_ids = input_ids.clone()
                other_ids[:, changed] = (other_ids[:, changed] + 1) % VOCABULARY
                other_logits = model(other_ids).logits
                assert torch.equal(logits[:, :changed], other_logits[:, :changed])
                assert not torch.equal(logits[:, changed], other_logits[:, changed])

    def test_holds_across_chunks_of_the_fast_path(self):
        model = make_model(TransNormerForCausalLM, position_embedding="none", block_size=64)
        input_ids = make_ids(1, 400)
        other_ids = input_ids.clone()
        other_ids[:, 300:] = make_ids(1, 100)
        with torch.no_grad():
            assert torch.equal(model(input_ids).logits[:, :300], model(other_ids).logits[:, :300])

    def test_a_bidirectional_model_does_see_later_tokens(self):
        model, input_ids = make_model(), make_ids(1, 9)
        other_ids = input_ids.clone()
        other_ids[:, -1] = (other_ids[:, -1] + 1) % VOCABULARY
        assert not torch.equal(last_hidden_state(model, input_ids)[:, 0], last_hidden_state(model, other_ids)[:, 0])


class TestPositions:
    @pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
    def test_given_position_ids_replace_columns(self, kind):
        model, input_ids = make_model(position_embedding=kind, layer_types=[NORM]), make_ids(1, 4)
        outputs = last_hidden_state(model, input_ids)
        assert torch.equal(last_hidden_state(model, input_ids, position_ids=torch.arange(4)[None]), outputs)
        shifted = last_hidden_state(model, input_ids, position_ids=torch.arange(4)[None] + 5)
        assert not torch.allclose(shifted, outputs)

    def test_sinusoidal_ones_are_the_released_table(self):
        model = make_model(position_embedding="sinusoidal")
        hidden_states, half = torch.zeros(1, 6, 16), 8
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
        angles = (torch.arange(6, dtype=torch.float64) + 2)[:, None] * frequencies  # counted from 2 on
        expected = torch.cat((angles.sin(), angles.cos()), 1).float()[None]
        torch.testing.assert_close(model.embed_positions(hidden_states, torch.arange(6), False), expected)

    @pytest.mark.parametrize("kind", ["sinusoidal", "none"])
    def test_only_learned_ones_end(self, kind):
        assert last_hidden_state(make_model(position_embedding=kind), make_ids(1, 40)).isfinite().all()
        with pytest.raises(ValueError, match=r"17 tokens and max_position_embeddings=16 .* use position_embedding="):
            make_model(position_embedding="learned")(make_ids(1, 17))

    def test_packed_rows_may_be_longer_than_the_learned_ones(self):
        model, input_ids = make_model(), make_ids(1, 30)
        outputs = last_hidden_state(model, input_ids, position_ids=packed_positions([15, 15]))
        torch.testing.assert_close(outputs[:, 15:], last_hidden_state(model, input_ids[:, 15:]))


class TestOutputs:
    def test_hidden_states_are_the_embeddings_and_every_layer(self):
        model, input_ids = make_model(layer_types=[DIAG, NORM, HYBRID]), make_ids(2, 6)
        per_layer = []
        for layer in model.layers:
            layer.register_forward_hook(lambda _module, _inputs, output: per_layer.append(output))
        outputs = model(input_ids, output_hidden_states=True)
        assert len(outputs.hidden_states) == 4
        for actual, expected in zip(outputs.hidden_states[1:], per_layer, strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)

    def test_a_tuple_on_request(self):
        model, input_ids = make_model(is_causal=True), make_ids(2, 6)
        expected = model(input_ids)
        hidden_states, cache = model(input_ids, return_dict=False)
        assert torch.equal(hidden_states, expected.last_hidden_state)
        assert isinstance(cache, TransNormerCache)

    def test_a_state_comes_from_causal_models_unless_declined(self):
        input_ids = make_ids(1, 5)
        model = make_model(is_causal=True)
        assert isinstance(model(input_ids)[CACHE_NAME], TransNormerCache)
        assert model(input_ids, use_cache=False).get(CACHE_NAME) is None
        assert model.train()(input_ids).get(CACHE_NAME) is None
        assert make_model(is_causal=True, use_cache=False)(input_ids).get(CACHE_NAME) is None
        assert make_model()(input_ids, use_cache=True).get(CACHE_NAME) is None

    def test_packed_sequences_stay_apart_where_a_state_is_the_default(self):
        model, input_ids = make_model(is_causal=True), make_ids(1, 12)
        outputs = model(input_ids, position_ids=packed_positions([5, 7]))
        torch.testing.assert_close(outputs.last_hidden_state[:, 5:], model(input_ids[:, 5:]).last_hidden_state)
        assert outputs.get(CACHE_NAME) is None

    def test_input_embeddings_equal_their_ids(self):
        model, input_ids = make_model(scale_embedding=True), make_ids(2, 6)
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(input_ids)).last_hidden_state
        assert torch.equal(by_embeddings, model(input_ids).last_hidden_state)


class TestAttentionMaps:
    """`output_attentions`: one map per layer, whichever backend runs; both of a hybrid layer stand in its heads."""

    def record(self, model, input_ids, **kwargs):
        """Outputs with maps, and per attention its values and what goes into its output projection."""
        values, outputs = [], []
        for module in model.modules():
            if isinstance(module, TransNormerDiagAttention | TransNormerNormAttention):
                module.v_proj.register_forward_hook(lambda _module, _inputs, output: values.append(output))
                module.out_proj.register_forward_pre_hook(lambda _module, inputs: outputs.append(inputs[0]))
        with torch.no_grad():
            return model(input_ids, output_attentions=True, **kwargs), values, outputs

    @variants
    @directions
    def test_maps_times_values_are_the_outputs(self, variant, is_causal):
        fields = {"variant": variant, "is_causal": is_causal, "backend": "eager", "attention_norm_type": "none"}
        model, input_ids = make_model(layer_types=[DIAG, NORM, HYBRID], **fields), make_ids(2, 10)
        outputs, values, inner = self.record(model, input_ids)
        assert [weights.shape[1] for weights in outputs.attentions] == [2, 2, 4]
        maps = [part for weights in outputs.attentions for part in weights.split(2, 1)]
        for weights, value, output in zip(maps, values, inner, strict=True):
            assert weights.shape == (2, 2, 10, 10)
            product = weights @ value.unflatten(-1, (2, 8)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            torch.testing.assert_close(product.transpose(1, 2).flatten(2), output)

    @variants
    @directions
    @backends
    def test_diag_maps_are_blocks_on_the_diagonal(self, variant, is_causal, backend):
        model = make_model(variant=variant, layer_types=[DIAG], is_causal=is_causal, backend=backend)
        (weights,) = model(make_ids(2, 10), output_attentions=True).attentions
        block = torch.arange(10) // BLOCK
        allowed = block[:, None] == block
        if is_causal:
            allowed = allowed.tril()
        assert (weights[..., ~allowed] == 0).all()
        assert (weights >= 0).all()
        if variant == "t2":
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 10))

    @pytest.mark.parametrize("combination", ["parallel", "diag_then_norm", "norm_then_diag"])
    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_every_layer_has_the_map_of_the_definition_at_its_place(self, backend, combination):
        layer_types, input_ids = [NORM, DIAG, NORM, HYBRID, "full_attention"], make_ids(1, 6)
        fields = {"layer_types": layer_types, "hybrid_combination": combination}
        model, eager = make_model(**fields, backend=backend), make_model(**fields, backend="eager")
        eager.load_state_dict(model.state_dict())
        maps, expected = (each(input_ids, output_attentions=True).attentions for each in (model, eager))
        for weights, of_definition, layer_type in zip(maps, expected, layer_types, strict=True):
            assert weights.shape == (1, 4 if layer_type == HYBRID else 2, 6, 6)
            torch.testing.assert_close(weights, of_definition)
        hybrid_in_blocks = maps[3][:, :2, BLOCK:, :BLOCK], maps[3][:, 2:, BLOCK:, :BLOCK]
        assert [bool((part != 0).any()) for part in hybrid_in_blocks] == [False, True]  # DiagAttention's heads first

    @backends
    def test_asking_for_maps_changes_no_output(self, backend):
        model, input_ids = make_model(layer_types=[DIAG, NORM, HYBRID], backend=backend), make_ids(2, 10)
        mask = torch.ones(2, 10)
        mask[0, :3] = 0
        plain, mapped = (model(input_ids, mask, output_attentions=wanted) for wanted in (False, True))
        torch.testing.assert_close(mapped.last_hidden_state, plain.last_hidden_state)
        assert plain.attentions is None

    def test_gradients_reach_the_maps(self):
        outputs = make_model(backend="eager")(make_ids(1, 6), output_attentions=True)
        for weights in outputs.attentions:
            weights.retain_grad()
        outputs.last_hidden_state.sum().backward()
        assert all(weights.grad.abs().sum() > 0 for weights in outputs.attentions)

    def test_padding_has_no_weight(self):
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 0]])
        model = make_model(layer_types=[DIAG, NORM], variant="t2", backend="eager")
        for weights in model(make_ids(2, 6), mask, output_attentions=True).attentions:
            assert (weights.transpose(2, 3).transpose(1, 2)[mask == 0] == 0).all()

    def test_a_step_from_a_state_has_none_of_norm_attention(self):
        model = make_model(is_causal=True, backend="eager")
        outputs = model(make_ids(1, 6), output_attentions=True)
        assert len(outputs.attentions) == 2
        step = model(make_ids(1, 1), past_key_values=outputs[CACHE_NAME], output_attentions=True)
        assert step.attentions[0].shape == (1, 2, 1, 7)  # DiagAttention's
        assert step.attentions[1] is None


def enable_checkpointing(model, use_reentrant):
    """By the name that the installed transformers has for it."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": use_reentrant})


class TestTraining:
    @directions
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_gives_the_same_gradients(self, is_causal, use_reentrant):
        model = make_model(layer_types=[DIAG, NORM, HYBRID], is_causal=is_causal, hidden_dropout_prob=0.2).train()
        input_ids, mask = make_ids(2, 10), torch.ones(2, 10)
        mask[0, :4] = 0

        def gradients():
            model.zero_grad()
            set_seed(3)  # dropout has to be drawn again the same way
            model(input_ids, attention_mask=mask).last_hidden_state.square().mean().backward()
            return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        expected = gradients()
        enable_checkpointing(model, use_reentrant)
        assert all(layer.gradient_checkpointing for layer in model.layers)
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    def test_dropout_is_for_training_only_and_follows_the_seed(self):
        model, input_ids = make_model(), make_ids(2, 8)
        assert torch.equal(last_hidden_state(model, input_ids), last_hidden_state(model, input_ids))
        model.train()
        outputs = []
        for seed in (1, 1, 2):
            set_seed(seed)
            outputs.append(last_hidden_state(model, input_ids))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[2])

    @pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
    def test_each_dropout_works_by_itself(self, field):
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model, input_ids = make_model(**none).train(), make_ids(1, 8)
        assert torch.equal(last_hidden_state(model, input_ids), last_hidden_state(model, input_ids))
        model = make_model(**none | {field: 0.5}).train()
        assert not torch.equal(last_hidden_state(model, input_ids), last_hidden_state(model, input_ids))

    def test_the_reflection_is_frozen_and_the_angles_are_learned(self):
        model = make_model(layer_types=[DIAG, NORM])
        model(make_ids(2, 8)).last_hidden_state.square().mean().backward()
        for layer in model.layers:
            lrpe = layer.self_attn.lrpe
            assert lrpe.theta.grad.abs().sum() > 0
            assert not lrpe.householder.requires_grad
            torch.testing.assert_close(lrpe.householder.norm(), torch.tensor(1.0))

    @pytest.mark.parametrize("initializer", ["normal", "xavier"])
    def test_initial_weights_follow_the_released_code(self, initializer):
        config = TransNormerConfig(
            vocab_size=2000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer=initializer
        )
        model = TransNormerModel(config)
        early, late = (layer.self_attn for layer in model.layers)
        glu = model.layers[0].feed_forward
        if initializer == "normal":
            expected = dict.fromkeys((model.embed_tokens.weight, early.q_proj.weight, glu.up_proj.weight), 0.02)
        else:
            expected = {
                model.embed_tokens.weight: 64**-0.5,
                early.q_proj.weight: (2 / 128) ** 0.5,
                late.k_proj.weight: (2 / 128 / 2) ** 0.5,
                late.out_proj.weight: (2 / 128) ** 0.5,
                glu.up_proj.weight: (1 / 3 / 64) ** 0.5,
            }
        for weight, std in expected.items():
            assert weight.std().item() == pytest.approx(std, rel=0.06)
        assert (model.embed_tokens.weight[config.pad_token_id] == 0).all()
        torch.testing.assert_close(early.lrpe.theta, 10000 ** (-torch.arange(8) / 8.0))


class TestPrecision:
    @variants
    @directions
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
    def test_half_precision_stays_near_float32(self, variant, is_causal, dtype, tolerance):
        model = make_model(variant=variant, is_causal=is_causal, layer_types=[DIAG, NORM, HYBRID])
        input_ids, mask = make_ids(2, 14), torch.ones(2, 14)
        mask[0, :3] = 0
        expected = last_hidden_state(model, input_ids, attention_mask=mask)
        outputs = last_hidden_state(model.to(dtype), input_ids, attention_mask=mask)
        assert outputs.dtype == dtype
        assert outputs.isfinite().all()
        real = mask == 1
        assert (outputs[real].float() - expected[real]).norm() / expected[real].norm() < tolerance

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_trains(self, dtype):
        model = make_model(layer_types=[DIAG, NORM]).to(dtype).train()
        model(make_ids(2, 9)).last_hidden_state.float().square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    def test_loading_in_half_precision(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        model = TransNormerModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == (torch.float32 if "lrpe" in name else torch.bfloat16), name
        assert last_hidden_state(model, make_ids(1, 9)).dtype == torch.bfloat16

    @pytest.mark.parametrize("convert", ["half", "bfloat16", "to", "to a model", "from_config", "from_pretrained"])
    def test_lrpe_stays_float32_and_long_texts_stay_right(self, convert, tmp_path):
        model = make_model(TransNormerForCausalLM, layer_types=[DIAG, NORM], position_embedding="sinusoidal")
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, TransNormerLRPE):
                    module.theta.mul_(1 + torch.rand_like(module.theta) / 3)  # angles that bfloat16 cannot hold
        dtype = torch.float16 if convert == "half" else torch.bfloat16
        if convert == "from_pretrained":
            model.save_pretrained(tmp_path)
            low = TransNormerForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
        elif convert == "from_config":
            low = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
            low.load_state_dict(model.state_dict())
        else:
            low = copy.deepcopy(model)
            low = (
                low.to(dtype)
                if convert == "to"
                else low.to(torch.zeros(1, dtype=dtype))
                if "model" in convert
                else (getattr(low, convert)())
            )
        assert low.lm_head.weight.dtype == dtype
        for name, tensor in low.state_dict().items():
            assert tensor.dtype == (torch.float32 if "lrpe" in name else dtype), name
        input_ids = make_ids(1, 3000)
        with torch.no_grad():
            expected, found = (m(input_ids, use_cache=False).logits[:, -200:].float() for m in (model, low))
        assert (found - expected).norm() / expected.norm() < 0.03

    def test_autocast_returns_finite_numbers_near_float32(self):
        model, input_ids = make_model(layer_types=[DIAG, NORM]), make_ids(2, 9)
        expected = last_hidden_state(model, input_ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = last_hidden_state(model, input_ids)
        assert (outputs - expected).norm() / expected.norm() < 0.1

    @pytest.mark.parametrize("pieces", [[3000], [2990, 9, 1]], ids=["whole", "pieces"])
    @pytest.mark.parametrize("kind", [DIAG, NORM, FULL])
    def test_autocast_does_not_reach_into_an_attention(self, kind, pieces):
        """Between the projections all is as without it: angles, also of late positions, feature maps, sums, states."""
        model = make_model(layer_types=[kind], is_causal=True, max_position_embeddings=3000)
        attention, input_ids = model.layers[0].self_attn, make_ids(1, 3000)
        tables = {name: torch.randn(VOCABULARY, 16).bfloat16() for name in ("q_proj", "k_proj", "v_proj")}

        def run(is_autocast, dtype=torch.bfloat16):
            """What reaches the output projection where the others give rows of `tables`, and the state behind it."""
            cache, outputs, begin = TransNormerCache(model.config), [], 0
            for size in pieces:
                ids, begin = input_ids[:, begin : begin + size], begin + size
                rows = {name: table[ids].to(dtype) for name, table in tables.items()}
                for name in rows:
                    getattr(attention, name).forward = lambda x, name=name, rows=rows: rows[name]
                attention.out_proj.forward = lambda x: outputs.append(x) or torch.zeros(x.shape)
                with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
                    model(ids, past_key_values=cache, use_cache=True)
            return torch.cat(outputs, 1), dict(cache.layers[0].states[0].tensors)

        (found, state), (expected, expected_state), (exact, exact_state) = (
            run(True),
            run(False),
            run(False, torch.float32),
        )
        assert found.dtype == torch.bfloat16  # as the products around it: no copy to float32 and back
        torch.testing.assert_close((found, state), (expected, expected_state), rtol=0, atol=0)
        assert (found - exact).norm() < 2**-7 * exact.norm()
        if kind != FULL:
            assert {tensor.dtype for tensor in state.values()} == {torch.float32}
            torch.testing.assert_close(state, exact_state)


def compile_and_compare(model, batches, **options):
    """Runs a model eagerly and compiled without graph breaks, in inference and, where it trains, with its gradients."""
    compiled = torch.compile(model, fullgraph=True, **options)
    for inputs in batches:
        results = []
        for run in (model, compiled):
            model.zero_grad()
            outputs = run(**inputs)[0]
            if model.training:
                outputs.square().mean().backward()
            results.append([outputs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for eager, fast in zip(*results, strict=True):
            torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)


def compilable(model_class, is_training):
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = make_model(model_class, layer_types=[DIAG, NORM], **no_dropout)
    return model.train(is_training)


def batch(batch_size, seq_len):
    mask = torch.ones(batch_size, seq_len, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": make_ids(batch_size, seq_len), "attention_mask": mask}


heads = pytest.mark.parametrize("model_class", [TransNormerModel, TransNormerForCausalLM], ids=["encoder", "causal LM"])
modes = pytest.mark.parametrize("is_training", [True, False], ids=["training", "inference"])


class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()

    def assert_one_graph_serves_every_length(self, model, backend):
        with torch._dynamo.config.patch(error_on_recompile=True):
            compile_and_compare(model, [batch(2, 9), batch(3, 14), batch(2, 16)], backend=backend, dynamic=True)

    def test_one_graph_serves_every_length_in_training(self):
        self.assert_one_graph_serves_every_length(compilable(TransNormerModel, is_training=True), "eager")

    def test_one_graph_serves_every_length_in_inference(self):
        self.assert_one_graph_serves_every_length(compilable(TransNormerForCausalLM, is_training=False), "eager")

    @heads
    @modes
    @pytest.mark.slow
    def test_one_graph_serves_every_length_through_autograd(self, model_class, is_training):
        self.assert_one_graph_serves_every_length(compilable(model_class, is_training), "aot_eager")

    @heads
    @modes
    @pytest.mark.slow
    def test_with_inductor(self, model_class, is_training):
        compile_and_compare(compilable(model_class, is_training), [batch(2, 9), batch(3, 14)], backend="inductor")

    def test_packed_sequences(self):
        inputs = {"input_ids": make_ids(1, 12), "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32)}
        compile_and_compare(compilable(TransNormerModel, is_training=True), [inputs], backend="eager")

    def test_position_ids_that_would_have_to_be_searched_are_refused(self):
        compiled = torch.compile(compilable(TransNormerModel, is_training=False), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="pass cu_seq_lens_q for packed sequences"):
            compiled(make_ids(1, 6), position_ids=torch.arange(6)[None])


@pytest.mark.parametrize("variant", ["t2", pytest.param("t1", marks=pytest.mark.slow)])
def test_export_of_the_encoder_with_dynamic_length(variant):
    model = make_model(variant=variant, layer_types=[DIAG, NORM])
    rows, columns = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=16)
    shape = {0: rows, 1: columns}
    program = torch.export.export(
        model,
        (),
        batch(2, 9),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        strict=False,
    )
    for size in ((1, 4), (3, 13), (2, 16)):
        inputs = batch(*size)
        outputs = program.module()(**inputs).last_hidden_state
        torch.testing.assert_close(outputs, model(**inputs).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm_type", ["simple_rms", "rms"])
def test_a_row_of_zeros_is_normed_to_zeros_in_every_dtype(norm_type, dtype):
    norm = make_norm(norm_type, TransNormerConfig(hidden_size=16, num_attention_heads=2))
    rows = torch.stack((torch.zeros(16), torch.full((16,), 300.0))).to(dtype).requires_grad_()
    normed = norm(rows)
    normed.sum().backward()
    torch.testing.assert_close(normed, torch.tensor([[0.0], [1.0]], dtype=dtype).expand(2, 16))
    assert not rows.grad.isnan().any()


def numbers_kept_for_backward(model, input_ids):
    """Of all storages that a forward pass leaves to the backward pass, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # holds the tensors, so that no address is used twice

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes() // 4, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states = model(input_ids).last_hidden_state
    assert hidden_states.requires_grad
    return sum(count for count, _ in kept.values())


@pytest.mark.parametrize("feed_forward", ["glu", "ffn"])
@pytest.mark.parametrize("kind", [DIAG, NORM])
def test_a_layer_keeps_each_input_of_a_product_once(kind, feed_forward, monkeypatch):
    """Its input, query, key, value, what the two attentions and the first norm give; and of the feed-forward its gate
    and its up alone. Beside them, a few numbers per token."""
    monkeypatch.setattr(modeling_transnormer, "MADE_AGAIN_FROM", 1)
    hidden_size, seq_len, fields = 64, 512, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fields |= {"hidden_size": hidden_size, "max_position_embeddings": seq_len, "feed_forward": feed_forward}
    shallow, deep = (make_model(layer_types=[kind] * depth, is_causal=True, **fields).train() for depth in (2, 3))
    ids = make_ids(1, seq_len)
    per_token = (numbers_kept_for_backward(deep, ids) - numbers_kept_for_backward(shallow, ids)) / seq_len
    inner = (2 if feed_forward == "glu" else 1) * deep.config.intermediate_size
    assert 6 * hidden_size + inner <= per_token < 6.75 * hidden_size + inner


@pytest.mark.parametrize("is_hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("feed_forward", ["glu", "ffn"])
def test_what_is_made_again_in_the_backward_pass_changes_no_gradient(feed_forward, is_hooked, monkeypatch):
    """Training is compared with eval mode, in which all is kept. No hook of a projection is called twice."""
    monkeypatch.setattr(modeling_transnormer, "MADE_AGAIN_FROM", 1)
    model = make_model(feed_forward=feed_forward, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    calls = []
    if is_hooked:
        model.layers[0].feed_forward.down_proj.register_forward_hook(lambda *_: calls.append(1))
    ids, gradients = make_ids(2, 11), []
    for is_training in (False, True):
        model.train(is_training).zero_grad()
        model(ids).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(calls) == (2 if is_hooked else 0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


WRONG_INPUTS = [
    # (fields of the model, inputs, what the error says)
    ({}, {}, "exactly one of input_ids or inputs_embeds"),
    ({}, {"input_ids": make_ids(1, 4), "inputs_embeds": torch.zeros(1, 4, 16)}, "exactly one of input_ids or"),
    (
        {},
        {"input_ids": make_ids(2, 4), "attention_mask": torch.ones(2, 1, 4, 4)},
        "attention_mask has shape (2, 1, 4, 4); supported is (batch, seq) = (2, 4)",
    ),
    ({}, {"input_ids": make_ids(2, 4), "attention_mask": torch.ones(2, 3)}, "attention_mask has shape (2, 3)"),
    ({}, {"input_ids": make_ids(2, 4), "attention_mask": torch.ones(1, 4)}, "supported is (batch, seq) = (2, 4)"),
    ({}, {"input_ids": make_ids(1, 17)}, "17 tokens and max_position_embeddings=16"),
    (
        {},
        {"input_ids": make_ids(1, 4), "past_key_values": DynamicCache()},
        f"{CACHE_NAME} was given to a bidirectional model (is_causal=False)",
    ),
    (
        {"is_causal": True},
        {"input_ids": make_ids(1, 4), "past_key_values": DynamicCache()},
        "the cache is a DynamicCache that was made without this model's configuration",
    ),
    (
        {},
        {"input_ids": make_ids(1, 4), "attention_mask": torch.eye(4)[:1], "cu_seq_lens_q": torch.tensor([0, 4])},
        "attention_mask and cu_seqlens were both given",
    ),
]


@pytest.mark.parametrize(("fields", "inputs", "said"), WRONG_INPUTS, ids=[said[:45] for *_, said in WRONG_INPUTS])
def test_wrong_inputs_are_named(fields, inputs, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make_model(**fields)(**inputs)


def test_packed_sequences_with_a_given_state_are_refused():
    model = make_model(is_causal=True)
    cache = TransNormerCache(model.config)
    with pytest.raises(ValueError, match=f"packed sequences cannot fill a {CACHE_NAME}"):
        model(make_ids(1, 4), past_key_values=cache, cu_seq_lens_q=torch.tensor([0, 2, 4]))


class TestAttentionImplementation:
    """`attn_implementation` of transformers: "eager" is the eager backend, "sdpa" the configuration's, others raise."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_model(backend="torch").save_pretrained(tmp_path)
        return tmp_path

    def backends_that_run(self, model, monkeypatch):
        """Of the attentions, in a forward."""
        run = set()

        def spied(function):
            def attend(*args, **options):
                run.add(options["backend"])
                return function(*args, **options)

            return attend

        with monkeypatch.context() as patch:
            for name in ("norm_attention", "diag_attention"):
                patch.setattr(modeling_transnormer, name, spied(getattr(modeling_transnormer, name)))
            model(make_ids(1, 6))
        return run

    @pytest.mark.parametrize(("name", "backend"), [("eager", "eager"), ("sdpa", "torch"), (None, "torch")])
    def test_what_runs(self, folder, monkeypatch, name, backend):
        given = {} if name is None else {"attn_implementation": name}
        model = TransNormerModel.from_pretrained(folder, **given)
        assert self.backends_that_run(model, monkeypatch) == {backend}
        assert model.config.backend == "torch"  # what is saved does not change

    def test_it_can_be_set_afterwards(self, folder, monkeypatch):
        model = TransNormerModel.from_pretrained(folder)
        model.set_attn_implementation("eager")
        assert self.backends_that_run(model, monkeypatch) == {"eager"}
        model.set_attn_implementation("sdpa")
        assert self.backends_that_run(model, monkeypatch) == {"torch"}

    def test_all_give_the_same_numbers(self, folder):
        input_ids = make_ids(2, 6)
        fast, eager = (TransNormerModel.from_pretrained(folder, attn_implementation=n) for n in ("sdpa", "eager"))
        torch.testing.assert_close(fast(input_ids).last_hidden_state, eager(input_ids).last_hidden_state)

    @pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa"])
    def test_what_is_not_our_attention_is_refused_with_what_works(self, folder, name):
        said = re.escape(f"attn_implementation={name!r}") + '.*"sdpa".*"eager"'
        with pytest.raises(ValueError, match=said):
            TransNormerModel.from_pretrained(folder, attn_implementation=name)
        with pytest.raises(ValueError, match=said):
            make_model().set_attn_implementation(name)

    def test_a_configuration_that_asks_for_maps_gets_them(self, folder):
        """As bertviz's examples load a model."""
        model = TransNormerModel.from_pretrained(folder, output_attentions=True)
        assert [weights.shape for weights in model(make_ids(1, 6)).attentions] == [(1, 2, 6, 6)] * 2
