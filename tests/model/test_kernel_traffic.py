"""The bytes that the kernels move, counted from their grids and tiles, against the memory floor (4 U and 7 U)."""

import pytest
import torch

from kernel_registry.diag import diag_attention_traffic
from kernel_registry.norm import norm_attention_traffic
from transnormer_hf.model import triton_diag_transnormer, triton_norm_transnormer
from transnormer_hf.model.ops_transnormer import diag_attention, norm_attention

BATCH_SIZE, NUM_HEADS, SEQ_LEN = 1, 12, 8192


def in_units(traffic, head_dim):
    """(forward, backward) bytes as multiples of U, for 16-bit elements."""
    return tuple(count / (BATCH_SIZE * NUM_HEADS * SEQ_LEN * head_dim * 2) for count in traffic)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_diag_attention(head_dim, block_size):
    traffic = diag_attention_traffic(BATCH_SIZE, NUM_HEADS, SEQ_LEN, head_dim, "bf16", block_size=block_size)
    forward, backward = in_units(traffic, head_dim)
    assert 4 <= forward <= 4.2
    assert 7 <= backward <= 7.3


@pytest.mark.parametrize("seq_len", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize("block_size", [1, 7, 48, 64])
def test_diag_attention_counts_every_token_once(seq_len, block_size):
    forward, backward = diag_attention_traffic(1, 1, seq_len, 64, "bf16", block_size=block_size, mask=False)
    programs = triton_diag_transnormer.count_tiles(seq_len, block_size, None)
    unit = seq_len * 64 * 2
    assert forward == 4 * unit + 8 * programs
    assert backward == 7 * unit + 8 * programs + programs * 32 * 4 * 2


@pytest.mark.parametrize("block_size", [16, 64])
def test_diag_attention_is_launched_as_counted(block_size, monkeypatch):
    """All that is handed to the kernels, without running them."""
    launches = []

    def record(kernel, grid, tensors, **arguments):
        launches.append(sum(tensor.nbytes for tensor in tensors.values() if tensor is not None))

    monkeypatch.setattr(triton_diag_transnormer, "launch", record)
    query, key, value = (
        torch.zeros(1, SEQ_LEN, 12, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)
    )
    theta = torch.ones(32, requires_grad=True)
    output = diag_attention(
        query, key, value, block_size=block_size, causal=True, lrpe=(theta, torch.ones(64)), backend="triton"
    )
    output.backward(torch.zeros(1, SEQ_LEN, 12, 64, dtype=torch.bfloat16).transpose(1, 2))
    assert len(launches) == 2
    traffic = diag_attention_traffic(1, 12, SEQ_LEN, 64, "bf16", block_size=block_size, mask=False)
    for found, counted in zip(launches, traffic, strict=True):
        assert 0.97 < found / counted < 1.03


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sequences", [(1, 1), (1, 12), (1, 96), (4, 16), (8, 16)])
def test_norm_attention(sequences, head_dim):
    """Within the budget at any number of sequences; the states of 256 tokens cost U / 2 per 64 channels."""
    unit = sequences[0] * sequences[1] * SEQ_LEN * head_dim * 2
    states = head_dim / 128  # S states in U
    forward, backward = norm_attention_traffic(*sequences, SEQ_LEN, head_dim, "bf16", causal=False, mask=True)
    assert 4 <= forward / unit <= 4.2 + 2 * states <= 1.6 * 4
    assert 7 <= backward / unit <= 9.3 + 2 * states
    forward, backward = norm_attention_traffic(*sequences, SEQ_LEN, head_dim, "bf16", causal=True, mask=True)
    assert 4 <= forward / unit <= 6.2 + 3 * states
    assert 7 <= backward / unit <= 9.3 + 3.5 * states <= 2 * 7


@pytest.mark.parametrize("seq_len", [256, 8192])
@pytest.mark.parametrize("causal", [False, True])
def test_norm_attention_is_launched_as_counted(causal, seq_len, monkeypatch):
    """All that is handed to the kernels, without running them."""
    launches = []

    def record(kernel, grid, tensors, **arguments):
        # a bidirectional forward pass is handed keys and values that it does not read, or states without rows
        unread = ("key", "value") if kernel is triton_norm_transnormer.output_kernel and not causal else ()
        launches.append(sum(t.nbytes for name, t in tensors.items() if t is not None and name not in unread))

    monkeypatch.setattr(triton_norm_transnormer, "launch", record)
    query, key, value = (torch.zeros(1, 12, seq_len, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    output, _ = norm_attention(query, key, value, causal=causal, backend="triton")
    assert len(launches) == 3
    handed_out = [sum(launches)]
    output.sum().backward()
    assert len(launches) == 6
    handed_out.append(sum(launches) - handed_out[0])
    traffic = norm_attention_traffic(1, 12, seq_len, 64, "bf16", causal=causal)
    for found, counted in zip(handed_out, traffic, strict=True):
        assert 0.94 < found / counted <= 1
