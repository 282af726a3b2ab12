"""How is a checkpoint opened for conversation, and how does it sample?"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.generation_axk1 import set_thinking_tokens


def sampling(temperature: float, top_p: float) -> dict:
    """`generate`'s arguments; temperature 0 is greedy."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


def load_for_chat(model_path: str, *, device_map: str = "auto", dtype: str = "auto"):
    """Load model and tokenizer from a folder or the Hub. The model knows its thinking ids and is in eval mode.

    ValueError if the checkpoint is not A.X K1, or its tokenizer lacks the control tokens or a chat template.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    if tokenizer.chat_template is None:
        raise ValueError(f"{model_path} has no chat template; save its tokenizer with one, as train_tokenizer does.")
    model = AutoModelForCausalLM.from_pretrained(model_path, device_map=device_map, dtype=dtype)
    if not isinstance(model, AxK1ForCausalLM):
        raise ValueError(f"{model_path} holds {type(model).__name__}, not an A.X K1 model; pass an axk1 checkpoint.")
    set_thinking_tokens(model.generation_config, tokenizer)
    return model.eval(), tokenizer
