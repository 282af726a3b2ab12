"""Are the schedules what their sources say, at the seams too?"""

import pytest

from trainers.schedules import DECAYS, batch_ramp, bias_rate, wsd

PHASES = {"warmup": 10, "stable": 70, "decay": 20}


def test_wsd_by_hand():
    expected = {0: 0.0, 5: 0.5, 10: 1.0, 45: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 1000: 0.1}
    assert {tokens: wsd(tokens, **PHASES, floor=0.1) for tokens in expected} == pytest.approx(expected)


@pytest.mark.parametrize("shape", DECAYS)
def test_wsd_is_continuous_and_falls(shape):
    values = [wsd(tokens / 10, **PHASES, floor=0.1, shape=shape) for tokens in range(1100)]
    # 1-sqrt falls steeply at first: a step of a 200th of the decay takes it by sqrt(1/200).
    assert max(abs(a - b) for a, b in zip(values, values[1:])) < 0.9 * (1 / 200) ** 0.5 + 1e-9
    falling = values[800:1001]
    assert all(a > b for a, b in zip(falling, falling[1:])) and falling[-1] == pytest.approx(0.1)


def test_wsd_phases_may_be_missing():
    assert wsd(0, warmup=0, stable=10, decay=0) == 1.0
    assert wsd(0, warmup=0, stable=0, decay=10) == 1.0 and wsd(5, warmup=0, stable=0, decay=10) == 0.5
    # Without a decay the stable phase has no end.
    assert wsd(10, warmup=0, stable=10, decay=0) == wsd(11, warmup=0, stable=10, decay=0) == 1.0


def test_shapes_by_hand():
    assert (
        DECAYS["sqrt"](0.25) == 0.5 and DECAYS["cosine"](0.5) == pytest.approx(0.5) and DECAYS["linear"](0.25) == 0.75
    )


def test_ramps():
    assert [batch_ramp(at, start=4, end=12, ramp=80) for at in (0, 10, 40, 80, 90)] == [4, 5, 8, 12, 12]
    assert batch_ramp(0, start=4, end=12, ramp=0) == 12
    assert [bias_rate(at, rate=0.001, stop=97) for at in (0, 96, 97)] == [0.001, 0.001, 0.0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wsd(1, warmup=-1, stable=1, decay=1), "a phase is negative"),
        (lambda: wsd(1, **PHASES, floor=2), "floor=2"),
        (lambda: wsd(1, **PHASES, shape="step"), "use one of linear, sqrt, cosine"),
        (lambda: batch_ramp(1, start=8, end=4, ramp=1), "from 8 to 4"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
