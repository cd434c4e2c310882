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
    "Maria reads 12 pages a day. Her book has 180 pages. How many days does she need, and how many "
    "pages are left after 9 days?",
    "A rectangle is 8 cm long and 5 cm wide. What are its perimeter and its area?",
    "There are 24 pupils in a class. A third of them walk to school, and half of the others take "
    "the bus. How many take the bus?",
    "A recipe for 4 people needs 300 grams of flour. How much flour do 10 people need?",
    "Write a Python function that merges two sorted lists into one sorted list.",
    "Write a Python class for a bank account with methods to deposit, to withdraw and to show the "
    "balance.",
    "What does this code print? for i in range(3): print(i * i)",
    "Write a JavaScript function that removes duplicates from an array, and explain it.",
    "Who wrote Romeo and Juliet, and what is the play about?",
    "Explain photosynthesis in simple words.",
    "What is the difference between weather and climate?",
    "Give me three arguments for and three against working from home.",
    "Translate into French: The library opens at nine o'clock in the morning.",
    "Is this review positive or negative? The food was cold, but the staff were very friendly.",
    "Write a short dialogue between a customer and a baker.",
    "Plan a two-day trip to Rome for a family with small children.",
)
NUM_SMOOTHING_TEXTS = 16
"""The first ones are enough to see outliers of activations by, which takes a slow forward pass."""


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
