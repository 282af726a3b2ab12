"""How does one talk to a model in a terminal: `axk1 chat`, both modes, streamed, the thought dimmed."""

from rich.console import Console

from modeling_axk1.generation_axk1 import ThinkingStreamer, split_thinking
from serving.loading import load_for_chat, sampling

HELP = "/think, /no-think: switch mode.  /budget N, /budget off: bound the thought.  /reset: forget.  /quit: leave."
# An escape sequence of the model's would set the terminal's title, or worse; a carriage return would overwrite the line.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"} | {ord("\r"): ""}
STYLES = {"thought": "dim italic", "answer": ""}


def run_chat(
    model_path: str,
    *,
    think: bool = False,
    budget: int | None = None,
    max_new_tokens: int = 4096,
    temperature: float = 0.6,
    top_p: float = 0.95,
    device_map: str = "auto",
    dtype: str = "auto",
    system: str | None = None,
) -> None:
    """Chat until /quit or the end of input. Budget and lengths in tokens; temperature 0 is greedy.  [model team's post]"""
    # Before the weights are read, which may take minutes.
    settings = {"max_new_tokens": max_new_tokens, **sampling(temperature, top_p)}
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to say; use 1 or more.")
    if budget is not None and budget < 0:
        raise ValueError(f"budget={budget} is no number of tokens; use 0 or more, or leave it out.")
    model, tokenizer = load_for_chat(model_path, device_map=device_map, dtype=dtype)
    Chat(model, tokenizer, Console(), settings, think=think, budget=budget, system=system).run()


class TooLong(Exception):
    """A conversation that leaves the model no position to answer at."""


class Chat:
    """One conversation: its messages, its mode, and the console it is shown on."""

    def __init__(self, model, tokenizer, console: Console, settings: dict, *, think: bool, budget: int | None, system):
        self.model = model
        self.tokenizer = tokenizer
        self.console = console
        self.settings = settings
        self.think = think
        self.budget_tokens = budget
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        # What the last reply could be at most: of the settings, or what the model had positions for.
        self.limit_tokens = settings["max_new_tokens"]
        # The part of the reply that was streamed last.
        self.showing: str | None = None

    def run(self) -> None:
        self._note(HELP)
        while True:
            try:
                line = self.console.input(f"\n[bold]{'think' if self.think else 'direct'}>[/bold] ").strip()
                line.encode()
            except (EOFError, KeyboardInterrupt):
                return
            except UnicodeError:
                # Some terminals take a byte for a letter: Backspace leaves half of one.
                self._note("that line was not UTF-8 and is left out; type it again")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.say(line)

    def command(self, line: str) -> None:
        """Obey a line that starts with a slash; an unknown one changes nothing and shows the help."""
        name, _, argument = line.partition(" ")
        if name in ("/think", "/no-think") and not argument:
            self.think = name == "/think"
        elif name == "/reset":
            self.messages = list(self.opening)
            self._note("forgotten")
        elif name == "/budget" and argument.isdecimal():
            self.budget_tokens = int(argument)
        elif name == "/budget" and argument == "off":
            self.budget_tokens = None
        else:
            self._note(f"{line} is not a command. {HELP}")

    def say(self, text: str) -> None:
        """Answer one message, streaming. Interrupted, the turn is dropped and the conversation goes on."""
        asked = self.messages + [{"role": "user", "content": text}]
        try:
            reply = self._generate(asked)
        except KeyboardInterrupt:
            self._note("\ninterrupted, this turn is dropped")
            return
        except TooLong as error:
            self._note(str(error))
            return
        self.console.print()
        if reply.truncated:
            self._note(
                f"the thought was cut at {self.limit_tokens:,} tokens; /budget N leaves room to answer"
            )
        message = {"role": "assistant", "content": reply.answer, "reasoning_content": reply.thought}
        self.messages = asked + [message]

    def _generate(self, messages: list[dict]):
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=self.think, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        tokens, positions = prompt["input_ids"].shape[1], self.model.config.max_position_embeddings
        if tokens >= positions:
            raise TooLong(f"that makes {tokens:,} tokens and the model has {positions:,} positions; /reset, or say less")
        self.showing = None
        # A model that never ends its turn would write on without positions.
        self.limit_tokens = min(self.settings["max_new_tokens"], positions - tokens)
        output_BS = self.model.generate(
            **prompt,
            enable_thinking=self.think,
            thinking_budget=self.budget_tokens,
            streamer=ThinkingStreamer(self.tokenizer, self._show),
            **self.settings | {"max_new_tokens": self.limit_tokens},
        )
        new_tokens = output_BS[0, prompt["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new_tokens, skip_special_tokens=True)
        return split_thinking(text, enable_thinking=self.think)

    def _show(self, part: str, text: str) -> None:
        if part == "answer" and self.showing == "thought":
            self.console.print()
        self.showing = part
        # What the model writes is shown as it is: [brackets] are no markup, numbers get no colour.
        self.console.print(text.translate(CONTROLS), style=STYLES[part], end="", markup=False, highlight=False, soft_wrap=True)

    def _note(self, text: str) -> None:
        self.console.print(text, style="cyan", markup=False, highlight=False)
