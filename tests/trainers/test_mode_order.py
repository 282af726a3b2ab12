"""Does an epoch visit every row it should, pairs together, like lengths together, the same after a resume?"""

import pytest
import torch

from trainers.mode_order import EpochSampler, draw_mix, order_units, pair_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pairs_are_thinking_first_whatever_the_order_of_rows():
    assert pair_rows([False, True, True, False], ["a", "b", "a", "b"]) == [(2, 0), (1, 3)]
    # A prompt may be there twice in each mode.
    assert pair_rows([True, True, False, False], ["a"] * 4) == [(0, 2), (1, 3)]


@pytest.mark.parametrize("modes", [[True, False, True], [True, False, False]])
def test_a_row_without_partner_is_named(modes):
    with pytest.raises(ValueError, match="1 of 2 prompts.*row 2"):
        pair_rows(modes, ["a", "a", "b"])
    with pytest.raises(ValueError, match="1 of 1 prompts.*row 2"):
        pair_rows(modes, ["a", "a", "a"])


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_mix_has_its_ratio_and_is_as_large_as_it_can_be(ratio):
    modes = [True] * 30 + [False] * 60
    drawn = draw_mix(modes, ratio, generator())
    thinking = sum(modes[row] for row in drawn)
    assert len(set(drawn)) == len(drawn) and thinking / len(drawn) == pytest.approx(ratio, abs=0.01)
    # One of the modes is used up.
    assert thinking == 30 or len(drawn) - thinking == 60
    if ratio == 0.5:
        assert drawn != draw_mix(modes, ratio, generator(1)), "the excess mode is drawn anew"


def test_mix_of_a_missing_mode_is_refused():
    with pytest.raises(ValueError, match="thinking_ratio=0.5 cannot be had from 0 thinking and 2 direct"):
        draw_mix([False, False], 0.5, generator())


@pytest.mark.parametrize("lengths", [None, "random"])
def test_every_row_once_and_units_together(lengths):
    units = [(2 * n, 2 * n + 1) for n in range(103)]
    lengths = lengths and torch.randint(1, 999, (206,), generator=generator(5)).tolist()
    order = order_units(units, lengths, 4, generator())
    assert sorted(order) == list(range(206)) and order != list(range(206))
    assert all((order[at], order[at + 1]) in units for at in range(0, 206, 2))
    assert order == order_units(units, lengths, 4, generator()) != order_units(units, lengths, 4, generator(1))


def test_grouped_by_length_pads_little_and_stays_random():
    lengths = torch.randint(1, 1000, (4000,), generator=generator(5)).tolist()
    units = [(row,) for row in range(4000)]

    def padding(order):
        batches = [[lengths[row] for row in order[at : at + 8]] for at in range(0, 4000, 8)]
        return sum(8 * max(batch) - sum(batch) for batch in batches) / sum(lengths)

    grouped, plain = (order_units(units, each, 16, generator()) for each in (lengths, None))
    assert padding(grouped) < 0.05 < 0.5 < padding(plain)
    firsts = [lengths[row] for row in grouped[::16]]
    assert firsts != sorted(firsts) and firsts != sorted(firsts, reverse=True)


def test_what_does_not_fill_an_update_comes_last():
    # The two of a broken update would otherwise shift all that follow into mixed batches.
    order = order_units([(row,) for row in range(10)], [1, 1, 1, 1, 5, 5, 5, 5, 9, 9], 4, generator())
    assert sorted(order[-2:]) == [8, 9] and {frozenset(order[:4]), frozenset(order[4:8])} == {
        frozenset(range(4)),
        frozenset(range(4, 8)),
    }


def test_sampler_serves_the_current_epoch():
    epoch = 0
    sampler = EpochSampler(lambda number: [number, 7, 8], lambda: epoch)
    assert len(sampler) == 3 and list(sampler) == [0, 7, 8]
    epoch = 4
    assert list(sampler) == [4, 7, 8]
