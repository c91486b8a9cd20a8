"""A training loss taken apart."""

import numpy as np
import pytest

from dist_train.study.trend import trend_of


def test_noise_is_what_goes_up_and_down_not_what_falls() -> None:
    steps = np.arange(2000)
    trend = 2 + 3 * np.exp(-steps / 300)
    noise = np.random.default_rng(1).normal(scale=0.2, size=len(steps))
    found = trend_of(trend + noise)
    assert found.noise == pytest.approx(0.2, rel=0.06)
    assert found.level == pytest.approx(trend[-1], abs=0.1)
    assert trend_of(trend).noise < 0.002
    assert trend_of(trend).slope == pytest.approx(100 * (trend[-1] - trend[-2]), rel=0.2)
    assert trend_of(np.array([3.0])).noise == 0


def test_a_few_wild_updates_move_neither_trend_nor_level_but_are_noise() -> None:
    calm = np.linspace(4, 3, 400)
    wild = calm.copy()
    wild[[310, 355, 399]] += 5
    assert trend_of(wild).level == pytest.approx(trend_of(calm).level, abs=0.01)
    assert trend_of(wild).slope == pytest.approx(trend_of(calm).slope, abs=0.02)
    assert trend_of(wild).noise > 0.5
