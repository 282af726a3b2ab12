"""What is wrong with this checkpoint for transformers, vLLM and SGLang?  Reads JSON and safetensors headers; builds no model.

What each engine wants was read in its source; the tables below are those facts.
  transformers 5.23: `models/axk1`, `conversion_mapping.py`; tests/conversion/test_doctor.py runs it on each defect.
  vLLM, 2026, read; `make vllm` runs sound checkpoints on it: `model_executor/models/AXK1.py`,
    `transformers_utils/configs/AXK1.py`, `model_executor/model_loader/default_loader.py`.
  SGLang: has no A.X K1 of its own (its issue 16230) and runs transformers' class: what stops that, stops it.
No file of a checkpoint is executed; its chat template is rendered in transformers' sandbox.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from conversion.checkpoint import (
    INDEX_NAME,
    StoredTensor,
    TensorSpec,
    listed,
    open_checkpoint,
    read_json,
    read_metadata,
)
from conversion.convert import local_tokenizer
from conversion.weight_map import POST_NORM, hf_shapes, rows_of
from modeling_axk1.configuration_axk1 import AxK1Config, in_units, layer_types_of
from modeling_axk1.generation_axk1 import END_THINK, THINK, TURN_END

ENGINES = ("transformers", "vLLM", "SGLang")
ALL = ENGINES
# SGLang runs transformers' class.
OURS = ("transformers", "SGLang")
VLLM = ("vLLM",)

ARCHITECTURES = ["AXK1ForCausalLM"]
# Read by vLLM from the config without a default, where `model_type` is axk1 and so transformers' own config class is built.
VLLM_FIELDS = ("topk_method", "scoring_func", "first_k_dense_replace", "moe_layer_freq")
# Numbers that transformers' own config wants with a point.  [read in its source]
FLOATS = ("routed_scaling_factor", "initializer_range", "rms_norm_eps")
# A field, the only value that vLLM's class can run, and what it does whatever the field says.
VLLM_ONLY = (
    ("attention_bias", False, "creates no biases in attention and skips those on the disk in silence"),
    ("rope_interleave", True, "always rotates interleaved pairs"),
    ("hidden_act", "silu", "refuses every other activation"),
)
ROUTER_BIAS = ".mlp.gate.e_score_correction_bias"
FUSED_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
SEPARATE_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
IN_MEMORY_NORM = f".mlp.{POST_NORM}"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One fact: `breaks` are the engines that stop or answer wrongly (error), differ or lack something (warning)."""

    severity: str
    breaks: tuple[str, ...]
    fact: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one folder, worst first, and how many tensors were held against the config."""

    model: str
    tensors: int
    nbytes: int
    findings: tuple[Finding, ...]

    def errors(self, engine: str | None = None) -> list[Finding]:
        return [
            each for each in self.findings if each.severity == "error" and (engine is None or engine in each.breaks)
        ]

    def json(self) -> str:
        verdict = {engine: len(self.errors(engine)) for engine in ENGINES}
        return json.dumps(asdict(self) | {"errors": verdict}, indent=2)


def diagnose(folder: str | Path) -> Diagnosis:
    """Hold a folder's config, tensors, tokenizer and generation config against what the engines want.

    ValueError if there is no config.json of an A.X K1: that is no checkpoint to examine.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter and no model; merge it into its base with axk1 adapter merge, or send it with hf upload."
        )
    said = read_json(folder / "config.json")
    if said.get("model_type") not in ("axk1", "AXK1"):
        raise ValueError(f"{folder} holds a model of type {said.get('model_type')!r}; doctor knows axk1 only.")
    findings = [*check_identity(said, folder), *check_fields(said)]
    config = _config_of(said, findings)
    tensors = _tensors_of(folder, findings)
    if config is not None:
        findings += [*check_layers(said, config), *check_rope(said, config)]
        findings += check_tokenizer(folder, config)
        if tensors and "quantization_config" not in said:
            findings += [*check_tensors(config, tensors), *check_dtypes(said, tensors)]
    if "quantization_config" in said:
        fact = "the weights are quantised, so names, shapes and dtypes were not held against the config"
        findings.append(Finding("note", (), fact, "examine the unquantised checkpoint"))
        findings += check_packed(tensors)
    findings += check_files(folder, tensors)
    ordered = sorted(findings, key=lambda each: SEVERITIES.index(each.severity))
    return Diagnosis(str(folder), len(tensors), sum(tensor.nbytes for tensor in tensors.values()), tuple(ordered))


def _config_of(said: dict, findings: list[Finding]) -> AxK1Config | None:
    try:
        return AxK1Config.from_dict({**said, "model_type": AxK1Config.model_type})
    # The last two are what transformers itself stumbles over: a dtype that is a list or none of torch's, a rope that is a text.
    except (ValueError, TypeError, StrictDataclassError, AttributeError, IndexError) as error:
        fact = f"config.json describes no model: {' '.join(str(error).split())}"
        findings.append(Finding("error", ALL, fact, "correct the field; the tensors were not held against it"))
        return None


def _tensors_of(folder: Path, findings: list[Finding]) -> Mapping[str, StoredTensor]:
    try:
        return open_checkpoint(folder)
    except ValueError as error:
        fact, _, remedy = str(error).removesuffix(".").rpartition("; ")
        findings.append(Finding("error", ALL, fact, remedy))
        return {}


# -- config.json --------------------------------------------------------------------------------------------------
def check_identity(said: dict, folder: Path) -> Iterator[Finding]:
    if said["model_type"] != AxK1Config.model_type:
        fact = f"model_type is {said['model_type']!r}, which transformers' AutoConfig does not know"
        yield Finding("error", OURS, fact, "write model_type 'axk1' (saving with this library does)")
    architectures = said.get("architectures")
    if architectures != ARCHITECTURES:
        fact = f"architectures is {architectures!r}; the engines look the class up as {ARCHITECTURES[0]}"
        yield Finding("error", ALL, fact, f"write architectures {ARCHITECTURES}")
    yield from check_auto_map(said.get("auto_map"), folder)


def check_auto_map(auto_map: object, folder: Path) -> Iterator[Finding]:
    if not auto_map:
        return
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    # An entry is module.Class, repository--module.Class where the code lives elsewhere, or a pair of them.
    entries = [each for value in values for each in (value if isinstance(value, list) else [value]) if each]
    files = {f"{str(each).split('.')[0]}.py" for each in entries if "--" not in str(each)}
    absent = sorted(name for name in files if not (folder / Path(name).name).is_file())
    if absent:
        fact = f"auto_map names {listed(absent)}, not in the folder: trust_remote_code=True fails"
        yield Finding("error", ALL, fact, "remove auto_map, or push with --remote-code")
    else:
        fact = "auto_map names Python files, which run where trust_remote_code=True"
        yield Finding("note", (), fact, "read them before you trust them; nothing needs them")


def check_fields(said: dict) -> Iterator[Finding]:
    """What the file itself says, before any default fills it."""
    absent = [name for name in VLLM_FIELDS if said.get(name) is None]
    if absent and said["model_type"] == AxK1Config.model_type:
        fact = f"config.json does not say {', '.join(absent)}, which vLLM reads without a default"
        yield Finding("error", VLLM, fact, "load it with AxK1Config and save it again: every field is written")
    null = [name for name in ("n_group", "topk_group") if name in said and said[name] is None]
    if null:
        fact = f"{' and '.join(null)} null: transformers wants a number and vLLM always groups"
        yield Finding("error", ALL, fact, "write 1 and 1 for an ungrouped router")
    whole = [name for name in FLOATS if type(said.get(name)) is int]
    if whole:
        fact = f"{whole[0]} is {said[whole[0]]}, a whole number, which transformers' own config refuses"
        yield Finding("error", OURS, fact, "load it with AxK1Config and save it again: it is written with its point")
    for name, value, habit in VLLM_ONLY:
        if said.get(name, value) not in (value, None):
            fact = f"{name} is {said[name]!r}, but vLLM {habit}"
            yield Finding("error", VLLM, fact, f"serve it with transformers, or train with {name}={value!r}")


def check_layers(said: dict, config: AxK1Config) -> Iterator[Finding]:
    if not config.post_mlp_norm:
        yield Finding("error", ALL, "post_mlp_norm is false: the engines have no such model", "train with the norm")
    if isinstance(config.moe_layer_freq, list):
        fact = "mlp_layer_types follows no first_k_dense_replace and moe_layer_freq, and vLLM reads only those two"
        yield Finding("error", VLLM, fact, "serve it with transformers")
    first, freq = said.get("first_k_dense_replace"), said.get("moe_layer_freq")
    ruled = layer_types_of(config.num_hidden_layers, first, freq)
    if not (first is None and freq is None) and ruled != config.mlp_layer_types:
        fact = (
            f"mlp_layer_types and first_k_dense_replace {first}, moe_layer_freq {freq} describe different layers: transformers "
            "reads the first, vLLM the others"
        )
        yield Finding("error", ALL, fact, "remove what is wrong and save the config again")
    if not config.has_router_bias and config.n_group > 1:
        fact = (
            f"topk_method {config.topk_method} with n_group {config.n_group}: transformers scores a group by its two best "
            "experts, vLLM and this library by the best one, so they route differently"
        )
        yield Finding("warning", OURS, fact, "compare answers, or train with noaux_tc or n_group 1")


def check_rope(said: dict, config: AxK1Config) -> Iterator[Finding]:
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        fact = f"rope_type is {kind!r}, which vLLM computes as YaRN"
        yield Finding("error", VLLM, fact, "use 'default' or 'yarn'")
    if kind == "yarn":
        named = {name: rope.get(name, 0) for name in ("factor", "original_max_position_embeddings")}
        wrong = [f"{name} {value!r}" for name, value in named.items() if type(value) not in (int, float)]
        reach = 0 if wrong else math.prod(named.values())
        if wrong:
            # Transformers computes a factor that is null from the two lengths.
            breaks = VLLM if wrong == ["factor None"] else ALL
            yield Finding(
                "error", breaks, f"YaRN's {' and '.join(wrong)} is no number", "write the one it was trained with"
            )
        elif reach != config.max_position_embeddings:
            fact = (
                f"YaRN reaches {reach:,.0f} positions, max_position_embeddings says {config.max_position_embeddings:,}"
            )
            yield Finding("warning", ALL, fact, "make factor x original_max_position_embeddings equal to it")
    elif config.max_position_embeddings > AxK1Config.max_position_embeddings:
        fact = f"max_position_embeddings is {config.max_position_embeddings:,} and rope_parameters has no YaRN"
        yield Finding("warning", ALL, fact, "write the YaRN it was trained with, or the length it was trained at")


# -- tensors ------------------------------------------------------------------------------------------------------
def expected_tensors(config: AxK1Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor on the disk; the prediction layers are those of `num_nextn_predict_layers`."""
    wanted = hf_shapes(rows_of(config))
    if config.attention_bias:
        sizes = {
            "q_a_proj": config.q_lora_rank,
            "kv_a_proj_with_mqa": config.kv_lora_rank + config.qk_rope_head_dim,
            "o_proj": config.hidden_size,
        }
        for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
            wanted |= {f"model.layers.{layer}.self_attn.{name}.bias": (size,) for name, size in sizes.items()}
    return wanted


def check_tensors(config: AxK1Config, tensors: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Every tensor that the config asks for is there in its shape, and no other: each is accounted for once."""
    if max(config.num_hidden_layers, config.n_routed_experts) > len(tensors):
        fact = f"the files hold {len(tensors)} tensors, fewer than the config has layers or experts"
        yield Finding("error", ALL, fact, "fetch the checkpoint whole, or correct the config")
        return
    layers, promised = config.num_hidden_layers, config.num_nextn_predict_layers
    found = sum(f"model.layers.{layers + i}.enorm.weight" in tensors for i in range(len(tensors)))
    yield from check_prediction(promised, found)
    wanted = expected_tensors(AxK1Config.from_dict({**config.to_dict(), "num_nextn_predict_layers": found}))

    if config.tie_word_embeddings:
        yield from check_tied("lm_head.weight" in tensors)
        wanted |= {name: wanted["model.embed_tokens.weight"] for name in tensors if name == "lm_head.weight"}
    in_memory = [name for name in tensors if FUSED_EXPERTS.fullmatch(name) or name.endswith(IN_MEMORY_NORM)]
    if in_memory:
        fact = (
            f"{len(in_memory)} tensors have the names of transformers' memory ({listed(in_memory, 2)}): it reads them, vLLM "
            "wants separate experts, and the norm one level up"
        )
        yield Finding("error", VLLM, fact, "load it with this library and save it again")
        wanted = with_memory_names(config, wanted, tensors)
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted and not name.endswith("rotary_emb.inv_freq")]
    wrong = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    yield from check_missing(config, missing)
    yield from check_extra(config, extra)
    if wrong:
        remedy = "correct the config, or cut padding off (axk1 convert does, for a padded vocabulary)"
        yield Finding(
            "error", ALL, f"{len(wrong)} tensors have other shapes than the config: {listed(wrong, 4)}", remedy
        )


def with_memory_names(
    config: AxK1Config, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorSpec]
) -> dict[str, tuple[int, ...]]:
    """Where `tensors` has a name of transformers' memory, that one instead of those on the disk that it stands for."""
    width, hidden = config.moe_intermediate_size, config.hidden_size
    shapes = {
        "gate_up": (config.n_routed_experts, 2 * width, hidden),
        "down": (config.n_routed_experts, hidden, width),
    }
    fused = {match.groups(): match[0] for match in map(FUSED_EXPERTS.fullmatch, tensors) if match}
    found = {}
    for name, shape in wanted.items():
        norm = name.removesuffix(POST_NORM) + IN_MEMORY_NORM.removeprefix(".")
        if match := SEPARATE_EXPERT.fullmatch(name):
            kind = "down" if match[2] == "down" else "gate_up"
            memory, shape_there = fused.get((match[1], kind)), shapes[kind]
        else:
            memory, shape_there = (norm if name.endswith(POST_NORM) and norm in tensors else None), shape
        found[memory or name] = shape_there if memory else shape
    return found


def packed_experts(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """The routed experts' matrices that are stored in 4 or 8 bits, as this library saves them and no other reads them."""
    return [
        tensor.name
        for tensor in tensors.values()
        if SEPARATE_EXPERT.fullmatch(tensor.name) and not tensor.dtype.is_floating_point
    ]


def check_packed(tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    if packed := packed_experts(tensors):
        fact = f"{len(packed)} matrices of routed experts are quantised: this library alone reads them, no engine without it"
        yield Finding("warning", ALL, fact, "import modeling_axk1 in transformers, else dequantize() the model and save it")


def check_tied(stored: bool) -> Iterator[Finding]:
    if stored:
        fact = (
            "tie_word_embeddings is true and lm_head.weight is stored: transformers ties them only where they are equal"
        )
        yield Finding("warning", ALL, fact, "write tie_word_embeddings false")
    else:
        fact = "tie_word_embeddings is true and lm_head.weight is not stored: vLLM has a head of its own that nothing fills"
        yield Finding("error", VLLM, fact, "untie: store a copy of the embedding as lm_head.weight, write false")


def check_prediction(promised: int, found: int) -> Iterator[Finding]:
    """The release itself promises a layer that it does not ship."""
    if found > promised:
        fact = f"{found} prediction layers are stored but num_nextn_predict_layers is {promised}: vLLM stops at their names"
        yield Finding("error", VLLM, fact, f"write num_nextn_predict_layers {found}")
    elif found < promised:
        fact = f"num_nextn_predict_layers is {promised} and {found} are stored: speculative decoding has no draft"
        yield Finding("warning", VLLM, fact, f"write num_nextn_predict_layers {found}, or convert them too")


def check_missing(config: AxK1Config, missing: list[str]) -> Iterator[Finding]:
    dense = {f"model.layers.{i}.{POST_NORM}" for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"}
    # Transformers reads no prediction layer.
    later = [(layer := LAYER.match(name)) and int(layer[1]) >= config.num_hidden_layers for name in missing]
    drafts = [name for name, is_later in zip(missing, later) if is_later]
    missing = [name for name, is_later in zip(missing, later) if not is_later]
    unused = [name for name in missing if name in dense]
    biases = [name for name in missing if name.endswith(ROUTER_BIAS)]
    others = [name for name in missing if name not in dense and not name.endswith(ROUTER_BIAS)]
    if unused:
        fact = f"{listed(unused, 4)} is missing: nothing uses it, but vLLM refuses a norm that no file fills"
        yield Finding("error", VLLM, fact, "load it with this library and save it again, which adds it")
    if biases:
        fact = (
            f"{len(biases)} router biases are missing ({listed(biases, 1)}) though topk_method is noaux_tc: vLLM creates them "
            "and never fills them, transformers takes zeros"
        )
        yield Finding("error", VLLM, fact, "load it with this library and save it again: zeros are written")
    if drafts:
        fact = (
            f"{len(drafts)} tensors of the prediction layers are missing: {listed(drafts, 4)}; the draft is not whole"
        )
        yield Finding(
            "error", VLLM, fact, "fetch or convert them whole, or remove them and write num_nextn_predict_layers 0"
        )
    if others:
        fact = (
            f"{len(others)} tensors that the config asks for are missing: {listed(others, 4)}; transformers itself draws "
            "them at random, with a warning only"
        )
        yield Finding("error", ALL, fact, "fetch the checkpoint whole, or correct the config")


def check_extra(config: AxK1Config, extra: Iterable[str]) -> Iterator[Finding]:
    layers = config.num_hidden_layers
    promised = range(layers, layers + config.num_nextn_predict_layers)
    biases, unknown = [], []
    for name in extra:
        layer = LAYER.match(name)
        # vLLM passes over whatever lies in a promised prediction layer, and over biases that it has no place for.
        if (layer and int(layer[1]) in promised) or (name.endswith(".bias") and ".self_attn." in name):
            continue
        (biases if name.endswith(ROUTER_BIAS) else unknown).append(name)
    if biases:
        fact = (
            f"{len(biases)} router biases are stored ({listed(biases, 1)}) though topk_method is {config.topk_method}: "
            "transformers applies them, vLLM stops at their names"
        )
        yield Finding("error", ALL, fact, "write topk_method noaux_tc if it was trained with them, else remove them")
    if unknown:
        fact = f"{len(unknown)} tensors have no place in the model: {listed(unknown, 4)}; vLLM stops at their names"
        yield Finding("error", VLLM, fact, "load it with this library and save it again, or correct the config")


def check_dtypes(said: dict, tensors: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    rounded = [t.name for t in tensors.values() if t.name.endswith(ROUTER_BIAS) and t.dtype != torch.float32]
    if rounded:
        fact = (
            f"{len(rounded)} router biases are {tensors[rounded[0]].dtype_name}, not fp32: near ties route differently"
        )
        yield Finding("warning", ALL, fact, "save them in fp32, as this library does")
    weights = [tensor for tensor in tensors.values() if not tensor.name.endswith(ROUTER_BIAS)]
    packed = sorted({t.dtype_name for t in weights if t.dtype.itemsize == 1 or not t.dtype.is_floating_point})
    if packed:
        fact = f"weights are {', '.join(packed)} and config.json has no quantization_config: nobody knows their scales"
        yield Finding("error", ALL, fact, "add the quantization_config they were packed with")
    stored = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in weights)
    named = said.get("dtype", said.get("torch_dtype"))
    if named is not None and stored and not packed and stored.most_common(1)[0][0] != named:
        fact = f"config.json says dtype {named}, most tensors are {stored.most_common(1)[0][0]}: dtype='auto' converts them"
        yield Finding("warning", ALL, fact, "write the dtype of the tensors")


# -- what lies beside the weights ---------------------------------------------------------------------------------
def check_files(folder: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    stray = sorted({path.name for path in folder.glob("*.safetensors")} - {t.path.name for t in tensors.values()})
    if stray and tensors and not (folder / INDEX_NAME).exists():
        fact = f"{listed(stray, 4)} is no part of the model, but without an index vLLM reads every safetensors file"
        yield Finding("error", VLLM, fact, "move it to a folder of its own")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        fact = f"{listed(pickles, 4)} may run code when loaded; not read here, and never pushed"
        yield Finding("note", (), fact, "remove what is not needed")
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            form = read_metadata(path).get("format")
        except (ValueError, OSError):
            # Reported among the tensors, with the reason; or a link to nothing, which the model does not ask for.
            continue
        if form != "pt":
            fact = f"{path.name} does not say format 'pt' in its metadata, which accelerate and transformers 4 want"
            yield Finding("warning", OURS, fact, "save it with transformers or safetensors' save_file(metadata=...)")


def check_tokenizer(folder: Path, config: AxK1Config) -> Iterator[Finding]:
    try:
        tokenizer = local_tokenizer(folder)
    # Which error it is depends on the file and on the library that reads it.
    except Exception as error:
        fact = f"no tokenizer can be read ({' '.join(str(error).split())[:160]})"
        if (folder / "tokenizer.json").exists():
            # A pointer of Git LFS, most often.
            yield Finding("error", ALL, f"tokenizer.json is there and {fact}", "fetch or save it again")
        else:
            yield Finding("warning", ALL, fact, "save one beside the model")
        return
    if len(tokenizer) > config.vocab_size:
        fact = f"the tokenizer has {len(tokenizer):,} tokens, the embedding {config.vocab_size:,} rows"
        yield Finding("error", ALL, fact, "resize the embedding, or take the tokenizer it was trained with")
    yield from check_tags(tokenizer)
    yield from check_template(tokenizer)
    yield from check_generation(folder, config, tokenizer)


def check_tags(tokenizer) -> Iterator[Finding]:
    vocabulary = tokenizer.get_vocab()
    for tag in (THINK, END_THINK):
        if tag not in vocabulary:
            fact = f"{tag} is no token of its own, so no engine can tell thought from answer"
            yield Finding("error", ALL, fact, "add it with tokenizer.add_tokens and train it")
        elif vocabulary[tag] in tokenizer.all_special_ids:
            fact = f"{tag} is a special token: decoded text loses it, and parsers of reasoning with it"
            yield Finding("warning", ALL, fact, "add it as AddedToken(special=False)")
    if TURN_END not in vocabulary:
        yield Finding("warning", ALL, f"{TURN_END} is no token of its own: a turn has no end", "add it and train it")


def check_template(tokenizer) -> Iterator[Finding]:
    if tokenizer.chat_template is None:
        yield Finding(
            "warning", ALL, "there is no chat template: chat requests are refused", "save the tokenizer with one"
        )
        return
    for thinking, tag in ((True, THINK), (False, END_THINK)):
        try:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], add_generation_prompt=True, tokenize=False, enable_thinking=thinking
            )
        # A template raises what it likes.
        except Exception as error:
            yield Finding("error", ALL, f"the chat template fails ({' '.join(str(error).split())[:160]})", "mend it")
            return
        mode = "thinking" if thinking else "non-thinking"
        other = END_THINK if thinking else THINK
        if not prompt.rstrip().endswith(tag) or prompt.rstrip().removesuffix(tag).rstrip().endswith(other):
            fact = f"a {mode} prompt ends in {prompt[-24:]!r} instead of {tag} alone, so the mode is not what was asked"
            yield Finding("error", ALL, fact, "use trainers.tokenizer.CHAT_TEMPLATE, or the one it was trained with")
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        fact = "the chat template marks the loss span ({% generation %}), which other Jinja engines do not know"
        yield Finding("warning", VLLM + ("SGLang",), fact, "save the template without the markers")
    if getattr(tokenizer, "response_template", None) is None:
        fact = "there is no response template: `transformers serve` returns the thought inside the answer"
        yield Finding(
            "warning", ("transformers",), fact, "set tokenizer.response_template (trainers.tokenizer has one)"
        )


def check_generation(folder: Path, config: AxK1Config, tokenizer) -> Iterator[Finding]:
    path = folder / "generation_config.json"
    try:
        generation = read_json(path) if path.is_file() else {}
    except ValueError as error:
        yield Finding("error", ALL, str(error), "save it again")
        return
    if not path.is_file():
        fact = "there is no generation_config.json: the engines take the config's tokens"
        yield Finding("warning", ALL, fact, "set_thinking_tokens(model.generation_config, tokenizer), then save")
    # transformers builds the one from the other where it is absent.
    stop = generation.get("eos_token_id", config.eos_token_id)
    stops = {each for each in (stop if isinstance(stop, list) else [stop]) if each is not None}
    turn_end = tokenizer.get_vocab().get(TURN_END)
    if turn_end is not None and turn_end not in stops:
        # vLLM stops at the tokenizer's end of sequence as well.
        breaks = OURS if tokenizer.eos_token_id == turn_end else ALL
        fact = f"eos_token_id {sorted(stops)} lacks {TURN_END} ({turn_end}): an answer runs on to the length limit"
        yield Finding("error", breaks, fact, "set_thinking_tokens(model.generation_config, tokenizer), then save")
    for name, tag in (("think_token_id", THINK), ("end_think_token_id", END_THINK)):
        token = tokenizer.get_vocab().get(tag)
        if token is not None and generation.get(name) != token:
            fact = f"generation_config.json says {name} {generation.get(name)}, the tokenizer says {token}"
            severity = "error" if name in generation else "warning"
            remedy = "set_thinking_tokens(model.generation_config, tokenizer), then save"
            yield Finding(severity, ("transformers",), fact + ": generate(enable_thinking=...) needs it", remedy)
    ids = {f"eos_token_id {each}": each for each in stops} | {
        f"pad_token_id {config.pad_token_id}": config.pad_token_id
    }
    outside = [name for name, each in ids.items() if each is not None and not 0 <= each < config.vocab_size]
    if outside:
        fact = f"{', '.join(outside)} lies outside the vocabulary of {config.vocab_size:,}"
        yield Finding("error", ALL, fact, "take the ids from the tokenizer")


# -- what is shown ------------------------------------------------------------------------------------------------
def text_of(diagnosis: Diagnosis) -> str:
    """The findings, worst first, and a line for each engine."""
    lines = [f"{diagnosis.model}: {diagnosis.tensors:,} tensors, {in_units(diagnosis.nbytes)}"]
    for each in diagnosis.findings:
        lines += ["", f"{each.severity:<8} {', '.join(each.breaks) or '-'}", f"         {each.fact}"]
        lines.append(f"         -> {each.remedy}")
    lines.append("")
    for engine in ENGINES:
        said = [
            sum(each.severity == kind and engine in each.breaks for each in diagnosis.findings) for kind in SEVERITIES
        ]
        state = "broken" if said[0] else "works, with less" if said[1] else "works"
        lines.append(f"{engine:<13} {state:<17} {said[0]} errors, {said[1]} warnings")
    return "\n".join(lines)
