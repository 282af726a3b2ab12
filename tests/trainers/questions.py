"""What is a model asked here? Questions as messages and as rows, in words that the tokenizer of the tests has learned."""

WORDS = "user assistant 0 1 2 3 4 5 6 7 8 9 right wrong so"


def ask(text):
    return [{"role": "user", "content": text}]


def questions(count, start=0):
    return [{"prompt": ask(str(number)), "answer": "right"} for number in range(start, start + count)]
