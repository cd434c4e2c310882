"""The example texts on which an export checks its graphs and calibrates confidence."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from dspark_batch.engine import TemplateError, Tokenizer

PROMPTS = (
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
PASSAGES = (
    "Tom has 3 boxes with 12 pencils each. He gives 7 pencils to his sister and shares the rest "
    "equally with two friends. First we count the pencils: 3 * 12 = 36. After the gift he has "
    "36 - 7 = 29 pencils. Divided by 3 people that is 9 each, and 2 pencils are left over. "
    "The answer is 9.",
    "def count_words(text):\n    counts = {}\n    for word in text.lower().split():\n"
    "        word = word.strip('.,!?')\n        if word:\n"
    "            counts[word] = counts.get(word, 0) + 1\n    return counts\n\n"
    "# Example:\nprint(count_words('The cat saw the dog.'))  # {'the': 2, 'cat': 1, ...}",
    "The lighthouse stood at the end of a long stone pier. Every evening Anna climbed its 142 "
    "steps to light the lamp, and every morning she wrote down which ships had passed. On the "
    "first of November the fog was so thick that she could not see the water below. Then a bell "
    "rang, three times, from somewhere very near.",
    "Dear Ms Keller,\n\nThank you for your message. We have looked into your order and found that "
    "the parcel was returned to our warehouse because the address was incomplete. Please send us "
    "the full address, and we will ship it again today at no cost.\n\nKind regards,\n"
    "Customer service",
    "1. **Plan ahead**: write down what you want to achieve this week.\n2. **Start small**: "
    "fifteen minutes are enough to begin.\n3. **Take breaks**: a short walk clears the mind.\n"
    "4. **Review**: on Friday, look at what worked and what did not.\n\n"
    "| day | task | done |\n|---|---|---|\n| Monday | report | yes |\n| Tuesday | slides | no |",
    "Photosynthesis is how plants turn light into chemical energy. In the leaves, chlorophyll "
    "absorbs light and splits water into oxygen, protons and electrons. The energy is stored in "
    "ATP and NADPH, with which the Calvin cycle builds sugar from carbon dioxide. "
    "6 CO2 + 6 H2O -> C6H12O6 + 6 O2.",
    "SELECT customers.name, COUNT(orders.id) AS num_orders\nFROM customers\nLEFT JOIN orders ON "
    "orders.customer_id = customers.id\nWHERE customers.country = 'France'\nGROUP BY "
    "customers.name\nHAVING COUNT(orders.id) > 3\nORDER BY num_orders DESC;",
    "To make bread you need flour, water, salt and yeast. Mix 500 grams of flour with 350 ml of "
    "warm water, 10 grams of salt and a little yeast, and knead the dough for ten minutes. Let it "
    "rise in a warm place until it has doubled, shape a loaf, and bake it at 230 degrees for half "
    "an hour. It is done when it sounds hollow.",
    "Q: What does a stack do?\nA: It keeps items in order and gives back the last one first. "
    "Pushing and popping take constant time.\n\nclass Stack:\n    def __init__(self):\n"
    "        self.items = []\n\n    def push(self, item):\n        self.items.append(item)\n\n"
    "    def pop(self):\n        return self.items.pop()",
    "Climate change has natural and human causes. Volcanoes and the sun play a part, but since the "
    "middle of the twentieth century most of the warming has come from burning coal, oil and gas, "
    "which releases carbon dioxide, and from farming, which releases methane. Forests that are cut "
    "down can no longer store carbon.",
    "La bibliothèque ouvre à neuf heures du matin. Das Museum ist montags geschlossen. El tren a "
    "Sevilla sale a las 17:45 desde el andén número 4. Il prezzo è di 12,50 euro a persona.",
)
"""Prose, code, tables and other languages, such as a target writes in answer to prompts."""
_MIN_TOKENS = 2400  # what most tokenizers make of the texts above


def example_prompts(tokenizer: Tokenizer | None, *, vocab_size: int) -> list[tuple[int, ...]]:
    """Token ids of `PROMPTS`, each as a user message if the target has a chat template.

    Without a tokenizer: as many random prompts, always the same.
    """
    if tokenizer is None:
        rng = np.random.default_rng(0)
        return [tuple(rng.integers(0, vocab_size, 24).tolist()) for _ in PROMPTS]
    prompts = []
    for text in PROMPTS:
        rendered, special = text, True
        if tokenizer.has_template:
            with suppress(TemplateError):  # the template needs more than a user message
                rendered, special = tokenizer.render([{"role": "user", "content": text}]), False
        prompts.append(tuple(tokenizer.encode(rendered, add_special=special)))
    return prompts


def check_rows(
    tokenizer: Tokenizer | None,
    prompts: Sequence[tuple[int, ...]],
    *,
    vocab_size: int,
    max_tokens: int,
) -> list[tuple[int, ...]]:
    """The prompts and `PASSAGES`, plus random rows (always the same) up to 2,400 tokens in all.

    Rows are cut to `max_tokens`.
    """
    rows = list(prompts)
    if tokenizer is not None:
        rows += [tuple(tokenizer.encode(text, add_special=True)) for text in PASSAGES]
    rows = [row[:max_tokens] for row in rows]
    rng = np.random.default_rng(1)
    while sum(map(len, rows)) < _MIN_TOKENS:
        rows.append(tuple(rng.integers(0, vocab_size, min(64, max_tokens)).tolist()))
    return rows
