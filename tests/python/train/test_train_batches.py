"""The order of the data: every token once an epoch, and each place computed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2rs.train.batches import Batches, Order
from gpt2rs.train.corpus import Tokens


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 40), more=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_an_epoch_goes_through_every_window_once(length: int, more: int, seed: int) -> None:
    n_tokens = length + more
    order = Order(n_tokens, length, seed)
    for epoch in range(3):
        starts = [order.start(epoch * order.windows + i) for i in range(order.windows)]
        offset = min(starts)
        assert 0 <= offset < length
        assert sorted(starts) == [offset + i * length for i in range(order.windows)]
        # The last one's last token still has a target.
        assert max(starts) + length < n_tokens
    # What no epoch can reach is less than two windows.
    assert n_tokens - order.windows * length <= 2 * length


def test_epochs_and_seeds_differ_and_windows_are_not_in_order() -> None:
    orders = [Order(100_000, 100, seed) for seed in (0, 1)]
    epochs = [
        tuple(order.start(e * order.windows + i) for i in range(order.windows))
        for order in orders
        for e in (0, 1)
    ]
    assert len(set(epochs)) == 4
    for starts in epochs:
        # Of a shuffled order, half of the neighbours ascend; six standard deviations are 54 of 999.
        assert abs(int(np.sum(np.diff(starts) > 0)) - 499) < 60
    assert len({min(starts) % 100 for starts in epochs}) > 1


def test_a_step_s_batch_is_a_function_of_the_seed_and_the_step() -> None:
    tokens = Tokens([np.arange(1000, dtype=np.uint16)])
    batches = Batches(tokens, 10, 4, seed=7)
    inputs, targets = batches.batch(5)
    assert inputs.shape == targets.shape == (4, 10)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(Batches(tokens, 10, 4, seed=7).batch(5)[0], inputs)
    # The same data, however many sequences a step has.
    halves = [Batches(tokens, 10, 2, seed=7).batch(step)[0] for step in (10, 11)]
    np.testing.assert_array_equal(np.concatenate(halves), inputs)


def test_the_order_is_this_one() -> None:
    """A resumed run relies on it: another order is another version."""
    assert [Order(1000, 10, 3).start(i) for i in (0, 1, 2, 98, 99, 10**12)] == [22, 552, 722, 832, 641, 364]


def test_too_little_data_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"has 10 tokens, .*; sequences of 10 tokens \(n_ctx\) need 11 at least"
    ):
        Order(10, 10, 0)
    assert Order(11, 10, 0).start(0) == 0
