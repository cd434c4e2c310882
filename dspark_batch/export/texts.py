"""A few prompts of different kinds, on which an export checks, calibrates and measures itself."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from dspark_batch.tokenizer import TemplateError, Tokenizer

TEXTS = (
    "What is the capital of France?",
    "Write a Python function that returns the n-th Fibonacci number and explain how it works.",
    "A shop sells pens at 3 dollars each. Tom buys 4 pens and pays with a 20 dollar bill. "
    "How much change does he get? Explain step by step.",
    "Summarise in two sentences why the sky is blue.",
    "List five tips for staying healthy.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Explain the difference between a list and a tuple in Python with an example.",
    "Rewrite this sentence in a formal tone: hey, can you send me that file asap?",
    "Write an email to a colleague that asks to move a meeting from Monday to Tuesday.",
    "A train travels 60 miles in 1.5 hours. What is its average speed? Show your work.",
    "Write a SQL query that counts the orders of every customer.",
    "What are the main causes of climate change?",
    "Create a weekly meal plan for a student on a small budget.",
    "Write a Python function to check whether a string is a palindrome.",
    "Describe how a bicycle works to a child.",
    "If 5 apples cost 10 dollars, how much do 8 apples cost? Explain step by step.",
)


def example_prompts(tokenizer: Tokenizer | None, *, vocab_size: int) -> list[tuple[int, ...]]:
    """Token ids of the texts, rendered as one user message where the target has a template.

    Without a tokenizer: as many seeded random prompts.
    """
    if tokenizer is None:
        rng = np.random.default_rng(0)
        return [tuple(rng.integers(0, vocab_size, 24).tolist()) for _ in TEXTS]
    prompts = []
    for text in TEXTS:
        rendered, special = text, True
        if tokenizer.has_template:
            with suppress(TemplateError):  # a template that wants more than a user message
                rendered, special = tokenizer.render([{"role": "user", "content": text}]), False
        prompts.append(tuple(tokenizer.encode(rendered, add_special=special)))
    return prompts
