"""Does vLLM itself compute what we do, from what we save, and cut its answers into thought, answer and calls?

On CPUs, in an environment of its own, since it asks for an older transformers: `make vllm` makes it and runs these.
"""

import json
import os
import subprocess
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from conversion.adapters import export_adapter
from modeling_axk1 import AxK1Config, AxK1ForCausalLM, set_thinking_tokens
from tests.documents import ROOT, documented
from tests.random_models import YARN, adapt, ours
from tests.ranks import free_port
from tests.servers import wait_for
from trainers.adapters import lora_config
from trainers.tokenizer import CHAT_TEMPLATE, train_tokenizer

VLLM = ROOT / ".venv-vllm/bin"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (VLLM.parent / ".installed").exists(), reason="vLLM is not installed beside; run make vllm"),
]
# K1's own sizes of heads and latents: vLLM's latent attention on a CPU has no others. Without YaRN its CPU build rotates
# queries wrongly (0.32: the kernel takes them for contiguous).
K1_HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "kv_lora_rank": 512}
SIZES = K1_HEADS | {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "rope_parameters": YARN | {"original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0},
    "initializer_range": 0.1,
}
PROMPTS = [[7], list(range(3, 20)), [5 * n % 101 for n in range(60)]]
# With a description: vLLM would write `"description": null` into the prompt.
ADD = {"name": "add", "description": "sums", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOL = {"type": "function", "function": ADD}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
# A question, what comes with it, its answer, and the mode in which it was learned.
CHATS = [
    ("one", {}, {"reasoning_content": "two three", "content": "four"}, True),
    ("one", {}, {"content": "five six"}, False),
    ("call", {"tools": [TOOL]}, {"content": "", "tool_calls": [CALL]}, False),
]
# vLLM's worker would take cores for itself, and its cache 4 GB.
ON_A_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
# The first spares a program the start of two processes.
ALONE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_A_CPU | ALONE


def run_there(script: str, model_or_asked: Path, out: Path, *more: str, **environment: str) -> None:
    """Run a program of this folder by vLLM's Python, in the folder of what it writes."""
    program = [VLLM / "python", Path(__file__).with_name(script), model_or_asked, out, *more]
    ran = subprocess.run(program, env=ENVIRONMENT | environment, cwd=out.parent, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]


# -- numbers --------------------------------------------------------------------------------------------------------
CASES = {
    "noaux_tc": {"topk_method": "noaux_tc", "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1},
    "group_limited_greedy": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "greedy": {"topk_method": "greedy", "norm_topk_prob": False, "n_shared_experts": 2},
    # vLLM's adapters need Triton, which has no CPUs, wherever there are experts.
    "adapter": {"first_k_dense_replace": 3},
}


def test_vllm_answers_as_we_do(tmp_path, subtests):
    models = {case: saved(case, tmp_path / case) for case in CASES}
    asked, said = tmp_path / "asked.json", tmp_path / "said.json"
    asked.write_text(json.dumps([[path, adapter, PROMPTS] for path, adapter, _ in models.values()]))
    run_there("vllm_says.py", asked, said)
    for (case, (_, _, model)), answers in zip(models.items(), json.loads(said.read_text()), strict=True):
        with subtests.test(case):
            for prompt, answer in zip(PROMPTS, answers, strict=True):
                assert_same(model, prompt, *answer)


def assert_same(model, prompt: list[int], tokens: list[int], chosen: list[float], given: list[float]) -> None:
    """Its greedy choices are ours, and it is as sure of each token as we are."""
    ids = torch.tensor([prompt + tokens])
    with torch.no_grad():
        log_TV = model(input_ids=ids).logits[0].log_softmax(-1)
    assert tokens and log_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    of_ours = log_TV[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(given + chosen), of_ours, atol=1e-4, rtol=0)


def saved(case: str, folder: Path) -> tuple[str, str | None, PreTrainedModel | PeftModel]:
    """A model's folder, its adapter's or None, and the model itself."""
    model = ours(AxK1Config.preset("nano", **SIZES | CASES[case])).eval()
    model.save_pretrained(folder / "model")
    if case != "adapter":
        return str(folder / "model"), None, model
    return str(folder / "model"), str(folder / "adapter"), adapted(model, folder)


def adapted(model, folder: Path) -> PeftModel:
    """With a random adapter, which is written for vLLM."""
    targets = {"targets": ("attention", "dense"), "exclude_modules": ["kv_b_proj"], "rslora": True}
    model = adapt(model, lora_config(model, **targets))
    model.save_pretrained(folder / "peft")
    export_adapter(folder / "peft", folder / "adapter")
    return model


# -- the server -----------------------------------------------------------------------------------------------------
def learn(folder: Path, **sizes) -> None:
    """Save a model that knows CHATS by heart."""
    tokenizer = train_tokenizer(["one two three four five six call", CHAT_TEMPLATE] * 4, 900)
    torch.manual_seed(0)
    model = AxK1ForCausalLM(AxK1Config.preset("nano", **SIZES | {"vocab_size": len(tokenizer), "num_hidden_layers": 2} | sizes))
    rows = [row_of(tokenizer, *chat) for chat in CHATS]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(160):
        sum(model(ids, labels=labels).loss for ids, labels in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    set_thinking_tokens(model.generation_config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def row_of(tokenizer, question: str, more: dict, answer: dict, thinking: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a chat, the loss on its answer alone."""
    asked = [{"role": "user", "content": question}]
    chat = [*asked, {"role": "assistant", **answer}]
    options = {"enable_thinking": thinking, "return_dict": False, **more}
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **options)
    ids = tokenizer.apply_chat_template(chat, **options)
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return torch.tensor([ids]), torch.tensor([labels])


@contextmanager
def serving(folder: Path):
    """The documented command on one CPU; its address."""
    port = str(free_port())
    smaller = ["--tensor-parallel-size", "1", "--no-enable-expert-parallel", "--enforce-eager", "--dtype", "float32"]
    smaller += ["--max-model-len", "512", "--max-num-seqs", "4", "--port", port, "--served-model-name", "m"]
    command = [VLLM / "vllm", "serve", folder, *documented("vllm serve MODEL")[3:], *smaller]
    log = folder.with_name("log").open("w+")
    running = subprocess.Popen(command, env=ENVIRONMENT, cwd=folder.parent, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", lambda: running.poll() is None, patience_s=300)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        running.terminate()
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()
        log.seek(0)
        print(log.read()[-5000:])  # shown where something fails
        log.close()


def ask(server: str, question: str, **more) -> bytes:
    said = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": 48, "temperature": 0, **more}
    request = urllib.request.Request(server, json.dumps(said).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read()


def whole(server: str, question: str, **more) -> dict:
    return json.loads(ask(server, question, **more))["choices"][0]["message"]


def streamed(server: str, question: str, **more) -> tuple[str, str]:
    """Thought and answer, put together from the pieces."""
    events = ask(server, question, stream=True, **more).decode().split("\n\n")
    pieces = [json.loads(event[6:])["choices"][0]["delta"] for event in events if event.startswith("data: {")]
    return tuple("".join(piece.get(part) or "" for piece in pieces) for part in ("reasoning", "content"))


THINK, DIRECT = ({"chat_template_kwargs": {"enable_thinking": on}} for on in (True, False))
ANSWERS = [
    (THINK, "two three", "four"),
    (DIRECT, "", "five six"),
    ({}, "", "five six"),
    ({"reasoning_effort": "high"}, "two three", "four"),
    ({"reasoning_effort": "none"}, "", "five six"),
]


def test_the_server_parts_thoughts_answers_and_calls(tmp_path, subtests):
    folder = tmp_path / "model"
    learn(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    thought_ids = tokenizer("two three", add_special_tokens=False).input_ids
    with serving(folder) as server:
        for how, thought, answer in ANSWERS:
            with subtests.test("mode", **how):
                message = whole(server, "one", **how)
                assert (message["reasoning"] or "", message["content"]) == (thought, answer)
                assert streamed(server, "one", **how) == (thought, answer)
        for budget in (0, 1, 2):
            with subtests.test("budget", budget=budget):
                message = whole(server, "one", thinking_token_budget=budget, **THINK)
                assert message["reasoning"] == tokenizer.decode(thought_ids[:budget])
        with subtests.test("call"):
            (call,) = whole(server, "call", tools=[TOOL])["tool_calls"]
            assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"]) == {"a": 1}


# -- reinforcement --------------------------------------------------------------------------------------------------
@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX vLLM packs latent attention otherwise: not tried")
@pytest.mark.parametrize("dense, targets", [(0, ()), (2, ("attention", "dense"))], ids=["experts", "adapter"])
def test_vllm_holds_the_policy_that_is_trained(dense, targets, tmp_path):
    learn(tmp_path / "model", first_k_dense_replace=dense)
    run_there("vllm_trains.py", tmp_path / "model", out := tmp_path / "out.json", *targets, PYTHONPATH=str(ROOT))
    said = json.loads(out.read_text())
    assert said["same"].pop("model.layers.0.self_attn.kv_b_proj.weight") and len(said["same"]) > 8
    assert [name for name, same in said["same"].items() if not same] == []
    assert dense or all(f"model.layers.1.mlp.{part}" in said["same"] for part in EXPERT_PARTS)
    # In bf16. Where weights change, its CPU build forgets to pack experts again for its kernel.
    assert not dense or said["distance"]["synchronised"] < min(said["distance"]["stale"] / 5, 0.5)


EXPERT_PARTS = ("experts.gate_up_proj", "experts.down_proj", "gate.e_score_correction_bias", "post_mlp_layernorm.weight")
