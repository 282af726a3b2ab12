"""Does vLLM hold the policy that is trained?  A program for the Python of `make vllm`, with this library on its path.

    python vllm_trains.py MODEL OUT.json [LORA_TARGET ...]

Two updates by reinforcement, with vLLM in the trainer's process and in bf16, then one more synchronisation. Out: by a weight's
name whether vLLM holds the policy's; and how far their log-probabilities of vLLM's greedy answer are from each other, before the
last synchronisation and after it.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from trainers.adapters import lora_config
from trainers.dapo_gspo import DapoGspoConfig, DapoGspoTrainer

QUESTIONS = ["one", "two", "three", "four", "five", "six", "call", "one two"] * 2
SMALL = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 8, "max_resample_rounds": 1}
ON_A_CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
QUIET = {"report_to": "none", "save_strategy": "no", "logging_steps": 1}
BY_VLLM = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128, "vllm_gpu_memory_utilization": 0.1}


def train(folder: str, targets: tuple[str, ...]) -> DapoGspoTrainer:
    rows = [{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS]
    args = DapoGspoConfig(
        output_dir="out", max_steps=2, learning_rate=1e-2, warmup_steps=0, **SMALL, **ON_A_CPU, **QUIET, **BY_VLLM
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    adapter = lora_config(model, targets, r=4, alpha=16) if targets else None
    trainer = DapoGspoTrainer(model, lambda answer, row: "t" in answer, args, Dataset.from_list(rows), peft_config=adapter)
    trainer.train()
    return trainer


def held(served: nn.Module) -> dict[str, Tensor]:
    """What vLLM computes with, by the name in a policy's memory."""
    found = dict(served.named_parameters())
    for name, module in served.named_modules():
        if hasattr(module, "W_UK_T"):
            # [heads, nope, latent] and [heads, latent, value], derived from kv_b_proj.
            both = torch.cat([module.W_UK_T, module.W_UV.transpose(1, 2)], dim=1)
            found[f"{name.removesuffix('.mla_attn.mla_attn')}.kv_b_proj.weight"] = both.flatten(0, 1)
    renamed = {
        "post_mlp_layernorm": "mlp.post_mlp_layernorm",
        "experts.routed_experts.w13_weight": "experts.gate_up_proj",
        "experts.routed_experts.w2_weight": "experts.down_proj",
    }
    for theirs, ours in renamed.items():
        found |= {name.replace(theirs, ours): tensor for name, tensor in found.items() if theirs in name}
    return found


def same(policy: nn.Module, served: nn.Module) -> dict[str, bool]:
    weights, biases = dict(policy.named_parameters()), dict(policy.named_buffers())
    # A CPU's kernels keep the weights of most linear layers elsewhere.
    theirs = {name: tensor for name, tensor in held(served).items() if tensor.numel()}
    return {name: is_same(tensor, theirs[name]) for name, tensor in (weights | biases).items() if name in theirs}


def is_same(tensor: Tensor, theirs: Tensor) -> bool:
    """The same numbers, in whatever order the kernels of a CPU want them, with whatever zeros behind."""
    numbers, others = (some[some != 0].sort().values for some in (tensor.to(theirs.dtype), theirs))
    return torch.equal(numbers, others)


def distance(trainer: DapoGspoTrainer) -> float:
    prompt = list(range(10, 22))
    how = SamplingParams(max_tokens=12, temperature=0, logprobs=1, ignore_eos=True)
    (said,) = trainer.vllm_generation.llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    answer = said.outputs[0]
    ids = torch.tensor([prompt + list(answer.token_ids)])
    with torch.no_grad():
        log_TV = trainer.model.eval()(input_ids=ids).logits[0].log_softmax(-1)
    ours = log_TV[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    theirs = [step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs)]
    return (ours - torch.tensor(theirs)).abs().max().item()


def main(folder: str, out: str, *targets: str) -> None:
    trainer = train(folder, targets)
    served = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    distances = {"stale": distance(trainer)}
    trainer.vllm_generation.sync_weights()
    distances["synchronised"] = distance(trainer)
    policy = trainer.model.merge_and_unload() if targets else trainer.model
    Path(out).write_text(json.dumps({"same": same(policy, served), "distance": distances}))


if __name__ == "__main__":
    main(*sys.argv[1:])
