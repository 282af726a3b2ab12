"""What of a model goes to the Hub?  The files that make it one, a card from its config, recipe and results; never a pickle.

The doctor has to agree first. The upload itself is huggingface_hub's: started again, it sends what is not there yet.
"""

import glob
import inspect
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from conversion.checkpoint import INDEX_NAME, listed, open_checkpoint, read_json
from conversion.convert import TOKENIZER_FILES
from conversion.doctor import PICKLES, Diagnosis, diagnose, packed_experts
from modeling_axk1.configuration_axk1 import AxK1Config, count_parameters, in_units

# What the Hub takes for `base_model_relation`.  [its documentation of model cards]
RELATIONS = ("finetune", "quantized", "adapter", "merge")
TAGS = ("axk1", "mixture-of-experts", "multi-head-latent-attention", "reasoning")
AUTO_MAP = {
    "AutoConfig": "configuration_axk1.AxK1Config",
    "AutoModel": "modeling_axk1.AxK1Model",
    "AutoModelForCausalLM": "modeling_axk1.AxK1ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_axk1.AxK1ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_axk1.AxK1ForTokenClassification",
}
# Files of an earlier push, beside the config, that this one does not replace would be read with the new ones.
STALE_SUFFIXES = (".safetensors", INDEX_NAME, ".py")
# Access tokens (the Hub's, GitHub's, OpenAI's, AWS's) and private keys: what is pushed is read by everyone.
SECRET = re.compile(
    rb"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{32,}|AKIA[A-Z0-9]{16})\b|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# What stands between these lines is written by us, at each push; what a person wrote around them stays.
BEGIN, END = "<!-- axk1 push: begin -->", "<!-- axk1 push: end -->"
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n?", re.DOTALL)


@dataclass(frozen=True)
class CardSettings:
    """What a checkpoint does not say of itself; what is None is taken from the README.md that is there.

    results: `results.json` of `axk1 eval`. recipe: the YAML file that it was trained with, shown whole.
    """

    license: str | None = None
    language: Sequence[str] | None = None
    base_model: Sequence[str] | None = None
    relation: str | None = None
    results: Path | None = None
    recipe: Path | None = None


@dataclass(frozen=True)
class Push:
    """Names in the repository, and the file or the bytes that will be there."""

    repo: str
    files: Mapping[str, Path | bytes]
    card: str
    diagnosis: Diagnosis

    def sizes(self) -> dict[str, int]:
        return {
            name: len(source) if isinstance(source, bytes) else source.stat().st_size
            for name, source in self.files.items()
        }


def plan_push(
    folder: str | Path, repo: str, settings: CardSettings | None = None, *, remote_code: bool = False
) -> Push:
    """All that `push_to_hub` would send; nothing is written or sent.

    remote_code: add this library's model files, for `trust_remote_code=True` where it is not installed.
    ValueError if the doctor finds errors or the card cannot be completed.
    """
    folder, settings = Path(folder), settings or CardSettings()
    validate_repo_id(repo)
    diagnosis = diagnose(folder)
    said = read_json(folder / "config.json")
    # What is broken by remote code that is not there is mended here, by leaving it out or sending it.
    errors = [each.fact for each in diagnosis.errors() if not each.fact.startswith("auto_map names")]
    if errors:
        raise ValueError(
            f"{folder} is not fit to push: {listed(errors, 2)}; `axk1 doctor {folder}` lists {len(errors)} errors with remedies."
        )
    weights = sorted({tensor.path for tensor in open_checkpoint(folder).values()})
    named = [*weights, folder / INDEX_NAME, folder / "generation_config.json", *folder.glob("LICENSE*")]
    named += [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
    files: dict[str, Path | bytes] = {
        path.name: path for path in named if path.is_file() and path.suffix not in (*PICKLES, ".py")
    }
    said.pop("auto_map", None)
    if remote_code:
        said["auto_map"] = AUTO_MAP
        files |= {path.name: path for path in model_files()}
    files["config.json"] = (json.dumps(said, indent=2) + "\n").encode()
    card = model_card(folder, repo, said, settings)
    files["README.md"] = card.encode()
    for name, source in files.items():
        if source not in weights:
            check_that_all_may_read(folder, name, source)
    return Push(repo, dict(sorted(files.items())), card, diagnosis)


def check_that_all_may_read(folder: Path, name: str, source: Path | bytes) -> None:
    """ValueError for a secret, and for a link out of the folder, which might be one; the Hub's cache is made of links."""
    if isinstance(source, Path):
        home = folder.resolve()
        homes = (home, home.parents[1] / "blobs", Path(inspect.getfile(AxK1Config)).resolve().parent)
        if not any(source.resolve().is_relative_to(each) for each in homes):
            raise ValueError(f"{source} is a link to {source.resolve()}, out of the folder; put the file there or remove it.")
        source = source.read_bytes()
    if found := SECRET.search(source):
        begin = found[0][:8].decode()
        raise ValueError(f"{name} holds what looks like a secret ({begin}...) and would be public; remove it, and revoke it.")


def push_to_hub(
    folder: str | Path,
    repo: str,
    settings: CardSettings | None = None,
    *,
    remote_code: bool = False,
    private: bool = False,
    api: HfApi | None = None,
) -> str:
    """Send a model folder, as `plan_push` shows it, to the repository (made if absent); returns its address."""
    push, api = plan_push(folder, repo, settings, remote_code=remote_code), api or HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    with TemporaryDirectory() as staged:
        stage(push, Path(staged))
        # Escaped names rather than patterns: the * of a pattern would reach into folders.
        stale = [glob.escape(name) for name in stale_files(push, api)] or None
        api.upload_folder(repo_id=repo, folder_path=staged, commit_message="Push by axk1", delete_patterns=stale)
    return str(url)


def stale_files(push: Push, api: HfApi | None = None) -> list[str]:
    """What the push deletes in the repository: weights and code beside its config that are not sent; in folders, nothing."""
    try:
        there = (api or HfApi()).list_repo_files(push.repo)
    except RepositoryNotFoundError:
        return []
    return [
        name for name in sorted(there) if "/" not in name and name.endswith(STALE_SUFFIXES) and name not in push.files
    ]


def stage(push: Push, folder: Path) -> None:
    """Lay the files out as the repository will have them: links for what is on the disk, no weight is copied."""
    for name, source in push.files.items():
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
        else:
            os.symlink(source.resolve(), folder / name)


def model_files() -> list[Path]:
    """This library's model as remote code: the package is flat, its files import each other by relative names."""
    package = Path(inspect.getfile(AxK1Config)).parent
    return [path for path in sorted(package.glob("*.py")) if path.name != "__init__.py"]


# -- the card -----------------------------------------------------------------------------------------------------
def model_card(folder: Path, repo: str, said: dict, settings: CardSettings) -> str:
    """README.md: complete metadata, our sections, and around them what a person wrote in the folder's own README.md."""
    path = folder / "README.md"
    try:
        # Some editors begin a file with a mark of the byte order, behind which metadata would go unseen.
        old = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); save it as such.") from error
    results = read_results(settings.results) if settings.results else {}
    data = metadata(repo, said, _old_metadata(path, old), settings, results)
    packed = bool(packed_experts(open_checkpoint(folder)))
    ours = "\n\n".join([BEGIN, *sections(repo, said, data, settings, results, packed=packed), END])
    # The folder's own metadata is merged above, its text stays below.
    body = FRONT_MATTER.sub("", old).strip()
    before, _, rest = body.partition(BEGIN)
    _, _, after = rest.partition(END)
    kept = (before.strip(), ours, after.strip()) if BEGIN in body and END in body else (ours, body)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(piece for piece in kept if piece) + "\n")
    return str(card)


def _old_metadata(path: Path, text: str) -> dict:
    if not FRONT_MATTER.match(text):
        return {}
    try:
        said = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:
        raise ValueError(f"{path} begins with metadata that is not YAML ({error}); mend or remove it.") from error
    for name in ("license", "base_model", "base_model_relation", "language", "tags"):
        values = said.get(name) if isinstance(said.get(name), list) else [said.get(name)]
        # YAML takes an unquoted no, Norwegian, for false.
        if not all(value is None or isinstance(value, str) for value in values):
            raise ValueError(f"{path} has the {name} {said[name]!r}, which is no text; write it in quotes.")
    return said


def metadata(repo: str, said: dict, old: dict, settings: CardSettings, results: dict) -> ModelCardData:
    """ValueError names what neither the settings nor the old card say and no config can."""
    lacking = [name for name in ("license", "language") if not (getattr(settings, name) or old.get(name))]
    if lacking:
        options = " ".join(f"--{name} ..." for name in lacking)
        raise ValueError(
            f"the card has no {' and no '.join(lacking)}; give {options} (the release: apache-2.0; en ko zh ja es), or write "
            "them into the folder's README.md."
        )
    base = settings.base_model or old.get("base_model")
    base = [base] if isinstance(base, str) else list(base or [])
    tags = [old["tags"]] if isinstance(old.get("tags"), str) else old.get("tags") or []
    merged = "merge" in tags
    relation = settings.relation or old.get("base_model_relation") or infer_relation(said, base, merged)
    if relation is not None and (relation not in RELATIONS or not base):
        raise ValueError(
            f"base_model_relation {relation!r} of the base model {', '.join(base) or 'none'} says nothing; give --base-model and "
            f"one of {', '.join(RELATIONS)}."
        )
    more = {"base_model": base if len(base) > 1 else base[0], "base_model_relation": relation} if base else {}
    kept = {name: value for name, value in old.items() if name not in ("model-index", "eval_results", "model_name")}
    language = settings.language or old["language"]
    return ModelCardData(
        **kept
        | more
        | {
            "license": settings.license or old["license"],
            "language": [language] if isinstance(language, str) else list(language),
            "library_name": "transformers",
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys([*TAGS, *tags])),
            "model_name": repo.split("/")[-1],
            "eval_results": evaluations(results) or None,
        }
    )


def infer_relation(said: dict, base: Sequence[str], merged: bool) -> str | None:
    if not base:
        return None
    if "quantization_config" in said:
        return "quantized"
    return "merge" if merged or len(base) > 1 else "finetune"


def read_results(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give the results.json that `axk1 eval` wrote.")
    results = read_json(path)
    rows, named = results.get("results"), {"task", "mode", "metric", "accuracy", "format_error", "problems"}
    whole = isinstance(rows, list) and all(isinstance(row, dict) and named <= row.keys() for row in rows)
    if not (rows and whole and isinstance(results.get("settings"), dict)):
        raise ValueError(f"{path} holds no results of `axk1 eval`; give the results.json in its --out.")
    return results


def evaluations(results: dict) -> list[EvalResult]:
    """Accuracy and format error of each task and mode, in percent, as the Hub's model-index has them."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", row["task"]),
            dataset_name=row["task"],
            metric_type=name,
            metric_name=f"{name.replace('_', ' ')}, {row['mode']} mode, %",
            metric_value=round(100 * row[name], 2),
            metric_config=row["mode"],
        )
        for row in results.get("results", [])
        for name in ("accuracy", "format_error")
    ]


def sections(
    repo: str, said: dict, data: ModelCardData, settings: CardSettings, results: dict, *, packed: bool
) -> list[str]:
    config = AxK1Config.from_dict({**said, "model_type": AxK1Config.model_type})
    pieces = [f"# {repo.split('/')[-1]}", summary(config, data), "## Architecture", architecture(config)]
    pieces += ["## Two modes", usage(repo, "auto_map" in said, packed)]
    if results:
        pieces += ["## Evaluation", evaluation(results)]
    if settings.recipe:
        recipe = Path(settings.recipe)
        pieces += ["## Training", f"`{recipe.name}`:", f"```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```"]
    return pieces


def summary(config: AxK1Config, data: ModelCardData) -> str:
    counts = count_parameters(config)
    kind = {
        "finetune": "Fine-tuned from",
        "quantized": "A quantisation of",
        "merge": "A merge of",
        "adapter": "An adapter for",
    }
    base = data.get("base_model")
    base = ", ".join(base if isinstance(base, list) else [base]) if base else None
    from_where = f" {kind[data.get('base_model_relation')]} {base}." if base else ""
    return (
        f"An A.X K1 model ([arXiv 2601.09200](https://arxiv.org/abs/2601.09200)): {counts['total']:,} parameters, "
        f"{counts['active']:,} active for a token; it answers at once or thinks first, as asked.{from_where}"
    )


def architecture(config: AxK1Config) -> str:
    sparse = config.mlp_layer_types.count("sparse")
    rows = {
        "layers": f"{config.num_hidden_layers}: {config.num_hidden_layers - sparse} dense, {sparse} mixture-of-experts",
        "hidden size; dense FFN": f"{config.hidden_size:,}; {config.intermediate_size:,}",
        "attention": f"multi-head latent, {config.num_attention_heads} heads, {config.kv_lora_rank} + "
        f"{config.qk_rope_head_dim} values cached a token and layer",
        "experts": f"{config.n_routed_experts} routed of width {config.moe_intermediate_size:,}, "
        f"{config.num_experts_per_tok} for a token, and {config.n_shared_experts} shared",
        "router": f"{config.topk_method}, {config.topk_group} of {config.n_group} groups",
        "vocabulary": f"{config.vocab_size:,}",
        "context": f"{config.max_position_embeddings:,} tokens",
    }
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def usage(repo: str, remote_code: bool, packed: bool) -> str:
    """`packed`: routed experts are quantised, which transformers' own class does not read."""
    trust = ", trust_remote_code=True" if remote_code else ""
    library = "no library but transformers is needed" if remote_code else "transformers' own class reads the same files"
    if packed:
        library = "bitsandbytes is needed" if remote_code else "after `import modeling_axk1`: transformers' own class fails"
    return f"""`enable_thinking` in the chat template decides the mode: `<think>` or `</think>` ends the prompt.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForCausalLM.from_pretrained("{repo}"{trust})  # {library}
chat = [{{"role": "user", "content": "What is 2 + 3?"}}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, enable_thinking=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=512)[0]))
```"""


def evaluation(results: dict) -> str:
    head = "| task | mode | problems | accuracy | format error | judged by |\n|---|---|---|---|---|---|\n"
    rows = "\n".join(
        f"| {row['task']} | {row['mode']} | {row['problems']} | {_share(row, 'accuracy')} | {_share(row, 'format_error')} | "
        f"{row['metric']} |"
        for row in results["results"]
    )
    asked = ", ".join(f"{name} {value}" for name, value in results["settings"].items() if name != "model")
    return f"{head}{rows}\n\nBy `axk1 eval` ({asked}); in brackets 95% bootstrap intervals."


def _share(row: dict, name: str) -> str:
    interval = row.get(f"{name}_interval")
    return f"{row[name]:.1%}" + (f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else "")


# -- what is shown ------------------------------------------------------------------------------------------------
def text_of_push(push: Push, api: HfApi | None = None) -> str:
    """Exactly what would go: every file with its bytes, what it deletes there, the card, and what the doctor warns of."""
    sizes = push.sizes()
    written = {name for name, source in push.files.items() if isinstance(source, bytes)}
    lines = [f"{push.repo}:"]
    lines += [
        f"  {name:<44}{size:>18,} bytes{'  (written for it)' * (name in written)}" for name, size in sizes.items()
    ]
    lines += [f"{len(sizes)} files, {sum(sizes.values()):,} bytes ({in_units(sum(sizes.values()))})"]
    lines += [*text_of_deletions(push, api), ""]
    lines += [f"{each.severity}: {each.fact} -> {each.remedy}" for each in push.diagnosis.findings]
    return "\n".join([*lines, "", "README.md:", push.card])


def text_of_deletions(push: Push, api: HfApi | None) -> list[str]:
    try:
        return [f"  {name}  (deleted there)" for name in stale_files(push, api)]
    # Without a network all else can still be shown; the error is that of whichever client the library uses.
    except Exception as error:
        return [f"What it deletes there is not known, the Hub did not answer: {' '.join(str(error).split())[:160]}"]
