"""The models that benchmark_model.py times, all of one size, with random weights and without dropout."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from transnormer_hf import TransNormerConfig
from transnormer_hf.model.modeling_transnormer import TransNormerAttention
from transnormer_hf.research.baselines import baseline_config
from transnormer_hf.research.baselines.flash_quad import GatedAttentionUnit

MODEL_CARDS = Path(__file__).parents[2] / "model_cards"

COMPILED = " compiled"  # behind the name of a model: the same one, compiled once for all lengths

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Size(NamedTuple):
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    vocab_size: int = 8192


class Contender(NamedTuple):
    """A model to time.

    build: size and length to the model with random weights.
    define: turns a copy of the model into its definition, in place; None where transformers answers for it.
    cache: what decoding carries along, "constant" or "grows"; None for models that do not decode.
    prefills_in_chunks: whether a prompt may come in several pieces at full speed.
    """

    build: Callable[[Size, int], PreTrainedModel]
    causal: bool = False
    define: Callable[[PreTrainedModel], None] | None = None
    cache: str | None = None
    prefills_in_chunks: bool = True


def transnormer_config(size: Size, length: int, variant: str, causal: bool) -> TransNormerConfig:
    """The paper's causal or bidirectional model at this size."""
    preset = MODEL_CARDS / f"transnormer-{variant}-{'wikitext103' if causal else 'base'}"
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoConfig.from_pretrained(preset, **size._asdict(), max_position_embeddings=length, **no_dropout)


def build_transnormer(
    size: Size, length: int, variant: str, causal: bool, attend: Attend | None = None
) -> PreTrainedModel:
    """TransNormer, with `attend` in place of its attentions if given."""
    config = transnormer_config(size, length, variant, causal)
    model = (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config)
    if attend is not None:
        replace_attention(model, attend)
    return model


def build_baseline(size: Size, length: int, mixer: str) -> PreTrainedModel:
    if mixer.startswith("flash"):  # a layer without a feed-forward counts for half a one
        size = size._replace(num_hidden_layers=2 * size.num_hidden_layers)
    config = baseline_config(transnormer_config(size, length, "t2", causal=False), mixer)
    model = AutoModelForMaskedLM.from_config(config)
    for module in model.modules():
        if isinstance(module, GatedAttentionUnit):  # its small scale lets nothing through that could be checked
            torch.nn.init.ones_(module.scale)
    return model


def replace_attention(model: PreTrainedModel, attend: Attend) -> None:
    """Put a function of (batch, heads, seq, head_dim) queries, keys and values in the place of every attention."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, TransNormerAttention):
                setattr(parent, name, ReplacedAttention(module, attend))


class ReplacedAttention(TransNormerAttention):
    """The projections and the norm of an attention around another function."""

    def __init__(self, attention: TransNormerAttention, function: Attend):
        torch.nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        self.function = function

    def attend(self, query, key, value, *_):
        return self.function(query, key, value)


def use_definition(model: PreTrainedModel) -> None:
    model.config.backend = "eager"


def build_peer(size: Size, length: int, model_type: str, causal: bool) -> PreTrainedModel:
    """A stock model of transformers at this size, with positions for `length` tokens."""
    width, layers, heads, _ = size
    gated, plain = int(8 / 3 * width), 4 * width  # the same number of weights
    dropout_fields = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    fields: dict[str, Any] = {
        **size._asdict(),
        "max_position_embeddings": length,
        **({} if causal else {"intermediate_size": plain}),
    }
    if model_type == "llama":
        fields |= {"intermediate_size": gated, "num_key_value_heads": heads}
    elif model_type == "minimax":
        # every layer linear; one expert, whose products ask for a width that is a multiple of 16
        fields |= {"intermediate_size": -(-gated // 16) * 16, "num_key_value_heads": heads, "head_dim": width // heads}
        fields |= {"layer_types": ["linear_attention"] * layers, "num_local_experts": 1, "num_experts_per_tok": 1}
    elif model_type == "nystromformer":
        fields |= {"segment_means_seq_len": length}  # left at its default it is the number of landmarks: full attention
    elif model_type == "modernbert":
        fields |= {"intermediate_size": gated}
        dropout_fields = ["attention_dropout", "embedding_dropout", "mlp_dropout"]
    elif model_type == "longformer":
        fields |= {"attention_window": min(512, length), "max_position_embeddings": length + 2}
    elif model_type == "reformer":
        del fields["num_hidden_layers"]
        fields |= {"attn_layers": [("local", "lsh")[index % 2] for index in range(layers)], "hash_seed": 0}
        fields |= {"feed_forward_size": plain, "attention_head_size": width // heads, "axial_pos_embds": False}
        dropout_fields = [
            "hidden_dropout_prob",
            *(f"{layer}_attention_probs_dropout_prob" for layer in ("local", "lsh")),
        ]
    if not causal:
        fields |= dict.fromkeys(dropout_fields, 0.0)
    config = AutoConfig.for_model(model_type, pad_token_id=1, bos_token_id=0, eos_token_id=2, **fields)
    return (AutoModelForCausalLM if causal else AutoModelForMaskedLM).from_config(config)


# Stands in for the attention to time a step without it.


class IdentityOnValue(torch.autograd.Function):
    """Returns the values. Queries and keys get zero gradients, so that their projections cost what they always do: a
    step is all but the attention itself."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zeros = torch.zeros_like(gradient)
        return zeros, zeros, gradient


def identity_on_value(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return IdentityOnValue.apply(query, key, value)


def build_compiled(size: Size, length: int, build: Callable[[Size, int], PreTrainedModel]) -> PreTrainedModel:
    model = build(size, length)
    model.compile(dynamic=True)
    return model


def transnormer(variant: str, causal: bool) -> Contender:
    build = functools.partial(build_transnormer, variant=variant, causal=causal)
    return Contender(build, causal, use_definition, "constant" if causal else None)


def peer(model_type: str, causal: bool = False, cache: str | None = None, **options: Any) -> Contender:
    return Contender(
        functools.partial(build_peer, model_type=model_type, causal=causal), causal, None, cache, **options
    )


def t2_without_attention() -> Contender:
    """Causal T2 whose attentions return their values."""
    build = functools.partial(build_transnormer, variant="t2", causal=True, attend=identity_on_value)
    return Contender(build, True, functools.partial(replace_attention, attend=lambda query, key, value: value))


def in_one_backbone(mixer: str) -> Contender:
    """Bidirectional T2 with a baseline in every layer, without LRPE and without a norm after it."""
    return Contender(functools.partial(build_baseline, mixer=mixer), define=use_definition)


FLOOR = "t2-identity"
# In the order of the turns; when time runs out, the last ones are left out.
CONTENDERS = {
    "transnormer-t2": transnormer("t2", causal=True),
    FLOOR: t2_without_attention(),
    "llama": peer("llama", causal=True, cache="grows"),
    "minimax": peer("minimax", causal=True, cache="constant", prefills_in_chunks=False),
    "transnormer-t2-bidirectional": transnormer("t2", causal=False),
    "bert": peer("bert"),
    "modernbert": peer("modernbert"),
    "transnormer-t1": transnormer("t1", causal=True),
    "transnormer-t1-bidirectional": transnormer("t1", causal=False),
    "nystromformer": peer("nystromformer"),
    "big_bird": peer("big_bird"),
    "longformer": peer("longformer"),
    "reformer": peer("reformer"),
}
TABLE7 = {
    "vanilla": in_one_backbone("softmax"),
    "1+elu": in_one_backbone("1+elu"),
    "performer": in_one_backbone("performer"),
    "cosformer": in_one_backbone("cosformer"),
    "ls": in_one_backbone("transformer_ls"),
    "flash-quad": in_one_backbone("flash_quad"),
    "flash": in_one_backbone("flash"),
    "transnormer-t1-bidirectional": CONTENDERS["transnormer-t1-bidirectional"],
    "transnormer-t2-bidirectional": CONTENDERS["transnormer-t2-bidirectional"],
    "lln": in_one_backbone("lln"),
    "lln-diag": in_one_backbone("lln_diag"),
    "local": in_one_backbone("local"),
    "kernelized": in_one_backbone("kernelized"),
    "skyformer": in_one_backbone("skyformer"),
    "nystrom": in_one_backbone("nystromformer"),
    "linformer": in_one_backbone("linformer"),
    "informer": in_one_backbone("informer"),
    "bigbird": in_one_backbone("bigbird"),
    "lsh": in_one_backbone("reformer"),
}
EVERYTHING = CONTENDERS | TABLE7
EVERYTHING |= {
    name + COMPILED: contender._replace(build=functools.partial(build_compiled, build=contender.build), cache=None)
    for name, contender in CONTENDERS.items()
}
