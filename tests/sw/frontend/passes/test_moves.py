"""Movements as a Select: what is known of a fit before it is searched for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from systole.sw.frontend.passes import moves


def _movement(seed, across):
    """Places of a random strided slice of a tensor (1, c, h, w), with its axes in another order,
    and the tensor's shape."""
    rng = np.random.default_rng(seed)
    shape = (1, *(int(n) for n in rng.integers(1, 9, 3)))
    places = np.arange(np.prod(shape)).reshape(shape)
    places = places[:, :, :: rng.integers(1, 3), :: rng.integers(1, 3)]
    if across:
        places = places.transpose(0, *(1 + rng.permutation(3)))
    (top, bottom), (left, right) = rng.integers(0, 2, (2, 2)).tolist()
    pads = ((0, 0), (0, 0), (top, bottom), (left, right))
    return np.pad(places, pads, constant_values=-1), shape


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_fit_takes_fewer_picks_than_the_bound(seed, across):
    index, shape = _movement(seed, across)
    fit = moves.fit(index, [("x", 1.0, shape)])
    if fit is None:
        return
    seen, places = shape, index
    if fit.flat:
        seen = (*shape[:2], 1, shape[2] * shape[3])
        places = index.reshape(*index.shape[:2], 1, -1)
    cells = moves._cells(places, [seen])
    assert cells is not None
    bound = moves._Bound(cells)
    assert bound.picks(fit.steps) <= sum(map(len, fit.phases))
    assert not bound.hopeless


@pytest.mark.parametrize(
    "numbers, most", [([[1, 2, 3]], 1), ([[2, 0, 2, 2], [1, 1, 0, 0]], 3), ([[0, 0]], 0)]
)
def test_most_alike(numbers, most):
    assert moves._most_alike(np.array(numbers)) == most


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_no_fit_costs_less_than_the_least(seed, across):
    index, shape = _movement(seed, across)
    fit = moves.fit(index, [("x", 1.0, shape)])
    if fit is not None and (index >= 0).all():
        assert moves.cost(fit, index.shape) >= moves.least_cost(index.shape)


def test_channels_that_take_too_many_places_are_refused_by_the_bound(monkeypatch):
    """Rows and columns exchanged with channels: every element of every channel is a pick of its
    own. No step is tried."""
    places = np.arange(28 * 28 * 48).reshape(28, 28, 48)[:8, :8].reshape(64, 48)
    index = places.T.reshape(1, 48, 1, 64)
    tried = []
    phases = moves._phases

    def recorded(cells, steps, sources, most):
        tried.append((steps, most))
        return phases(cells, steps, sources, most)

    monkeypatch.setattr(moves, "_phases", recorded)
    assert moves._fit(index, [("x", 1.0, (1, 28, 28, 48))]) is None
    assert not tried


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 1, 2], [2, 3, 0, 1]])
def test_channels_filled_alike_take_channels_of_their_own(order):
    """Columns of three channels in another order, among them a single channel."""
    places = np.arange(5 * 4 * 4).reshape(1, 5, 4, 4)
    for channels in ([3], [4, 1, 2], [0, 0, 3]):
        fit = moves.fit(places[:, channels][..., order], [("x", 1.0, (1, 5, 4, 4))])
        assert fit is not None
        taken = np.stack([pick.channels for phase in fit.phases for pick in phase])
        assert taken.tolist() == [channels] * len(taken)
