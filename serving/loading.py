"""How is a checkpoint opened for conversation, and how does it sample?"""

import math

import torch
from transformers import AutoModelForCausalLM

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.generation_axk1 import open_tokenizer, set_thinking_tokens

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def sampling(temperature: float, top_p: float) -> dict:
    """`generate`'s arguments; temperature 0 is greedy. ValueError for values that are none."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} does not exist; 0 is greedy, the authors sample at 0.6.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} is no share above 0 and up to 1; the authors use 0.95.")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def load_for_chat(model_path: str, *, device_map: str = "auto", dtype: str = "auto"):
    """Load model and tokenizer from a folder or the Hub. The model knows its thinking ids and is in eval mode.

    ValueError if the checkpoint is not A.X K1, or its tokenizer lacks the control tokens or a chat template.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} does not exist; use auto, float32, bfloat16 or float16.")
    if "cuda" in device_map and not torch.cuda.is_available():
        raise ValueError(f"device_map={device_map!r} asks for a GPU and PyTorch sees none here; use auto or cpu.")
    tokenizer = open_tokenizer(model_path)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_path} has no chat template; save its tokenizer with one, as train_tokenizer does.")
    model = AutoModelForCausalLM.from_pretrained(model_path, device_map=device_map, dtype=dtype)
    if not isinstance(model, AxK1ForCausalLM):
        raise ValueError(f"{model_path} holds {type(model).__name__}, not an A.X K1 model; pass an axk1 checkpoint.")
    set_thinking_tokens(model.generation_config, tokenizer)
    return model.eval(), tokenizer
