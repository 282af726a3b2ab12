"""Do cells that run at once come back in order, and does the first failure end them?"""

import json
import time
from functools import partial

import pytest

from recipes import nano_cells
from tests.ranks import forking


@pytest.fixture(autouse=True)
def fast_processes():
    forking()


@pytest.mark.parametrize("jobs", [1, 2])
def test_cells_at_once_come_back_in_their_order(jobs, tmp_path, capfd):
    calls = [partial(json.loads, f'{{"cell": {number}}}') for number in range(4)]
    said = partial(print, "what a cell says")
    log = tmp_path / "cells.log"
    assert nano_cells.at_once([*calls, said], jobs, 1, log) == [{"cell": number} for number in range(4)] + [None]
    out, bar = capfd.readouterr()
    assert "what a cell says" in (out if jobs == 1 else log.read_text())
    assert jobs == 1 or "5/5" in bar and not out


def test_the_first_cell_that_fails_ends_the_others(tmp_path):
    others = [call for n in range(8) for call in (partial(time.sleep, 0.2), (tmp_path / str(n)).touch)]
    with pytest.raises(ValueError, match="invalid literal"):
        nano_cells.at_once([partial(int, "no number"), *others], 2, 1, tmp_path / "cells.log")
    assert not (tmp_path / "7").exists()
