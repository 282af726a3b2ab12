"""Does the 4-bit recipe measure the model that the demo left, in both modes and layer by layer, and say what was lost?"""

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoTokenizer

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, set_thinking_tokens
from recipes import nano_four_bit as recipe
from recipes.nano_think_fusion import Settings, draw_splits, make_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` leaves, its model untrained."""
    out = tmp_path_factory.mktemp("demo")
    settings = Settings(max_new_tokens=8).scaled(0.008)
    (out / "settings.json").write_text(json.dumps(asdict(settings)))
    make_tokenizer(out / "tokenizer", draw_splits(settings))
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=len(tokenizer), **ids))
    set_thinking_tokens(model.generation_config, tokenizer)
    model.save_pretrained(out / "fused")
    tokenizer.save_pretrained(out / "fused")
    return out


def test_every_way_both_modes_and_every_layer(demo, capsys):
    threads = torch.get_num_threads()
    results = recipe.main(["--model", str(demo / "fused"), "--threads", "1"])
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert results["problems"] == 4 and "4 held-out problems" in said
    assert list(results["measured"]) == ["as trained", "NF4, double", "NF4", "8 bits"]
    assert all([row["mode"] for row in rows] == ["thinking", "non-thinking"] for rows in results["measured"].values())
    assert results["shares"]["as trained"] == 0 and results["shares"]["NF4"] > 0.8
    for way, low, high in (("NF4, double", 0.07, 0.11), ("NF4", 0.07, 0.11), ("8 bits", 0.004, 0.015)):
        rows = results["errors"][way]
        assert [row["layer"] for row in rows] == [0, 1, 2] and all(low < row["attention"] < high for row in rows)
        assert [low < row["routed experts"] < high for row in rows[1:]] == [True, True]
        assert f"{rows[1]['routed experts']:.4f}" in said


def test_points_lost_are_those_against_the_first_way():
    def rows(thinking, direct):
        modes = {"thinking": thinking, "non-thinking": direct}
        return [{"mode": mode, "accuracy": accuracy, "format_error": 0.0} for mode, accuracy in modes.items()]

    measured = {"as trained": rows(0.99, 0.12), "NF4": rows(0.98, 0.13)}
    table = recipe.accuracy_table(measured, {"as trained": 0.0, "NF4": 0.8})
    assert [row["points lost"] for row in table] == ["+0.0", "+0.0", "+1.0", "-1.0"]


def test_a_folder_without_the_demos_settings_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="settings.json is not there; give the fused folder"):
        recipe.main(["--model", str(tmp_path / "fused")])
