"""How is a checkpoint opened for conversation, and how does it sample?"""

import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.generation_axk1 import set_thinking_tokens

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        # Transformers takes a path that is not there for a name on the Hub, and speaks of that alone.
        lacks = "holds no tokenizer that can be read" if Path(model_path).is_dir() else "is no folder, nor to be had from the Hub"
        raise ValueError(f"{model_path} {lacks} ({' '.join(str(error).split())[:200]}).") from error
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_path} has no chat template; save its tokenizer with one, as train_tokenizer does.")
    model = AutoModelForCausalLM.from_pretrained(model_path, device_map=device_map, dtype=dtype)
    if not isinstance(model, AxK1ForCausalLM):
        raise ValueError(f"{model_path} holds {type(model).__name__}, not an A.X K1 model; pass an axk1 checkpoint.")
    set_thinking_tokens(model.generation_config, tokenizer)
    return model.eval(), tokenizer
