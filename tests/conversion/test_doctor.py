"""Does the doctor find each fault, name whom it breaks, and leave a healthy checkpoint alone?  Transformers itself is asked."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

import axk1
from conversion.doctor import ALL, OURS, VLLM, diagnose, expected_tensors, text_of
from modeling_axk1 import AxK1Config, set_thinking_tokens
from tests.random_models import YARN, ours, padded_ids, random_config
from trainers.tokenizer import TRAINING_CHAT_TEMPLATE, train_tokenizer

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
MEMORY, NORM = "model.layers.1.mlp.", "post_mlp_layernorm.weight"
UNUSED = "model.layers.0.post_mlp_layernorm.weight"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """Two layers, one dense, grouped experts, YaRN, a tokenizer: as this library saves it."""
    folder = tmp_path_factory.mktemp("doctor") / "model"
    tokenizer = train_tokenizer(["what is 1 + 2 ? it is 3 ."] * 4, vocab_size=300)
    sizes = {"num_hidden_layers": 2, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    flags = {"attention_bias": False, "tie_word_embeddings": False, "rope_interleave": True}
    rope = {"rope_parameters": YARN, "max_position_embeddings": 64, "first_k_dense_replace": 1}
    model = ours(random_config(4, vocab_size=len(tokenizer), **sizes, **flags, **rope))
    set_thinking_tokens(model.generation_config, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(healthy, tmp_path):
    return shutil.copytree(healthy, tmp_path / "model")


def edit_json(path, drop=(), **changes):
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in said.items() if name not in drop}))


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def edit_generation(**changes):
    return lambda folder: edit_json(folder / "generation_config.json", **changes)


def edit_tensors(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_tokenizer(change):
    def edit(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        change(tokenizer)
        tokenizer.save_pretrained(folder)

    return edit


def fuse(tensors):
    halves = [
        [tensors.pop(f"model.layers.1.mlp.experts.{e}.{half}.weight") for half in ("gate_proj", "up_proj", "down_proj")]
        for e in range(6)
    ]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([g, u]) for g, u, _ in halves])
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack([down for *_, down in halves])


def special_tags(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<think>", special=True)]})


def both_tags(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "is false -%}\n        {{- '</think>' -}}", "is false -%}\n        {{- '<think></think>' -}}"
    )


# Name: what is done to the healthy folder, severity, whom it breaks, words of the fact. `stock`: how transformers takes it.
CLEAN, UNLIKE, REFUSED = "loads, same logits", "loads otherwise", "refuses"
FAULTS = {
    "model_type": (edit_config(model_type="AXK1"), "error", OURS, "'AXK1'", None),
    "architectures": (edit_config(architectures=["AxK1ForCausalLM"]), "error", ALL, "['AxK1ForCausalLM']", None),
    "auto_map": (edit_config(auto_map={"AutoConfig": "configuration_axk1.A"}), "error", ALL, "configuration_axk1.py", CLEAN),
    "method unsaid": (edit_config(drop=["topk_method"]), "error", VLLM, "does not say topk_method", CLEAN),
    "a whole scale": (edit_config(routed_scaling_factor=1), "error", OURS, "routed_scaling_factor is 1, a whole", REFUSED),
    "null groups": (edit_config(n_group=None), "error", ALL, "n_group null", REFUSED),
    "layers at odds": (edit_config(first_k_dense_replace=0), "error", ALL, "describe different layers", CLEAN),
    "bias method": (edit_config(topk_method="group_limited_greedy"), "error", ALL, "1 router biases are stored", CLEAN),
    "group scores": (
        lambda f: (edit_config(topk_method="group_limited_greedy")(f), edit_tensors(lambda t: t.pop(BIAS))(f)),
        "warning", OURS, "two best", UNLIKE,
    ),
    "interleave": (edit_config(rope_interleave=False), "error", VLLM, "rope_interleave is False", UNLIKE),
    "activation": (edit_config(hidden_act="gelu"), "error", VLLM, "hidden_act is 'gelu'", UNLIKE),
    "rope kind": (
        edit_config(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
        "error", VLLM, "'linear'", UNLIKE,
    ),
    "yarn's null": (edit_config(rope_parameters=YARN | {"factor": None}), "error", VLLM, "factor None is no number", CLEAN),
    "yarn's text": (
        edit_config(rope_parameters=YARN | {"original_max_position_embeddings": "16"}),
        "error", ALL, "original_max_position_embeddings='16', not a number above 0", REFUSED,
    ),
    "rope a text": (edit_config(rope_parameters="yarn"), "error", ALL, "describes no model", REFUSED),
    "dtype a list": (edit_config(dtype=["x"]), "error", ALL, "describes no model", REFUSED),
    "dtype unknown": (edit_config(dtype="x"), "error", ALL, "describes no model: module 'torch' has no attribute 'x'", REFUSED),
    "yarn's reach": (edit_config(max_position_embeddings=128), "warning", ALL, "reaches 64", CLEAN),
    "no yarn": (
        edit_config(max_position_embeddings=131072, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        "warning", ALL, "no YaRN", UNLIKE,
    ),
    "impossible": (edit_config(n_group=4), "error", ALL, "n_routed_experts=6 does not split", REFUSED),
    "unused norm": (edit_tensors(lambda t: t.pop(UNUSED)), "error", VLLM, f"{UNUSED} is missing", CLEAN),
    "no bias": (edit_tensors(lambda t: t.pop(BIAS)), "error", VLLM, f"biases are missing ({BIAS})", UNLIKE),
    "no expert": (edit_tensors(lambda t: t.pop(EXPERT)), "error", ALL, f"missing: {EXPERT}", REFUSED),
    "no norm": (
        edit_tensors(lambda t: t.pop("model.layers.1.post_mlp_layernorm.weight")),
        "error", ALL, "missing: model.layers.1.post_mlp_layernorm", UNLIKE,
    ),
    "stray": (edit_tensors(lambda t: t.update({"model.layers.0.x": torch.ones(2)})), "error", VLLM, "no place", CLEAN),
    "shape": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT][1:].clone()})), "error", ALL, f"{EXPERT} [", REFUSED),
    "vocabulary": (
        edit_tensors(lambda t: t.update({"lm_head.weight": torch.cat([t["lm_head.weight"]] * 2)})),
        "error", ALL, "lm_head.weight [", REFUSED,
    ),
    "fused": (edit_tensors(fuse), "error", VLLM, "2 tensors have the names of transformers' memory", CLEAN),
    "memory's names": (
        edit_tensors(lambda t: (fuse(t), t.update({f"{MEMORY}{NORM}": t.pop(f"model.layers.1.{NORM}")}))),
        "error", VLLM, "3 tensors have the names of transformers' memory", CLEAN,
    ),
    "fused shape": (
        edit_tensors(lambda t: (fuse(t), t.update({f"{MEMORY}experts.down_proj": torch.ones(6, 2, 2)}))),
        "error", ALL, "experts.down_proj [6, 2, 2]", REFUSED,
    ),
    "prediction": (
        edit_tensors(lambda t: t.update({"model.layers.2.enorm.weight": torch.ones_like(t["model.norm.weight"])})),
        "error", VLLM, "1 prediction layers are stored", CLEAN,
    ),
    "half a prediction": (
        edit_tensors(lambda t: t.update({"model.layers.2.enorm.weight": torch.ones_like(t["model.norm.weight"])})),
        "error", VLLM, "the draft is not whole", CLEAN,
    ),
    "promised": (edit_config(num_nextn_predict_layers=1), "warning", VLLM, "no draft", CLEAN),
    "tied, both stored": (edit_config(tie_word_embeddings=True), "warning", ALL, "only where they are equal", CLEAN),
    "tied": (
        lambda f: (edit_config(tie_word_embeddings=True)(f), edit_tensors(lambda t: t.pop("lm_head.weight"))(f)),
        "error", VLLM, "that nothing fills", UNLIKE,
    ),
    "bias dtype": (edit_tensors(lambda t: t.update({BIAS: t[BIAS].bfloat16()})), "warning", ALL, "are BF16, not fp32", CLEAN),
    "packed": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)})), "error", ALL, "I8", None),
    "dtype": (edit_config(dtype="bfloat16"), "warning", ALL, "most tensors are float32", CLEAN),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "error", ALL, "truncated", REFUSED,
    ),
    "pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "error", ALL, "a pointer of Git LFS", REFUSED,
    ),
    "dangling": (
        lambda f: (shutil.move(f / "model.safetensors", f / "x"), (f / "model.safetensors").symlink_to("gone")),
        "error", ALL, "neither model.safetensors nor", REFUSED,
    ),
    "no metadata": (
        lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors"),
        "warning", OURS, "format 'pt'", CLEAN,
    ),
    "stray file": (
        lambda f: shutil.copyfile(f / "model.safetensors", f / "consolidated.safetensors"),
        "error", VLLM, "consolidated.safetensors is no part", CLEAN,
    ),
    "pickle": (lambda f: (f / "training_args.bin").write_bytes(b""), "note", (), "training_args.bin", CLEAN),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "warning", ALL, "no tokenizer can be read", None),
    "half a tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "error", ALL, "tokenizer.json is there and no tokenizer can be read", None,
    ),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "warning", ALL, "no chat template", None),
    "training template": (
        lambda f: (f / "chat_template.jinja").write_text(TRAINING_CHAT_TEMPLATE),
        "warning", ("vLLM", "SGLang"), "loss span", None,
    ),
    "modes": (edit_tokenizer(both_tags), "error", ALL, "instead of </think> alone", None),
    "special tag": (edit_tokenizer(special_tags), "warning", ALL, "<think> is a special token", None),
    "no response": (
        lambda f: edit_json(f / "tokenizer_config.json", drop=["response_template"]),
        "warning", ("transformers",), "no response template", None,
    ),
    "long tokenizer": (edit_tokenizer(lambda t: t.add_tokens(["<new>"])), "error", ALL, "embedding", None),
    "no turn end": (edit_generation(eos_token_id=1), "error", OURS, "lacks <|im_end|>", None),
    "no generation": (lambda f: (f / "generation_config.json").unlink(), "warning", ALL, "no generation_config.json", None),
    "think id": (edit_generation(think_token_id=7), "error", ("transformers",), "think_token_id 7", None),
    "outside": (edit_config(pad_token_id=10**6), "error", ALL, "pad_token_id 1000000 lies outside", None),
}  # fmt: skip


def test_what_this_library_saves_is_healthy(healthy):
    diagnosis = diagnose(healthy)
    assert diagnosis.findings == () and diagnosis.tensors > 40
    assert text_of(diagnosis).count("works  ") == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault, folder):
    spoil, severity, breaks, words, _ = FAULTS[fault]
    spoil(folder)
    diagnosis = diagnose(folder)
    found = [(each.severity, each.breaks) for each in diagnosis.findings if words in each.fact]
    assert found == [(severity, breaks)], text_of(diagnosis)
    if FAULTS[fault][4] == CLEAN and not (severity == "error" and "transformers" in breaks):
        assert diagnosis.errors("transformers") == []
    assert all(each.remedy for each in diagnosis.findings)


@pytest.fixture(scope="module")
def healthy_logits(healthy):
    return stock_logits(healthy)


@torch.no_grad()
def stock_logits(folder):
    model = AXK1ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(padded_ids(model.config)[0]).logits


def stock_takes(folder, healthy_logits) -> str:
    try:
        logits = stock_logits(folder)
    except Exception:
        return REFUSED
    return CLEAN if torch.equal(logits, healthy_logits) else UNLIKE


@pytest.mark.parametrize("fault", [name for name, row in FAULTS.items() if row[4] is not None])
def test_transformers_takes_it_as_the_doctor_says(fault, folder, healthy_logits):
    """What breaks transformers does not load, or not the same model; what breaks vLLM alone is nothing to transformers."""
    spoil, severity, breaks, _, stock = FAULTS[fault]
    spoil(folder)
    assert stock_takes(folder, healthy_logits) == stock
    if stock == REFUSED:
        assert diagnose(folder).errors("transformers")


def test_transformers_alone_does_not_know_the_other_model_type():
    assert "axk1" in CONFIG_MAPPING_NAMES and "AXK1" not in CONFIG_MAPPING_NAMES


def test_a_resave_by_transformers_is_seen(healthy, tmp_path):
    AXK1ForCausalLM.from_pretrained(healthy).save_pretrained(tmp_path)
    diagnosis = diagnose(tmp_path)
    assert [each.breaks for each in diagnosis.findings if each.severity == "error"] == [VLLM]
    assert UNUSED in text_of(diagnosis)


@pytest.mark.parametrize("seed", range(6))
def test_every_tensor_that_we_save_is_expected_and_no_other(seed, tmp_path):
    model = ours(random_config(seed))
    model.save_pretrained(tmp_path)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    expected = expected_tensors(model.config)
    assert {name: shape for name, shape in expected.items() if name in stored} == stored
    assert expected.keys() - stored.keys() <= {"lm_head.weight"}


def test_the_release_as_counted_lacks_only_what_it_ships_without(tmp_path):
    """K1 with 46,000 tensors in a sparse file: seconds, and the promised prediction layer is a warning, no error."""
    config = AxK1Config.preset("k1", topk_method="group_limited_greedy", num_nextn_predict_layers=1)
    config.architectures = ["AXK1ForCausalLM"]
    config.save_pretrained(tmp_path)
    shapes = expected_tensors(AxK1Config.preset("k1", topk_method="group_limited_greedy"))
    header, begin = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    diagnosis = diagnose(tmp_path)
    assert begin == 2 * 518_983_059_456 and diagnosis.tensors == len(shapes)
    assert not diagnosis.errors()
    assert any("num_nextn_predict_layers is 1 and 0 are stored" in each.fact for each in diagnosis.findings)


def test_a_template_cannot_run_code(folder, tmp_path):
    mark = tmp_path / "ran"
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch MARK') }}"
    (folder / "chat_template.jinja").write_text(escape.replace("MARK", str(mark)))
    assert any("the chat template fails" in each.fact for each in diagnose(folder).findings)
    assert not mark.exists()


def test_remote_code_and_pickles_are_not_run(folder, tmp_path):
    mark = tmp_path / "ran"
    (folder / "configuration_axk1.py").write_text(f"open({str(mark)!r}, 'w')")
    edit_config(auto_map={"AutoConfig": "configuration_axk1.A", "AutoTokenizer": ["configuration_axk1.T", None]})(
        folder
    )
    assert any("run where trust_remote_code" in each.fact for each in diagnose(folder).findings)
    assert not mark.exists()


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and no model; merge it into its base with axk1 adapter merge"):
        diagnose(tmp_path)


def test_the_command(folder, capsys):
    assert axk1.main(["doctor", str(folder)]) == 0
    assert "vLLM          works" in capsys.readouterr().out
    edit_config(architectures=None)(folder)
    assert axk1.main(["doctor", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["errors"] == {"transformers": 1, "vLLM": 1, "SGLang": 1} and said["findings"][0]["severity"] == "error"
    edit_config(model_type="llama")(folder)
    assert axk1.main(["doctor", str(folder)]) == 2
    assert "holds a model of type 'llama'" in capsys.readouterr().err
