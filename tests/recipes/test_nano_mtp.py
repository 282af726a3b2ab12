"""Do the two cells differ by the layer alone, and does the report say what was measured?"""

import json
from functools import partial

import pytest
import torch

from recipes import nano_cells, nano_mtp


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nano_cells, "DRAWS", 20)
        patch.setattr(
            nano_mtp, "MTPSettings", partial(nano_mtp.MTPSettings, row_tokens=48, batch_rows=8, prompt_tokens=8)
        )
        out = tmp_path_factory.mktemp("mtp")
        arguments = ["--out", str(out), "--seeds", "3", "--threads", "1", "--scale", "0.005"]
        yield out, nano_mtp.main(arguments), arguments


def test_cells_start_alike_and_the_layer_comes_on_top():
    models = nano_mtp.start_models(nano_mtp.MTPSettings(), vocab_size=300)
    off, on = (models[cell].state_dict() for cell in nano_mtp.CELLS)
    assert all(torch.equal(off[name], on[name]) for name in off)
    assert {name.split(".")[2] for name in on.keys() - off.keys()} == {"3"}


def test_training_rows_are_not_the_held_out_ones():
    settings = nano_mtp.MTPSettings(text_bytes=300_000, steps=2)
    train, test, vocab = nano_mtp.draw_rows(settings)
    again, *_ = nano_mtp.draw_rows(settings)
    assert torch.equal(train, again) and train.shape == (64, 128) and max(train.max(), test.max()) < vocab
    assert not {tuple(row) for row in train.tolist()} & {tuple(row) for row in test.tolist()}


def test_the_report_shows_what_was_measured(run, capsys):
    out, [seed], arguments = run
    assert (torch.tensor(seed["on"]["losses"]) - torch.tensor(seed["off"]["losses"])).abs().max() > 1e-5
    # The layer's share is taken out of the logged loss: the first steps of both cells are about alike.
    assert seed["on"]["curve"][0][1] == pytest.approx(seed["off"]["curve"][0][1], abs=0.05)
    assert seed["on"]["mtp_curve"] and not seed["off"]["mtp_curve"]
    speed = seed["on"]["eight rows"]
    assert speed["rows_alike"] == 1.0 and 0 <= speed["accepted"] <= speed["drafted"] and speed["drafted"] > 0
    tables = json.loads((out / "mtp.json").read_text())["tables"]
    assert [row["cell"] for row in tables["The main head's loss"]] == ["off", "on", "on - off"]
    assert len(tables["Generation, greedy"]) == 2 and "<svg" in (out / "mtp.html").read_text()
    assert nano_mtp.main(arguments) == [seed] and "finished earlier" in capsys.readouterr().out


@pytest.mark.parametrize("gap, said", [(-0.5, "lower by 0.500"), (0.5, "higher by 0.500"), (0.0, "does not differ")])
def test_the_verdict_is_the_intervals(gap, said):
    seeds = [{"off": {"losses": [2.0, 3.0]}, "on": {"losses": [2.0 + gap, 3.0 + gap]}}] * 2
    assert said in nano_mtp.verdict(seeds)
