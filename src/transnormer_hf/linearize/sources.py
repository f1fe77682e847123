"""The weights of a pretrained transformer in a TransNormer (`sources_families.py`: which tensor goes where).

A TransNormer has the same projections, feed-forwards and norms as a BERT or a Llama and differs in what happens between
the projections. So everything is copied: softmax inside a block (DiagAttention of T2) is then exact for texts that fit
into one block, "full_attention" is exact for every text, and NormAttention has weights to start from.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.configuration_transnormer import TransNormerConfig
from ..model.modeling_transnormer import (
    FIRST_POSITION,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForMultipleChoice,
    TransNormerForQuestionAnswering,
    TransNormerForSequenceClassification,
    TransNormerForTokenClassification,
    TransNormerModel,
)
from .sources_families import FAMILIES, HEADS, SAME_FIELDS, Family, Line, Transform

logger = logging.get_logger(__name__)


class SourceError(ValueError):
    """The source cannot be expressed: the message names the configuration field, or lists every tensor concerned."""


# End of the source's class name -> class here.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "Model": TransNormerModel,
    "ForMaskedLM": TransNormerForMaskedLM,
    "LMHeadModel": TransNormerForCausalLM,
    "ForCausalLM": TransNormerForCausalLM,
    "ForSequenceClassification": TransNormerForSequenceClassification,
    "ForTokenClassification": TransNormerForTokenClassification,
    "ForQuestionAnswering": TransNormerForQuestionAnswering,
    "ForMultipleChoice": TransNormerForMultipleChoice,
}


def transfer(
    source: PreTrainedModel,
    layer_types: list[str] | None = None,
    num_linear_layers: int | None = None,
    softmax_layers: list[int] | None = None,
    block_size: int = 64,
    variant: str = "t2",
    max_position_embeddings: int | None = None,
    position_extension: str = "none",
) -> PreTrainedModel:
    """A TransNormer that begins where `source` ends: every weight of it, in the class with the same head.

    With T2 (softmax blocks) layers of DiagAttention compute what the source's do for texts of up to `block_size`
    tokens, and "full_attention" for all texts. NormAttention inherits projections that were made for softmax: train
    those layers before use.

    Args:
        source: a model of one of `FAMILIES`, with or without a head of language modelling, sequences, tokens, spans or
            choices. It stays as it is.
        layer_types: "chunked_attention" (DiagAttention), "linear_attention" (NormAttention) or "full_attention" (the
            source's own) per layer. `None` is the paper's: DiagAttention in the first half, NormAttention in the rest.
        num_linear_layers: instead of `layer_types`, how many of the last layers become NormAttention.
        softmax_layers: indices of layers that become "full_attention", whatever the above says of them.
        block_size: tokens per block of DiagAttention.
        variant: "t2", or "t1", whose relu blocks are not the source's softmax for any text.
        max_position_embeddings: number of positions; `None` is the source's.
        position_extension: how learned positions beyond the source's table come about. "interpolate": the table is
            stretched, linearly between its rows; "tile": it is repeated; "none": they do not.

    Returns:
        The TransNormer in evaluation mode and float32, on the source's device. A Llama's head is no longer tied to the
        embeddings, for it takes the gain of the last norm; the pooler of a bare BERT stays behind.

    Raises:
        SourceError: an architecture, a field of its configuration or a tensor that has no counterpart.
        ValueError: an argument that does not fit the source.
    """
    family, task = recognise(source)
    check_source(source, family, task)
    config = target_config(source, family, task) | {"block_size": block_size, "variant": variant}
    num_layers = source.config.num_hidden_layers
    config["layer_types"] = choose_layer_types(num_layers, layer_types, num_linear_layers, softmax_layers)
    table = position_table(source, family, max_position_embeddings, position_extension)
    if table is not None:
        config["max_position_embeddings"] = len(table) - FIRST_POSITION
    elif max_position_embeddings is not None:
        config["max_position_embeddings"] = max_position_embeddings
    target = MODEL_CLASSES[task](TransNormerConfig(**config)).eval()
    target.load_state_dict(map_parameters(source, target, family, table))
    if target.can_generate():
        target.generation_config = copy.deepcopy(source.generation_config)
    return target.to(source.device)


def recognise(source: PreTrainedModel) -> tuple[Family, str]:
    """The family of a model and what its class name ends in, a key of `MODEL_CLASSES`."""
    model_type, class_name = source.config.model_type, type(source).__name__
    if model_type == "qwen3":
        raise SourceError(
            "model_type='qwen3' normalises queries and keys inside the attention (q_norm, k_norm), which has no "
            "counterpart here; use a Qwen2 or Llama model."
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise SourceError(f"model_type={model_type!r} is not known; known are {', '.join(map(repr, FAMILIES))}.")
    task = class_name.removeprefix(family.class_prefix)
    if task not in MODEL_CLASSES or not class_name.startswith(family.class_prefix):
        raise SourceError(
            f"{class_name} has a head without a counterpart; load the source with AutoModel, or as one of "
            f"{', '.join(family.class_prefix + name for name in MODEL_CLASSES)}, as far as transformers has them."
        )
    return family, task


def check_source(source: PreTrainedModel, family: Family, task: str) -> None:
    """Raises SourceError with the field, its value and what works, unless a TransNormer can compute the same."""
    config = source.config

    def refuse(field: str, value: Any, remedy: str) -> None:
        raise SourceError(f"{config.model_type}: {field}={value!r} cannot be expressed: {remedy}.")

    if getattr(config, "quantization_config", None) is not None:
        refuse("quantization_config", config.quantization_config, "load the source without it, in float32 or bfloat16")
    for field, value, remedy in family.required:
        if getattr(config, field, value) != value:
            refuse(field, getattr(config, field), remedy)
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "embedding_size", hidden_size) != hidden_size:
        remedy = f"embeddings are as wide as hidden_size={hidden_size}; use a source where both are equal"
        refuse("embedding_size", config.embedding_size, remedy)
    if (getattr(config, "head_dim", None) or hidden_size // num_heads) * num_heads != hidden_size:
        remedy = f"num_attention_heads={num_heads} heads must fill hidden_size={hidden_size}; use such a source"
        refuse("head_dim", getattr(config, "head_dim", None), remedy)
    if task == "ForMaskedLM" and (act := family.head_activation) is not None and getattr(config, act) != "gelu":
        refuse(act, getattr(config, act), "the head's activation is 'gelu'; load the source with AutoModel")
    if task == "ForMultipleChoice" and getattr(config, "summary_type", "first") != "first":
        refuse("summary_type", config.summary_type, "the head reads the first token; load the source with AutoModel")
    rotary = getattr(source.base_model, "rotary_emb", None)
    if rotary is not None:
        if rotary.rope_type in ("dynamic", "longrope"):
            remedy = "its angles depend on the text's length; load the source with 'default', 'linear' or 'llama3'"
            refuse("rope_parameters['rope_type']", rotary.rope_type, remedy)
        if rotary.attention_scaling != 1:
            remedy = f"{rotary.rope_type!r} scales the attention; load the source with 'default', 'linear' or 'llama3'"
            refuse("attention_scaling of RoPE", rotary.attention_scaling, remedy)


def target_config(source: PreTrainedModel, family: Family, task: str) -> dict[str, Any]:
    """The source's configuration as fields of TransNormerConfig, but for the layers and positions that are chosen."""
    config = source.config
    fields = {name: getattr(config, name) for name in SAME_FIELDS} | family.fields(config, task)
    fields["attention_norm_type"] = "simple_rms"  # of the layers that softmax attention leaves
    embeddings, head = source.get_input_embeddings(), source.get_output_embeddings()
    if head is not None:  # a tied head cannot take the last norm's gain
        fields["tie_word_embeddings"] = head.weight is embeddings.weight and not family.gains
    return fields


def choose_layer_types(
    num_layers: int,
    layer_types: list[str] | None,
    num_linear_layers: int | None,
    softmax_layers: list[int] | None,
) -> list[str]:
    if layer_types is not None and num_linear_layers is not None:
        raise ValueError(f"layer_types and num_linear_layers={num_linear_layers} say the same; give one of them.")
    if layer_types is None:
        num_linear = num_layers - num_layers // 2 if num_linear_layers is None else num_linear_layers
        if not 0 <= num_linear <= num_layers:
            raise ValueError(f"num_linear_layers={num_linear} must be from 0 to {num_layers}, the source's layers.")
        layer_types = ["chunked_attention"] * (num_layers - num_linear) + ["linear_attention"] * num_linear
    if "hybrid" in layer_types:
        raise ValueError("layer_types holds 'hybrid', two attentions with one set of weights; use one of the others.")
    layer_types = list(layer_types)
    for index in softmax_layers or ():
        if not 0 <= index < num_layers:
            raise ValueError(f"softmax_layers holds {index}; the source's layers are 0 to {num_layers - 1}.")
        layer_types[index] = "full_attention"
    return layer_types


def position_table(
    source: PreTrainedModel, family: Family, num_positions: int | None, extension: str
) -> torch.Tensor | None:
    """Learned positions, (FIRST_POSITION + num_positions, hidden_size) with the unused rows in front; None for RoPE."""
    if extension not in ("none", "interpolate", "tile"):
        raise ValueError(f"position_extension={extension!r} is not known; choose 'none', 'interpolate' or 'tile'.")
    name = next((line[0] for line in family.names if line[1] == "model.embed_positions.embedding"), None)
    if name is None:
        if extension != "none":
            raise ValueError(
                f"position_extension={extension!r}: {source.config.model_type} has no table of positions, its angles "
                "exist for all of them; leave 'none', and load the source with rope_parameters for other angles."
            )
        return None
    weight = source.base_model.get_submodule(name.removeprefix("model.")).weight.detach().float()  # (rows, hidden_size)
    rows = weight[source.config.pad_token_id + 1 :] if family.skips_padding_rows else weight
    if num_positions is None:
        num_positions = len(rows)
    if num_positions > len(rows):
        if extension == "none":
            raise ValueError(
                f"max_position_embeddings={num_positions} and the source learned {len(rows)} positions; choose "
                "position_extension='interpolate' or 'tile'."
            )
        if extension == "tile":
            rows = rows.repeat(-(-num_positions // len(rows)), 1)
        else:
            channels = nn.functional.interpolate(rows.mT[None], num_positions, mode="linear", align_corners=True)
            rows = channels[0].mT
    return nn.functional.pad(rows[:num_positions], (0, 0, FIRST_POSITION, 0))


def map_parameters(
    source: PreTrainedModel, target: PreTrainedModel, family: Family, table: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """The state dict of `target` in float32: the source's tensors, the table of positions, and what the source lacks.

    Raises SourceError that lists every missing, left-over and misshapen tensor.
    """
    # the base model is called "model." on both sides here, also where it is all there is
    base_prefix = "" if source.base_model is source else f"{source.base_model_prefix}."
    own_prefix = "model." if isinstance(target, TransNormerModel) else ""
    wanted = {own_prefix + name: tensor.shape for name, tensor in target.state_dict().items()}

    mapped: dict[str, torch.Tensor] = {}
    gains: list[tuple[str, list[str], torch.Tensor]] = []
    problems: list[str] = []
    for source_name, parameter in source.named_parameters(remove_duplicate=False):  # tied weights by all their names
        name, tensor = source_name, parameter.detach().float()
        if source_name.startswith(base_prefix):
            name = f"model.{source_name.removeprefix(base_prefix)}"
        for names, _ in places(name, family.gains):
            gains.append((source_name, names, tensor))
            break
        else:
            for names, transform in places(name, [*HEADS, *family.names]):
                if all(place in wanted for place in names):
                    tensors = [tensor] if transform is None else transform(tensor, source.config)
                    mapped.update(zip(names, tensors, strict=bool(names)))
                    if not names:
                        logger.info(f"{source_name} has no use without a classification head and is left behind.")
                    break
            else:
                problems.append(f"left over: {source_name} {tuple(tensor.shape)}")
    if table is not None:
        mapped["model.embed_positions.embedding.weight"] = table

    for source_name, names, gain in gains:
        takers = [name for name in names if name in mapped]
        for name in takers:
            mapped[name] = mapped[name] * gain  # (out, in) · (in,)
        if not takers and not torch.equal(gain, torch.ones_like(gain)):
            problems.append(f"left over: {source_name} {tuple(gain.shape)}, a gain that no linear layer follows")

    add_what_is_absent(mapped, wanted, getattr(source.base_model, "rotary_emb", None), target.config.is_causal)
    for name, shape in wanted.items():
        if name not in mapped:
            problems.append(f"missing: {name} {tuple(shape)}")
        elif mapped[name].shape != shape:
            problems.append(f"wrong shape: {name} is {tuple(mapped[name].shape)}, the model has {tuple(shape)}")
    if problems:
        listing = "\n  ".join(problems)
        raise SourceError(
            f"{type(source).__name__} does not fit ({len(problems)} tensors):\n  {listing}\n"
            "Load it with another head, or without one, and without adapters; compare its sizes with its configuration."
        )
    return {name.removeprefix(own_prefix): tensor for name, tensor in mapped.items()}


def add_what_is_absent(
    mapped: dict[str, torch.Tensor], wanted: Mapping[str, torch.Size], rotary: Any, is_causal: bool
) -> None:
    """Add what the source does without: LRPE that does nothing or is its RoPE, biases, a classifier's first layer.

    Angles of 0 rotate nothing, as softmax needs it; NormAttention of a MiniLM learned as well from them as from those
    of a new layer (STS-B dev after 200 steps of attention transfer: 0.8622, 0.8625).
    """
    for name, shape in wanted.items():
        if name.endswith("lrpe.theta"):
            mapped[name] = torch.zeros(shape) if rotary is None else rotary.inv_freq.float()
        elif name.endswith("lrpe.householder"):
            mapped[name] = torch.zeros(shape)  # no reflection
        elif name == "classifier.dense.weight" and is_causal:
            mapped[name] = torch.eye(*shape)
        elif name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in mapped:
            mapped.setdefault(name, torch.zeros(shape))


def places(name: str, lines: Iterable[Line]) -> Iterator[tuple[list[str], Transform | None]]:
    """Where a weight or bias may go by each line that matches its module, and what is done to it."""
    module, _, kind = name.rpartition(".")
    for pattern, here, *transform in lines:
        match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), module)
        if match is not None:
            modules = [here] if isinstance(here, str) else here
            names = [f"{place.replace('*', match[match.lastindex or 0])}.{kind}" for place in modules]
            yield names, transform[0] if transform else None
