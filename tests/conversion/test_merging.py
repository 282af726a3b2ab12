"""Is a streamed merge the plain merge bit for bit, whole after any kill, small in memory, and strict about its input?"""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AXK1Config

from conversion import merge_checkpoints
from conversion.merging import BLOCK_ELEMENTS, check_same_tokenizer
from tests.folders import assert_same_bits, contents, on_disk

ROOT = Path(__file__).parents[2]


def save_model(folder, tensors, shards=1, **files):
    """A safetensors folder of `shards` files, dealt out like cards so that no two folders need agree."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    filenames = [f"model-{i + 1}-of-{shards}.safetensors" for i in range(shards)]
    if shards == 1:
        filenames = ["model.safetensors"]
    else:
        weight_map = {name: filename for filename, part in zip(filenames, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for filename, part in zip(filenames, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / filename, metadata={"format": "pt"})
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def weights(seed, dtype=torch.float32):
    """Odd sizes, a scalar, an empty tensor, one larger than a block, and a table of whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (7, 5), "b": (33,), "c": (), "d": (0, 3), "big": (BLOCK_ELEMENTS + 3,), "e": (64, 64)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"positions": torch.arange(9), "norm": torch.randn(11, generator=generator)}


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


def plain_merge(a, b, alpha):
    """The oracle: everything in memory, the formula as it is written."""
    return {
        name: (alpha * a[name].float() + (1 - alpha) * b[name].float()).to(a[name].dtype)
        if a[name].is_floating_point()
        else a[name]
        for name in a
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_the_plain_merge_bit_for_bit(tmp_path, dtype, alpha):
    a, b = weights(1, dtype), weights(2, dtype)
    folders = save_model(tmp_path / "a", a, shards=3), save_model(tmp_path / "b", b, shards=2)
    out = merge_checkpoints(*folders, tmp_path / "out", alpha=alpha, shard_bytes=40_000, progress=False)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same_bits(on_disk(out), plain_merge(a, b, alpha))


def test_merge_is_not_vacuous_and_the_weight_is_the_thinking_models(tmp_path):
    folders = [save_model(tmp_path / str(value), {"w": torch.full((4,), float(value))}) for value in (1, 3)]
    merged = on_disk(merge_checkpoints(*folders, tmp_path / "out", alpha=0.75, progress=False))
    assert merged["w"].tolist() == [1.5] * 4


def test_fp64_is_merged_in_fp64(tmp_path):
    a, b = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    folders = save_model(tmp_path / "a", {"w": a}), save_model(tmp_path / "b", {"w": b})
    out = on_disk(merge_checkpoints(*folders, tmp_path / "out", alpha=0.8, progress=False))
    assert torch.equal(out["w"], 0.8 * a + (1 - 0.8) * b)


def tiny_stock(seed):
    config = AXK1Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def test_every_expert_of_a_stock_model_is_merged_and_stock_reloads_it(tmp_path):
    folders = [tmp_path / "thinking", tmp_path / "nonthinking"]
    for seed, folder in enumerate(folders):
        tiny_stock(seed).save_pretrained(folder)
    out = merge_checkpoints(*folders, tmp_path / "out", alpha=0.8, shard_bytes=60_000, progress=False)
    a, b, merged = map(on_disk, (*folders, out))
    assert sum(".mlp.experts." in name for name in merged) == 2 * 8 * 3
    assert_same_bits(merged, plain_merge(a, b, 0.8))
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    # Stock neither stores nor fills the dense layer's norm, which it does not use: fresh memory, whatever was there.
    unused = "model.layers.0.mlp.post_mlp_layernorm.weight"
    reloaded = [without(AutoModelForCausalLM.from_pretrained(folder).state_dict(), unused) for folder in folders]
    assert_same_bits(without(model.state_dict(), unused), plain_merge(*reloaded, 0.8))


def two_models(tmp_path):
    tokenizer = {"model": {"vocab": {"x": 0, "y": 1}}, "padding": None}
    a = save_model(tmp_path / "a", weights(1), 2, config={"model_type": "axk1"}, tokenizer=tokenizer)
    b = save_model(tmp_path / "b", weights(2), 1, config={"model_type": "axk1"}, tokenizer=tokenizer)
    return a, b


def test_companions_come_from_the_thinking_model(tmp_path):
    a, b = two_models(tmp_path)
    (a / "chat_template.jinja").write_text("{{ messages }}")
    (a / "training_args.bin").write_bytes(b"not a part of the model")
    (a / "README.md").write_text("the thinking model")
    (b / "generation_config.json").write_text("{}")
    out = merge_checkpoints(a, b, tmp_path / "out", shard_bytes=40_000, progress=False)
    names = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert names == {"model.safetensors.index.json", "config.json", "tokenizer.json", "chat_template.jinja", "README.md"}
    card = (out / "README.md").read_text()
    assert "**0.8** x `a`" in card and "**0.2** x `b`" in card
    digests = subprocess.run(["sha256sum", *out.glob("*.safetensors")], capture_output=True, text=True).stdout
    assert all(line.split()[0] in card for line in digests.splitlines()) and digests


def run_in_child(action):
    """Run `action` in a forked process; returns how it ended (a signal is negative)."""
    child = os.fork()
    if not child:
        try:
            # tqdm's own lock is shared between processes: killed with it in hand, the child would stop the parent.
            tqdm.set_lock(threading.RLock())
            action()
            os._exit(0)
        except OSError:
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(frame, event):
    """A call of a C function, but for those of waiting for threads, which are more or fewer each time."""
    return event == "c_call" and not frame.f_code.co_filename.endswith(("threading.py", "concurrent/futures/thread.py"))


def killed_at(call, action):
    """`action`, killed without warning as it makes its `call`-th call of a function written in C: reads, writes, renames."""
    left = call

    def count(frame, event, argument):
        nonlocal left
        left -= counted(frame, event)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def armed():
        sys.setprofile(count)
        action()

    return run_in_child(armed)


def count_calls(action):
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += counted(frame, event)

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path):
    a, b = two_models(tmp_path)
    sources = contents(a), contents(b)

    def merge(out=tmp_path / "out"):
        merge_checkpoints(a, b, out, shard_bytes=20_000, progress=False)

    merge(tmp_path / "truth")
    truth = contents(tmp_path / "truth")
    calls = count_calls(merge)
    shutil.rmtree(tmp_path / "out")
    assert len(truth) > 5 and calls > 200
    # Thirty points anywhere, then each of the last steps, the rename and the cleaning up, until one is beyond the end.
    last = calls - 60
    for point in itertools.chain(random.Random(0).sample(range(1, last), 30), itertools.count(last)):
        end = killed_at(point, merge)
        if end == 0 and point > calls - 10:
            break
        assert end == -signal.SIGKILL, (point, end)
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == truth, point
        if not (tmp_path / "out").exists() or (tmp_path / "out.partial.jsonl").exists():
            merge()
        assert contents(tmp_path / "out") == truth, point
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "truth"], point
        shutil.rmtree(tmp_path / "out")
    assert (contents(a), contents(b)) == sources


def test_finished_shards_are_not_written_again(tmp_path, monkeypatch):
    a, b = two_models(tmp_path)
    calls = count_calls(lambda: merge_checkpoints(a, b, tmp_path / "truth", shard_bytes=20_000, progress=False))
    shutil.rmtree(tmp_path / "truth")
    killed_at(calls - 200, lambda: merge_checkpoints(a, b, tmp_path / "out", shard_bytes=20_000, progress=False))
    journal = (tmp_path / "out.partial.jsonl").read_text().splitlines()[1:]
    finished = [tmp_path / "out.partial" / json.loads(line)["part"] for line in journal]
    inodes = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in finished}
    assert inodes
    out = merge_checkpoints(a, b, tmp_path / "out", shard_bytes=20_000, progress=False)
    assert inodes == {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in inodes}


def test_full_disk_is_an_error_and_resumes(tmp_path):
    a, b = two_models(tmp_path)
    sources = contents(a), contents(b)

    def merge_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        merge_checkpoints(a, b, tmp_path / "out", shard_bytes=20_000, progress=False)

    assert run_in_child(merge_with_little_room) == 7
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    merge_checkpoints(a, b, tmp_path / "out", shard_bytes=20_000, progress=False)
    merge_checkpoints(a, b, tmp_path / "truth", shard_bytes=20_000, progress=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "truth")
    assert (contents(a), contents(b)) == sources


def test_too_little_room_is_said_before_the_first_byte(tmp_path, monkeypatch):
    a, b = two_models(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match="1.0 kB are free"):
        merge_checkpoints(a, b, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out.partial").iterdir())


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc/self/status to read a process's anonymous memory")
    tensor_bytes, tensors = 2 * 4096 * 4096, 5
    weight = torch.randn(4096, 4096).bfloat16()
    for name in "ab":
        save_model(tmp_path / name, {f"w{i}": weight + i for i in range(tensors)})
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, *(str(tmp_path / name) for name in ("a", "b", "out"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak = map(int, done.stdout.split())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > tensors * tensor_bytes
    assert 0 < peak - before <= tensor_bytes


MEASURE_MEMORY = """
import sys, threading
import torch
from conversion import merge_checkpoints

torch.set_num_threads(1)

def anonymous_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, over = 0, threading.Event()

def watch():
    global peak
    while not over.wait(0.001):
        peak = max(peak, anonymous_bytes())

before = anonymous_bytes()
watcher = threading.Thread(target=watch)
watcher.start()
merge_checkpoints(*sys.argv[1:], progress=False)
over.set()
watcher.join()
print(before, peak)
"""


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range(tmp_path, alpha):
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        merge_checkpoints(*two_models(tmp_path), tmp_path / "out", alpha=alpha)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: without(w, "b"), r"only the thinking one has \[b\]"),
        (lambda w: w | {"extra": torch.zeros(2)}, r"only the non-thinking one has \[extra\]"),
        (lambda w: w | {"a": w["a"].T.contiguous()}, r"a \(F32\[7, 5\] and F32\[5, 7\]\)"),
        (lambda w: w | {"a": w["a"].half()}, r"a \(F32\[7, 5\] and F16\[7, 5\]\)"),
        (lambda w: w | {"positions": w["positions"] + 1}, "whole numbers differ: positions"),
        (lambda w: w | {"e": w["e"].fill_(float("nan"))}, "e holds a NaN"),
    ],
)
def test_what_cannot_be_merged_is_listed_and_nothing_is_left(tmp_path, change, complaint):
    folders = save_model(tmp_path / "a", weights(1)), save_model(tmp_path / "b", change(weights(2)))
    with pytest.raises(ValueError, match=complaint):
        merge_checkpoints(*folders, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_float8_and_quantised_models_are_refused(tmp_path):
    eight = {"w": torch.ones(4).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="without their scales: w"):
        merge_checkpoints(save_model(tmp_path / "a", eight), save_model(tmp_path / "b", eight), tmp_path / "out")
    a, b = (save_model(tmp_path / name, weights(1), config={"quantization_config": {}}) for name in "cd")
    with pytest.raises(ValueError, match="is quantised"):
        merge_checkpoints(a, b, tmp_path / "out")


def test_tokenizers_must_agree_in_what_a_token_means(tmp_path):
    a, b = two_models(tmp_path)
    (b / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 1, "y": 0}}, "padding": None}))
    with pytest.raises(ValueError, match=r"tokenizer\.json \(model: tokens 'x', 'y'\)"):
        merge_checkpoints(a, b, tmp_path / "out", progress=False)
    (b / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json \(only a has it\)"):
        merge_checkpoints(a, b, tmp_path / "out", progress=False)
    # A trainer leaves its padding behind in the file: that is no other tokenizer.
    (b / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0, "y": 1}}, "padding": {"length": 9}}))
    merge_checkpoints(a, b, tmp_path / "out", progress=False)


def test_added_tokens_of_slow_tokenizers_must_agree(tmp_path):
    for name, place in (("a", 5), ("b", 6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "added_tokens.json").write_text(json.dumps({"<think>": place}))
    with pytest.raises(ValueError, match="differ in added_tokens.json"):
        check_same_tokenizer(tmp_path / "a", tmp_path / "b")
    # Where a library writes them elsewhere as well, the file may be missing.
    (tmp_path / "b" / "added_tokens.json").unlink()
    check_same_tokenizer(tmp_path / "a", tmp_path / "b")


def test_configs_that_differ_are_said(tmp_path):
    a, b = two_models(tmp_path)
    (b / "config.json").write_text(json.dumps({"model_type": "axk1", "rope_theta": 5, "transformers_version": "1"}))
    with pytest.warns(UserWarning, match=r"the thinking model's is kept: rope_theta \(None and 5\)"):
        merge_checkpoints(a, b, tmp_path / "out", progress=False)


def test_finished_work_is_not_overwritten(tmp_path):
    a, b = two_models(tmp_path)
    merge_checkpoints(a, b, tmp_path / "out", progress=False)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        merge_checkpoints(a, b, tmp_path / "out", alpha=0.5, progress=False)
    assert contents(tmp_path / "out") == before


def test_truncated_shard_is_named_before_anything_is_written(tmp_path):
    a, b = two_models(tmp_path)
    path = b / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"b.model\.safetensors is truncated"):
        merge_checkpoints(a, b, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()
