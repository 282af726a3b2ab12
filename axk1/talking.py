"""How does one talk to a model from the command line?  `axk1 chat` and `axk1 serve`."""

import argparse

from axk1.parsing import add_command

CHAT = """examples:
  axk1 chat runs/nano/fused                     direct answers
  axk1 chat runs/nano/fused --think --budget 64  a thought of at most 64 tokens before each answer

In the chat: /think and /no-think switch the mode, /budget N bounds the thought, /reset forgets, /quit leaves."""
SERVE = """examples:
  axk1 serve runs/nano/fused --port 8000
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "fused",
    "messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {"enable_thinking": true}}'

The thought comes back as `reasoning_content`, the answer as `content`."""


def add(commands) -> None:
    _add_chat(commands)
    _add_serve(commands)


def _add_chat(commands) -> None:
    command = add_command(commands, "chat", chat, "talk to a model in the terminal", CHAT)
    _add_model_options(command)
    command.add_argument("--budget", type=int, metavar="N", help="close a thought after N tokens (default: never)")
    command.add_argument(
        "--max-new-tokens", type=int, default=4096, metavar="N", help="an answer's limit (default 4096)"
    )
    command.add_argument("--system", metavar="TEXT", help="a system message to begin with")


def _add_serve(commands) -> None:
    command = add_command(commands, "serve", serve, "answer OpenAI-compatible requests over HTTP", SERVE)
    _add_model_options(command)
    command.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    command.add_argument("--port", type=int, default=8000, help="default 8000")


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model_path", metavar="MODEL", help="folder or Hub name of an A.X K1 model")
    command.add_argument(
        "--think", action=argparse.BooleanOptionalAction, default=False, help="think before answering (default: no)"
    )
    # The authors' sampling.  [model team's post]
    command.add_argument("--temperature", type=float, default=0.6, metavar="T", help="default 0.6; 0 is greedy")
    command.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    command.add_argument(
        "--device-map", default="auto", help="where the weights go: auto, cpu, cuda, ... (default auto)"
    )
    command.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, ... (default auto)")


def chat(**options) -> None:
    from serving.chat import run_chat

    run_chat(**options)


def serve(**options) -> None:
    from serving.server import run_server

    run_server(**options)
