"""A behaviour planted in a tiny model: positives and negatives are made of two sets of words, whose embeddings the
model writes to its logits."""

from __future__ import annotations

import random
from typing import Any

from sealign.demonstrations.demonstration import Demonstration
from tests.tiny_models import build_model

WANTED = ["a", "e", "o"]
UNWANTED = ["t", "s", "n"]
PLACES = ["town", "house", "road", "bridge", "garden", "tower", "school", "harbour", "valley", "island"]


def planted_model(vocab_size: int) -> Any:
    """Return a tiny Llama whose logits are its residual stream times the embeddings."""
    return build_model("llama", vocab_size=vocab_size, tie_word_embeddings=True)


def planted_demonstrations(count: int, seed: int = 0, *, shuffled: bool = False) -> list[Demonstration]:
    """Return demonstrations of unequal lengths; if shuffled, the sides are exchanged at random: nothing is wanted."""
    draw = random.Random(seed)
    items = []
    for number in range(count):
        sides = [" ".join(draw.choices(words, k=draw.randint(3, 7))) for words in (WANTED, UNWANTED)]
        if shuffled and draw.random() < 0.5:
            sides.reverse()
        positive, negative = sides
        items.append(Demonstration(f"What is near the {PLACES[number % 10]} number {number}?", positive, negative))
    return items
