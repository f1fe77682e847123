"""Checkpoints of the authors' training code (fairseq) as transformers folders.

The released decoder language models and roberta-style encoders, T1 and T2, name their tensors
`decoder.layers.0.self_attn.urpe.theta`, `encoder.sentence_encoder.layers.0.glu.l1.weight` and so on. Tensors and
parameters must correspond one to one: if any is missing, left over or of another shape, the conversion lists them all
and writes nothing.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..model.configuration_transnormer import TransNormerConfig
from ..model.modeling_transnormer import TransNormerForCausalLM, TransNormerForMaskedLM
from ..training.files import new_folder

# Released name -> name here; the first pattern that matches the whole name applies.
RENAMES = [
    (r"(?:decoder|encoder\.sentence_encoder)\.embed_tokens\.weight", "model.embed_tokens.weight"),
    (r"encoder\.sentence_encoder\.embed_positions\.weight", "model.embed_positions.embedding.weight"),
    (r"(?:decoder|encoder\.sentence_encoder)\.layernorm_embedding\.(weight|bias)", r"model.embed_norm.\1"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+\.self_attn\.[qkv]_proj\.(?:weight|bias))", r"model.\1"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+\.self_attn\.out_proj\.(?:weight|bias))", r"model.\1"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+\.self_attn)\.urpe\.theta", r"model.\1.lrpe.theta"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+\.self_attn)\.urpe\.v", r"model.\1.lrpe.householder"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+)\.glu\.l1\.(\w+)", r"model.\1.feed_forward.gate_proj.\2"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+)\.glu\.l2\.(\w+)", r"model.\1.feed_forward.up_proj.\2"),
    (r"(?:decoder|encoder\.sentence_encoder)\.(layers\.\d+)\.glu\.l3\.(\w+)", r"model.\1.feed_forward.down_proj.\2"),
    (r"encoder\.lm_head\.((?:dense|layer_norm)\.(?:weight|bias))", r"lm_head.\1"),
    (r"encoder\.lm_head\.bias", "lm_head.decoder.bias"),
]
# Second names of the embedding matrix, which must hold the same numbers.
TIED = re.compile(r"decoder\.output_projection\.weight|encoder\.lm_head\.weight")
# Version and device markers, which are not trained.
WITHOUT_WEIGHT = re.compile(r"(?:decoder|encoder\.sentence_encoder)\.(?:version|embed_positions\._float_tensor)")


class ConversionError(ValueError):
    """The checkpoint does not fit: the message lists every tensor concerned."""


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    config: TransNormerConfig,
    tokenizer: str | os.PathLike | None = None,
) -> PreTrainedModel:
    """Reads a released checkpoint and writes a folder that `AutoModel….from_pretrained` loads.

    Args:
        checkpoint: file with `{"model": state_dict, ...}`, read with `weights_only=True`.
        output_dir: folder to write, new or empty. It appears whole or not at all.
        config: the architecture, for instance a preset's.
        tokenizer: name or folder of a tokenizer to put beside the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConversionError: missing, left-over or misshapen tensors, or a file that is not such a checkpoint.
        FileNotFoundError, FileExistsError: the checkpoint is not there, or output_dir holds files already.
        ValueError: the tokenizer has more tokens than the model.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"output_dir={str(output_dir)!r} exists and is not an empty folder; choose another one.")
    state_dict = read_state_dict(checkpoint)
    is_decoder = any(name.startswith("decoder.") for name in state_dict)
    if is_decoder != config.is_causal:
        family = "a decoder (causal)" if is_decoder else "an encoder (bidirectional)"
        raise ConversionError(f"{checkpoint} holds {family} and the configuration says is_causal={config.is_causal}.")
    model = (TransNormerForCausalLM if is_decoder else TransNormerForMaskedLM)(config).eval()
    model.load_state_dict(convert_state_dict(state_dict, model), strict=False)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tokenizer) if tokenizer is not None else None
    if loaded_tokenizer is not None and len(loaded_tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer={str(tokenizer)!r} has {len(loaded_tokenizer)} tokens and the checkpoint {config.vocab_size}; "
            "it is not the one the model was trained with."
        )

    with new_folder(output_dir) as unfinished:
        model.save_pretrained(unfinished)
        if loaded_tokenizer is not None:
            loaded_tokenizer.save_pretrained(unfinished)
    return model


def read_state_dict(checkpoint: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a fairseq checkpoint, read without running any code from it.

    Only tensors, plain containers and `argparse.Namespace`, which holds fairseq's options, are allowed.
    """
    checkpoint = Path(checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint={str(checkpoint)!r} is not a file.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConversionError(f"{checkpoint} cannot be read as a checkpoint of tensors: {error}") from error
    state_dict = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ConversionError(f'{checkpoint} does not hold {{"model": state_dict, ...}} with a tensor per name.')
    return dict(state_dict)


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The released tensors under the names of `model`, complete and in its shapes.

    Raises ConversionError that lists every missing, left-over and misshapen tensor.
    """
    # named_parameters lists tied weights once; the frozen vectors of LRPE are buffers
    wanted = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    converted: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    for name, tensor in state_dict.items():
        if WITHOUT_WEIGHT.fullmatch(name):
            continue
        if TIED.fullmatch(name):
            embedding = next((value for key, value in state_dict.items() if key.endswith(".embed_tokens.weight")), None)
            if embedding is None or not torch.equal(tensor, embedding):
                problems.append(f"left over: {name} {tuple(tensor.shape)}, not tied to embed_tokens.weight")
            continue
        new_name = next((re.sub(old, new, name) for old, new in RENAMES if re.fullmatch(old, name)), None)
        if new_name is None or new_name not in wanted:
            problems.append(f"left over: {name} {tuple(tensor.shape)}")
            continue
        if new_name.endswith("lrpe.theta"):
            tensor = tensor.flatten()  # (1, 1, head_dim / 2) there
        if tensor.shape != wanted[new_name]:
            problems.append(f"wrong shape: {name} is {tuple(tensor.shape)}, the model has {tuple(wanted[new_name])}")
        converted[new_name] = tensor
    problems += [f"missing: {name} {tuple(shape)}" for name, shape in wanted.items() if name not in converted]
    if problems:
        listing = "\n  ".join(problems)
        raise ConversionError(
            f"the checkpoint and the configuration do not fit ({len(problems)} tensors):\n  {listing}\n"
            "Compare vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, "
            "position_embedding and max_position_embeddings."
        )
    return converted
