"""Demonstrations are split by prompt, by a seed, and whatever their order."""

from __future__ import annotations

import random

import pytest

from sealign.demonstrations.demonstration import Demonstration, Turn
from sealign.demonstrations.splits import split_demonstrations
from sealign.errors import DemonstrationError

ITEMS = [Demonstration(f"What is {n}?", f"{n}.", f"Blue {k}.") for n in range(17) for k in range(1 + n % 3)]


def prompts(items: list[Demonstration]) -> set[str]:
    return {item.prompt for item in items}


@pytest.mark.parametrize(("holdout", "expected"), [(0.3, 5), (0.01, 1), (0.99, 16), (0.5, 8)])
def test_each_prompt_is_on_one_side(holdout: float, expected: int) -> None:
    fitted, held_out = split_demonstrations(ITEMS, holdout=holdout, seed=2)
    assert len(prompts(held_out)) == expected
    assert not prompts(fitted) & prompts(held_out)
    assert [item for item in ITEMS if item in fitted] == fitted
    assert [item for item in ITEMS if item in held_out] == held_out
    assert len(fitted) + len(held_out) == len(ITEMS)


def test_the_seed_draws_and_the_order_does_not_matter() -> None:
    draws = [prompts(split_demonstrations(ITEMS, seed=seed)[1]) for seed in range(6)]
    assert len({frozenset(draw) for draw in draws}) == 6
    assert len(set.union(*draws)) > 12
    shuffled = random.Random(0).sample(ITEMS, len(ITEMS))
    assert prompts(split_demonstrations(shuffled, seed=4)[1]) == draws[4]


def test_the_same_question_after_another_history_is_another_prompt() -> None:
    items = [Demonstration("Why?", "So.", "No.", (Turn("system", f"You are {n}."),)) for n in range(2)]
    fitted, held_out = split_demonstrations(items)
    assert len(fitted) == len(held_out) == 1


@pytest.mark.parametrize("holdout", [0, 1, -0.1, float("nan")])
def test_fractions_out_of_range(holdout: float) -> None:
    with pytest.raises(DemonstrationError, match=f"holdout is {holdout}, but it must be above 0 and below 1"):
        split_demonstrations(ITEMS, holdout=holdout)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(DemonstrationError, match="there are demonstrations of 1 prompts, but .* at least 2; add some"):
        split_demonstrations([Demonstration("a", "b", "c"), Demonstration("a ", "d", "e")])
