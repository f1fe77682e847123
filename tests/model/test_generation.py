"""`generate` in all the ways transformers offers in-tree: each gives what greedy decoding without a state gives."""

import threading

import pytest
import torch
from test_cache import LAYER_MIXES, padded_batch, tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache, TextIteratorStreamer
from transformers.generation import CompileConfig
from transformers.generation.streamers import BaseStreamer

from transnormer_hf import TransNormerCache
from transnormer_hf.model.configuration_transnormer import CACHE_NAME

GREEDY = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": -1, "pad_token_id": 1}
PROMPT_LENGTH = 11


def make(mix="diag, norm", **overrides):
    model = tiny_model(mix, **overrides)
    model.generation_config = GenerationConfig(**GREEDY)
    return model


def expected_ids(model, input_ids, new_tokens=9, **inputs):
    """Greedy decoding by whole forwards, without any state."""
    return model.generate(input_ids, use_cache=False, max_new_tokens=new_tokens, **inputs)


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize("mix", LAYER_MIXES)
def test_greedy_decoding_of_a_padded_batch(mix, variant):
    model = make(mix, variant=variant)
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1
    expected = expected_ids(model, input_ids, attention_mask=attention_mask)
    assert model.generate(input_ids, attention_mask=attention_mask).equal(expected)
    for row in (0, 1):  # a row generates what it would generate alone
        alone = input_ids[row, attention_mask[row].bool()][None]
        assert model.generate(alone)[0, alone.shape[1] :].equal(expected[row, PROMPT_LENGTH:])


@pytest.mark.parametrize("mix", ["diag, norm", "full, norm"])
@pytest.mark.parametrize("options", [{"cache_implementation": name} for name in ("dynamic", "static", "offloaded")])
def test_every_cache_implementation(options, mix):
    model = make(mix)
    for batch_size, length, new_tokens in ((2, 7, 5), (2, 5, 3), (1, 13, 8), (3, 6, 4)):  # and one after the other
        input_ids = torch.randint(3, 50, (batch_size, length))
        output = model.generate(input_ids, max_new_tokens=new_tokens, return_dict_in_generate=True, **options)
        assert output.sequences.equal(expected_ids(model, input_ids, new_tokens))
        assert isinstance(output[CACHE_NAME], TransNormerCache)
        is_compileable = options["cache_implementation"] == "static" and "full" not in mix  # whose state grows
        assert output[CACHE_NAME].is_compileable == is_compileable


def test_continuous_batching_is_refused():
    with pytest.raises(NotImplementedError, match="Continuous batching pages keys and values"):
        make().generate_batch([[3, 4, 5]])


def test_a_quantized_cache_is_refused():
    with pytest.raises(ValueError, match="quantized"):
        make().generate(torch.randint(3, 50, (1, 5)), cache_implementation="quantized")


@pytest.mark.parametrize(
    "make_cache",
    [
        TransNormerCache,
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=30),
    ],
)
@pytest.mark.parametrize("mix", ["parallel", "diag, full"])
def test_a_cache_that_is_handed_in(make_cache, mix):
    model, input_ids = make(mix), torch.randint(3, 50, (2, PROMPT_LENGTH))
    cache = make_cache(model.config)
    assert model.generate(input_ids, **{CACHE_NAME: cache}).equal(expected_ids(model, input_ids))
    assert cache.get_seq_length() == PROMPT_LENGTH + 8


def test_a_cache_without_our_configuration_is_refused():
    with pytest.raises(ValueError, match="made without this model's configuration"):
        make().generate(torch.randint(3, 50, (1, 5)), **{CACHE_NAME: DynamicCache()})


@pytest.mark.parametrize("mix", ["diag, norm", "parallel"])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 5, 20])
def test_prefill_in_chunks_that_begin_anywhere_in_a_block(mix, chunk_size):
    model = make(mix)
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1  # the padding of row 1 is longer than a chunk
    expected = expected_ids(model, input_ids, attention_mask=attention_mask)
    output = model.generate(input_ids, attention_mask=attention_mask, prefill_chunk_size=chunk_size)
    assert output.equal(expected)


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_a_conversation_goes_on_where_it_stopped(cache_implementation):
    model = make("parallel")
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        return_dict_in_generate=True,
        cache_implementation=cache_implementation,
    )
    turn = torch.randint(3, 50, (3, 4))
    conversation = torch.cat((output.sequences, turn), 1)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, 9 + 4), value=1)
    expected = expected_ids(model, conversation, attention_mask=attention_mask)
    again = model.generate(conversation, attention_mask=attention_mask, **{CACHE_NAME: output[CACHE_NAME]})
    assert again.equal(expected)


def test_a_turn_can_be_given_alone_with_the_mask_of_everything():
    model, input_ids = make(), torch.randint(3, 50, (2, PROMPT_LENGTH))
    cache = TransNormerCache(model.config)
    first = model.generate(input_ids, **{CACHE_NAME: cache})
    turn = torch.cat((first[:, -1:], torch.randint(3, 50, (2, 3))), 1)  # the last token is not in the state yet
    whole = torch.cat((first[:, :-1], turn), 1)
    expected = expected_ids(model, whole)
    full_mask = torch.ones_like(whole)
    output = model.generate(turn, attention_mask=full_mask, **{CACHE_NAME: cache})
    assert output[:, 4:].equal(expected[:, whole.shape[1] :])


def test_a_turn_without_the_mask_of_everything_is_refused():
    model = make()
    cache = TransNormerCache(model.config)
    model.generate(torch.randint(3, 50, (1, PROMPT_LENGTH)), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match=f"3 tokens and {CACHE_NAME} has taken in 19"):
        model.generate(torch.randint(3, 50, (1, 3)), **{CACHE_NAME: cache})


def test_a_turn_without_a_mask_when_everything_is_given():
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    cache = TransNormerCache(model.config)
    first = model.generate(input_ids, **{CACHE_NAME: cache})
    whole = torch.cat((first, torch.randint(3, 50, (1, 3))), 1)
    assert model.generate(whole, **{CACHE_NAME: cache}).equal(expected_ids(model, whole))


def test_generation_from_a_saved_state(tmp_path):
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    cache = TransNormerCache(model.config)
    with torch.no_grad():
        model(input_ids[:, :-1], past_key_values=cache)
    cache.save_pretrained(tmp_path)
    loaded = TransNormerCache.from_pretrained(tmp_path, model.config)
    assert model.generate(input_ids, **{CACHE_NAME: loaded}).equal(expected_ids(model, input_ids))


# Several sequences


@pytest.mark.parametrize("mix", ["diag, norm", "parallel"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.7},
        {"num_beams": 2, "prefill_chunk_size": 3},
        {"num_beams": 3, "cache_implementation": "static"},
    ],
)
def test_beam_search_follows_its_beams(mix, options):
    model = make(mix)
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1
    stateless = {name: value for name, value in options.items() if name in ("num_beams", "num_return_sequences")}
    stateless["length_penalty"] = options.get("length_penalty", 1.0)
    expected = expected_ids(model, input_ids, attention_mask=attention_mask, **stateless)
    assert model.generate(input_ids, attention_mask=attention_mask, **options).equal(expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 3}, {"top_k": 5, "top_p": 0.8}])
def test_sampling_draws_the_same_with_and_without_a_state(options):
    model, input_ids = make(), torch.randint(3, 50, (2, PROMPT_LENGTH))
    torch.manual_seed(1)
    expected = expected_ids(model, input_ids, do_sample=True, **options)
    torch.manual_seed(1)
    assert model.generate(input_ids, do_sample=True, **options).equal(expected)


def test_prompts_can_branch_from_one_state():
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    cache = TransNormerCache(model.config)
    with torch.no_grad():
        model(input_ids[:, :-1], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(1)
    output = model.generate(input_ids, **{CACHE_NAME: cache}, do_sample=True, num_return_sequences=3)
    torch.manual_seed(1)
    assert output.equal(expected_ids(model, input_ids, do_sample=True, num_return_sequences=3))


# Several tokens per forward


def assistant_of(model, noise):
    """A model that agrees with `model` sometimes: the more noise, the less."""
    assistant = make("diag, norm")
    assistant.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    return assistant


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_assisted_decoding_equals_greedy(noise, schedule):
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    assistant = assistant_of(model, noise)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = schedule
    expected = expected_ids(model, input_ids, new_tokens=30)
    output = model.generate(
        input_ids, assistant_model=assistant, max_new_tokens=30, return_dict_in_generate=True, output_scores=True
    )
    assert output.sequences.equal(expected)
    # the state is that of the accepted tokens, and goes on
    cache = output[CACHE_NAME]
    assert cache.get_seq_length() == expected.shape[1] - 1
    whole = torch.cat((expected, torch.randint(3, 50, (1, 2))), 1)
    assert model.generate(whole, **{CACHE_NAME: cache}).equal(expected_ids(model, whole))


def test_assisted_sampling_runs():
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    output = model.generate(input_ids, assistant_model=assistant_of(model, 0.02), do_sample=True)
    assert output.shape == (1, PROMPT_LENGTH + 9)


def test_prompt_lookup_equals_greedy():
    model, phrase = make(), torch.randint(3, 50, (1, 5))
    input_ids = torch.cat((phrase, phrase, phrase[:, :3]), 1)
    expected = expected_ids(model, input_ids, new_tokens=20)
    output = model.generate(input_ids, prompt_lookup_num_tokens=3, max_new_tokens=20)
    assert output.equal(expected)


# Other inputs and outputs


def test_generation_from_embeddings():
    model = make("parallel")
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1
    embeddings = model.get_input_embeddings()(input_ids).detach()
    expected = expected_ids(model, input_ids, attention_mask=attention_mask)[:, PROMPT_LENGTH:]
    output = model.generate(inputs_embeds=embeddings, attention_mask=attention_mask)
    assert output.equal(expected)
    both = model.generate(input_ids, inputs_embeds=embeddings, attention_mask=attention_mask)
    assert both[:, PROMPT_LENGTH:].equal(expected)


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.has_ended = True


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}])
def test_streaming_gives_every_token_once(options):
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    recorder = Recorder()
    output = model.generate(input_ids, streamer=recorder, **options)
    assert recorder.tokens == output[0].tolist()
    assert recorder.has_ended


class Tokenizer:
    """As much of a tokenizer as a text streamer uses."""

    def decode(self, token_ids, **kwargs):
        return "".join(f"<{int(token)}> " for token in token_ids)


def test_text_can_be_read_while_it_is_generated():
    model, input_ids = make(), torch.randint(3, 50, (1, PROMPT_LENGTH))
    streamer = TextIteratorStreamer(Tokenizer(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=(input_ids,), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == [f"<{token}>" for token in expected_ids(model, input_ids)[0, PROMPT_LENGTH:].tolist()]


def test_scores_and_hidden_states_of_every_step():
    model, input_ids = make(), torch.randint(3, 50, (2, PROMPT_LENGTH))
    options = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
    output, expected = (model.generate(input_ids, use_cache=use_cache, **options) for use_cache in (True, False))
    torch.testing.assert_close(output.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert len(output.hidden_states) == 9
    assert output.hidden_states[1][-1].shape == (2, 1, 16)


# Compilation


def test_only_a_static_cache_is_compiled_and_its_step_once():
    model = make("parallel")
    input_ids, attention_mask = padded_batch(PROMPT_LENGTH)
    attention_mask[2] = 1
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    compile_config._compile_all_devices = True  # else for accelerators only
    torch._dynamo.reset()
    expected = expected_ids(model, input_ids, attention_mask=attention_mask)
    options = {"attention_mask": attention_mask, "compile_config": compile_config}
    assert model.generate(input_ids, **options).equal(expected)
    assert not graphs
    for _ in range(2):  # the second call has a new cache, and the compiled step of the first
        assert model.generate(input_ids, cache_implementation="static", **options).equal(expected)
    assert len(graphs) == 1
