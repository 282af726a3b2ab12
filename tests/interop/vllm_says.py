"""What does vLLM answer?  A program for the Python of `make vllm`, which has vLLM and not this library.

    python vllm_says.py ASKED.json SAID.json

Asked: one list a model, [folder, adapter's folder or null, prompts as token ids]. Said: for each prompt the greedy tokens and
their log-probabilities, then those of the prompt's own tokens from the second on.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TOKENS = 16


def answers(folder: str, adapter: str | None, prompts: list[list[int]]) -> list[tuple[list[int], list[float], list[float]]]:
    small = {"max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, "distributed_executor_backend": "uni"}
    model = LLM(folder, dtype="float32", enforce_eager=True, enable_lora=bool(adapter), **small)
    how = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, prompt_logprobs=1, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    adapted = LoRARequest("adapter", 1, adapter) if adapter else None
    said = []
    for prompt, output in zip(prompts, model.generate(asked, how, lora_request=adapted, use_tqdm=False)):
        tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        given = [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:])]
        said.append((tokens, [step[token].logprob for token, step in zip(tokens, steps)], given))
    return said


def main(asked: str, said: str) -> None:
    Path(said).write_text(json.dumps([answers(*ask) for ask in json.loads(Path(asked).read_text())]))


if __name__ == "__main__":  # vLLM starts processes that read this file again
    main(*sys.argv[1:])
