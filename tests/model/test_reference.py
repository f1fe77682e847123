"""Feature maps, LRPE and attention metadata, against formulas written out again here in plain Python."""

import math
from unittest.mock import Mock, patch

import pytest
import torch

from transnormer_hf.model.reference_transnormer import (
    LRPE,
    AttentionMetadata,
    apply_feature_map,
    apply_lrpe,
    attention_metadata,
    compute_dtype,
    prepare_query_key,
    rotation_table,
    zero_padding,
)

HEAD_DIM = 8


def make_lrpe(head_dim=HEAD_DIM, dtype=torch.float64):
    theta = 10000 ** (-torch.arange(head_dim // 2, dtype=dtype) / (head_dim // 2))
    householder = torch.randn(head_dim, dtype=dtype)
    return LRPE(theta, householder / householder.norm())


def rotated_by_loops(vector, position, lrpe):
    """R_t(theta) (I - 2 v v^T) x for one vector, entry by entry."""
    theta, v = lrpe.theta.tolist(), lrpe.householder.tolist()
    x = vector.tolist()
    dot = sum(a * b for a, b in zip(x, v, strict=True))
    x = [a - 2 * dot * b for a, b in zip(x, v, strict=True)]
    result = []
    for pair, angle in enumerate(theta):
        a, b = x[2 * pair], x[2 * pair + 1]
        cos, sin = math.cos(position * angle), math.sin(position * angle)
        result += [a * cos - b * sin, a * sin + b * cos]
    return torch.tensor(result, dtype=vector.dtype)


class TestLRPE:
    def test_matches_the_rotation_of_every_pair_by_itself(self):
        lrpe, states = make_lrpe(), torch.randn(2, 3, 5, HEAD_DIM, dtype=torch.float64)
        positions = torch.tensor([[0, 1, 2, 3, 4], [-2, -1, 0, 70, 1000]])
        rotated = apply_lrpe(states, positions, lrpe)
        for row in range(2):
            for head in range(3):
                for column in range(5):
                    expected = rotated_by_loops(states[row, head, column], positions[row, column].item(), lrpe)
                    torch.testing.assert_close(rotated[row, head, column], expected)

    def test_one_row_of_positions_serves_the_whole_batch(self):
        lrpe, states = make_lrpe(), torch.randn(2, 3, 5, HEAD_DIM, dtype=torch.float64)
        positions = torch.arange(5)
        assert torch.equal(apply_lrpe(states, positions, lrpe), apply_lrpe(states, positions.expand(2, 5), lrpe))

    def test_scores_depend_on_the_distance_only(self):
        lrpe = make_lrpe()
        query, key = torch.randn(2, 1, 1, 1, HEAD_DIM, dtype=torch.float64)

        def score(i, j):
            return (apply_lrpe(query, torch.tensor([i]), lrpe) * apply_lrpe(key, torch.tensor([j]), lrpe)).sum()

        for distance in (0, 1, 17):
            for start in (0, 5, 4000):
                torch.testing.assert_close(score(start + distance, start), score(distance, 0))
        assert not torch.isclose(score(1, 0), score(2, 0))

    def test_at_distance_zero_the_score_is_the_plain_dot_product(self):
        lrpe, (query, key) = make_lrpe(), torch.randn(2, 2, 3, 6, HEAD_DIM, dtype=torch.float64)
        positions = torch.arange(6) * 31
        scores = (apply_lrpe(query, positions, lrpe) * apply_lrpe(key, positions, lrpe)).sum(-1)
        torch.testing.assert_close(scores, (query * key).sum(-1))

    def test_norms_stay(self):
        states = torch.randn(1, 1, 9, HEAD_DIM, dtype=torch.float64)
        torch.testing.assert_close(apply_lrpe(states, torch.arange(9), make_lrpe()).norm(dim=-1), states.norm(dim=-1))

    @pytest.mark.parametrize("position", [511, 131_072, 1_000_003])
    def test_angles_are_exact_to_float32_at_any_position(self, position):
        theta = make_lrpe(64, torch.float32).theta
        cos, sin = rotation_table(torch.tensor([position]), theta)
        exact = position * theta.double()
        assert (cos[0] - exact.cos()).abs().max() < 5e-7
        assert (sin[0] - exact.sin()).abs().max() < 5e-7
        assert cos.dtype == torch.float32

    def test_float32_output_stays_near_float64_at_position_131072(self):
        lrpe, states = make_lrpe(64, torch.float32), torch.randn(1, 1, 3, 64)
        positions = torch.tensor([131_070, 131_071, 131_072])
        exact = apply_lrpe(states.double(), positions, LRPE(*(parameter.double() for parameter in lrpe)))
        assert (apply_lrpe(states, positions, lrpe) - exact).abs().max() < 5e-6

    def test_the_gradient_of_theta_is_position_times_the_turned_vector(self):
        lrpe, states = make_lrpe(), torch.randn(1, 2, 4, HEAD_DIM, dtype=torch.float64)
        positions = torch.tensor([0, 1, 100, 131_072])
        theta = lrpe.theta.clone().requires_grad_()
        weights = torch.randn_like(states)
        (apply_lrpe(states, positions, LRPE(theta, lrpe.householder)) * weights).sum().backward()
        rotated = apply_lrpe(states, positions, lrpe)
        turned = torch.stack((-rotated[..., 1::2], rotated[..., 0::2]), -1).flatten(-2)  # d/d(angle) of a rotation
        expected = (positions[:, None] * (turned * weights).unflatten(-1, (-1, 2)).sum(-1)).sum((0, 1, 2))
        torch.testing.assert_close(theta.grad, expected)


@pytest.mark.parametrize(
    ("feature_map", "formula"),
    [
        ("identity", lambda x: x),
        ("elu", lambda x: x if x > 0 else math.exp(x) - 1),
        ("1+elu", lambda x: 1 + x if x > 0 else math.exp(x)),
    ],
)
def test_feature_maps(feature_map, formula):
    states = torch.tensor([-30.0, -1.0, -1e-3, 0.0, 0.5, 40.0], dtype=torch.float64)
    expected = torch.tensor([formula(x) for x in states.tolist()], dtype=torch.float64)
    torch.testing.assert_close(apply_feature_map(states, feature_map), expected)


def test_an_unknown_feature_map_is_named():
    with pytest.raises(ValueError, match=r"feature_map='relu' is not known; choose one of 'identity', 'elu', '1\+elu'"):
        apply_feature_map(torch.zeros(1), "relu")


def test_sums_are_float32_at_least():
    wide = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
    assert {dtype: compute_dtype(dtype) for dtype in wide} == wide
    assert compute_dtype(torch.float64) == torch.float64


class TestAttentionMetadata:
    def metadata(self, mask=None, **kwargs) -> AttentionMetadata:
        mask = None if mask is None else torch.tensor(mask)
        batch_size, seq_len = (1, kwargs.pop("seq_len")) if mask is None else mask.shape
        return attention_metadata(batch_size, seq_len, torch.device("cpu"), mask, **kwargs)

    def test_without_a_mask_positions_are_columns(self):
        metadata = self.metadata(seq_len=4)
        assert metadata.positions.tolist() == [0, 1, 2, 3]
        assert metadata[1:] == (None, None, None, None, True, None)

    @pytest.mark.parametrize(
        ("mask", "positions"),
        [
            ([1, 1, 1, 1], [0, 1, 2, 3]),
            ([1, 1, 0, 0], [0, 1, 2, 3]),
            ([0, 0, 1, 1], [-2, -1, 0, 1]),
            ([0, 1, 0, 1], [-1, 0, 1, 2]),  # an interior zero keeps its place
            ([0, 0, 0, 0], [-4, -3, -2, -1]),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
    def test_positions_start_at_the_first_real_token(self, mask, positions, dtype):
        metadata = attention_metadata(2, 4, torch.device("cpu"), torch.tensor([mask, [1] * 4]).to(dtype))
        assert metadata.positions.tolist() == [positions, [0, 1, 2, 3]]
        assert metadata.is_real.tolist() == [[bool(real) for real in mask], [True] * 4]

    def test_an_offset_moves_every_position(self):
        assert self.metadata(seq_len=3, position_offset=5).positions.tolist() == [5, 6, 7]
        offsets = torch.tensor([5, 9])
        assert attention_metadata(2, 2, offsets.device, position_offset=offsets).positions.tolist() == [[5, 6], [9, 10]]

    def test_a_row_that_has_started_keeps_the_places_of_its_zeros(self):
        metadata = self.metadata([[0, 0, 1], [0, 0, 1]], position_offset=torch.tensor([7, 0]))
        assert metadata.positions.tolist() == [[7, 8, 9], [-2, -1, 0]]

    def test_packed_sequences_each_start_at_zero(self):
        metadata = self.metadata(seq_len=7, cu_seqlens=torch.tensor([0, 3, 4, 7]))
        assert metadata.positions.tolist() == [0, 1, 2, 0, 0, 1, 2]
        assert metadata.sequence_ids.tolist() == [0, 0, 0, 1, 2, 2, 2]
        assert metadata.is_real is None

    def test_packed_sequences_may_be_empty(self):
        metadata = self.metadata(seq_len=5, cu_seqlens=torch.tensor([0, 0, 3, 3, 5]))
        assert metadata.positions.tolist() == [0, 1, 2, 0, 1]
        assert metadata.sequence_ids.tolist() == [1, 1, 1, 3, 3]

    def test_packed_sequences_take_an_offset_each(self):
        metadata = self.metadata(seq_len=5, cu_seqlens=torch.tensor([0, 3, 5]), position_offset=torch.tensor([10, 20]))
        assert metadata.positions.tolist() == [10, 11, 12, 20, 21]

    @pytest.mark.parametrize("shape", [(2, 5), (3, 4), (2, 1, 4), (2, 1, 4, 4), (8,)])
    def test_a_mask_of_another_shape_is_refused(self, shape):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*supported is \(batch, seq\) = \(2, 4\)"):
            attention_metadata(2, 4, torch.device("cpu"), torch.ones(shape))

    @pytest.mark.parametrize("offset", [0, 3, torch.tensor(3), torch.tensor([3, 0])], ids=str)
    def test_nothing_is_copied_between_host_and_device(self, monkeypatch, offset):
        # a number made a tensor on the device is such a copy, for which the host waits
        for make in ("as_tensor", "tensor"):
            monkeypatch.setattr(torch, make, Mock(side_effect=AssertionError))
        mask = torch.ones(2, 4, dtype=torch.long)
        with patch.object(torch.Tensor, "to", side_effect=AssertionError):
            attention_metadata(2, 4, mask.device, mask, position_offset=offset)
            attention_metadata(2, 4, mask.device, position_offset=offset)

    def test_nothing_is_read_back_from_the_device(self):
        # tensors on "meta" have no values: reading one raises
        device = torch.device("meta")
        mask = torch.ones(2, 6, device=device)
        assert attention_metadata(2, 6, device, mask).positions.shape == (2, 6)
        assert attention_metadata(2, 6, device, mask, position_offset=torch.ones(2, device=device)).is_real.shape == (
            2,
            6,
        )
        cu_seqlens = torch.ones(3, device=device, dtype=torch.int32)
        assert attention_metadata(1, 6, device, cu_seqlens=cu_seqlens).sequence_ids.shape == (6,)


def test_padding_keys_are_zero_after_the_feature_map():
    metadata = attention_metadata(1, 4, torch.device("cpu"), torch.tensor([[0, 1, 1, 0]]))
    query, key = torch.zeros(2, 1, 2, 4, HEAD_DIM, dtype=torch.float64)
    _, key = prepare_query_key(query, key, metadata, "1+elu", make_lrpe())
    assert (key[:, :, [0, 3]] == 0).all()  # and not 1 + elu(0) = 1
    torch.testing.assert_close(key[:, :, 1:3].norm(dim=-1), torch.full((1, 2, 2), HEAD_DIM**0.5, dtype=torch.float64))


def test_padding_that_is_not_a_number_becomes_zero():
    metadata = attention_metadata(1, 2, torch.device("cpu"), torch.tensor([[0, 1]]))
    states = torch.tensor([[[[float("nan")], [2.0]]]])
    assert zero_padding(states, metadata).tolist() == [[[[0.0], [2.0]]]]
