"""Sequence parallelism: each rank of a process group holds a slice of every sequence.

To a query of NormAttention, all tokens of other slices are one state K^T V: the ranks exchange (head_dim x head_dim)
states, and nothing as long as the sequence. DiagAttention exchanges nothing, provided that no block is cut by the end
of a slice. Everything else in the model works token by token.

Rank 0 holds the beginning of the sequences. All ranks must take part in every forward and every backward.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from ..model.modeling_transnormer import (
    TransNormerAttention,
    TransNormerDiagAttention,
    TransNormerForCausalLM,
    TransNormerForMaskedLM,
    TransNormerForTokenClassification,
    TransNormerFullAttention,
    TransNormerModel,
    TransNormerNormAttention,
    TransNormerPreTrainedModel,
)
from ..model.ops_transnormer import norm_attention
from ..model.reference_transnormer import LRPE, AttentionMetadata, attention_metadata

# The heads that work token by token; the others pool over a whole sequence.
HEADS = (TransNormerModel, TransNormerForCausalLM, TransNormerForMaskedLM, TransNormerForTokenClassification)


def sequence_parallel_norm_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    feature_map: str = "identity",
    lrpe: LRPE | tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    backend: str = "auto",
    metadata: AttentionMetadata | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`norm_attention` of a sequence that is split over the ranks of `group`.

    The output of a slice is norm_attention whose initial state is the sum of the states of the slices before it
    (causal) or of all others. Forward all-gathers one state per slice, (batch, heads, head_dim, head_dim), and backward
    its gradient.

    Args:
        query, key, value: (batch, heads, seq, head_dim), this rank's slice; slices may differ in length.
        causal, feature_map, lrpe, backend: as in `norm_attention`, the same on every rank. The gradients of `lrpe` are
            those of this slice; summed over the ranks, they are those of the sequence.
        attention_mask: (batch, seq), this rank's slice of it.
        metadata: from `sequence_parallel_metadata`, in place of attention_mask; one serves all layers of a model.
        group: the ranks that share the sequences; None for all.

    Returns:
        This rank's slice of the output, shape and dtype of `value`.

    Raises:
        ValueError: as `norm_attention`, and for packed sequences, a mask beside a metadata, or no process group.
    """
    if metadata is None:
        batch_size, _, seq_len, _ = query.shape
        metadata = sequence_parallel_metadata(batch_size, seq_len, query.device, attention_mask, group=group)
    elif attention_mask is not None:
        raise ValueError("metadata was given together with attention_mask, which it replaces; give one.")
    if metadata.cu_seqlens is not None:
        raise ValueError("metadata has cu_seqlens; packed sequences cannot be split over ranks, pad them instead.")
    options: dict[str, Any] = {"feature_map": feature_map, "lrpe": lrpe, "backend": backend, "metadata": metadata}
    # The state does not depend on the query, and autograd knows.
    _, state = norm_attention(key.detach(), key, value, causal=False, return_state=True, **options)
    others = ExchangeStates.apply(state, causal, group)  # (batch, heads, head_dim, head_dim)
    return norm_attention(query, key, value, causal=causal, initial_state=others, **options)[0]


class ExchangeStates(torch.autograd.Function):
    """The sum of the other ranks' states: of those before this one (causal), or of all.

    A state counts in the sums of the ranks behind its own, so its gradient is the sum of theirs.
    """

    @staticmethod
    def forward(ctx, state, causal, group):
        ctx.causal, ctx.group = causal, group
        return sum_of_other_ranks(state, group, before=True, behind=not causal)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_others):
        return sum_of_other_ranks(grad_others, ctx.group, before=not ctx.causal, behind=True), None, None


def sum_of_other_ranks(
    tensor: torch.Tensor, group: dist.ProcessGroup | None, *, before: bool, behind: bool
) -> torch.Tensor:
    """The sum of the tensors of the ranks before this one, behind it, or both; shape of `tensor`."""
    everyone, rank = gather(tensor, group), dist.get_rank(group)
    total = torch.zeros_like(everyone[0])
    if before:
        total += everyone[:rank].sum(0)
    if behind:
        total += everyone[rank + 1 :].sum(0)
    return total


def gather(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The tensors of all ranks, (ranks, *tensor.shape)."""
    if not dist.is_initialized():
        raise ValueError(
            "sequence parallelism needs a process group: start with `accelerate launch` or torchrun, and call "
            "torch.distributed.init_process_group."
        )
    everyone = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
    # concatenated, the one form that every backend knows
    dist.all_gather_single(everyone.flatten(0, 1), tensor.contiguous(), group=group)
    return everyone


def sequence_parallel_metadata(
    batch_size: int,
    seq_len: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    *,
    block_size: int | None = None,
    max_length: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> AttentionMetadata:
    """`attention_metadata` of this rank's slice; positions count from where its sequences begin, on whichever rank.

    The ranks exchange their lengths, and the host waits for them: once per forward of a model.

    Args:
        batch_size, seq_len: the shape of this rank's slice.
        attention_mask: (batch, seq), this rank's slice, or None; padding may stand on either side.
        block_size: that of DiagAttention, if there is one.
        max_length: of the whole sequence, where positions are learned.
        group: the ranks that share the sequences; None for all.

    Raises:
        ValueError, on all ranks alike: a slice begins inside of a block, or the sequence is longer than max_length.
    """
    leading = torch.zeros(batch_size, dtype=torch.long, device=device)
    if attention_mask is not None:
        positions = attention_metadata(batch_size, seq_len, device, attention_mask).positions  # (batch, seq)
        leading = -positions[:, 0]
    mine = torch.stack((torch.full_like(leading, seq_len), seq_len - leading, leading * 0 + (attention_mask is None)))
    lengths, behind_padding, without_mask = gather(mine, group).cpu().unbind(1)  # (ranks, batch) each
    starts = [torch.zeros(batch_size, dtype=torch.long)]  # positions taken before each slice; 0 where only padding is
    for length, first_tokens in zip(lengths, behind_padding, strict=True):
        starts.append(torch.where(starts[-1] > 0, starts[-1] + length, first_tokens))

    if block_size is not None and any((start % block_size).any() for start in starts[1:-1]):
        rank = next(rank for rank, start in enumerate(starts) if (start % block_size).any())
        raise ValueError(
            f"the slice of rank {rank} begins at positions {starts[rank].tolist()}, inside of a block of DiagAttention "
            f"(block_size={block_size}): give each rank but the last a multiple of {block_size} tokens, and pad on the "
            f"right, or on the left by a multiple of {block_size}."
        )
    total = int(lengths[:, 0].sum())
    if max_length is not None and total > max_length:
        raise ValueError(
            f"the slices have {total} tokens together and max_position_embeddings={max_length} positions were learned; "
            "use position_embedding='sinusoidal' or 'none'."
        )
    start = starts[dist.get_rank(group)]
    if without_mask.all():
        return attention_metadata(batch_size, seq_len, device, position_offset=int(start[0]))
    return attention_metadata(batch_size, seq_len, device, attention_mask, position_offset=start.to(device))


def make_sequence_parallel(
    model: TransNormerPreTrainedModel, group: dist.ProcessGroup | None = None
) -> TransNormerPreTrainedModel:
    """Make the ranks of `group` share sequences: each gives the model its slice of them.

    input_ids, attention_mask, labels and logits are then those of the slice. The label of a causal model's last token
    lies on the next rank, so shift the labels before cutting them, and pass the slice as `labels` and `shift_labels`
    (contiguous). The gradient of the whole sequence is the sum of the ranks' gradients of *summed* losses.

    Returns:
        The model, whose backbone and NormAttentions are now those of this file, with the same parameters; of a model
        without a head, which is all backbone, another object.

    Raises:
        ValueError: a head that pools over the sequence, an attention that is not TransNormer's, or a batch norm, which
            takes all tokens together.
    """
    if not isinstance(model, HEADS):
        raise ValueError(
            f"model is a {type(model).__name__}, which pools over the sequence; sequence parallelism is there for "
            f"{', '.join(head.__name__ for head in HEADS)}."
        )
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            raise ValueError(
                'model has a norm of type "batch", over the tokens of all ranks; sequence parallelism is there for '
                '"simple_rms", "rms" and "layer".'
            )
        is_local_or_linear = isinstance(module, TransNormerNormAttention | TransNormerDiagAttention)
        is_full = isinstance(module, TransNormerFullAttention)
        if isinstance(module, TransNormerAttention) and (is_full or not is_local_or_linear):
            raise ValueError(
                f"model has a {type(module).__name__}, whose tokens meet those of other ranks; sequence parallelism is "
                "there for DiagAttention and NormAttention."
            )
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, TransNormerNormAttention):
                setattr(parent, name, SequenceParallelNormAttention(module, group))
            elif isinstance(module, TransNormerModel):
                setattr(parent, name, SequenceParallelModel(module, group))
    return SequenceParallelModel(model, group) if isinstance(model, TransNormerModel) else model


class SequenceParallelNormAttention(TransNormerNormAttention):
    """NormAttention of a slice, which also meets the states of the other ranks."""

    def __init__(self, attention: TransNormerNormAttention, group: dist.ProcessGroup | None):
        torch.nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)  # its parts and settings: nothing is made anew
        self.group = group

    def attend(self, query, key, value, metadata, lrpe, state):
        if state is not None:
            raise ValueError("a sequence-parallel model keeps no past_key_values; pass use_cache=False.")
        if value.dtype == torch.float16:  # as in one process: the norm brings the sums back into its range
            query, key, value = query.float(), key.float(), value.float()
        return sequence_parallel_norm_attention(
            query,
            key,
            value,
            **self.options,
            lrpe=lrpe,
            metadata=metadata,
            backend=self.config.attention_backend,
            group=self.group,
        )


class SequenceParallelModel(TransNormerModel):
    """The backbone of a slice, whose positions go on from the ranks before."""

    def __init__(self, model: TransNormerModel, group: dist.ProcessGroup | None):
        torch.nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)
        self.group = group

    def _metadata(self, inputs_embeds, attention_mask, position_ids, cache, cu_seqlens):
        given = {"past_key_values": cache, "cu_seq_lens_q": cu_seqlens, "position_ids": position_ids}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} was given to a sequence-parallel model, which takes slices without it.")
        config: Any = self.config
        batch_size, seq_len, _ = inputs_embeds.shape
        return sequence_parallel_metadata(
            batch_size,
            seq_len,
            inputs_embeds.device,
            attention_mask,
            block_size=None if set(config.layer_types) == {"linear_attention"} else config.block_size,
            max_length=config.max_position_embeddings if config.position_embedding == "learned" else None,
            group=self.group,
        )
