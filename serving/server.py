"""How do programs talk to a model: `axk1 serve`, an OpenAI-compatible endpoint with `reasoning_content` and both modes.

Requests are read, streamed and answered by transformers' serving parts. What is ours: the model is opened as our class
(theirs would build transformers' own), generation keeps the mode's format, and a request can set mode and budget.
"""

import asyncio
import threading
import uuid
from collections.abc import Coroutine
from pathlib import Path

import torch

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import (
        ChatCompletionHandler,
        TransformersCompletionCreateParamsStreaming,
    )
except (ImportError, NameError) as missing:
    # NameError: transformers' own guard leaves names undefined when one of the packages is absent.
    raise ImportError("axk1 serve needs fastapi, uvicorn and openai; pip install 'axk1[serve]'.") from missing

from transformers import GenerationConfig, StoppingCriteria
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState
from transformers.utils.versions import require_version

from serving.answers import AnswerParser, as_openai_ends, in_one_piece, take_any_call
from serving.loading import load_for_chat, sampling
from serving.requests import read_request

require_version("transformers>=5.21", "Before 5.21 its serving parts drop reasoning_content from streams.")

# How often a request that is being answered in one piece is asked whether its client still listens.
LISTENING_CHECK_S = 0.2


async def _while_heard(request: Request, answering: Coroutine):
    """What `answering` returns; it is cancelled when the client hangs up, who else would keep the others waiting."""
    task = asyncio.ensure_future(answering)
    while not task.done():
        await asyncio.wait({task}, timeout=LISTENING_CHECK_S)
        if not task.done() and await request.is_disconnected():
            task.cancel()
            return _error(499, "The client hung up.")
    return await task


class Interruption(StoppingCriteria):
    """Ends `generate` at the next token after `event` is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def _in_mode(model, inputs: dict, config: GenerationConfig) -> dict:
    """The inputs of `generate`, with the mode that the chat template wrote at the end of the prompt; `config` is cut to fit.

    ValueError for a prompt that leaves the model no position to answer at.
    """
    tokens, positions = inputs["input_ids"].shape[1], model.config.max_position_embeddings
    if tokens >= positions:
        raise ValueError(f"The prompt has {tokens:,} tokens and the model {positions:,} positions; shorten it.")
    rows = model.get_output_embeddings().weight.shape[0]
    if outside := [token for (token,) in config.sequence_bias or {} if token >= rows]:
        raise ValueError(f"logit_bias names token {outside[0]} and the model has {rows:,}; leave it out.")
    # A model that never ends its turn would write on without positions.
    config.max_new_tokens = min(config.max_new_tokens, positions - tokens)
    thinking = inputs["input_ids"][0, -1].item() == model.generation_config.think_token_id
    return {**inputs, "enable_thinking": thinking, "thinking_budget": config.thinking_budget}


def _error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


class ThinkingParams(TransformersCompletionCreateParamsStreaming, total=False):
    """What a chat request may hold: OpenAI's fields, transformers' `chat_template_kwargs`, and the budget in tokens."""

    thinking_budget: int


class OneModel(ModelManager):
    """The one model that this server holds, opened by us."""

    def __init__(self, model, tokenizer, name: str):
        super().__init__()
        self.model, self.tokenizer = model, take_any_call(tokenizer)
        # Set after the parent's constructor, which would load it.
        self.force_model = name

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name that requests use, which theirs puts a revision behind."""
        return model_id

    def load_model_and_processor(self, *args, **kwargs):
        return self.model, self.tokenizer

    def get_gen_models(self) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "axk1"}]


class ThinkingGenerateManager(GenerateManager):
    """Generate in the mode that the prompt's last token names, with its format enforced."""

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        inputs = _in_mode(model, inputs, gen_config)
        if response_parser is not None:
            # Theirs would stop in a thought too, and leave the stop text in the answer.
            stop, gen_config.stop_strings, stopped = gen_config.stop_strings or [], None, threading.Event()
            response_parser = AnswerParser(response_parser, stop, stopped)
            inputs |= {"stopping_criteria": [Interruption(stopped)]}
        if gen_config.seed is not None:
            # On its thread, in its turn: the requests that wait before it would draw the seed's numbers.
            self.submit(torch.manual_seed, gen_config.seed)
        return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)


class ThinkingState(GenerationState):
    """One thread generates, request after request."""

    def __init__(self):
        super().__init__()
        self.manager = ThinkingGenerateManager()

    def get_manager(self, model_id: str, use_cb: bool = False):
        return self.manager


class ThinkingChatHandler(ChatCompletionHandler):
    """`/v1/chat/completions`. The mode is `chat_template_kwargs.enable_thinking`, or else OpenAI's `reasoning_effort`."""

    _valid_params_class = ThinkingParams

    async def handle_request(self, body: dict, request_id: str):
        return await super().handle_request(read_request(body), request_id)

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict], modality) -> list[dict]:
        """As `read_request` gives them: theirs drops thoughts, and the words of a message that has `tool_calls`."""
        return messages

    def _streaming(self, *args, **kwargs):
        response = super()._streaming(*args, **kwargs)
        response.body_iterator = as_openai_ends(response.body_iterator)
        return response

    async def _non_streaming(self, request_id: str, model, processor, model_id: str, *args, **kwargs) -> JSONResponse:
        """The stream in one piece, so that both say the same."""
        stream = self._streaming(request_id, model, processor, model_id, *args, **kwargs)
        message, last = await in_one_piece(stream.body_iterator)
        end = {"finish_reason": last["choices"][0]["finish_reason"], "usage": last["usage"]}
        return JSONResponse(self._build_completion(request_id, model_id=model_id, **end, **message))

    def _build_generation_config(self, body: dict, *args, **kwargs) -> GenerationConfig:
        rest = {name: value for name, value in body.items() if name != "seed"}
        config = super()._build_generation_config(rest, *args, **kwargs)
        config.seed = body.get("seed")
        if body.get("temperature"):
            # Theirs turns sampling off at 0 and never on: a greedy default must not swallow the request.
            config.do_sample = True
        config.thinking_budget = body.get("thinking_budget")
        return config


def run_server(
    model_path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    think: bool = False,
    temperature: float = 0.6,
    top_p: float = 0.95,
    device_map: str = "auto",
    dtype: str = "auto",
) -> None:
    """Serve a checkpoint until interrupted. `think`, `temperature` and `top_p` hold where a request does not say."""
    # Before the weights are read, which may take minutes.
    settings = sampling(temperature, top_p)
    if not 0 <= port <= 65_535:
        raise ValueError(f"port={port} does not exist; use 1 to 65535, or 0 for any that is free.")
    model, tokenizer = load_for_chat(model_path, device_map=device_map, dtype=dtype)
    model.generation_config.update(**settings)
    app = build_app(model, tokenizer, name=Path(model_path).resolve().name, think=think)
    uvicorn.run(app, host=host, port=port)


def build_app(model, tokenizer, *, name: str, think: bool = False) -> FastAPI:
    """The endpoints, for a model opened by `load_for_chat`; `name` is what requests call it."""
    models = OneModel(model, tokenizer, name)
    handler = ThinkingChatHandler(models, ThinkingState(), chat_template_kwargs={"enable_thinking": think})
    app = FastAPI(title="axk1")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict):
        name = request.headers.get("x-request-id", f"chatcmpl-{uuid.uuid4().hex}")
        return await _while_heard(request, handler.handle_request(body, name))

    @app.get("/v1/models")
    def list_models():
        return {"object": "list", "data": models.get_gen_models()}

    # A name may hold a slash, as a Hub name does.
    @app.get("/v1/models/{model:path}")
    def retrieve_model(model: str):
        for found in models.get_gen_models():
            if found["id"] == model:
                return found
        message = f"The model {model!r} does not exist; this server has {name!r}."
        return _error(404, message, param="model", code="model_not_found")

    @app.get("/health")
    def health():
        return {"status": "ok"}

    # OpenAI's clients show an error's text only in OpenAI's form.
    @app.exception_handler(ValueError)
    async def refuse(_: Request, error: ValueError):
        return _error(400, str(error))

    @app.exception_handler(TemplateError)
    async def refuse_by_template(_: Request, error: TemplateError):
        return _error(400, str(error))

    @app.exception_handler(RuntimeError)
    async def fail(_: Request, error: RuntimeError):
        return _error(500, str(error))

    @app.exception_handler(RequestValidationError)
    async def refuse_body(_: Request, error: RequestValidationError):
        return _error(400, f"The request's body is no JSON object ({error.errors()[0]['msg']}); send one, as application/json.")

    @app.exception_handler(HTTPException)
    async def pass_on(_: Request, error: HTTPException):
        return _error(error.status_code, error.detail)

    return app
