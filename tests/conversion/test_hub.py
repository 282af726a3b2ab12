"""Does a push send exactly what it shows, whole and loadable, and nothing of a broken model?  Offline: the Hub is a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

import axk1
from conversion.doctor import ALL, diagnose
from conversion.hub import CardSettings, model_files, plan_push, push_to_hub, stage, text_of_push
from modeling_axk1 import AxK1Config, AxK1ForCausalLM, count_parameters, set_thinking_tokens
from tests.random_models import ours, padded_ids, tiny_chat_config
from trainers.scorecard import EvalSettings, write_results
from trainers.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
SETTINGS = CardSettings(license="apache-2.0", language=["en", "ko"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = train_tokenizer(["what is 1 + 2 ? it is 3 ."] * 4, vocab_size=300)
    model = ours(tiny_chat_config(len(tokenizer)))
    set_thinking_tokens(model.generation_config, tokenizer)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """As training leaves one: with a pickle, checkpoints and code of unknown origin beside the model."""
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model/training_args.bin").write_bytes(b"pickle")
    (tmp_path / "model/tokenizer_of_mine.py").write_text("raise SystemExit")
    (tmp_path / "model/checkpoint-2").mkdir()
    (tmp_path / "model/checkpoint-2/model.safetensors").write_bytes(b"")
    (tmp_path / "model/extra.safetensors").write_bytes(b"not in the index")
    return tmp_path / "model"


class FolderHub:
    """The three calls of HfApi that a push makes, onto a folder; it deletes as huggingface_hub does."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []

    def create_repo(self, repo_id, *, private, exist_ok):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        return f"https://huggingface.co/{repo_id}"

    def list_repo_files(self, repo_id):
        root = self.root / repo_id
        return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        self.calls.append(("upload_folder", repo_id, delete_patterns))
        for name in filter_repo_objects(self.list_repo_files(repo_id), allow_patterns=delete_patterns or []):
            (self.root / repo_id / name).unlink()
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


def results_file(tmp_path) -> Path:
    rows = [
        {
            "task": "gsm8k_test", "mode": mode, "metric": "exact", "problems": 40, "accuracy": accuracy,
            "accuracy_interval": [accuracy - 0.1, accuracy + 0.1], "format_error": 0.025, "format_error_interval": [0.0, 0.1],
            "truncation": 0.0, "truncation_interval": [0.0, 0.0], "tokens_per_answer": 9.0, "tokens_interval": [8.0, 9.0],
            "seconds_per_answer": 0.1,
        }
        for mode, accuracy in (("thinking", 0.775), ("non-thinking", 0.3))
    ]  # fmt: skip
    write_results(tmp_path, EvalSettings(model="runs/model", limit=40), rows)
    return tmp_path / "results.json"


def test_exactly_the_model_is_sent_and_loads(folder, tmp_path):
    hub = FolderHub(tmp_path / "hub")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert push_to_hub(folder, "me/nano", SETTINGS, private=True, api=hub) == "https://huggingface.co/me/nano"
    assert hub.calls[0] == ("create_repo", "me/nano", True, True)
    sent = tmp_path / "hub/me/nano"
    names = {path.name for path in sent.iterdir()}
    weights = {name for name in names if name.endswith(".safetensors")}
    assert len(weights) > 2 and names - weights == {
        "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    plan = plan_push(folder, "me/nano", SETTINGS)
    assert plan.sizes() == {path.name: path.stat().st_size for path in sent.iterdir()}
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}, "the folder was changed"
    assert not diagnose(sent).findings
    assert "response_template" in json.loads((sent / "tokenizer_config.json").read_text())
    ids, _ = padded_ids(AxK1ForCausalLM.from_pretrained(folder).config)
    with torch.no_grad():
        expected = AxK1ForCausalLM.from_pretrained(folder)(ids).logits
        assert torch.equal(AxK1ForCausalLM.from_pretrained(sent)(ids).logits, expected)


def test_only_stale_files_beside_the_config_are_deleted(folder, tmp_path):
    hub = FolderHub(tmp_path / "hub")
    there = tmp_path / "hub/me/nano"
    kept = {"adapter/adapter_model.safetensors", "custom_generate/generate.py", "notes.txt", ".gitattributes"}
    gone = {"model-00001-of-00099.safetensors", "modeling_[old].py"}
    for name in kept | gone:
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("of an earlier push")
    push = plan_push(folder, "me/nano", SETTINGS)
    said = {line.split()[0] for line in text_of_push(push, hub).splitlines() if line.endswith("(deleted there)")}
    push_to_hub(folder, "me/nano", SETTINGS, api=hub)
    assert set(hub.list_repo_files("me/nano")) == push.files.keys() | kept and said == gone
    push_to_hub(folder, "me/nano", SETTINGS, api=hub)
    assert hub.calls[-1] == ("upload_folder", "me/nano", None), "an empty list of patterns would be one"


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_who_reads_quantised_experts_is_said(saved, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="4 and 8 bits need bitsandbytes")
    model = AxK1ForCausalLM.from_pretrained(saved, quantization_config=BitsAndBytesConfig(**bits))
    model.save_pretrained(tmp_path / "packed")
    with pytest.raises(RuntimeError):
        AXK1ForCausalLM.from_pretrained(tmp_path / "packed")(torch.zeros(1, 3, dtype=torch.long))
    said = [each.fact for each in diagnose(tmp_path / "packed").findings if each.breaks == ALL]
    assert any("12 matrices of routed experts are quantised: this library alone reads them" in fact for fact in said)
    cards = [plan_push(tmp_path / "packed", "me/nano", SETTINGS, remote_code=code).card for code in (False, True)]
    assert "# after `import modeling_axk1`: transformers' own class fails" in cards[0]
    assert "trust_remote_code=True)  # bitsandbytes is needed" in cards[1]
    assert "transformers' own class reads the same files" in plan_push(saved, "me/nano", SETTINGS).card


def test_a_broken_model_is_not_sent(folder, tmp_path):
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"architectures": ["AxK1ForCausalLM"]}))
    hub = FolderHub(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"not fit to push: architectures is .* lists 1 errors with remedies"):
        push_to_hub(folder, "me/nano", SETTINGS, api=hub)
    assert hub.calls == []


def test_the_card_is_complete(folder, tmp_path):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("learning_rate: 1e-5\n")
    settings = CardSettings(
        "apache-2.0", ["en", "ko"], ["skt/A.X-K1"], results=results_file(tmp_path), recipe=recipe
    )  # fmt: skip
    card = ModelCard(plan_push(folder, "me/nano", settings).card)
    said = card.data.to_dict()
    assert {name: said[name] for name in ("license", "library_name", "pipeline_tag", "language")} == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation", "language": ["en", "ko"],
    }  # fmt: skip
    assert said["base_model"] == "skt/A.X-K1" and said["base_model_relation"] == "finetune"
    assert "axk1" in said["tags"]
    # Read back by huggingface_hub from the model-index.
    values = {(each.metric_type, each.metric_config): each.metric_value for each in card.data.eval_results}
    assert values == {
        ("accuracy", "thinking"): 77.5, ("accuracy", "non-thinking"): 30.0,
        ("format_error", "thinking"): 2.5, ("format_error", "non-thinking"): 2.5,
    }  # fmt: skip
    assert card.data.model_name == "nano" and {each.dataset_name for each in card.data.eval_results} == {"gsm8k_test"}
    assert "| gsm8k_test | thinking | 40 | 77.5% [67.5%, 87.5%] | 2.5% [0.0%, 10.0%] | exact |" in card.text
    parameters = count_parameters(AxK1Config.from_pretrained(folder))["total"]
    assert "```yaml\nlearning_rate: 1e-5\n```" in card.text and f"{parameters:,} parameters" in card.text


def test_what_a_person_wrote_stays_and_a_second_push_changes_nothing(folder):
    (folder / "README.md").write_text(
        "---\nlicense: mit\nlanguage: ko\ntags:\n- merge\nbase_model: a/b\ndatasets:\n- c/d\n---\n# Mine\n\nWritten by hand.\n"
    )
    card = plan_push(folder, "me/nano").card
    said = ModelCard(card).data.to_dict()
    assert (said["license"], said["language"], said["base_model_relation"]) == ("mit", ["ko"], "merge")
    assert said["datasets"] == ["c/d"] and {"merge", "axk1"} <= set(said["tags"])
    assert card.endswith("# Mine\n\nWritten by hand.\n") and card.count("Written by hand") == 1
    (folder / "README.md").write_text(card)
    assert plan_push(folder, "me/nano").card == card
    assert ModelCard(plan_push(folder, "me/nano", CardSettings(license="apache-2.0")).card).data.license == "apache-2.0"


def test_metadata_that_people_write_is_read(folder):
    (folder / "README.md").write_text("\ufeff---\nlicense: mit\nlanguage: ko\ntags: mine\n---\nWords.\n", encoding="utf-8")
    card = ModelCard(plan_push(folder, "me/nano").card)
    assert (card.data.license, card.data.language, card.data.tags[-1]) == ("mit", ["ko"], "mine")
    assert "m" not in card.data.tags and card.text.endswith("Words.\n")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n")
    with pytest.raises(ValueError, match=r"README.md has the language \['en', False\], which is no text; write it in quotes"):
        plan_push(folder, "me/nano")


@pytest.mark.parametrize(
    "settings, repo, complaint",
    [
        (CardSettings(), "me/nano", "no license and no language; give --license ... --language ..."),
        (CardSettings(license="mit"), "me/nano", "no language; give --language ..."),
        (CardSettings("mit", "en", relation="merge"), "me/nano", "'merge' of the base model none says nothing"),
        (CardSettings("mit", "en", ["a/b"], relation="child"), "me/nano", "'child' of the base model a/b"),
        (CardSettings("mit", "en", results=Path("nowhere.json")), "me/nano", "nowhere.json is no file; give the results.json"),
        (CardSettings("mit", "en", results=Path("config.json")), "me/nano", "config.json holds no results"),
        (SETTINGS, "me/na/no", "Repo id"),
    ],
)
def test_what_cannot_be_completed_is_refused(settings, repo, complaint, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=complaint):
        plan_push(folder, repo, settings)


def leak_in_recipe(folder):
    (folder / "sft.yaml").write_text(f"model: x\nhub_token: {TOKEN}\n")


def link_out(folder):
    (folder.parent / "private").write_text("not for the Hub")
    (folder / "tokenizer_extra.json").symlink_to(folder.parent / "private")


TOKEN = "hf_" + "Ab1" * 12


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (leak_in_recipe, r"README.md holds what looks like a secret \(hf_Ab1Ab\.\.\.\) and would be public"),
        (lambda f: (f / "LICENSE").write_text("-----BEGIN RSA PRIVATE KEY-----\n"), "LICENSE holds what looks like a secret"),
        (link_out, "tokenizer_extra.json is a link to .*private, out of the folder"),
        (lambda f: (f / "README.md").write_bytes(b"caf\xe9"), "README.md is no text in UTF-8"),
    ],
    ids=["token in the recipe", "key", "link", "card"],
)
def test_what_is_not_for_all_to_read_is_refused(spoil, complaint, folder):
    spoil(folder)
    recipe = folder / "sft.yaml"
    settings = CardSettings("mit", "en", recipe=recipe if recipe.exists() else None)
    with pytest.raises(ValueError, match=complaint):
        plan_push(folder, "me/nano", settings)


def test_links_of_the_cache_and_of_weights_are_followed(folder, tmp_path):
    cache, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/1"
    cache.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.iterdir() if path.is_file())):
        # Weights may be kept on another disk.
        place = cache if path.suffix != ".safetensors" else folder
        if place is cache:
            shutil.copyfile(path, cache / str(number))
        (snapshot / path.name).symlink_to(cache / str(number) if place is cache else path)
    assert plan_push(snapshot, "me/nano", SETTINGS).sizes() == plan_push(folder, "me/nano", SETTINGS).sizes()
    assert plan_push(snapshot, "me/nano", SETTINGS, remote_code=True)


REMOTE = """
import sys
sys.path = [p for p in sys.path if p != {root!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
assert "modeling_axk1" not in sys.modules
model = AutoModelForCausalLM.from_pretrained("pushed", trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model)
with torch.no_grad():
    torch.save(model(torch.arange(10)[None]).logits, "out.pt")
"""


def test_remote_code_goes_along_and_runs(folder, tmp_path):
    push = plan_push(folder, "me/nano", SETTINGS, remote_code=True)
    assert {path.name for path in model_files()} < push.files.keys()
    assert "tokenizer_of_mine.py" not in push.files and "trust_remote_code=True" in push.card
    (tmp_path / "pushed").mkdir()
    stage(push, tmp_path / "pushed")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    code = REMOTE.format(root=str(ROOT))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    with torch.no_grad():
        expected = AxK1ForCausalLM.from_pretrained(folder).eval()(torch.arange(10)[None]).logits
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    # Pushed on without its code, it says nothing of code.
    copied = shutil.copytree(tmp_path / "pushed", tmp_path / "copied")
    config = json.loads(plan_push(copied, "me/nano", SETTINGS).files["config.json"])
    assert "auto_map" not in config


def test_local_files_only_loads_from_a_cache(folder, tmp_path):
    """As huggingface_hub lays its cache out: blobs, snapshots of links, a ref."""
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--me--nano"
    for part in ("blobs", f"snapshots/{commit}", "refs"):
        (repository / part).mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (tmp_path / "staged").mkdir()
    stage(plan_push(folder, "me/nano", SETTINGS), tmp_path / "staged")
    for path in (tmp_path / "staged").iterdir():
        shutil.copyfile(path, repository / "blobs" / path.name)
        os.symlink(f"../../blobs/{path.name}", repository / f"snapshots/{commit}" / path.name)
    only = {"local_files_only": True, "cache_dir": cache}
    model = AutoModelForCausalLM.from_pretrained("me/nano", **only)
    stock = AXK1ForCausalLM.from_pretrained("me/nano", **only)
    assert type(model) is AxK1ForCausalLM and model.generation_config.think_token_id is not None
    assert AutoTokenizer.from_pretrained("me/nano", **only).response_template["version"] == 1
    ids, _ = padded_ids(model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained("me/other", **only)


def test_the_command_shows_and_sends_nothing(folder, capsys):
    arguments = ["push", str(folder), "me/nano", "--license", "mit", "--language", "en"]
    assert axk1.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    sizes = plan_push(folder, "me/nano", CardSettings("mit", ["en"])).sizes()
    assert f"{len(sizes)} files, {sum(sizes.values()):,} bytes" in out and "training_args.bin may run code" in out
    assert out.endswith(plan_push(folder, "me/nano", CardSettings("mit", ["en"])).card + "\n")
    assert axk1.main(["push", str(folder), "me/nano", "--dry-run"]) == 2
    assert "give --license" in capsys.readouterr().err
