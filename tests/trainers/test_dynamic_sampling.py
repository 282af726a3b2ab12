"""Is a group kept where it can teach, replaced by one of the scarcer mode, and no more asked than the keep rate calls for?"""

import math

import torch

from trainers.dynamic_sampling import Group, Rollout, fill_slots, groups_to_ask, regroup, slim


def group(thinking, rewards, alive=None, instruction=0):
    rollouts = [Rollout({"thinking": thinking, "instruction": instruction}, [5], "", None, {}) for _ in rewards]
    made = Group(rollouts, torch.tensor(rewards), alive=True)
    return Group(rollouts, torch.tensor(rewards), alive=made.fate == "kept" if alive is None else alive)


def test_fates():
    nan = math.nan
    assert group(True, [[1.0, 0.0, 0.0], [1.0, 0.0, -0.7]]).fate == "all_right", "a shaped reward must not save a group"
    assert group(True, [[-1.0, 0.0], [-1.0, 0.0]]).fate == "all_wrong"
    assert group(True, [[-1.0, -1.0], [-1.0, -1.0]]).fate == "all_wrong"
    assert group(True, [[-1.0, 0.0], [-1.0, -1.0]]).fate == "kept", "format alone can teach"
    assert group(True, [[1.0, 0.0], [-1.0, 0.0]]).fate == "kept"
    assert group(True, [[nan, 0.0], [-1.0, 0.0]]).fate == "failed"


def test_slots_are_filled_with_live_groups_of_the_scarcer_mode_first():
    live, dead = [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]
    slots = [group(True, live), group(False, dead), group(True, dead), group(False, dead)]
    fresh = [group(True, live, instruction=n) for n in (1, 2)] + [group(False, live, instruction=n) for n in (3, 4)]
    filled = fill_slots(slots, [group(False, dead, instruction=9), *fresh])
    assert [(each.thinking, each.rollouts[0].row["instruction"]) for each in filled] == [
        (True, 0), (False, 3), (True, 1), (False, 4),
    ]  # fmt: skip
    assert filled[0] is slots[0] and fill_slots(slots, [])[1:] == slots[1:]
    one = fill_slots(slots, [group(True, live, instruction=7)])
    assert [each.alive for each in one] == [True, True, False, False] and one[1].thinking


def test_the_next_round_asks_what_the_keep_rate_calls_for():
    assert groups_to_ask(2, asked=16, kept=8, unit=2, most=16) == 4
    assert groups_to_ask(1, asked=16, kept=8, unit=6, most=24) == 6
    assert groups_to_ask(3, asked=16, kept=1, unit=2, most=16) == 16
    assert groups_to_ask(3, asked=16, kept=0, unit=2, most=16) == 16


def test_answers_are_put_together_however_batches_cut_them():
    right, wrong = [1.0, 0.0], [-1.0, 0.0]
    first = group(True, [right, wrong])
    cut = [group(True, [right]), group(False, [wrong], instruction=1), group(True, [wrong]), first]
    (one, two) = regroup([slim(each) for each in cut], 2)
    assert one.thinking and one.fate == "kept" and torch.equal(one.rewards_GF, first.rewards_GF)
    assert not two.thinking and two.fate == "all_wrong" and list(two.rollouts[0].completion_ids) == [5]
