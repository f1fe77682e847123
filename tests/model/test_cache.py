"""The state of a causal model: what goes in, what comes back, and that it is the full forward in other words."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from transnormer_hf import TransNormerCache, TransNormerConfig, TransNormerForCausalLM
from transnormer_hf.model.configuration_transnormer import CACHE_NAME

BLOCK_SIZE = 4
LAYER_MIXES = {
    "diag": ["chunked_attention"] * 2,
    "norm": ["linear_attention"] * 2,
    "diag, norm": ["chunked_attention", "linear_attention"],
    "norm, diag": ["linear_attention", "chunked_attention"],
    "full": ["full_attention"] * 2,
    "diag, full": ["chunked_attention", "full_attention"],
    "full, norm": ["full_attention", "linear_attention"],
    "parallel": ["hybrid"] * 2,
    "diag_then_norm": ["hybrid"] * 2,
    "norm_then_diag": ["hybrid"] * 2,
}


def tiny_model(mix="diag, norm", variant="t2", **overrides):
    options = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "layer_types": LAYER_MIXES[mix],
        "hybrid_combination": mix if "_then_" in mix else "parallel",
        "variant": variant,
        "block_size": BLOCK_SIZE,
        "position_embedding": "sinusoidal",
        "initializer_range": 0.3,
        "is_causal": True,
    }
    return TransNormerForCausalLM(TransNormerConfig(**(options | overrides))).eval()


def run(model, input_ids, cache, attention_mask=None, chunks=None):
    """Logits of the columns after those in the cache, fed in chunks of these lengths."""
    logits, seen = [], cache.get_seq_length()
    for length in chunks or [input_ids.shape[1]]:
        columns = slice(seen, seen + length)
        mask = None if attention_mask is None else attention_mask[:, : columns.stop]
        with torch.no_grad():
            logits.append(model(input_ids[:, columns], attention_mask=mask, past_key_values=cache).logits)
        seen = columns.stop
    return torch.cat(logits, 1)


def padded_batch(length):
    """A full row, a row with 6 columns of padding in front (more than a block), and one with zeros inside."""
    input_ids = torch.randint(3, 50, (3, length))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :6] = 0
    attention_mask[2, [4, 5, 8]] = 0
    return input_ids, attention_mask


def splits(length):
    yield from ([first, length - first] for first in range(1, length))
    yield [1] * length
    for size in (3, BLOCK_SIZE):
        yield [min(size, length - start) for start in range(0, length, size)]


def largest_difference(model, input_ids, attention_mask, every_chunks):
    """Between logits in chunks and those of the full forward, over real tokens."""
    with torch.no_grad():
        expected = model(input_ids, attention_mask=attention_mask, use_cache=False).logits
    is_real = 1 if attention_mask is None else attention_mask[..., None]
    return max(
        ((run(model, input_ids, TransNormerCache(model.config), attention_mask, chunks) - expected) * is_real)
        .abs()
        .max()
        for chunks in every_chunks
    )


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("mix", LAYER_MIXES)
def test_any_split_of_a_sequence_gives_the_full_forward(mix, variant):
    model = tiny_model(mix, variant).double()
    input_ids, attention_mask = padded_batch(11)
    assert largest_difference(model, input_ids, None, splits(11)) < 1e-10
    assert largest_difference(model, input_ids, attention_mask, splits(11)) < 1e-10


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("mix", LAYER_MIXES)
def test_decoding_is_exact_in_float32(mix, variant):
    model = tiny_model(mix, variant, initializer_range=0.05)
    input_ids, attention_mask = padded_batch(40)
    every_chunks = [[40], [1] * 40, [10, 1, 1, 17, 11]]
    assert largest_difference(model, input_ids, None, every_chunks) < 1e-5
    assert largest_difference(model, input_ids, attention_mask, every_chunks) < 1e-5


def test_the_state_does_not_grow():
    model = tiny_model("parallel")
    cache, sizes = TransNormerCache(model.config), set()
    for _ in range(6):
        with torch.no_grad():
            model(torch.randint(3, 50, (1, 7)), past_key_values=cache)
        sizes.add(sum(tensor.nbytes for state in cache.states for tensor in state.tensors.values()))
    assert len(sizes) == 1
    assert cache.get_seq_length() == 42


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_float32_at_least(dtype):
    model = tiny_model("parallel").to(dtype)
    cache = TransNormerCache(model.config)
    run(model, torch.randint(3, 50, (1, 9)), cache, chunks=[6, 1, 1, 1])
    expected = torch.promote_types(dtype, torch.float32)
    assert {tensor.dtype for state in cache.states for tensor in state.tensors.values()} == {expected}


# Gradients


def gradients_by_segment(model, input_ids, chunks, alone, checkpointing=None):
    """Of truncated back-propagation. alone: each segment has a state of its own, made without gradients."""
    model.zero_grad()
    model.train()
    if checkpointing is not None:
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": checkpointing})
    cache, losses, seen = TransNormerCache(model.config), [], 0
    for length in chunks:
        if alone and seen:
            cache = TransNormerCache(model.config)
            with torch.no_grad():
                model(input_ids[:, :seen], past_key_values=cache)
        logits = model(input_ids[:, seen : seen + length], past_key_values=cache).logits
        losses.append(logits.double().logsumexp(-1).sum())
        seen += length
    torch.stack(losses).sum().backward()
    return [parameter.grad for parameter in model.parameters()], [state.tensors for state in cache.states]


@pytest.mark.parametrize(
    ("mix", "checkpointing", "backend"),
    [
        *((mix, None, "torch") for mix in LAYER_MIXES),
        *(("parallel", checkpointing, backend) for checkpointing in (False, True) for backend in ("torch", "eager")),
        ("parallel", None, "triton"),
    ],
)
def test_truncated_back_propagation_sees_each_state_as_it_was(mix, checkpointing, backend):
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, input_ids = tiny_model(mix, backend=backend, **fields), torch.randint(3, 50, (2, 13))
    expected, states = gradients_by_segment(model, input_ids, [5, 1, 1, 6], alone=True)
    found, states_after = gradients_by_segment(model, input_ids, [5, 1, 1, 6], False, checkpointing)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    for one, other in zip(states_after, states, strict=True):  # the backward pass takes nothing in again
        for name in other:
            if name == "state":
                torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)


def test_a_step_without_gradients_spares_what_autograd_has_saved():
    model, input_ids = tiny_model("parallel").train(), torch.randint(3, 50, (1, 9))
    cache = TransNormerCache(model.config)
    model(input_ids[:, :4], past_key_values=cache)
    loss = model(input_ids[:, 4:8], past_key_values=cache).logits.sum()
    with torch.no_grad():
        model(input_ids[:, 8:], past_key_values=cache)
        cache.reset()
    loss.backward()


# Attention maps


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("mix", ["diag", "diag, norm", "parallel"])
@pytest.mark.parametrize("chunks", [[18], [7, 11], [5, 1, 1, 6, 5], [1] * 18])
def test_maps_of_blocks_go_on_through_the_state(mix, variant, chunks):
    model = tiny_model(mix, variant, backend="torch").double()
    input_ids, attention_mask = padded_batch(18)
    options = {"output_attentions": True, "past_key_values": TransNormerCache(model.config)}
    seen = 0
    with torch.no_grad():
        whole = model(input_ids, attention_mask=attention_mask, use_cache=False, output_attentions=True).attentions
        for length in chunks:
            end = seen + length
            mask = attention_mask[:, :end]
            maps = model(input_ids[:, seen:end], attention_mask=mask, **options).attentions
            for layer_type, part, of_whole in zip(model.config.layer_types, maps, whole, strict=True):
                if seen and layer_type == "linear_attention":
                    assert part is None  # past keys are folded into the state
                    continue
                of_whole = of_whole[:, : part.shape[1]]  # of a hybrid layer, DiagAttention's heads
                assert part.shape[1] == 2 + 2 * (layer_type == "hybrid" and not seen)
                is_real = attention_mask[:, None, seen:end, None]
                torch.testing.assert_close(part * is_real, of_whole[:, :, seen:end, :end] * is_real)
            seen = end


@pytest.mark.parametrize("assistant", [False, True])
def test_generation_gives_the_maps_of_every_step(assistant):
    model = tiny_model("diag")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 50, "pad_token_id": 1}
    options |= {"output_attentions": True, "return_dict_in_generate": True}
    prompt = torch.randint(3, 50, (1, 7))
    cached = model.generate(prompt, **options, **({"assistant_model": tiny_model("diag")} if assistant else {}))
    expected = model.generate(prompt, **options, use_cache=False)
    assert cached.sequences.equal(expected.sequences)
    assert len(cached.attentions) == 6
    for step, whole in zip(cached.attentions, expected.attentions, strict=True):
        for part, of_whole in zip(step, whole, strict=True):
            torch.testing.assert_close(part, of_whole[:, :, -part.shape[2] :])


@pytest.mark.parametrize("mix", ["norm", "diag, norm"])
def test_assisted_decoding_where_a_layer_has_no_map_is_refused_by_name(mix):
    model, prompt = tiny_model(mix), torch.randint(3, 50, (1, 7))
    with pytest.raises(ValueError, match="output_attentions=True with assisted decoding"):
        model.generate(prompt, prompt_lookup_num_tokens=2, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("chunks", [[6, 3], [8, 1], [1] * 9])
def test_learned_positions_end_with_a_message_and_leave_the_state_as_it_is(chunks):
    model = tiny_model(position_embedding="learned", max_position_embeddings=8)
    cache = TransNormerCache(model.config)
    input_ids = torch.randint(3, 50, (1, 9))
    run(model, input_ids[:, :-1], cache, chunks=[*chunks[:-1], chunks[-1] - 1] if chunks[-1] > 1 else chunks[:-1])
    with pytest.raises(ValueError, match="the input has 9 tokens and max_position_embeddings=8"):
        run(model, input_ids, cache, chunks=[1])
    assert cache.get_seq_length() == 8


# Taking tokens back


@pytest.mark.parametrize("mix", ["diag, norm", "parallel", "norm"])
@pytest.mark.parametrize("chunks", [[15], [6, 1, 1, 5, 2]])
def test_crop_goes_back_over_blocks_and_padding(mix, chunks):
    model = tiny_model(mix).double()
    input_ids, attention_mask = padded_batch(18)
    for count in (0, 1, 3, 4, 6, 11, 15):
        cache = TransNormerCache(model.config)
        cache.activate_past_recording()
        run(model, input_ids, cache, attention_mask, chunks)
        cache.crop(-count)
        assert cache.get_seq_length() == 15 - count
        logits = run(model, input_ids, cache, attention_mask, [1, count + 2])
        expected = run(model, input_ids, TransNormerCache(model.config), attention_mask, [18])[:, 15 - count :]
        assert ((logits - expected).abs().amax(-1) * attention_mask[:, 15 - count :]).max() < 1e-10


def test_crop_can_go_back_behind_an_earlier_crop():
    # Assistants with another tokenizer take back more than they added since the last crop.
    model, input_ids = tiny_model(), torch.randint(3, 50, (1, 320))
    expected = run(model, input_ids, TransNormerCache(model.config))
    cache = TransNormerCache(model.config)
    cache.activate_past_recording()
    run(model, input_ids, cache, chunks=[200])
    for added, removed in ((5, 5), (0, 20), (3, 0), (2, 30), (150, 0), (1, 60)):
        if added:
            run(model, input_ids, cache, chunks=[added])
        cache.crop(-removed)
    seen = cache.get_seq_length()
    assert seen == 200 + 5 - 5 - 20 + 3 + 2 - 30 + 150 + 1 - 60
    torch.testing.assert_close(run(model, input_ids, cache, chunks=[4]), expected[:, seen : seen + 4])
    recorded = sum(columns.shape[1] for *_, columns in cache.layers[0].progress.history)
    assert recorded < 150, "what can no longer be asked for is let go"


def test_crop_says_what_it_cannot_do():
    model = tiny_model()
    cache = TransNormerCache(model.config)
    run(model, torch.randint(3, 50, (1, 5)), cache)
    with pytest.raises(RuntimeError, match=r"crop\(-1\) cannot take back 1 of 5 tokens: the last 0 are recorded"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match=r"crop\(3\) cannot take back 2 of 5 tokens"):
        cache.crop(3)  # transformers before 5.14 says how many tokens to keep
    cache.crop(0)
    assert cache.get_seq_length() == 5


def test_recording_that_is_switched_off_by_layer_lets_go_of_the_past():
    # `generate` does so when it hands a cache back.
    model = tiny_model()
    cache = TransNormerCache(model.config)
    cache.activate_past_recording()
    assert all(layer.record_past for layer in cache.layers)
    run(model, torch.randint(3, 50, (1, 9)), cache, chunks=[5, 4])
    for layer in cache.layers:
        layer.record_past = False
    run(model, torch.randint(3, 50, (1, 10)), cache, chunks=[1])
    assert not cache.layers[0].progress.history
    assert not any(state.history for state in cache.states)


# Rows


@pytest.mark.parametrize("is_recording", [False, True])
def test_rows_are_reordered_selected_and_repeated(is_recording):
    model = tiny_model("parallel")
    input_ids, attention_mask = padded_batch(12)
    rows = torch.tensor([2, 2, 0])
    changes = {
        "reorder_cache": (rows, rows),
        "batch_select_indices": (torch.tensor([1]), torch.tensor([1])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    for method, (argument, expected_rows) in changes.items():
        cache, expected_cache = TransNormerCache(model.config), TransNormerCache(model.config)
        if is_recording:
            cache.activate_past_recording()
        run(model, input_ids, cache, attention_mask, [5, 4])
        getattr(cache, method)(argument)
        assert cache.batch_size == len(expected_rows)
        if is_recording:
            cache.crop(-2)
        chunks = [cache.get_seq_length(), 1, 2]
        logits = run(model, input_ids[expected_rows], cache, attention_mask[expected_rows], chunks[1:])
        expected = run(model, input_ids[expected_rows], expected_cache, attention_mask[expected_rows], chunks)
        torch.testing.assert_close(logits, expected[:, chunks[0] :])


def test_another_batch_size_than_that_of_the_state_is_refused():
    model = tiny_model()
    cache = TransNormerCache(model.config)
    assert cache.batch_size == -1
    run(model, torch.randint(3, 50, (1, 5)), cache)
    with pytest.raises(ValueError, match="holds 1 rows and the input has 3"):
        run(model, torch.randint(3, 50, (3, 6)), cache)


@pytest.mark.parametrize("mix", ["parallel", "diag, full"])
@pytest.mark.parametrize("is_compileable", [False, True])
def test_reset_begins_anew_with_any_batch(is_compileable, mix):
    model = tiny_model(mix)
    input_ids, attention_mask = padded_batch(9)
    cache = TransNormerCache(model.config, is_compileable)
    for rows in (slice(0, 3), slice(1, 3), slice(0, 3), slice(0, 3)):
        expected = run(model, input_ids[rows], TransNormerCache(model.config), attention_mask[rows], [7, 2])
        torch.testing.assert_close(run(model, input_ids[rows], cache, attention_mask[rows], [7, 2]), expected)
        cache.reset()
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_branches_off(duplicate):
    model, input_ids = tiny_model(), torch.randint(3, 50, (2, 9))
    cache = TransNormerCache(model.config)
    run(model, input_ids, cache, chunks=[6])
    branch = duplicate(cache)
    expected = run(model, input_ids, cache, chunks=[1, 2])
    torch.testing.assert_close(run(model, input_ids, branch, chunks=[1, 2]), expected, rtol=0, atol=0)


def test_a_state_made_in_inference_mode_goes_on_outside_of_it():
    model, input_ids = tiny_model(), torch.randint(3, 50, (1, 8))
    cache = TransNormerCache(model.config)
    with torch.inference_mode():
        model(input_ids[:, :6], past_key_values=cache)
    run(model, input_ids, cache, chunks=[1, 1])


def test_a_layer_can_be_moved_off_and_back():
    model, input_ids = tiny_model("parallel"), torch.randint(3, 50, (1, 8))
    cache = TransNormerCache(model.config)
    run(model, input_ids, cache, chunks=[5])
    for layer in range(len(cache)):
        cache.offload(layer)
        cache.prefetch(layer)
    expected = run(model, input_ids, TransNormerCache(model.config))[:, 5:]
    torch.testing.assert_close(run(model, input_ids, cache, chunks=[3]), expected)


def test_the_state_can_be_allocated_before_the_first_token():
    model, input_ids = tiny_model("parallel"), torch.randint(3, 50, (2, 8))
    cache = TransNormerCache(model.config)
    assert not cache.is_initialized
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.bfloat16, device="cpu")
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    expected = run(model, input_ids, TransNormerCache(model.config))
    torch.testing.assert_close(run(model, input_ids, cache, chunks=[5, 1, 2]), expected)


def test_the_cache_describes_itself():
    model = tiny_model()
    cache = TransNormerCache(model.config)
    assert (len(cache), cache.get_max_length(), cache.has_previous_state()) == (2, -1, False)
    run(model, torch.randint(3, 50, (2, 5)), cache)
    assert cache.get_mask_sizes(3, 0) == (8, 0)
    assert cache.has_previous_state()
    assert "batch_size=2, seq_length=5" in repr(cache)
    with pytest.raises(NotImplementedError, match="receive"):
        cache.update(torch.ones(1), torch.ones(1), 0)


# In training


def test_training_keeps_no_state():
    model = tiny_model().train()
    assert model(torch.randint(3, 50, (1, 5))).get(CACHE_NAME) is None


def test_a_forward_that_fills_a_state_can_be_differentiated():
    model, input_ids = tiny_model("parallel"), torch.randint(3, 50, (2, 9))
    model(input_ids, labels=input_ids, past_key_values=TransNormerCache(model.config)).loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(gradients, expected)


# Caches of transformers


@pytest.mark.parametrize(
    "make", [lambda config: DynamicCache(config=config), lambda config: StaticCache(config=config, max_cache_len=20)]
)
@pytest.mark.parametrize("mix", LAYER_MIXES)
def test_a_cache_of_transformers_is_adopted(make, mix):
    model, input_ids = tiny_model(mix), torch.randint(3, 50, (2, 9))
    cache = make(model.config)
    is_static = isinstance(cache, StaticCache)
    with torch.no_grad():
        output = model(input_ids[:, :6], past_key_values=cache)
    assert output[CACHE_NAME] is cache
    assert cache.is_compileable == (is_static and "full" not in mix)
    expected = run(model, input_ids, TransNormerCache(model.config))[:, 6:]
    torch.testing.assert_close(run(model, input_ids, cache, chunks=[1, 2]), expected)


def test_an_adopted_cache_goes_on_recording():
    model, input_ids = tiny_model(), torch.randint(3, 50, (1, 9))
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    run_logits = model(input_ids, past_key_values=cache).logits
    cache.crop(-2)
    torch.testing.assert_close(run(model, input_ids, cache, chunks=[2]), run_logits[:, 7:])


def test_a_cache_without_our_configuration_is_refused():
    model, input_ids = tiny_model(), torch.randint(3, 50, (1, 5))
    with pytest.raises(ValueError, match=r"DynamicCache that was made without this model's configuration; use Trans"):
        model(input_ids, past_key_values=DynamicCache())
    foreign = DynamicCache(config=model.config)
    foreign.layers[0].update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    with pytest.raises(ValueError, match="holds keys and values of another kind"):
        model(input_ids, past_key_values=foreign)
    with pytest.raises(ValueError, match="tuple"):
        model(input_ids, past_key_values=((torch.ones(1), torch.ones(1)),))


# On disk

CONTINUE = """
import sys, torch
from transnormer_hf import TransNormerCache, TransNormerForCausalLM
folder = sys.argv[1]
model = TransNormerForCausalLM.from_pretrained(folder).eval()
cache = TransNormerCache.from_pretrained(folder, model.config)
with torch.no_grad():
    torch.save(model(torch.load(folder + "/continuation.pt"), past_key_values=cache).logits, folder + "/logits.pt")
"""


@pytest.mark.parametrize("mix", ["diag, norm", "parallel", "norm"])
def test_a_loaded_state_continues_like_the_original(mix, tmp_path):
    model = tiny_model(mix)
    input_ids, attention_mask = padded_batch(12)
    cache = TransNormerCache(model.config)
    cache.activate_past_recording()
    run(model, input_ids, cache, attention_mask, [9])
    file = cache.save_pretrained(tmp_path / "prompts" / "long.safetensors")
    assert [path.name for path in file.parent.iterdir()] == ["long.safetensors"]
    loaded = TransNormerCache.from_pretrained(file, model.config)
    assert loaded.get_seq_length() == 9
    expected = run(model, input_ids, cache, attention_mask, [1, 2])
    logits = run(model, input_ids, loaded, attention_mask, [1, 2])
    torch.testing.assert_close(logits, expected)


def test_a_state_outlives_the_process(tmp_path):
    model, input_ids = tiny_model("parallel"), torch.randint(3, 50, (2, 12))
    model.save_pretrained(tmp_path)
    cache = TransNormerCache(model.config)
    run(model, input_ids, cache, chunks=[7])
    cache.save_pretrained(tmp_path)
    torch.save(input_ids[:, 7:], tmp_path / "continuation.pt")
    subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path)], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), run(model, input_ids, cache, chunks=[5]))


def test_the_state_of_another_model_is_refused(tmp_path):
    model = tiny_model("diag, norm")
    cache = TransNormerCache(model.config)
    with pytest.raises(ValueError, match="empty"):
        cache.save_pretrained(tmp_path)
    run(model, torch.randint(3, 50, (1, 5)), cache)
    cache.save_pretrained(tmp_path)
    other = tiny_model("diag, norm", variant="t1", block_size=8).config
    with pytest.raises(ValueError, match=r"block_size=4, here 8; feature_map='1\+elu', here 'elu'"):
        TransNormerCache.from_pretrained(tmp_path, other)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    model = tiny_model()
    cache = TransNormerCache(model.config)
    run(model, torch.randint(3, 50, (1, 5)), cache)
    file = cache.save_pretrained(tmp_path)
    before = file.read_bytes()
    run(model, torch.randint(3, 50, (1, 6)), cache, chunks=[1])

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("transnormer_hf.model.cache_transnormer.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.save_pretrained(tmp_path)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


# Long contexts in half precision


def half_precision_errors(dtype, variant, positions):
    """Relative error of the last layer's output against float64, over 64 tokens up to each of these positions."""
    model = tiny_model("diag, norm", variant, hidden_size=64, intermediate_size=96, block_size=64).model.to(dtype)
    exact = copy.deepcopy(model).double()
    caches = TransNormerCache(model.config), TransNormerCache(model.config)
    errors, seen = {}, 0
    for chunk in torch.randint(3, 50, (1, positions[-1])).split(min(4096, positions[0]), 1):
        with torch.no_grad():
            output, expected = (
                network(chunk, past_key_values=cache).last_hidden_state.double()
                for network, cache in zip((model, exact), caches, strict=True)
            )
        assert output.isfinite().all()
        seen += chunk.shape[1]
        if seen in positions:
            error = (output - expected)[:, -64:].norm() / expected[:, -64:].norm()
            errors[seen] = error.item()
    return errors


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_get_worse_with_length(dtype, variant):
    errors = half_precision_errors(dtype, variant, [1024, 4096, 8192])
    assert max(errors.values()) < (0.005 if dtype == torch.float16 else 0.03)
    assert errors[8192] < 1.5 * errors[1024]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_for_131072_tokens(dtype, variant):
    errors = half_precision_errors(dtype, variant, [4096, 16384, 65536, 131072])
    assert max(errors.values()) < (0.005 if dtype == torch.float16 else 0.03)
    assert errors[131072] < 1.5 * errors[4096]


# The compiled step


def test_a_compiled_step_is_compiled_once():
    model, input_ids = tiny_model(), torch.randint(3, 50, (2, 20))
    expected = run(model, input_ids, TransNormerCache(model.config))
    cache = TransNormerCache(model.config, is_compileable=True)
    run(model, input_ids, cache, chunks=[7])
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    logits = run(step, input_ids, cache, chunks=[1] * 8)
    torch.testing.assert_close(logits, expected[:, 7:15])
    assert len(graphs) == 1
