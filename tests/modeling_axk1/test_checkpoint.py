"""Does every weight survive: to disk and back, through stock transformers, through Trainer's resume, as Hub remote code?"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from modeling_axk1 import (
    AxK1Config,
    AxK1ForCausalLM,
    AxK1ForSequenceClassification,
    AxK1ForTokenClassification,
    AxK1Model,
    set_thinking_tokens,
)
from tests.folders import on_disk
from tests.random_models import ours, padded_ids, random_config
from tests.ranks import run_on_ranks
from trainers.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


def same_weights(a: torch.nn.Module, b: torch.nn.Module, but: str | None = None) -> bool:
    x, y = a.state_dict(), b.state_dict()
    names = {name for name in x.keys() | y.keys() if but is None or but not in name}
    return all(name in x and name in y and torch.equal(x[name], y[name]) for name in names)


@pytest.mark.parametrize("seed", range(6))
def test_one_checkpoint_serves_both(seed, tmp_path):
    model = ours(random_config(seed))
    model.save_pretrained(tmp_path / "ours")
    stock = AXK1ForCausalLM.from_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    again = AxK1ForCausalLM.from_pretrained(tmp_path / "ours")
    from_stock = AxK1ForCausalLM.from_pretrained(tmp_path / "stock")
    assert same_weights(model, again)
    # Stock drops the one norm that nothing uses; everything else comes back.
    assert same_weights(model, from_stock, but="layers.0.mlp.post_mlp_layernorm")
    input_ids, _ = padded_ids(model.config)
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, again(input_ids).logits)
        assert torch.equal(model(input_ids).logits, from_stock(input_ids).logits)
        reloaded = AXK1ForCausalLM.from_pretrained(tmp_path / "stock")
        assert torch.equal(stock(input_ids).logits, reloaded(input_ids).logits)


def test_names_on_disk_are_the_releases(tmp_path):
    model = ours(random_config(1, first_k_dense_replace=1, num_hidden_layers=2, n_routed_experts=3))
    model.save_pretrained(tmp_path)
    layer = {name.removeprefix("model.layers.1.") for name in on_disk(tmp_path) if name.startswith("model.layers.1.")}
    attention = "q_a_proj q_a_layernorm q_b_proj kv_a_proj_with_mqa kv_a_layernorm kv_b_proj o_proj".split()
    expected = {f"self_attn.{name}.weight" for name in attention}
    expected |= {"self_attn.q_a_proj.bias", "self_attn.kv_a_proj_with_mqa.bias", "self_attn.o_proj.bias"} & layer
    projections = ("gate_proj", "up_proj", "down_proj")
    expected |= {f"mlp.experts.{e}.{p}.weight" for e in range(3) for p in projections}
    expected |= {f"mlp.shared_experts.{p}.weight" for p in projections}
    expected |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias", "post_mlp_layernorm.weight"}
    expected |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert layer == expected
    assert "model.layers.0.post_mlp_layernorm.weight" in on_disk(tmp_path)
    file = json.loads((tmp_path / "config.json").read_text())
    assert file["architectures"] == ["AXK1ForCausalLM"] and "auto_map" not in file


@pytest.mark.parametrize("method, written", [("noaux_tc", True), ("group_limited_greedy", False), ("greedy", False)])
def test_bias_is_written_for_noaux_tc_only(method, written, tmp_path):
    ours(random_config(2, topk_method=method)).save_pretrained(tmp_path)
    assert any("e_score_correction_bias" in name for name in on_disk(tmp_path)) == written


def test_shards_and_dtype(tmp_path):
    model = ours(random_config(3)).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AxK1ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same_weights(model, loaded)
    gate = loaded.model.layers[-1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32 and gate.weight.dtype == torch.bfloat16


def test_auto_classes_give_ours(tmp_path):
    ours(random_config(1)).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is AxK1ForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is AxK1Model
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is AxK1ForSequenceClassification
    assert type(AutoModelForTokenClassification.from_pretrained(tmp_path)) is AxK1ForTokenClassification


def test_unused_norm_never_trains(tmp_path):
    ours(random_config(1, first_k_dense_replace=1)).save_pretrained(tmp_path)
    model = AxK1ForCausalLM.from_pretrained(tmp_path)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.0.mlp.post_mlp_layernorm.weight"]


def test_what_stock_leaves_out_is_made_new(tmp_path):
    """Its resave lacks the unused norm, a release without biases those: constants, not memory as it was."""
    model = ours(random_config(1, first_k_dense_replace=1))
    model.save_pretrained(tmp_path)
    left_out = ("layers.0.post_mlp_layernorm.weight", "e_score_correction_bias")
    tensors = {name: tensor for name, tensor in on_disk(tmp_path).items() if not name.endswith(left_out)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    poison = torch.full((2**20,), torch.nan)
    del poison
    state = AxK1ForCausalLM.from_pretrained(tmp_path).state_dict()
    norm = state["model.layers.0.mlp.post_mlp_layernorm.weight"]
    assert torch.equal(norm, torch.ones_like(norm))
    biases = [tensor for name, tensor in state.items() if name.endswith("e_score_correction_bias")]
    assert biases and not any(bias.any() for bias in biases)


def test_disk_offload_gives_the_same_logits(tmp_path):
    model = ours(random_config(1))
    model.save_pretrained(tmp_path / "model")
    half = sum(p.nbytes for p in model.parameters()) // 2
    offloaded = AxK1ForCausalLM.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": half}, offload_folder=tmp_path / "offload"
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    input_ids, _ = padded_ids(model.config)
    with torch.no_grad():
        assert torch.equal(offloaded(input_ids).logits, model(input_ids).logits)
        kwargs = dict(max_new_tokens=5, do_sample=False)
        assert torch.equal(offloaded.generate(input_ids, **kwargs), model.generate(input_ids, **kwargs))


# Bare load_state_dict


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_bare_load_state_dict_reads_the_disk_layout(shard_size, tied, tmp_path):
    """In one file, and shard by shard with the experts of a layer spread over shards, as Trainer does."""
    model = ours(random_config(2, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    fresh = AxK1ForCausalLM(model.config)
    assert not same_weights(model, fresh)
    paths = sorted(tmp_path.glob("*.safetensors"))
    for path in paths:
        result = fresh.load_state_dict(load_file(path), strict=len(paths) == 1)
        assert not result.unexpected_keys
    assert same_weights(model, fresh)


def test_bare_load_state_dict_onto_the_meta_device(tmp_path):
    model = ours(random_config(2))
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        fresh = AxK1ForCausalLM(model.config)
    fresh.load_state_dict(on_disk(tmp_path), assign=True)
    assert same_weights(model, fresh)


def test_bare_load_state_dict_still_reads_its_own_layout():
    model = ours(random_config(2))
    fresh = AxK1ForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    assert same_weights(model, fresh)


def test_missing_or_misshapen_expert_is_an_error(tmp_path):
    model = ours(random_config(2))
    model.save_pretrained(tmp_path)
    tensors = on_disk(tmp_path)
    name = next(n for n in tensors if ".experts.1.up_proj" in n)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict({k: v for k, v in tensors.items() if k != name}, strict=True)
    with pytest.raises(RuntimeError, match=name):
        model.load_state_dict(tensors | {name: tensors[name][:-1]}, strict=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# Resume


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is 1 + 2 ? it is 3 ."] * 4, vocab_size=300)


def tiny(tokenizer) -> AxK1ForCausalLM:
    model = ours(AxK1Config.preset("nano", vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.05))
    model.config.pad_token_id = tokenizer.pad_token_id
    set_thinking_tokens(model.generation_config, tokenizer)
    return model


def plain_trainer(tokenizer, arguments):
    rows = [{"input_ids": (ids := torch.randint(0, 60, (9,)).tolist()), "labels": ids} for _ in range(16)]
    return Trainer(
        model=tiny(tokenizer),
        args=TrainingArguments(**arguments),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
    )


def sft_trainer(tokenizer, arguments):
    rows = [{"prompt": f"what is {i} + {i} ?", "completion": f" it is {2 * i} ."} for i in range(16)]
    return SFTTrainer(
        model=tiny(tokenizer),
        args=SFTConfig(max_length=32, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def grpo_trainer(tokenizer, arguments):
    rows = [{"prompt": f"what is {i} + {i} ?"} for i in range(16)]
    config = GRPOConfig(num_generations=2, max_completion_length=6, beta=0.0, **arguments)
    return GRPOTrainer(
        model=tiny(tokenizer),
        args=config,
        reward_funcs=lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids],
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def arguments(folder, **more) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
        **more,
    }


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer, grpo_trainer])
def test_resume_is_bit_identical(make, tokenizer, tmp_path):
    """Stock loses every routed expert here: its checkpoints are written in the disk layout and read into the fused one."""
    torch.manual_seed(0)
    straight = make(tokenizer, arguments(tmp_path))
    straight.train()
    torch.manual_seed(0)
    resumed = make(tokenizer, arguments(tmp_path))
    before = resumed.model.model.layers[-1].mlp.experts.down_proj.clone()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert type(resumed.model) is AxK1ForCausalLM
    assert not torch.equal(before, resumed.model.model.layers[-1].mlp.experts.down_proj)
    assert same_weights(straight.model, resumed.model)


def test_load_best_model_at_end_loads_the_best(tokenizer, tmp_path):
    trainer = plain_trainer(
        tokenizer,
        arguments(
            tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, metric_for_best_model="loss",
            greater_is_better=True, learning_rate=1e-3,
        ),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2"), "the worst, as asked, is the earlier one"
    best = AxK1ForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_weights(trainer.model, best)


# Damaged and mismatched files


def test_truncated_weights_are_named(tmp_path):
    ours(random_config(1)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged .* copy or download it again\.$"):
        AxK1ForCausalLM.from_pretrained(tmp_path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_configuration_of_other_weights_is_refused(tmp_path):
    config = random_config(1, num_hidden_layers=2, first_k_dense_replace=1)
    ours(config).save_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"])
    with pytest.raises(ValueError, match=r"lacks \d+ weights that its configuration asks for, model\.layers\.2"):
        AxK1ForCausalLM.from_pretrained(tmp_path)
    edit_config(tmp_path, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], n_routed_experts=16)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AxK1ForCausalLM.from_pretrained(tmp_path)


# In other processes


def run_python(code: str, cwd: Path, **environment) -> str:
    """Output of a Python process that cannot import this project."""
    environment = {**os.environ, **environment}
    environment.pop("PYTHONPATH", None)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


REMOTE = """
import sys
sys.path = [p for p in sys.path if p != {root!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
try:
    import modeling_axk1
    raise SystemExit("the project is importable here: " + modeling_axk1.__file__)
except ImportError:
    pass
sys.modules["triton"] = None  # its import fails
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
assert type(model).__name__ == "AxK1ForCausalLM" and model.config._experts_implementation == "axk1"
assert sys.modules[type(model).__module__.rpartition(".")[0] + ".moe_kernels"].triton is None
ids = torch.arange(10)[None]
with torch.no_grad():
    torch.save((model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)), "out.pt")
model.save_pretrained("again")
print("auto_map" in open("again/config.json").read())
"""


def test_folder_works_as_hub_remote_code_and_without_triton(tmp_path):
    model = ours(random_config(2))
    try:
        AxK1Config.register_for_auto_class()
        AxK1ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model.save_pretrained(tmp_path / "model")
    finally:
        AxK1Config._auto_class = AxK1ForCausalLM._auto_class = None
    assert json.loads((tmp_path / "model/config.json").read_text())["auto_map"]
    run_python(REMOTE.format(root=str(ROOT)), tmp_path, HF_HOME=str(tmp_path / "cache"))
    logits, generated = torch.load(tmp_path / "out.pt")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated)


def ddp_steps():
    model = ours(random_config(3, first_k_dense_replace=1)).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(2):
        ids = torch.randint(0, 67, (4, 9), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(2)[torch.distributed.get_rank()]
        optimizer.zero_grad()
        wrapped(mine, labels=mine).loss.backward()
        optimizer.step()
    return model.state_dict()


def test_two_process_ddp_steps_equal_one_process(tmp_path):
    first, _ = run_on_ranks(2, tmp_path, ddp_steps)
    model = ours(random_config(3, first_k_dense_replace=1)).train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(2):
        ids = torch.randint(0, 67, (4, 9), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        sum(model(half, labels=half).loss / 2 for half in ids.chunk(2)).backward()
        optimizer.step()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)
