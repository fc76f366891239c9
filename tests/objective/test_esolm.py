"""Draws and packing: statistics, what they may depend on, padding, and the layout."""

import numpy as np
import pytest
import torch

from esolm_megatron.config import ObjectiveConfig
from esolm_megatron.objective.esolm import (
    DIFFUSION,
    SEQUENTIAL,
    OrderedRows,
    draw_diffusion,
    draw_orders,
    draw_sequential,
    draw_step,
    draw_validation,
    mean_loss,
    pack,
    part_sums,
)
from esolm_megatron.objective.noise import antithetic_times, elbo_weight, uniforms, words
from esolm_megatron.objective.order import inverse

MASK = 96


def rows_of(count, length, seed=0):
    tokens = np.random.default_rng(seed).integers(0, MASK, (count, length))
    return tokens, np.ones((count, length), bool), np.arange(count)


def split_step(alpha_0, ranks, num_micro_batches, *, step=3, **objective):
    """A global batch of 12 rows drawn by `ranks` data ranks, as {(row, part): packed row}."""
    tokens, valid, rows = rows_of(12, 13)
    config = ObjectiveConfig(alpha_0=alpha_0, **objective)
    found, counts = {}, 0
    for rank in range(ranks):
        mine = slice(rank, None, ranks)
        noised = draw_step(
            tokens[mine], valid[mine], rows[mine], config, mask_id=MASK, global_batch_size=12,
            num_micro_batches=num_micro_batches, capacity=13, key=(1, step),
        )  # fmt: skip
        counts = counts + noised.num_valid
        assert len({b.layout for b in noised.micro_batches}) == 1
        for batch in noised.micro_batches:
            for source in batch.sources.unique().tolist():
                of = batch.sources == source
                row = tuple(sorted(zip(*(
                    x[of].tolist() for x in (batch.positions[batch.places], batch.targets, batch.weights, batch.parts,
                                             batch.dropout_ids[batch.places])
                ), strict=True)))  # fmt: skip
                assert row not in found
                found[row] = True
    return found, counts


@pytest.mark.parametrize("objective", [{}, {"diffusion_loss": "any_order"}])
def test_noise_is_independent_of_ranks_and_micro_batches(objective):
    whole, counts = split_step(0.5, 1, 1, **objective)
    assert counts.tolist() == [6 * 13, 6 * 13]
    for ranks, micro_batches in ((1, 3), (2, 1), (3, 2), (3, 1), (6, 1)):
        assert split_step(0.5, ranks, micro_batches, **objective)[0] == whole
    assert split_step(0.5, 1, 1, step=4, **objective)[0] != whole


def test_words_are_a_function_of_their_key():
    assert np.array_equal(words(5, 1, "a", 2), words(5, 1, "a", 2))
    assert not np.array_equal(words(5, 1, "a", 2), words(5, 1, "a", 3))
    assert words(3, 0, "frozen").tolist() == FROZEN, "old runs must resume with the same noise"


FROZEN = [12275126280711796914, 12287237305325058063, 392099404823819096]


def test_times_take_one_stratum_each():
    t = antithetic_times(np.arange(8), 8, 1e-3, 5, 6)
    assert sorted(np.floor((t - 1e-3) / (1 - 1e-3) * 8).astype(int).tolist()) == list(range(8))
    assert np.allclose(t[2::4], antithetic_times(np.array([2, 6]), 8, 1e-3, 5, 6))
    many = np.array([antithetic_times(np.arange(3), 3, 1e-3, s) for s in range(400)])
    assert abs(many.mean() - 0.5005) < 0.01


def test_diffusion_masks_with_the_right_probability_and_weight():
    tokens, valid, rows = rows_of(3000, 41)
    config = ObjectiveConfig(alpha_0=0.6, diffusion_fraction=0.5)
    drawn = draw_diffusion(tokens, valid, rows, 3000, config, 1, 2)
    t = antithetic_times(rows, 3000, config.time_epsilon, 1, 2)
    clean = 0.6 * (1 - (1 - 1e-3) * t)
    error = (drawn.masked - (1 - clean)[:, None]).sum() / np.sqrt((clean * (1 - clean)).sum() * 41)
    assert abs(error) < 4
    assert np.allclose(drawn.weights, drawn.masked * elbo_weight(t, 0.6, 1e-3)[:, None])
    in_order = np.take_along_axis(drawn.masked, drawn.order, 1)
    assert (np.diff(in_order.astype(int), axis=1) >= 0).all(), "clean places come first"
    first = drawn.order[:, -1]
    assert np.abs(np.bincount(first, minlength=41) - 3000 / 41).max() < 5 * np.sqrt(3000 / 41), "masks in random order"


def test_low_variance_weights_are_one():
    tokens, valid, rows = rows_of(5, 11)
    config = ObjectiveConfig(alpha_0=1.0, diffusion_loss="low_var")
    drawn = draw_diffusion(tokens, valid, rows, 5, config, 0)
    assert np.array_equal(drawn.weights, drawn.masked.astype(float))


def test_any_order_loss_counts_what_diffusion_generates():
    tokens, valid, rows = rows_of(4000, 17)
    config = ObjectiveConfig(alpha_0=0.3, diffusion_loss="any_order")
    drawn = draw_diffusion(tokens, valid, rows, 4000, config, 0)
    counted = np.take_along_axis(drawn.weights, drawn.order, 1)
    assert (np.diff(counted, axis=1) <= 0).all(), "they are the first places of the order"
    assert abs(counted.mean() - 0.3) < 4 * np.sqrt(0.21 / counted.size)
    rest = [order[int(n) :] for order, n in zip(drawn.order, counted.sum(1), strict=True)]
    assert all((np.diff(x) > 0).all() for x in rest)


def test_sequential_rows_mask_left_to_right():
    tokens, valid, rows = rows_of(3000, 37)
    drawn = draw_sequential(tokens, valid, rows, 0.25, 37, 1, 2)
    assert abs(drawn.masked.mean() - 0.75) < 4 * np.sqrt(0.1875 / drawn.masked.size)
    for order, masked in zip(drawn.order, drawn.masked, strict=True):
        count = masked.sum()
        assert not masked[order[: 37 - count]].any()
        assert (np.diff(order[37 - count :]) > 0).all()
    prefix = [order[0] for order, masked in zip(drawn.order, drawn.masked, strict=True) if masked.sum() < 37]
    assert np.abs(np.bincount(prefix, minlength=37) - len(prefix) / 37).max() < 5 * np.sqrt(len(prefix) / 37)


def test_a_row_with_too_many_masks_is_drawn_again():
    tokens, valid, rows = rows_of(500, 40)
    drawn = draw_sequential(tokens, valid, rows, 0.5, 21, 1, 2)
    assert drawn.masked.sum(1).max() <= 21
    free = draw_sequential(tokens, valid, rows, 0.5, 40, 1, 2)
    fits = free.masked.sum(1) <= 21
    assert 0.3 < fits.mean() < 0.9
    assert np.array_equal(drawn.masked[fits], free.masked[fits]), "others keep their noise"


def test_padding_is_never_masked_counted_or_seen():
    tokens, valid, rows = rows_of(6, 19)
    lengths = [19, 1, 7, 0, 12, 18]
    for row, n in enumerate(lengths):
        valid[row, n:] = False
    config = ObjectiveConfig(alpha_0=0.5)
    for kind in ("elbo", "any_order"):
        drawn = draw_diffusion(tokens, valid, rows, 6, config.model_copy(update={"diffusion_loss": kind}), 0)
        assert not drawn.weights[~valid].any()
        for order, n in zip(drawn.order, lengths, strict=True):
            assert set(order[:n]) == set(range(n)), "padding comes last, where causal attention hides it"
    with pytest.raises(ValueError, match=r"row 3 has 19 padding tokens.*use capacity = seq_length = 19"):
        draw_sequential(tokens, valid, rows, 0.5, 13, 0)
    drawn = draw_sequential(tokens, valid, rows, 0.5, 19, 0)
    assert not (drawn.masked & ~valid).any()
    orders = draw_orders(valid, rows, 0.5, 0)
    assert all(set(order[:n]) == set(range(n)) for order, n in zip(orders, lengths, strict=True))


def test_packed_places_are_masks_of_their_targets():
    tokens, valid, rows = rows_of(8, 23)
    noised = draw_step(
        tokens, valid, rows, ObjectiveConfig(alpha_0=0.5), mask_id=MASK, global_batch_size=8, num_micro_batches=2,
        capacity=23, key=(0, 1),
    )  # fmt: skip
    for index, batch in enumerate(noised.micro_batches):
        assert batch.layout.num_tokens == len(batch.tokens) == 2 * 23 + 2 * 23 + 2 * 23
        assert (batch.tokens[batch.places] == MASK).all()
        own = np.concatenate([np.arange(2) + 2 * index, 4 + np.arange(2) + 2 * index])
        positions = batch.positions[batch.places].numpy()
        assert np.array_equal(tokens[own[batch.sources.numpy()], positions], batch.targets.numpy())
        assert ((batch.sources < 2) == (batch.parts == DIFFUSION)).all()
        assert len(set(batch.dropout_ids.tolist())) == len(batch.dropout_ids)
    assert noised.num_valid.tolist() == [4 * 23, 4 * 23]


def test_mask_stream_holds_the_last_places_of_the_order():
    tokens, _, rows = rows_of(1, 5)
    order = np.array([[3, 0, 4, 1, 2]])
    masked = np.zeros((1, 5), bool)
    masked[0, [1, 2]] = True
    batch = pack(None, [(OrderedRows(tokens, order, masked, masked * 1.0, rows), 3, SEQUENTIAL)], MASK)
    assert batch.positions.tolist() == [3, 0, 4, 1, 2, 4, 1, 2]
    assert batch.tokens.tolist() == [*tokens[0, order[0]], MASK, MASK, MASK]
    assert batch.places.tolist() == [6, 7]
    with pytest.raises(ValueError, match="lies before the last 1 places"):
        pack(None, [(OrderedRows(tokens, order, masked, masked * 1.0, rows), 1, SEQUENTIAL)], MASK)


def test_validation_puts_every_row_in_both_parts():
    tokens, valid, rows = rows_of(4, 9)
    noised = draw_validation(tokens, valid, rows, 4, ObjectiveConfig(alpha_0=0.5), mask_id=MASK, key=(0,))
    (batch,) = noised.micro_batches
    assert (batch.layout.num_plain, batch.layout.groups) == (4, ((4, 9),))
    assert noised.num_valid.tolist() == [36, 36]
    only = draw_validation(tokens, valid, rows, 4, ObjectiveConfig(alpha_0=1.0), mask_id=MASK, key=(0,))
    assert only.num_valid.tolist() == [36, 0]


def test_loss_is_the_sum_of_both_means():
    tokens, valid, rows = rows_of(4, 9)
    noised = draw_validation(tokens, valid, rows, 4, ObjectiveConfig(alpha_0=0.5), mask_id=MASK, key=(0,))
    (batch,) = noised.micro_batches
    losses = torch.rand(len(batch.places), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = part_sums(losses, batch)
    diffusion = batch.parts == DIFFUSION
    assert sums[0].item() == pytest.approx((losses * batch.weights)[diffusion].sum().item())
    assert sums[1].item() == pytest.approx(losses[~diffusion].sum().item())
    assert mean_loss(sums, noised.num_valid).item() == pytest.approx((sums.sum() / 36).item())


def test_uniforms_fill_the_unit_interval():
    u = uniforms(words(100_000, 0, "u"))
    assert 0 <= u.min() < 1e-3
    assert 0.999 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005


def test_inverse_tells_when_each_position_comes():
    order = np.array([[2, 0, 3, 1]])
    assert inverse(order).tolist() == [[1, 3, 0, 2]]
