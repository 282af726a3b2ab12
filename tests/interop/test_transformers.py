"""Does stock transformers read what we write, and we what it writes: tensors, logits, text, its pipeline, its server?"""

import socket

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, pipeline
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import padded_ids
from tests.tolerances import PREFILL

CHAT = [{"role": "user", "content": "What is 4 * 5?"}]


def test_both_ways(checkpoint, tmp_path):
    ours, stock = AxK1ForCausalLM.from_pretrained(checkpoint), AXK1ForCausalLM.from_pretrained(checkpoint)
    stock.save_pretrained(tmp_path)
    back = AxK1ForCausalLM.from_pretrained(tmp_path)
    ids, mask = padded_ids(ours.config)
    with torch.no_grad():
        logits = [model(ids, attention_mask=mask).logits for model in (ours, stock, back)]
    torch.testing.assert_close(logits[0], logits[1], atol=PREFILL, rtol=PREFILL)
    assert torch.equal(logits[0], logits[2]), "a resave by transformers changed the model"


def test_its_pipeline_says_the_same_with_either_class(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    said = []
    for kind in (AxK1ForCausalLM, AXK1ForCausalLM):
        talk = pipeline("text-generation", model=kind.from_pretrained(checkpoint), tokenizer=tokenizer)
        said.append(talk(CHAT, max_new_tokens=12, do_sample=False, return_full_text=False)[0]["generated_text"])
    assert said[0] and said[0] == said[1]


def test_files_say_that_they_are_torch(checkpoint):
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) > 1
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_transformers_serve_answers_openai_in_both_modes(checkpoint):
    """`transformers serve MODEL`: its own process parts, its own model class, our templates."""
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    openai = pytest.importorskip("openai", reason="the serve extra is not installed")
    Serve = pytest.importorskip("transformers.cli.serve").Serve
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Its constructor serves, in a thread.
    server = Serve(str(checkpoint), device="cpu", host="127.0.0.1", port=port, non_blocking=True)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        asked = {"model": str(checkpoint), "messages": CHAT, "temperature": 0, "max_tokens": 16}
        thinking, direct = (
            client.chat.completions.create(**asked, extra_body={"chat_template_kwargs": {"enable_thinking": mode}})
            for mode in (True, False)
        )
    finally:
        server.kill_server()
    thought = thinking.choices[0].message.reasoning_content
    assert thought and "think>" not in thought
    assert direct.choices[0].message.content and not getattr(direct.choices[0].message, "reasoning_content", None)
