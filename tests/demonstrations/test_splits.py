"""Demonstrations are split by prompt or topic, by a seed, and whatever their order."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from sealign.demonstrations.demonstration import Demonstration, Turn
from sealign.demonstrations.sources import load_demonstrations
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


def topics(items: list[Demonstration]) -> set[str | None]:
    return {item.topic for item in items}


def test_each_topic_is_on_one_side() -> None:
    items = [Demonstration(f"What is {n}?", f"{n}.", "Blue.", topic="abcdefg"[n % 7]) for n in range(35)]
    for seed in range(6):
        fitted, held_out = split_demonstrations(items, holdout=0.3, seed=seed)
        assert not topics(fitted) & topics(held_out)
        assert (len(fitted), len(held_out)) == (25, 10)
        assert [item for item in items if item in held_out] == held_out


def test_whole_topics_come_as_near_as_they_can_to_the_fraction() -> None:
    sizes = {"a": 1, "b": 20, "c": 7, "d": 4, "e": 8}
    items = [Demonstration(f"{topic}{n}", "x", "y", topic=topic) for topic, size in sizes.items() for n in range(size)]
    for seed in range(4):
        wanted = range(1, len(items))
        drawn = [split_demonstrations(items, holdout=number / len(items), seed=seed)[1] for number in wanted]
        assert all(topics(smaller) <= topics(larger) for smaller, larger in pairwise(drawn))
        found = {len(held_out) for held_out in drawn}
        assert len(found) == len(sizes) - 1
        for number, held_out in zip(wanted, drawn, strict=True):
            assert abs(len(held_out) - number) == min(abs(size - number) for size in found)


def test_a_prompt_of_two_topics_is_on_one_side() -> None:
    items = [Demonstration(f"{n}", "x", "y", topic="ab"[n % 2]) for n in range(8)]
    items += [Demonstration("0", "z", "y", topic="b"), Demonstration("9", "x", "y")]
    for seed in range(6):
        fitted, held_out = split_demonstrations(items, seed=seed)
        assert not prompts(fitted) & prompts(held_out)
        assert len(fitted) + len(held_out) == len(items)


@pytest.mark.parametrize("name", ["truthfulness", "positivity"])
def test_bundled_behaviours_are_split_by_topic(name: str) -> None:
    fitted, held_out = split_demonstrations(load_demonstrations(f"bundled:{name}"), holdout=0.3)
    assert not topics(fitted) & topics(held_out)
    assert 0.25 < len(held_out) / len(fitted + held_out) < 0.35


@pytest.mark.parametrize("holdout", [0, 1, -0.1, float("nan")])
def test_fractions_out_of_range(holdout: float) -> None:
    with pytest.raises(DemonstrationError, match=f"holdout is {holdout}, but it must be above 0 and below 1"):
        split_demonstrations(ITEMS, holdout=holdout)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(
        DemonstrationError, match="there are demonstrations of 1 prompts or topics, but a split .* at least 2; add some"
    ):
        split_demonstrations([Demonstration("a", "b", "c"), Demonstration("a ", "d", "e")])
