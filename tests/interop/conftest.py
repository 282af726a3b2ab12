"""One tiny chat checkpoint, saved by this library, for every other library to read.  `make interop` runs what is here."""

from pathlib import Path

import pytest

from modeling_axk1 import AxK1Config, set_thinking_tokens
from tests.random_models import ours
from trainers.tokenizer import train_tokenizer


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("interop")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interop") / "tiny-axk1"
    tokenizer = train_tokenizer(["The answer to 12 + 3 is 15.\n", "What is 4 * 5? Let me see.\n"] * 20, 330)
    # bitsandbytes computes on a CPU only what has a multiple of 32 rows.
    sizes = {"num_hidden_layers": 2, "qk_rope_head_dim": 32, "initializer_range": 0.1}
    model = ours(AxK1Config.preset("nano", vocab_size=len(tokenizer), **sizes))
    set_thinking_tokens(model.generation_config, tokenizer)
    # In two files, with an index.
    model.save_pretrained(folder, max_shard_size="500KB")
    tokenizer.save_pretrained(folder)
    return folder
