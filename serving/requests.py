"""What may a chat request hold?  OpenAI's fields, checked; what transformers' serving would drop without a word is refused."""

import json
import sys
from collections.abc import Callable

# OpenAI's names. All but the first mean thinking: A.X K1 has two modes, the budget bounds the thought.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
DROPPED = ("functions", "function_call", "generation_config", "audio", "prediction", "web_search_options", "presence_penalty")
# What transformers' serving gives the chat template itself.
SET_HERE = ("tools", "add_generation_prompt", "tokenize", "return_tensors", "return_dict", "load_audio_from_video")
# What the tokenizer would take for its own, not the template's: each gives a prompt that has no turn to answer in.
NOT_THE_TEMPLATES = ("chat_template", "continue_final_message", "truncation", "padding", "max_length", "tokenizer_kwargs")


def _whole(least: int) -> Callable[[object], bool]:
    """Of 64 bits, as torch holds it."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _number(least: float, most: float) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


NUMBERS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "temperature": ("a number from 0", _number(0, 1e6)),
    "top_p": ("a share from 0 to 1", _number(0, 1)),
    # It becomes a repetition penalty of 1 + it, which has to stay above 0.
    "frequency_penalty": ("a number from -0.9 to 2 (1 + it is the repetition penalty here)", _number(-0.9, 2)),
    "seed": ("a whole number of 64 bits", _whole(-(2**63))),
    "max_tokens": ("a number of tokens from 1 and below 2**63", _whole(1)),
    "max_completion_tokens": ("a number of tokens from 1 and below 2**63", _whole(1)),
    "thinking_budget": ("a number of tokens from 0 and below 2**63", _whole(0)),
}


def read_request(body: dict) -> dict:
    """The request as transformers' serving takes it: nulls left out, the mode in `chat_template_kwargs`.

    ValueError for what is no request, and for what would not be done.
    """
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"The request holds half a character ({error}); send both of its \\u escapes.") from error
    body = {name: value for name, value in body.items() if value is not None}
    body |= {"messages": _messages(body.get("messages"))}
    _refuse_unmet(body)
    for name, (words, fits) in NUMBERS.items():
        if name in body and not fits(body[name]):
            raise ValueError(f"{name}={body[name]!r} is not {words}.")
    return _with_mode(_with_tools(_with_biases(_with_stop(body))))


def _messages(messages: object) -> list[dict]:
    if not isinstance(messages, list):
        raise ValueError(f"messages={messages!r} is no conversation; give a list of messages with role and content.")
    return [_message(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _message(where: str, message: object) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where} is {message!r}; give an object with role and content.")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"content of type {kind} is not read; this model takes text.")
            if kind is None or not isinstance(part.get("text"), str):
                raise ValueError(f'{where} has the part {part!r}; give {{"type": "text", "text": ...}}.')
    elif content is not None and not isinstance(content, str):
        raise ValueError(f"{where} has the content {content!r}; give a text.")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(is_call, calls)):
        raise ValueError(f"{where} has the tool_calls {calls!r}; give a list of functions with name and arguments.")
    thought = message.get("reasoning_content")
    if thought is not None and not isinstance(thought, str):
        raise ValueError(f"{where} has the reasoning_content {thought!r}; give a text.")
    text = content if isinstance(content, str) else " ".join(part["text"] for part in content or [])
    # OpenAI's newer name.
    role = "system" if message["role"] == "developer" else message["role"]
    # Its clients send null for what a message has not.
    said = {name: value for name, value in message.items() if value is not None}
    return said | {"role": role, "content": text, "tool_calls": [_with_read_arguments(call) for call in calls]}


def is_call(call: object) -> bool:
    function = (call.get("function") or call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def _with_read_arguments(call: dict) -> dict:
    """A table, as chat templates read it; what a model wrote that is no JSON is given back to it as it was."""
    function = call.get("function") or call
    try:
        function = function | {"arguments": json.loads(function["arguments"] or "{}")}
    except (TypeError, ValueError):
        pass
    return {"type": "function", "function": function}


def _refuse_unmet(body: dict) -> None:
    if body.get("n", 1) != 1:
        raise ValueError(f"n={body['n']} answers were asked for and one is given; leave n out and ask again.")
    if body.get("logprobs") or body.get("top_logprobs"):
        raise ValueError("logprobs are not given; leave them out.")
    form = body.get("response_format", {"type": "text"})
    form = form.get("type") if isinstance(form, dict) else form
    if form != "text":
        raise ValueError(f"response_format {form!r} is not enforced here; leave it out and ask for it in words.")
    if unread := [name for name in DROPPED if body.get(name)]:
        raise ValueError(f"{unread[0]} is not read here; leave it out.")


def _with_stop(body: dict) -> dict:
    stop = body.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop={body['stop']!r} is no text that can be met; give one, or a list of them.")
    rest = {name: value for name, value in body.items() if name != "stop"}
    return rest | {"stop": stop} if stop else rest


def _with_biases(body: dict) -> dict:
    """Whole numbers, which are most of OpenAI's biases, as transformers takes them."""
    biases = body.get("logit_bias", {})
    fits = _number(-sys.float_info.max, sys.float_info.max)
    if not isinstance(biases, dict) or not all(token.isdecimal() and fits(bias) for token, bias in biases.items()):
        raise ValueError(f"logit_bias={biases!r} is no table of token ids with a number each.")
    return body | {"logit_bias": {token: float(bias) for token, bias in biases.items()}} if biases else body


def _with_tools(body: dict) -> dict:
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools={tools!r} is no list of functions; give objects with type and function.")
    choice = body.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise ValueError(f"tool_choice={choice!r} is not enforced here; use auto or none.")
    return {name: value for name, value in body.items() if choice == "auto" or name != "tools"}


def _with_mode(body: dict) -> dict:
    """`body` with `reasoning_effort` turned into `enable_thinking`: "none" is off, any other effort on."""
    template = body.get("chat_template_kwargs", {})
    if not isinstance(template, dict):
        raise ValueError(f"chat_template_kwargs={template!r} is no table; give such as {{\"enable_thinking\": true}}.")
    if taken := [name for name in SET_HERE if name in template]:
        raise ValueError(f"chat_template_kwargs holds {taken[0]}, which this server sets; leave it out.")
    if taken := [name for name in NOT_THE_TEMPLATES if name in template]:
        raise ValueError(f"chat_template_kwargs holds {taken[0]}, which is no variable of the template; leave it out.")
    if not isinstance(template.get("enable_thinking", False), bool):
        raise ValueError(f"enable_thinking={template['enable_thinking']!r} names no mode; use true or false.")
    effort = body.get("reasoning_effort")
    if effort is None:
        return body
    if effort not in EFFORTS:
        raise ValueError(f"reasoning_effort={effort!r} is unknown; use one of {', '.join(EFFORTS)}.")
    body = {key: value for key, value in body.items() if key != "reasoning_effort"}
    return body | {"chat_template_kwargs": {"enable_thinking": effort != "none"} | template}
