"""A tiny saved checkpoint, as the commands meet it: a folder with weights, configuration and tokenizer."""

import pytest
import torch

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import tiny_chat_config
from trainers.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("serving") / "tiny-axk1"
    tokenizer = train_tokenizer(["The answer to 12 + 3 is 15.\n", "What is 4 * 5? Let me see.\n"] * 20, 330)
    config = tiny_chat_config(len(tokenizer))
    # Room for the tools that a prompt spells out.
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = AxK1ForCausalLM(config)
    # The model would only ever say these, so that its text is plain and the tags must be held off by force.
    sayable = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) if token.isalpha()]
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(len(tokenizer)) if i not in sayable]] *= 0.1
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["<think>", "</think>"])] *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
