"""Attention transfer and joint distillation between tiny random models: what learns, from what, and what is kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from transnormer_hf.linearize import transfer
from transnormer_hf.linearize.distillation import (
    Stage,
    TextBatches,
    attention_losses,
    attention_of,
    compare,
    evaluate,
    joint_losses,
    one_cycle,
    recorded_attention,
    run_stage,
    scale_output_projections,
)

VOCAB = 40
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# weights large enough for attention to differ from a mean
SIZES |= {"initializer_range": 0.4, "max_position_embeddings": 32}


def make_source(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "bert":
        return BertModel(BertConfig(**SIZES, intermediate_size=32)).eval()
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32)).eval()


def make_pair(name: str = "bert", **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Teacher and student; the student asks for no gradients, as `distill` hands it over."""
    source = make_source(name)
    options = {"layer_types": ["linear_attention"] * 2, **options}
    teacher = transfer(source, layer_types=["full_attention"] * 2)
    return teacher.requires_grad_(False), transfer(source, **options).requires_grad_(False)


def make_rows(number: int = 40, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 13, (number,), generator=generator)
    return [torch.randint(3, VOCAB, (int(length),), generator=generator).tolist() for length in lengths]


def make_texts(number: int = 40, batch_size: int = 8, seed: int = 0) -> TextBatches:
    return TextBatches(make_rows(number, seed), batch_size, pad_token_id=0, seed=seed)


def attention_stage(teacher, student, layers=(0, 1), **options) -> Stage:
    defaults = {"train": make_texts(), "held_out": make_texts(16, seed=1), "learning_rate": 1e-2, "max_steps": 20}
    return Stage(
        "test",
        {f"layer {layer}": attention_of(student, layer) for layer in layers},
        attention_losses(teacher, student, layers),
        **{**defaults, **options},
    )


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(first, second) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# ---- Texts ----


def test_the_order_of_batches_follows_from_the_seed_and_the_step_alone():
    texts, again, other = make_texts(), make_texts(), make_texts()
    other.seed = 1
    for step in (11, 0, 7, 3):
        assert torch.equal(texts.batch(step)["input_ids"], again.batch(step)["input_ids"])
    assert any(texts.batch(step)["input_ids"].shape != other.batch(step)["input_ids"].shape for step in range(5))


def test_an_epoch_holds_every_row_once_and_the_mask_tells_padding():
    texts = make_texts(40, batch_size=8)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * len(texts), (epoch + 1) * len(texts)):
            batch = texts.batch(step)
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                seen.append(row[mask.bool()].tolist())
        assert sorted(seen) == sorted(texts.rows)
    in_order = [len(row) for batch in texts.in_order() for row in batch["input_ids"]]
    assert len(in_order) == 40
    assert in_order == sorted(in_order)


def test_batches_can_be_asked_for_by_tokens():
    texts = make_texts()
    batches = list(texts.holding(100))
    counts = [int(batch["attention_mask"].sum()) for batch in batches]
    assert sum(counts[:-1]) < 100 <= sum(counts)


def test_texts_without_rows_are_refused():
    with pytest.raises(ValueError, match="rows: got none"):
        TextBatches([], 8, 0)


# ---- What a teacher shows ----


def test_the_record_is_what_the_source_s_attention_takes_and_gives():
    source = make_source("bert")
    teacher = transfer(source, layer_types=["full_attention"] * 2)
    taken, given = {}, {}
    for number, layer in enumerate(source.encoder.layer):
        layer.register_forward_pre_hook(lambda _, args, number=number: taken.__setitem__(number, args[0]))
        layer.attention.output.dense.register_forward_hook(
            lambda _, args, output, number=number: given.__setitem__(number, output)
        )
    batch = make_texts().batch(0)
    is_real = batch["attention_mask"].bool()
    with torch.no_grad(), recorded_attention(teacher, [0, 1]) as records:
        teacher(**batch)
        source(**batch)
    for layer in (0, 1):
        for shown, wanted in ((records[layer].inputs, taken[layer]), (records[layer].outputs, given[layer])):
            torch.testing.assert_close(shown[is_real], wanted[is_real], rtol=1e-4, atol=1e-4)


def test_nothing_is_recorded_after_the_block():
    teacher, _ = make_pair()
    with recorded_attention(teacher, [0]) as records:
        pass
    teacher(**make_texts().batch(0))
    assert records == {}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_does_not_enter_the_losses(name):
    teacher, student = make_pair(name)
    batch = make_texts().batch(0)
    wider = {key: F.pad(tensor, (0, 5)) for key, tensor in batch.items()}
    wider["input_ids"] = torch.where(wider["attention_mask"] == 0, 7, wider["input_ids"])
    for losses in (attention_losses(teacher, student, [0, 1]), joint_losses(teacher, student)):
        plain, padded = losses(batch), losses(wider)
        for part in plain:
            for here, there in zip(plain[part], padded[part], strict=True):
                torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_an_attention_that_computes_the_same_has_no_error(name):
    layers = ["chunked_attention", "full_attention"]
    teacher, student = make_pair(name, layer_types=layers, block_size=16)
    assert max(evaluate(attention_losses(teacher, student, [0, 1]), make_texts()).values()) < 1e-8
    assert compare(teacher, student, make_texts())["hidden_states"] < 1e-8
    assert evaluate(joint_losses(teacher, student), make_texts())["student"] < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_perplexity_is_that_of_the_language_model(name):
    teacher, student = make_pair(name)
    row = make_rows()[0]
    ids = torch.tensor([row])
    figures = compare(teacher, student, TextBatches([row], 1, 0))
    with torch.no_grad():
        loss = student(input_ids=ids, labels=ids).loss
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert set(compare(*make_pair("bert"), make_texts())) == {"hidden_states"}


# ---- The closed form ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_output_projections_meet_the_root_mean_square_that_they_were_made_for(name):
    teacher, student = make_pair(name)
    texts = make_texts()
    layers = [attention_of(model, layer) for model in (teacher, student) for layer in (0, 1)]
    copied = [attention.out_proj.weight.clone() for attention in layers]
    contexts: list[list[torch.Tensor]] = [[] for _ in layers]
    for attention, found in zip(layers, contexts, strict=True):
        attention.out_proj.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
    wanted = []
    for batch in texts.in_order():
        with recorded_attention(teacher, [0, 1]) as records:
            teacher(**batch)
        for layer, shown in records.items():
            attention_of(student, layer)(shown.inputs, shown.metadata)
        wanted.append(batch["attention_mask"].bool())
    roots = [
        torch.cat([context[mask] for context, mask in zip(found, wanted, strict=True)]).square().mean().sqrt()
        for found in contexts
    ]
    assert roots[2] == pytest.approx(1, abs=1e-3)  # the norm of NormAttention
    scale_output_projections(teacher, student, [0, 1], texts.in_order())
    for layer in (0, 1):
        torch.testing.assert_close(layers[layer].out_proj.weight, copied[layer])
        expected = copied[2 + layer] * roots[layer] / roots[2 + layer]
        torch.testing.assert_close(layers[2 + layer].out_proj.weight, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_named_is_not_scaled():
    teacher, student = make_pair()
    before = weights_of(attention_of(student, 0))
    scale_output_projections(teacher, student, [1], make_texts().in_order())
    assert equal(weights_of(attention_of(student, 0)), before)


# ---- Attention transfer ----


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_every_attention_comes_closer_to_its_teacher(name):
    teacher, student = make_pair(name)
    scale_output_projections(teacher, student, [0, 1], make_texts().in_order())
    others = {key: value for key, value in weights_of(student).items() if "self_attn" not in key}
    result = run_stage(attention_stage(teacher, student, max_steps=60))
    for part, error in result.after.items():
        assert error < 0.95 * result.before[part]
    assert evaluate(attention_losses(teacher, student, [0, 1]), make_texts(16, seed=1)) == pytest.approx(result.after)
    assert equal(others, weights_of(student))
    assert result.steps == 60


def test_positions_learn_too():
    teacher, student = make_pair("gpt2")
    run_stage(attention_stage(teacher, student, layers=[0]))
    assert attention_of(student, 0).lrpe.theta.abs().max() > 0
    assert attention_of(student, 1).lrpe.theta.abs().max() == 0


def test_a_layer_learns_the_same_whether_another_learns_beside_it_or_not():
    teacher, together = make_pair()
    _, alone = make_pair()
    untouched = weights_of(attention_of(alone, 0))
    run_stage(attention_stage(teacher, together))
    run_stage(attention_stage(teacher, alone, layers=[1]))
    assert equal(weights_of(attention_of(together, 1)), weights_of(attention_of(alone, 1)))
    assert equal(weights_of(attention_of(alone, 0)), untouched)
    assert not equal(weights_of(attention_of(together, 0)), untouched)


def test_the_weights_before_are_kept_where_training_makes_them_worse():
    teacher, student = make_pair()
    scale_output_projections(teacher, student, [0, 1], make_texts().in_order())
    before = weights_of(student)
    result = run_stage(attention_stage(teacher, student, learning_rate=1e3, max_steps=3))
    assert result.after == result.before
    assert equal(weights_of(student), before)


def test_each_layer_keeps_its_own_best(monkeypatch):
    """The held-out errors of layer 0 fall, those of layer 1 rise after the second evaluation."""
    from transnormer_hf.linearize import distillation

    teacher, student = make_pair()
    stage = attention_stage(teacher, student, max_steps=4, eval_steps=1)
    told = iter([(5, 5), (4, 4), (3, 6), (2, 7), (1, 8)])
    seen = []

    def evaluate(losses, texts):
        seen.append([weights_of(part) for part in stage.parts.values()])
        return dict(zip(stage.parts, next(told), strict=True))

    monkeypatch.setattr(distillation, "evaluate", evaluate)
    result = run_stage(stage)
    assert result.before == {"layer 0": 5, "layer 1": 5}
    assert result.after == {"layer 0": 1, "layer 1": 4}
    assert equal(weights_of(attention_of(student, 0)), seen[4][0])
    assert equal(weights_of(attention_of(student, 1)), seen[1][1])


def test_nothing_asks_for_gradients_before_or_after():
    teacher, student = make_pair()
    run_stage(attention_stage(teacher, student, max_steps=1))
    assert not any(parameter.requires_grad for model in (teacher, student) for parameter in model.parameters())


# ---- Budgets ----


def test_the_learning_rate_rises_and_falls_to_zero():
    rates = [one_cycle(step / 100) for step in range(101)]
    assert 0 < rates[0] < 0.02
    assert max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0)


def test_the_budget_is_steps_or_minutes_whichever_ends_first(monkeypatch):
    from transnormer_hf.linearize import distillation

    teacher, student = make_pair()
    stage = attention_stage(teacher, student, max_steps=100, max_minutes=1.0)
    assert stage.progress(50, 0) == 0.5
    assert stage.progress(50, 45) == 0.75
    assert stage.progress(50, 300) == 1
    assert attention_stage(teacher, student, max_steps=0).progress(0, 0) == 1
    clock = iter(range(0, 10_000, 10))  # every look at it finds 10 seconds gone
    monkeypatch.setattr(distillation.time, "perf_counter", lambda: next(clock))
    result = run_stage(stage)
    assert result.steps == 6
    assert result.minutes == 1


# ---- Resume ----


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", ["attention", "joint"])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(kind, tmp_path):
    def make_stage(student, **options) -> Stage:
        if kind == "attention":
            return attention_stage(teacher, student, max_steps=12, eval_steps=5, **options)
        return Stage(
            "test",
            {"student": student.base_model.layers},
            joint_losses(teacher, student),
            make_texts(),
            make_texts(16, seed=1),
            learning_rate=1e-3,
            max_steps=12,
            eval_steps=5,
            **options,
        )

    teacher, whole = make_pair("gpt2")
    expected = run_stage(make_stage(whole))
    _, student = make_pair("gpt2")
    checkpoint = tmp_path / "new" / "checkpoint.pt"
    stage = make_stage(student, checkpoint=checkpoint, settings={"seed": 1})
    batch = stage.train.batch

    def interrupt(step):
        if step == 8:
            raise Interrupted
        return batch(step)

    stage.train.batch = interrupt
    with pytest.raises(Interrupted):
        run_stage(stage)
    assert torch.load(checkpoint, weights_only=True)["step"] == 5
    _, student = make_pair("gpt2")
    result = run_stage(make_stage(student, checkpoint=checkpoint, settings={"seed": 1}))
    assert (result.before, result.after, result.steps) == (expected.before, expected.after, expected.steps)
    assert equal(weights_of(student), weights_of(whole))
    # and a run that was at its end only gets its weights back
    _, student = make_pair("gpt2")
    assert run_stage(make_stage(student, checkpoint=checkpoint, settings={"seed": 1})).after == expected.after
    assert equal(weights_of(student), weights_of(whole))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    teacher, student = make_pair()
    options = {"checkpoint": tmp_path / "checkpoint.pt", "max_steps": 1}
    run_stage(attention_stage(teacher, student, **options, settings={"seed": 1, "block_size": 8}))
    with pytest.raises(ValueError, match=r"checkpoint\.pt was written with seed=1, and seed=2 was given"):
        run_stage(attention_stage(teacher, student, **options, settings={"seed": 2, "block_size": 8}))


# ---- Joint distillation ----


def joint_stage(teacher, student, **options) -> Stage:
    defaults = {"train": make_texts(), "held_out": make_texts(16, seed=1), "learning_rate": 3e-3, "max_steps": 40}
    parts = {"student": student.base_model.layers}
    return Stage("test", parts, joint_losses(teacher, student), **{**defaults, **options})


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_whole_student_comes_closer_and_its_embeddings_stay(name):
    teacher, student = make_pair(name)
    scale_output_projections(teacher, student, [0, 1], make_texts().in_order())
    before = weights_of(student)
    first = compare(teacher, student, make_texts(16, seed=1))
    result = run_stage(joint_stage(teacher, student))
    assert result.after["student"] < 0.95 * result.before["student"]
    assert compare(teacher, student, make_texts(16, seed=1))["hidden_states"] < first["hidden_states"]
    changed = {key for key, tensor in weights_of(student).items() if not torch.equal(tensor, before[key])}
    assert changed
    assert all(".layers." in f".{key}" for key in changed)


def test_the_whole_student_is_never_worse_than_before():
    teacher, student = make_pair("llama")
    before = weights_of(student)
    result = run_stage(joint_stage(teacher, student, learning_rate=1e2, max_steps=3))
    assert result.after == result.before
    assert equal(weights_of(student), before)


def test_a_language_model_s_loss_is_the_hidden_states_error_and_the_divergence():
    teacher, student = make_pair("gpt2")
    row = make_rows()[0]
    batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    with torch.no_grad():
        total, tokens = joint_losses(teacher, student)(batch)["student"]
        ours, theirs = (model(**batch, output_hidden_states=True) for model in (student, teacher))
    errors = [
        (a - b).square().sum() / b.square().sum()
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    p, q = theirs.logits[0].softmax(-1), ours.logits[0].softmax(-1)  # (seq, vocab_size)
    divergence = (p * (p / q).log()).sum(-1).mean()
    assert tokens == len(row)
    torch.testing.assert_close(total / tokens, sum(errors) / 2 + divergence, rtol=1e-4, atol=1e-5)
