"""TransNormer ("The Devil in Linear Transformer", Qin et al., EMNLP 2022): the model, from embeddings to heads.

Early layers use DiagAttention (softmax or relu attention inside blocks), late layers NormAttention (linear attention
whose output is normalised in place of a denominator). Both are functions of `ops_transnormer.py`; this file puts
projections, norms, feed-forwards and heads around them.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, StaticCache
from transformers.generation import GenerationMode
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, fixed_cross_entropy
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_transnormer import StateUpdate, TransNormerCache, adopt_cache, cache_lengths, receive
from .configuration_transnormer import CACHE_NAME, TransNormerConfig
from .ops_transnormer import diag_attention, norm_attention, simple_rms_norm, with_segments, without_autocast
from .reference_transnormer import (
    LRPE,
    AttentionMetadata,
    apply_feature_map,
    apply_lrpe,
    attention_metadata,
    compute_dtype,
    diag_attention_map,
    hidden_keys,
    is_exporting,
    norm_attention_map,
    operator_namespace,
    positioned_metadata,
    prepare_query_key,
    rotation_table,
    zero_padding,
)

if TYPE_CHECKING:  # transformers before 5.10 copies the code files that this one names, and no others
    from .triton_common_transnormer import launch  # noqa: F401
    from .triton_diag_transnormer import triton_diag_attention  # noqa: F401
    from .triton_norm_transnormer import triton_norm_attention  # noqa: F401

logger = logging.get_logger(__name__)

# The released models count positions from 2 on, as fairseq does (padding index + 1, and padding is 1 there).
FIRST_POSITION = 2


class TransNormerRMSNorm(nn.Module):
    """RMSNorm without weights, over the last dimension.

    "simple_rms": x / (rms(x) + eps), the released code's. "rms": x / sqrt(ms(x) + eps), Eq. 14 of the paper.
    """

    def __init__(self, norm_type: str, config: TransNormerConfig):
        super().__init__()
        self.norm_type, self.config = norm_type, config

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm_type == "simple_rms":
            return simple_rms_norm(hidden_states, self.config.rms_norm_eps, self.config.attention_backend)
        wide = hidden_states.to(compute_dtype(hidden_states.dtype))  # in float16 an eps of 1e-8 would be zero
        eps = self.config.rms_norm_eps
        if is_exporting():  # as in `simple_rms_norm`
            wide, eps = wide * 2**12, eps * 2**24
        return nn.functional.rms_norm(wide, wide.shape[-1:], eps=eps).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.norm_type}, eps={self.config.rms_norm_eps}"


class TransNormerBatchNorm(nn.BatchNorm1d):
    """Batch norm over all tokens of a batch, padding included: that of the authors' Long-Range Arena models."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch, seq, hidden_size) to the same
        return super().forward(hidden_states.flatten(0, -2)).view_as(hidden_states)


def make_norm(norm_type: str, config: TransNormerConfig) -> nn.Module:
    """The norm of that name over `hidden_size` channels."""
    if norm_type == "none":
        return nn.Identity()
    if norm_type == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    if norm_type == "batch":
        return TransNormerBatchNorm(config.hidden_size, eps=config.layer_norm_eps)
    return TransNormerRMSNorm(norm_type, config)


class TransNormerLRPE(nn.Module):
    """Parameters of the learned relative position encoding of one attention, shared by its heads, queries and keys.

    theta: (head_dim / 2,) learned angles. householder: (head_dim,) a random unit vector that stays as it is. The
    released code has it as a parameter without gradient; from_pretrained would make such a parameter trainable, a
    buffer stays.

    Both stay float32 in a model of half precision: theta is multiplied by the position, and so is its rounding.
    """

    householder: torch.Tensor

    def __init__(self, head_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(head_dim // 2, dtype=torch.float32))
        self.register_buffer("householder", torch.empty(head_dim, dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """What `.half()`, `.bfloat16()` and `.to()` end in; there is no public hook."""

        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            is_rounded = result.is_floating_point() and result.itemsize < tensor.itemsize
            return tensor.to(result.device) if is_rounded else result

        return super()._apply(keep_precision, *args, **kwargs)

    def forward(self) -> LRPE:
        if self.theta.itemsize < 4:
            logger.warning_once(
                f"LRPE's theta is {self.theta.dtype} here: its rounding grows with the position, and long texts come "
                "out wrong. Keep the parameters float32 and let autocast compute in half precision (FSDP: a "
                "MixedPrecisionPolicy with param_dtype=torch.float32, as this package's Trainer sets it)."
            )
        return LRPE(self.theta, self.householder)


class TransNormerAttention(nn.Module):
    """Projections, one of the two attentions, its norm, and the output projection.

    What happens between the projections, subclasses say, on (batch, heads, seq, head_dim) query, key and value:
    `attend`; `step`, the same for one token after those in the state, which takes it in before the query meets it;
    `attention_map` (batch, heads, seq, seq), and `map_with_past` (batch, heads, seq, seen) of tokens that meet a state.
    A map is None where an attention has none.
    """

    attend: Callable[..., torch.Tensor]
    step: Callable[..., torch.Tensor]
    attention_map: Callable[..., torch.Tensor | None]
    map_with_past: Callable[..., torch.Tensor | None]

    def __init__(self, config: TransNormerConfig, has_norm: bool, gain: float = 1.0):
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.xavier_gain = gain  # type: ignore[assignment]  # read by `_init_weights`
        self.out_proj.xavier_gain = 1.0  # type: ignore[assignment]
        self.lrpe = TransNormerLRPE(self.head_dim) if config.lrpe else None
        self.norm = make_norm(config.attention_norm_type if has_norm else "none", config)

    def forward(
        self, hidden_states: torch.Tensor, metadata: AttentionMetadata, state: StateUpdate | None = None,
        output_attentions: bool = False, query_input: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """hidden_states (batch, seq, hidden_size) to the same, and the map (batch, heads, seq, seq) or None.

        state: this attention's part of the cache, or None. query_input: what queries are made of, if not hidden_states.
        """
        shape = hidden_states.shape
        query_input = hidden_states if query_input is None else query_input
        order = metadata.order  # (batch, seq) or None
        if order is not None:
            hidden_states, query_input = (x.take_along_dim(order[..., None], 1) for x in (hidden_states, query_input))
        query = self._split_heads(self.q_proj(query_input), metadata)
        key = self._split_heads(self.k_proj(hidden_states), metadata)
        value = self._split_heads(self.v_proj(hidden_states), metadata)
        lrpe = self.lrpe() if self.lrpe is not None else None

        weights = output_map = None
        with without_autocast(query.device):  # LRPE, maps and what is done with a state are float32 as well
            if output_attentions and (state is None or state.tokens.is_prefill):
                weights = output_map = self.attention_map(query, key, metadata, lrpe)
            elif output_attentions:
                output_map = self.map_with_past(query, key, metadata, lrpe, state)
            attend = self.step if state is not None and state.tokens.is_step else self.attend
            output = attend(query, key, value, metadata, lrpe, state)  # (batch, heads, seq, head_dim)
            if weights is not None:  # the output goes by way of the map, so that gradients reach the map
                output = (weights @ zero_padding(value.to(weights.dtype), metadata)).to(value.dtype)
        output = self.norm(output.transpose(1, 2).reshape(shape)).to(value.dtype)
        if order is not None:
            back = order.argsort(1)
            output = output.take_along_dim(back[..., None], 1)
            if output_map is not None:
                output_map = output_map.take_along_dim(back[:, None, :, None], 2)
                output_map = output_map.take_along_dim(back[:, None, None, :], 3)
        return self.out_proj(output), output_map

    def _split_heads(self, states: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        # packed sequences may lie in several rows; the attentions take them in one
        batch_size = states.shape[0] if metadata.cu_seqlens is None else 1
        return states.view(batch_size, -1, self.num_heads, self.head_dim).transpose(1, 2)


class TransNormerNormAttention(TransNormerAttention):
    """NormAttention: Norm(phi(Q) (phi(K)^T V)), the norm over all heads together (Eqs. 13-14)."""

    def __init__(self, config: TransNormerConfig):
        super().__init__(config, has_norm=True, gain=2**-0.5)
        self.options: dict[str, Any] = {"causal": config.is_causal, "feature_map": config.feature_map}

    def attend(self, query, key, value, metadata, lrpe, state):
        if value.dtype == torch.float16:  # sums over a long context leave its range before the norm brings them back
            query, key, value = query.float(), key.float(), value.float()
        past = None if state is None or state.tokens.is_prefill else state.past["state"]
        options = self.options | {"lrpe": lrpe, "metadata": metadata, "backend": self.config.attention_backend}
        output, new_state = norm_attention(
            query, key, value, **options, initial_state=past, return_state=state is not None
        )
        if state is not None:
            if state.tokens.is_recorded:  # the state may have to be built anew from these
                wide = compute_dtype(key.dtype)
                _, key = prepare_query_key(query.to(wide), key.to(wide), metadata, self.config.feature_map, lrpe)
            state.append(key, value, new_state)
        return output

    def step(self, query, key, value, metadata, lrpe, state):
        query_key = torch.cat((query, key), 1).to(compute_dtype(query.dtype))  # (batch, 2 * heads, 1, head_dim)
        query_key = apply_feature_map(query_key, self.config.feature_map)
        if lrpe is not None:
            query_key = apply_lrpe(query_key, metadata.positions, lrpe)
        query, key = query_key.chunk(2, 1)
        state.append(key, value)
        return state.state.attend(query)

    def attention_map(self, query, key, metadata, lrpe):
        return norm_attention_map(query, key, metadata=metadata, lrpe=lrpe, **self.options)[0]

    def map_with_past(self, query, key, metadata, lrpe, state):
        return None  # the state is a sum over past keys


class TransNormerDiagAttention(TransNormerAttention):
    """DiagAttention: softmax(Q K^T / sqrt(head_dim)) V inside each block, or with relu, whose output is normalised."""

    def __init__(self, config: TransNormerConfig, has_norm: bool | None = None):
        super().__init__(config, has_norm=config.diag_activation == "relu" if has_norm is None else has_norm)
        self.options: dict[str, Any] = {"causal": config.is_causal, "scale": config.head_dim**-0.5}
        self.options |= {"block_size": config.block_size, "activation": config.diag_activation}
        self.dropout_p = config.attention_probs_dropout_prob

    def attend(self, query, key, value, metadata, lrpe, state):
        dropout_p = self.dropout_p if self.training else 0.0
        options = self.options | {"dropout_p": dropout_p, "backend": self.config.attention_backend}
        if state is None:
            return diag_attention(query, key, value, **options, lrpe=lrpe, metadata=metadata)

        # A state holds rotated keys, so that a later query meets them as they are.
        query, key = self.rotate(query, key, metadata, lrpe)
        value = value.to(key.dtype)
        if state.tokens.is_prefill:
            output = diag_attention(query, key, value, **options, metadata=metadata)
        else:  # the blocks of the new tokens begin with what the state holds
            block_size = self.config.block_size
            past_key, past_value = state.past_block()
            padded_query = nn.functional.pad(query, (0, 0, block_size, 0))
            keys, values = torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)
            output = diag_attention(padded_query, keys, values, **options, metadata=state.tokens.with_past)
            output = output[:, :, block_size:]
        state.append(key, value)
        return output

    def rotate(self, query, key, metadata, lrpe):
        """Query and key as they enter the products, and the state: LRPE within the block, in the accumulating dtype."""
        query_key = torch.cat((query, key), 1).to(compute_dtype(query.dtype))  # (batch, 2 * heads, seq, head_dim)
        if lrpe is not None:
            query_key = apply_lrpe(query_key, metadata.positions % self.options["block_size"], lrpe)
        return query_key.chunk(2, 1)

    def step(self, query, key, value, metadata, lrpe, state):
        query, key = self.rotate(query, key, metadata, lrpe)
        state.append(key, value)
        return state.state.attend(query, state.tokens, self.options["activation"], self.options["scale"])

    def attention_map(self, query, key, metadata, lrpe):
        weights = diag_attention_map(query, key, metadata=metadata, lrpe=lrpe, **self.options)
        return nn.functional.dropout(weights, self.dropout_p, self.training)

    def map_with_past(self, query, key, metadata, lrpe, state):
        query, key = self.rotate(query, key, metadata, lrpe)
        tokens, block_size = state.tokens, self.config.block_size
        if tokens.is_step:
            slots = tokens.slots[:, None, :, None].expand_as(key)
            scores = (query * self.options["scale"]) @ state.past["keys"].scatter(2, slots, key).mT
            if self.options["activation"] == "relu":
                weights = scores.relu()
            else:
                weights = scores.masked_fill(~tokens.visible, torch.finfo(scores.dtype).min).softmax(-1)
            return state.attention_map(weights * tokens.visible, tokens.columns)
        past_key, _ = state.past_block()
        query = nn.functional.pad(query, (0, 0, block_size, 0))
        options = self.options | {"metadata": tokens.with_past, "lrpe": None}
        weights = diag_attention_map(query, torch.cat((past_key, key), 2), **options)
        return state.attention_map(weights[:, :, block_size:], tokens.columns)


class TransNormerFullAttention(TransNormerDiagAttention):
    """Ordinary attention, softmax(Q K^T / sqrt(head_dim)) V over the whole sequence: one block without an end.

    No part of the paper's models: for the layers of a converted model that stay as they were. Its state grows.
    """

    def __init__(self, config: TransNormerConfig):
        super().__init__(config, has_norm=False)
        self.options |= {"activation": "softmax", "block_size": 2**31}

    def attend(self, query, key, value, metadata, lrpe, state):
        query, key = (states.to(value.dtype) for states in self.rotate(query, key, metadata, lrpe))
        visible = None
        if state is None and (metadata.is_real is not None or metadata.sequence_ids is not None):
            hidden = hidden_keys(metadata, self.options["causal"])
            visible = ~hidden | hidden.all(-1, keepdim=True)  # a padding token may see nothing: it sees all, not NaN
        elif state is not None:
            state.append(key, value)
            key, value = state.with_new("keys", key), state.with_new("values", value)
            visible = state.tokens.visible_keys
        options = {"is_causal": self.options["causal"] and visible is None, "scale": self.options["scale"]}
        dropout_p = self.dropout_p if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(query, key, value, visible, dropout_p, **options)

    step = attend

    def map_with_past(self, query, key, metadata, lrpe, state):
        query, key = self.rotate(query, key, metadata, lrpe)
        scores = (query * self.options["scale"]) @ state.with_new("keys", key).mT  # (batch, heads, seq, keys)
        weights = scores.masked_fill(~state.tokens.visible_keys, torch.finfo(scores.dtype).min).softmax(-1)
        return state.attention_map(weights, state.tokens.key_columns)


class TransNormerHybridAttention(nn.Module):
    """Both attentions in one layer (Table 12): their mean, or the output of one as the query of the other.

    Its map (batch, 2 · heads, seq, seq) has the heads of DiagAttention, then those of NormAttention.
    """

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.combination = config.hybrid_combination
        self.diag, self.linear = TransNormerDiagAttention(config), TransNormerNormAttention(config)

    def forward(
        self, hidden_states: torch.Tensor, metadata: AttentionMetadata,
        state: tuple[StateUpdate, StateUpdate] | None = None, output_attentions: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        diag_state, linear_state = (None, None) if state is None else state
        diag, linear = (self.diag, diag_state), (self.linear, linear_state)
        first, second = (linear, diag) if self.combination == "norm_then_diag" else (diag, linear)
        output, weights = first[0](hidden_states, metadata, first[1], output_attentions)
        query_input = None if self.combination == "parallel" else output
        second_output, second_weights = second[0](hidden_states, metadata, second[1], output_attentions, query_input)
        if self.combination == "parallel":
            second_output = (output + second_output) / 2
        maps = [weights, second_weights] if first is diag else [second_weights, weights]
        maps = [weights for weights in maps if weights is not None]  # beside a state, DiagAttention's alone
        return second_output, torch.cat(maps, 1) if maps else None


ATTENTION_CLASSES: dict[str, Callable[[TransNormerConfig], nn.Module]] = {
    "chunked_attention": TransNormerDiagAttention,
    "linear_attention": TransNormerNormAttention,
    "hybrid": TransNormerHybridAttention,
    "full_attention": TransNormerFullAttention,
}


MADE_AGAIN_FROM = 2**20  # numbers; making fewer again would take some percent of a step's time


class TransNormerFeedForward(nn.Module):
    """GLU: down(act(gate(x)) * up(x)), or FFN: down(act(up(x))); a bias in every projection."""

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.gate_proj = None
        if config.feed_forward == "glu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(hidden_states)
        up = self.up_proj(hidden_states)
        # The backward pass keeps these two, and makes again what is made of them elementwise, where that saves much.
        is_large = self.training and not torch.compiler.is_compiling() and up.numel() >= MADE_AGAIN_FROM
        if is_large and is_plain_linear(self.down_proj):
            inputs = (gate, up, self.down_proj.weight, self.down_proj.bias)
            return checkpoint(self._down, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.down_proj(self._inner(gate, up))

    def _inner(self, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
        return self.act_fn(up) if gate is None else self.act_fn(gate) * up

    def _down(self, gate, up, weight, bias):  # the weights are passed: the module may have others by then
        return nn.functional.linear(self._inner(gate, up), weight, bias)


class TransNormerAttentionMap(nn.Identity):
    """Where `output_attentions` takes the map of a layer, or the None of an attention that has none: one place each."""


class TransNormerLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual branch, the norm before (pre) or after the sum (post)."""

    def __init__(self, config: TransNormerConfig, layer_idx: int):
        super().__init__()
        self.self_attn = ATTENTION_CLASSES[config.layer_types[layer_idx]](config)
        self.feed_forward = TransNormerFeedForward(config)
        self.attention_map = TransNormerAttentionMap()
        self.attention_norm = make_norm(config.norm_type, config)
        self.feed_forward_norm = make_norm(config.norm_type, config)
        self.is_pre_norm = config.norm_placement == "pre"
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden_states: torch.Tensor, metadata: AttentionMetadata,
        state: StateUpdate | tuple[StateUpdate, StateUpdate] | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:  # fmt: skip
        # (batch, seq, hidden_size) throughout
        branch = self.attention_norm(hidden_states) if self.is_pre_norm else hidden_states
        branch, weights = self.self_attn(branch, metadata, state, **kwargs)
        if kwargs.get("output_attentions"):
            self.attention_map(weights)
        hidden_states = hidden_states + self.dropout(branch)
        if not self.is_pre_norm:
            hidden_states = self.attention_norm(hidden_states)

        branch = self.feed_forward_norm(hidden_states) if self.is_pre_norm else hidden_states
        hidden_states = hidden_states + self.dropout(self.feed_forward(branch))
        return hidden_states if self.is_pre_norm else self.feed_forward_norm(hidden_states)


class TransNormerPositions(nn.Module):
    """Absolute positions added to the embeddings: a learned table, sines and cosines, or nothing."""

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.kind, self.hidden_size = config.position_embedding, config.hidden_size
        self.max_positions = config.max_position_embeddings
        self.embedding = None
        if self.kind == "learned":
            # row 1 is fairseq's row for padding: never used, there so that released tables fit
            self.embedding = nn.Embedding(config.max_position_embeddings + FIRST_POSITION, config.hidden_size, 1)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor, max_length: int | None) -> torch.Tensor:
        """hidden_states (batch, seq, hidden_size) plus the embedding of positions, (seq,) or (batch, seq).

        max_length: a number that no position reaches; None: the host looks for the largest, and waits for the device.

        Raises ValueError for positions that were not learned.
        """
        if self.kind == "none":
            return hidden_states
        positions = positions.clamp(min=0)
        if self.kind == "learned":
            if max_length is None:
                max_length = int(positions.max()) + 1 if positions.numel() and not torch.compiler.is_compiling() else 0
            if max_length > self.max_positions:
                raise ValueError(
                    f"the input has {max_length} tokens and max_position_embeddings={self.max_positions} positions "
                    "were learned; truncate the input, or use position_embedding='sinusoidal' or 'none'."
                )
            return hidden_states + self.embedding(positions + FIRST_POSITION)
        positions = positions + FIRST_POSITION
        half = self.hidden_size // 2
        # powers in float64: the last digit of a float32, which libraries round differently, counts times the position
        wide = torch.float32 if hidden_states.device.type == "mps" else torch.float64
        steps = torch.arange(half, device=hidden_states.device, dtype=wide)
        cos, sin = rotation_table(positions, (10000 ** (-steps / (half - 1))).float())
        return hidden_states + torch.cat((sin, cos), -1).to(hidden_states.dtype)


@auto_docstring
class TransNormerPreTrainedModel(PreTrainedModel):
    config: TransNormerConfig
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransNormerLayer"]
    _skip_keys_device_placement = [CACHE_NAME]
    _keep_in_fp32_modules_strict = ["lrpe"]
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": TransNormerLayer,
        "attentions": OutputRecorder(TransNormerAttentionMap),
    }

    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        # of the card that the Trainer writes: the Hub asks for trust where it sees this tag
        self.add_model_tags(["custom_code"])

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={attn_implementation!r} is a form of softmax attention over a whole text, which "
                f'{type(self).__name__} does not compute. Use "sdpa" (the same as to leave it out: the fast form of '
                'these attentions that `backend` in the configuration names) or "eager" (their definitions).'
            )
        return attn_implementation or "sdpa"

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TransNormerLRPE):
            pairs = torch.arange(module.theta.shape[0], device=module.theta.device, dtype=torch.float32)
            init.copy_(module.theta, 10000 ** (-pairs / module.theta.shape[0]))
            direction = torch.randn_like(module.householder, dtype=torch.float32)
            init.copy_(module.householder, direction / direction.norm())
        if self.config.initializer == "xavier":
            self._init_as_released_decoder(module)

    def _init_as_released_decoder(self, module: nn.Module) -> None:
        """Embeddings N(0, 1/sqrt(hidden_size)), Xavier-uniform attention, torch's default elsewhere; biases are zero.

        It goes by modules that hold weights: transformers passes over the others where the code is not its own.
        """
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif hasattr(module, "xavier_gain"):
            init.xavier_uniform_(module.weight, gain=module.xavier_gain)
        elif isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)


@auto_docstring
class TransNormerModel(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.is_causal = config.is_causal  # of the layers; what forward is given as is_causal must agree
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_index(config))
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.embed_token_types = None
        if config.type_vocab_size:
            self.embed_token_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_positions = TransNormerPositions(config)
        self.embed_norm = make_norm(config.embedding_norm, config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(TransNormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config.final_norm, config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None, use_cache: bool | None = None, cache: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:  # fmt: skip
        r"""
        past_key_values (`Cache`, *optional*):
            The state of earlier tokens: a `TransNormerCache`, or a `DynamicCache(config=...)`, which becomes one.
        cache (`Cache`, *optional*):
            The name of `past_key_values` since transformers 5.24; either may be given on any release.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds.")
        cache = given_cache(past_key_values, cache)
        check_other_arguments(kwargs, self.is_causal)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # (batch, seq, hidden_size)

        if cache is not None:
            if not self.is_causal:
                raise ValueError(
                    f"{CACHE_NAME} was given to a bidirectional model (is_causal=False), which has none. In place of "
                    "prefix tuning: transnormer_hf.training.state_tuning."
                )
            adopt_cache(cache, self.config)
        metadata = self._metadata(inputs_embeds, attention_mask, position_ids, cache, kwargs.get("cu_seq_lens_q"))
        metadata = with_segments(metadata)
        is_packed = metadata.cu_seqlens is not None
        positions = metadata.positions.view(inputs_embeds.shape[:2]) if is_packed else metadata.positions
        if position_ids is not None:
            positions = position_ids
        max_length: int | None = inputs_embeds.shape[1]
        if is_packed and position_ids is None and positions.device.type != "cpu":
            max_length = 0  # cu_seq_lens_q is there to spare the host a look
        elif is_packed or position_ids is not None or not isinstance(cache_lengths(cache), int):
            max_length = None
        hidden_states = inputs_embeds * self.embed_scale
        if self.embed_token_types is not None:
            is_told = token_type_ids is not None
            token_types = token_type_ids if is_told else positions.new_zeros(inputs_embeds.shape[:2])
            hidden_states = hidden_states + self.embed_token_types(token_types)
        hidden_states = self.embed_positions(hidden_states, positions, max_length)
        hidden_states = self.dropout(self.embed_norm(hidden_states))

        if cache is None and use_cache and self.is_causal and not (self.training or is_packed or is_exporting()):
            cache = TransNormerCache(self.config)
        updates: list[Any] = [None] * len(self.layers)
        if cache is not None:
            updates = receive(cache, metadata, batch_size=inputs_embeds.shape[0])

        kwargs.setdefault("output_attentions", self.config.output_attentions)
        for layer, state in zip(self.layers, updates, strict=True):
            hidden_states = layer(hidden_states, metadata=metadata, state=state, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _metadata(self, inputs_embeds, attention_mask, position_ids, cache, cu_seqlens):
        """Where the tokens stand, from whichever description of padding or packing was given."""
        batch_size, seq_len, _ = inputs_embeds.shape
        lengths = cache_lengths(cache)
        has_past = not isinstance(lengths, int)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < seq_len:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; supported is (batch, seq) = "
                    f"{(batch_size, seq_len)}, or with the columns of earlier tokens in front, of 1 for real tokens "
                    "and 0 for padding. Causality is part of the model (is_causal), packed sequences are given by "
                    "position_ids that restart or by cu_seq_lens_q."
                )
            if attention_mask.shape[1] > seq_len and not has_past:
                raise CacheError(
                    f"attention_mask has {attention_mask.shape[1]} columns for {seq_len} tokens, and no state of the "
                    f"tokens before them was given as {CACHE_NAME}. {_HOST_HAS_CHANGED}"
                )
            attention_mask = attention_mask[:, -seq_len:]
            has_both = (position_ids is not None and seq_len > 1) or cu_seqlens is not None
            is_seen = has_both or attention_mask.device.type == "cpu"  # elsewhere the host would wait for the device
            if is_seen and not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and bool(attention_mask.all()):
                attention_mask = None  # without zeros it says nothing, and packing is found
        if position_ids is not None:
            position_ids = position_ids.expand(batch_size, seq_len)
            if attention_mask is None and cu_seqlens is None and not (has_past and seq_len == 1):
                cu_seqlens = packed_boundaries(position_ids)
        if cu_seqlens is not None:
            if cache is not None:
                raise ValueError(f"packed sequences cannot fill a {CACHE_NAME}; pass use_cache=False.")
            return attention_metadata(1, batch_size * seq_len, inputs_embeds.device, attention_mask, cu_seqlens)
        if position_ids is not None:
            return positioned_metadata(position_ids, attention_mask, has_past, cache is not None)
        return attention_metadata(batch_size, seq_len, inputs_embeds.device, attention_mask, position_offset=lengths)


def padding_index(config: TransNormerConfig) -> int | None:
    """The token whose embedding is zero and never learned: padding, unless it begins or ends texts as well."""
    eos = config.eos_token_id
    others = [config.bos_token_id, *(eos if isinstance(eos, list) else [eos])]
    return None if config.pad_token_id in others else config.pad_token_id


class CacheError(ValueError, RuntimeError):
    """The state of earlier tokens is missing or came by an unknown way. Going on would compute something else."""


_HOST_HAS_CHANGED = (
    f"This code knows it as past_key_values and cache, and runs with transformers {transformers.__version__}; if "
    "`generate` called, use another release of transformers or pass use_cache=False."
)

# Tensors that forward takes in `**kwargs`: those of `TransformersKwargs` (lengths of packed sequences, and what the
# loss is divided by), and what the tokenizers, Trainers and older releases of transformers hand to every model.
PASSED_ON = {*TransformersKwargs.__annotations__, "cache_position", "shift_labels", "token_type_ids"}


def given_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The one that was given. Raises ValueError if these are two different ones."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            f"cache and past_key_values are two names of one argument and were given two different caches; pass "
            f"{CACHE_NAME} alone (its name in transformers {transformers.__version__})."
        )
    return past_key_values if cache is None else cache


def check_other_arguments(kwargs: Mapping[str, Any], is_causal: bool) -> None:
    """Raises if an argument that forward does not know would have changed the result.

    CacheError for a cache under an unknown name, TypeError for a tensor, ValueError for `is_causal` against the model.
    """
    if kwargs.get("is_causal", is_causal) != is_causal:
        raise ValueError(
            f"is_causal={kwargs['is_causal']} was given to a model that was built with is_causal={is_causal}; set it "
            "in the configuration."
        )
    for name, value in kwargs.items():
        if isinstance(value, Cache):
            raise CacheError(f"forward got a {type(value).__name__} as {name!r}. {_HOST_HAS_CHANGED}")
        if isinstance(value, torch.Tensor) and name not in PASSED_ON:
            raise TypeError(
                f"forward got an unexpected tensor {name!r} of shape {tuple(value.shape)}; it would be ignored. "
                f"What is passed on: {', '.join(sorted(PASSED_ON))}."
            )


def packed_boundaries(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Boundaries of packed sequences, (num_sequences + 1,), where positions (batch, seq) restart; None if none does.

    Rows follow each other, each begins a sequence. This looks at values, so it waits for the device once per forward;
    `cu_seq_lens_q` (`DataCollatorWithFlattening(return_flash_attn_kwargs=True)`) spares that.
    """
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids alone cannot be searched for packed sequences inside torch.compile or torch.export; pass "
            "cu_seq_lens_q for packed sequences, attention_mask for padded ones, and no position_ids otherwise."
        )
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1]) != 1  # the first column of a row always does
    if int(starts.sum()) == len(starts):
        return None
    starts = starts.flatten().nonzero().flatten()
    return torch.nn.functional.pad(starts, (0, 1), value=position_ids.numel())


# The loss of language models
#
# The logits of all tokens would be the largest tensors of a training step. Here they exist for a chunk of tokens at a
# time, and not at all for tokens without a label. Gradients are computed on the way forward: computing the logits again
# in the backward pass takes 1.4 times as long.

IGNORED = -100  # the label of tokens without one, as in transformers
LOGITS_AT_A_TIME = 2**24  # 64 MB in float32; but 64 tokens at least, fewer make slow products
# No CUDA graph holds the operator, which looks at the number of labels. (torch before 2.9 has no such tag.)
TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


def skips_logits(model: PreTrainedModel, skip_logits: bool | None, labels: torch.Tensor | None, options: Any) -> bool:
    """Whether a language model computes the loss without logits: with labels, in training or on request.

    Not where more happens than it knows: a loss of the user's own (`model.loss_function = ...`), another
    `ignore_index`, a last projection with LoRA, hooks, a sharded or a quantised weight.
    """
    is_known = model.loss_function in (ForCausalLMLoss, ForMaskedLMLoss) and "ignore_index" not in options
    is_wanted = model.training if skip_logits is None else skip_logits
    return labels is not None and is_wanted and is_known and is_plain_linear(model.get_output_embeddings())


def is_plain_linear(linear: Any) -> bool:
    """Whether a module is no more than its weight and bias."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    is_bare = "forward" not in vars(linear) and not any(getattr(linear, f"_{kind}_hooks") for kind in kinds)
    return is_bare and type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)


def token_cross_entropy(
    linear: nn.Linear, hidden_states: torch.Tensor, labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None, reduction: str = "mean", **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Cross-entropy of `linear(hidden_states)` with labels, without all logits in memory; softmax and sums in float32.

    Args:
        hidden_states: (..., hidden_size).
        labels: (...), token ids, or -100 for none.
        num_items_in_batch: what the sum is divided by; None: the number of labels. A 0 counts as 1.
        reduction: "mean", or "none" for the loss of each token, (...), which has no gradient.

    Raises ValueError for labels of another shape; RuntimeError in backward with create_graph=True.
    """
    if labels.shape != hidden_states.shape[:-1]:
        expected = tuple(hidden_states.shape[:-1])
        raise ValueError(f"labels have shape {tuple(labels.shape)}; those of these hidden states have {expected}.")
    device, weight, is_mean = hidden_states.device, linear.weight, reduction == "mean"
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device.type))
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias
    inputs = (hidden_states.flatten(0, -2), weight, bias)
    needs = [tensor.requires_grad and torch.is_grad_enabled() and is_mean for tensor in inputs]
    total, losses, *_ = linear_cross_entropy(*inputs, labels.flatten().to(device), needs)
    if not is_mean:
        return losses.detach().view(labels.shape)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=device).clamp(min=1)


@torch.library.custom_op(
    f"{operator_namespace(__name__)}::linear_cross_entropy", mutates_args=(), **TAGS,
    schema="(Tensor hidden_states, Tensor weight, Tensor bias, Tensor labels, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
def linear_cross_entropy(hidden_states, weight, bias, labels, needs):
    """The sum of the losses, the losses (tokens,), and the gradients of the sum, without entries where none is needed.

    hidden_states: (tokens, hidden_size), in the dtype of the products; weight: (vocab_size, hidden_size); bias:
    (vocab_size,); labels: (tokens,); needs: of the first three, whether it needs a gradient.
    """
    _, losses, *grads = room_for_losses(hidden_states, weight, bias, labels, needs)
    dtype, wide = hidden_states.dtype, losses.dtype
    weight, bias = weight.to(dtype), bias.to(dtype)
    for rows in (labels != IGNORED).nonzero().squeeze(1).split(max(64, LOGITS_AT_A_TIME // len(weight))):
        states, targets = hidden_states[rows], labels[rows, None]  # (chunk, hidden_size), (chunk, 1)
        scores = nn.functional.linear(states, weight, bias).to(wide)  # (chunk, vocab_size)
        torch.log_softmax(scores, -1, out=scores)
        losses[rows] = -scores.gather(1, targets).squeeze(1)
        if any(needs):  # the gradient of the logits: the probabilities, less 1 for the label
            scores.exp_().scatter_add_(1, targets, scores.new_full(targets.shape, -1))
            narrow = scores.to(dtype)
        if needs[0]:
            grads[0][rows] = (narrow @ weight).to(wide)
        if needs[1] and dtype == wide:
            grads[1].addmm_(narrow.T, states)
        elif needs[1]:
            grads[1].add_(narrow.T @ states)
        if needs[2]:
            grads[2].add_(scores.sum(0))
    return losses.sum(), losses, *grads


@linear_cross_entropy.register_fake
def room_for_losses(hidden_states, weight, bias, labels, needs):
    """Zeros in the shapes of what `linear_cross_entropy` returns."""
    shapes = [tensor.shape if need else 0 for tensor, need in zip((hidden_states, weight, bias), needs, strict=True)]
    dtype = compute_dtype(hidden_states.dtype)
    return tuple(hidden_states.new_zeros(shape, dtype=dtype) for shape in ((), labels.shape, *shapes))


def scale_gradients(ctx, grad_total, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative; pass skip_logits=False to have one.")
    pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    return *(grad * grad_total if is_needed else None for grad, is_needed in pairs), None, None


def save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


linear_cross_entropy.register_autograd(scale_gradients, setup_context=save_gradients)


@auto_docstring
class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransNormerConfig):
        if not config.is_causal:  # a causal model on a bidirectional encoder would see what it predicts
            config = copy.deepcopy(config)
            config.is_causal, config.pooling = True, "last"
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None, labels: torch.LongTensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | torch.Tensor = 0, cache: Cache | None = None,
        skip_logits: bool | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:  # fmt: skip
        r"""
        past_key_values (`Cache`, *optional*):
            The state of earlier tokens: a `TransNormerCache`, or a `DynamicCache(config=...)`, which becomes one.
        cache (`Cache`, *optional*):
            The name of `past_key_values` since transformers 5.24; either may be given on any release.
        skip_logits (`bool`, *optional*):
            Whether to compute the loss of the labels without logits, which are then None (see `skips_logits`). The
            default is to do so in training.
        """
        cache = given_cache(past_key_values, cache)
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept, :]  # (batch, kept, hidden_size)
        loss = logits = None
        if skips_logits(self, skip_logits, labels, kwargs):
            shifted = kwargs.get("shift_labels")
            shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if shifted is None else shifted
            loss = token_cross_entropy(self.lm_head, hidden_states, shifted, **kwargs)
        else:
            logits = self.lm_head(hidden_states)  # (batch, kept, vocab_size)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        is_for_caller = labels is None and self.training and kwargs.get("num_items_in_batch") is not None
        if is_for_caller and not torch.compiler.is_compiling():
            logger.warning_once(
                "The Trainer computes the loss of these logits by itself. If that is for label_smoothing_factor, it is"
                " wrong: transformers shifts the labels only for the causal models that it knows by name. Use"
                " transnormer_hf.training.fine_tuning.CardTrainer, or a compute_loss_func."
            )
        kept_outputs = {name: outputs.get(name) for name in (CACHE_NAME, "hidden_states", "attentions")}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **kept_outputs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, but with the states of this model in the cache before the first forward.

        forward would adopt the cache as well. Two things must happen earlier: a stock cache of linear attention alone
        cannot tell its length, and transformers before 5.14 crops a cache without having asked it to record.
        """
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                'cache_implementation="quantized" has nothing to gain here: the state is of constant size and held in '
                "float32; leave cache_implementation out."
            )
        was_given = model_kwargs.get(CACHE_NAME) is not None
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            return
        is_assisted = GenerationMode.ASSISTED_GENERATION in (*args, *kwargs.values())
        # before 5.14 nobody asks a cache to record, and 5.14 not that of the assistant
        must_record = generation_config.is_assistant or (is_assisted and not hasattr(Cache, "activate_past_recording"))
        if was_given:
            adopt_cache(cache, self.config)
        else:  # a TransNormerCache, so that what `generate` returns can be saved
            must_record = must_record or any(getattr(layer, "record_past", False) for layer in cache.layers)
            cache = TransNormerCache(self.config, is_compileable=isinstance(cache, StaticCache))
            model_kwargs[CACHE_NAME] = cache
        if is_assisted and generation_config.output_attentions and "linear_attention" in self.config.layer_types:
            raise ValueError(
                "output_attentions=True with assisted decoding: NormAttention has no attention map next to a state; "
                "leave one of the two out."
            )
        if must_record:
            for layer in cache.layers:
                layer.activate_past_recording()
        if was_given and generation_config.is_assistant:  # transformers 5.15 crops the assistant's cache too little
            mask, length = model_kwargs.get("attention_mask"), getattr(generation_config, "_mask_length", None)
            length = length if mask is None else mask.shape[1]
            if length is not None and cache.get_seq_length() >= length:
                cache.crop(length - 1 - cache.get_seq_length())

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Continuous batching pages keys and values; a TransNormer has none: use generate.")

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads its signature
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new_ids, cache = inputs.get("input_ids"), inputs.get(CACHE_NAME)
        if new_ids is None or new_ids.shape[1] == input_ids.shape[1]:
            return inputs
        total, new, seen = input_ids.shape[1], new_ids.shape[1], 0 if cache is None else cache.get_seq_length()
        if not new:
            raise ValueError(
                f"The input has {total} tokens and {CACHE_NAME} has taken in {seen}: pass the whole sequence, or the "
                "new tokens with an attention_mask for the whole sequence."
            )
        if seen + new < total:
            raise CacheError(
                f"generate hands over {new} of {total} tokens, and the state has taken in {seen}: it did not advance. "
                f"{_HOST_HAS_CHANGED}"
            )
        return inputs

    @staticmethod
    def create_masks_for_generate(
        config: TransNormerConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor | None:
        """The columns of the new tokens: the state knows the rest, and a compiled step sees one shape and stride."""
        if attention_mask is None:
            return None
        return attention_mask[:, -inputs_embeds.shape[1] :].clone(memory_format=torch.contiguous_format)


class TransNormerLMHead(nn.Module):
    """dense, gelu, LayerNorm, then the tied embedding matrix with a bias per token (the released encoder's)."""

    def __init__(self, config: TransNormerConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor, labels: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """The logits (..., vocab_size) or, with labels (...), the loss, as in `token_cross_entropy`."""
        hidden_states = self.layer_norm(nn.functional.gelu(self.dense(hidden_states)))
        if labels is None:
            return self.decoder(hidden_states)
        return token_cross_entropy(self.decoder, hidden_states, labels, **options)


@auto_docstring
class TransNormerForMaskedLM(TransNormerPreTrainedModel):
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = TransNormerLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None, position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None, labels: torch.LongTensor | None = None,
        skip_logits: bool | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:  # fmt: skip
        r"""
        skip_logits (`bool`, *optional*):
            Whether to compute the loss of the labels without logits, which are then None (see `skips_logits`). The
            default is to do so in training.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids,
            **kwargs,
        )  # fmt: skip
        loss = logits = None
        if skips_logits(self, skip_logits, labels, kwargs):
            loss = self.lm_head(outputs.last_hidden_state, labels, **kwargs)
        else:
            logits = self.lm_head(outputs.last_hidden_state)  # (batch, seq, vocab_size)
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss, logits, outputs.hidden_states, outputs.attentions)


# Not transformers' generic heads: their AutoModel.from_config asks for trust_remote_code again; no mask is read.
class TransNormerClassificationHead(nn.Module):
    """dropout, dense, activation, dropout, projection on a vector per sequence, as in RoBERTa (tanh)."""

    def __init__(self, config: TransNormerConfig, num_outputs: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.classifier_activation]
        self.dropout = make_classifier_dropout(config)
        self.out_proj = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        pooled = self.activation(self.dense(self.dropout(pooled)))
        return self.out_proj(self.dropout(pooled))


def make_classifier_dropout(config: TransNormerConfig) -> nn.Dropout:
    is_given = config.classifier_dropout is not None
    return nn.Dropout(config.classifier_dropout if is_given else config.hidden_dropout_prob)


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """One vector per sequence: its first or last real token, or the mean of all real ones.

    hidden_states: (batch, seq, hidden_size); attention_mask: (batch, seq) or None. Returns (batch, hidden_size), zeros
    for a row of padding pooled by "mean".
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(hidden_states[..., 0])
    is_real = attention_mask.bool()  # (batch, seq)
    if pooling == "mean":
        wide = compute_dtype(hidden_states.dtype)  # a sum over a long text leaves the range of float16
        total = hidden_states.masked_fill(~is_real[..., None], 0).sum(1, dtype=wide)
        return (total / is_real.sum(1, keepdim=True).clamp(min=1)).to(hidden_states.dtype)
    if pooling == "first":
        token = is_real.int().argmax(1)  # (batch,)
    else:
        token = is_real.shape[1] - 1 - is_real.int().flip(1).argmax(1)
    return hidden_states.gather(1, token[:, None, None].expand(-1, 1, hidden_states.shape[-1])).squeeze(1)


@auto_docstring
class TransNormerForSequenceClassification(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransNormerModel(config)
        self.classifier = TransNormerClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None, position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None, labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:  # fmt: skip
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids,
            **kwargs | {"use_cache": False},
        )  # fmt: skip
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.pooling)  # (batch, hidden_size)
        logits = self.classifier(pooled)  # (batch, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                # The other two losses of transformers are means over the micro-batch whatever is passed.
                loss = loss * labels.numel() / num_items
        return SequenceClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


@auto_docstring
class TransNormerForTokenClassification(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TransNormerModel(config)
        self.dropout = make_classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None, position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None, labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenClassifierOutput:  # fmt: skip
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids,
            **kwargs | {"use_cache": False},
        )  # fmt: skip
        logits = self.classifier(self.dropout(outputs.last_hidden_state))  # (batch, seq, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


@auto_docstring
class TransNormerForQuestionAnswering(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None, position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None, start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None, **kwargs: Unpack[TransformersKwargs],
    ) -> QuestionAnsweringModelOutput:  # fmt: skip
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, token_type_ids=token_type_ids,
            **kwargs | {"use_cache": False},
        )  # fmt: skip
        logits = self.qa_outputs(outputs.last_hidden_state)  # (batch, seq, 2)
        start_logits, end_logits = (half.contiguous() for half in logits.unbind(-1))  # (batch, seq)
        loss = None
        if start_positions is not None and end_positions is not None:
            if self.training:
                # The Trainer counts no items where there are two labels and averages its micro-batches: each row has
                # the same weight, however many of a micro-batch have their answer outside of the text.
                kwargs.setdefault("num_items_in_batch", start_positions.numel())
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(loss, start_logits, end_logits, outputs.hidden_states, outputs.attentions)


@auto_docstring
class TransNormerForMultipleChoice(TransNormerPreTrainedModel):
    def __init__(self, config: TransNormerConfig):
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.classifier = TransNormerClassificationHead(config, num_outputs=1)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self, input_ids: torch.LongTensor | None = None, attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None, position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None, labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MultipleChoiceModelOutput:  # fmt: skip
        # (batch, choices, seq) is run as (batch * choices, seq)
        num_choices = (input_ids if input_ids is not None else inputs_embeds).shape[1]
        flat_ids, flat_mask, flat_types, flat_positions, flat_embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        outputs = self.model(
            flat_ids, flat_mask, flat_positions, inputs_embeds=flat_embeds, token_type_ids=flat_types,
            **kwargs | {"use_cache": False},
        )  # fmt: skip
        pooled = pool(outputs.last_hidden_state, flat_mask, self.config.pooling)
        logits = self.classifier(pooled).view(-1, num_choices)  # (batch, choices)
        loss = None
        if labels is not None:
            loss = fixed_cross_entropy(logits, labels, kwargs.get("num_items_in_batch"))
        return MultipleChoiceModelOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = [
    "TransNormerForCausalLM", "TransNormerForMaskedLM", "TransNormerForMultipleChoice",
    "TransNormerForQuestionAnswering", "TransNormerForSequenceClassification", "TransNormerForTokenClassification",
    "TransNormerModel", "TransNormerPreTrainedModel",
]  # fmt: skip
