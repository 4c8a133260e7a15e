"""Which sequences are planned, what is read from each, and what does not fit a context."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BloomConfig

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import DemonstrationError
from sealign.fitting.collect_config import CollectConfig
from sealign.fitting.sequences import Read, TokenSequence, check_context, plan_sequences
from sealign.models.prompt_format import PromptFormat
from tests.tiny_models import build_model

FORMATS = [PromptFormat(), PromptFormat("plain"), PromptFormat("few_shot", "Be short."), PromptFormat("few_shot_chat")]
WORDS = st.lists(st.sampled_from(["ice", "river", "bread", "clock", "a", "in winter"]), min_size=1, max_size=6)
DEMONSTRATIONS = st.builds(
    lambda prompt, positive, negative: Demonstration(" ".join(prompt), " ".join(positive), " ".join(negative)),
    WORDS,
    WORDS.map(lambda words: ["Yes,", *words]),
    WORDS.map(lambda words: ["No,", *words]),
)
PLAIN = PromptFormat("plain")


def _reads(sequences: list[TokenSequence], demonstration: int) -> dict[int, Read]:
    """The reads of one demonstration by role; each role is there once."""
    reads = [read for sequence in sequences for read in sequence.reads if read.demonstration == demonstration]
    assert sorted(read.role for read in reads) == [0, 1, 2]
    return {read.role: read for read in reads}


def _last_tokens(sequence: TokenSequence) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Ids and (role, demonstration, stop) of each read, which is of one token."""
    assert all(read.start == read.stop - 1 for read in sequence.reads)
    return sequence.ids, sorted((read.role, read.demonstration, read.stop) for read in sequence.reads)


@pytest.mark.parametrize("form", FORMATS)
def test_a_neutral_prompt_is_read_from_the_positive_sequence(form: Any, tokenizer: Any, demonstrations: Any) -> None:
    sequences = plan_sequences(tokenizer, demonstrations, CollectConfig(prompt_format=form), None)
    expected = []
    for index, item in enumerate(demonstrations):
        prompt = form.encode_prompt(tokenizer, item.prompt)
        positive = form.encode(tokenizer, item.prompt, item.positive)
        negative = form.encode(tokenizer, item.prompt, item.negative)
        assert len(prompt) < len(positive)
        assert positive[: len(prompt)] == prompt
        expected.append((positive, [(0, index, len(prompt)), (1, index, len(positive))]))
        expected.append((negative, [(2, index, len(negative))]))
    assert [_last_tokens(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_generated_neutral_has_a_sequence_of_its_own(form: Any, tokenizer: Any, demonstrations: Any) -> None:
    # Of unequal lengths; the model may also end at once.
    generated = [list(range(20 * index, 20 * index + index)) for index in range(len(demonstrations))]
    sequences = plan_sequences(
        tokenizer, demonstrations, CollectConfig(prompt_format=form, neutral="generated"), generated
    )
    expected = []
    for index, item in enumerate(demonstrations):
        neutral = form.encode_prompt(tokenizer, item.prompt) + generated[index]
        positive = form.encode(tokenizer, item.prompt, item.positive)
        negative = form.encode(tokenizer, item.prompt, item.negative)
        expected += [(ids, [(role, index, len(ids))]) for role, ids in enumerate((neutral, positive, negative))]
    assert [_last_tokens(sequence) for sequence in sequences] == expected


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("generated", [None, [4, 0, 7, 2]])
def test_a_completion_is_read_from_its_own_tokens(
    form: Any, generated: Any, tokenizer: Any, demonstrations: Any
) -> None:
    items = demonstrations[:4]
    neutrals = None if generated is None else [[5] * length for length in generated]
    config = CollectConfig(prompt_format=form, token="completion", neutral="generated" if generated else "prompt")
    sequences = plan_sequences(tokenizer, items, config, neutrals)
    for index, item in enumerate(items):
        prompt = len(form.encode_prompt(tokenizer, item.prompt))
        ends = [len(form.encode(tokenizer, item.prompt, text)) for text in (item.positive, item.negative)]
        reads = _reads([s for s in sequences if s.reads[0].demonstration == index], index)
        length = 0 if generated is None else generated[index]
        # A prompt that nothing follows is read at its last token.
        assert (reads[0].start, reads[0].stop) == ((prompt if length else prompt - 1), prompt + length)
        assert [(reads[role].start, reads[role].stop) for role in (1, 2)] == [(prompt, end) for end in ends]


def test_ids_are_the_text_that_is_meant(tokenizer: Any, demonstrations: Any) -> None:
    positive, negative = plan_sequences(tokenizer, demonstrations[:1], CollectConfig(), None)
    question = "<user>What is ice?\n<model>"
    assert tokenizer.decode(positive.ids) == f"{question} Frozen water."
    assert tokenizer.decode(negative.ids) == f"{question} Frozen air, which falls from the clouds in winter."
    assert tokenizer.decode(positive.ids[: _reads([positive, negative], 0)[0].stop]) == question


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(DEMONSTRATIONS, min_size=2, max_size=5),
    others=st.lists(DEMONSTRATIONS, min_size=4, max_size=6),
    generated=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_random_token_depends_on_seed_and_text_only(
    tokenizer: Any, items: list[Demonstration], others: list[Demonstration], generated: bool, seed: int
) -> None:
    config = CollectConfig(prompt_format=PLAIN, token="random", seed=seed)
    kept = len(items) - 1  # the last, behind others than before, and with more behind it
    exchanged = [*others[:kept], items[kept], *others[kept:]]

    def plan(demonstrations: list[Demonstration], length: int) -> list[TokenSequence]:
        completions = [[5] * length for _ in demonstrations]
        completions[kept] = [6, 7, 8]
        return plan_sequences(tokenizer, demonstrations, config, completions if generated else None)

    reads = _reads(plan(items, 2), kept)
    assert reads == _reads(plan(exchanged, 11), kept)
    assert all(0 <= read.start == read.stop - 1 for read in reads.values())


@pytest.mark.parametrize("role", [0, 1, 2])
def test_every_token_can_be_chosen_by_seed_and_by_text(role: int, tokenizer: Any) -> None:
    item = Demonstration("Is ice hot?", "No.", "Yes.")
    configs = [CollectConfig(prompt_format=PLAIN, token="random", seed=seed) for seed in range(150)]
    by_seed = [_reads(plan_sequences(tokenizer, [item], config, None), 0)[role] for config in configs]
    others = [Demonstration(f"Is ice {number}?", "No.", "Yes.") for number in range(100, 250)]
    one_seed = plan_sequences(tokenizer, others, configs[0], None)
    by_text = [read for sequence in one_seed for read in sequence.reads if read.role == role]
    for reads, some in ((by_seed, item), (by_text, others[0])):
        whole = plan_sequences(tokenizer, [some], CollectConfig(prompt_format=PLAIN, token="mean"), None)
        assert len(reads) == 150
        assert {read.start for read in reads} == set(range(_reads(whole, 0)[role].stop))


NUMBERED = [Demonstration(f"Is it {number}?", "Yes.", "No.") for number in range(13)]


def _sequence(length: int, *reads: tuple[int, int]) -> TokenSequence:
    return TokenSequence([5] * length, [Read(role, demonstration, 0, length) for role, demonstration in reads])


@pytest.mark.parametrize(("role", "word"), [(0, "neutral"), (1, "positive"), (2, "negative")])
def test_too_long_a_sequence_is_named(role: int, word: str, tokenizer: Any) -> None:
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=23)
    sequences = [_sequence(7, (1, 0)), _sequence(31, (role, 12)), _sequence(23, (2, 3))]
    with pytest.raises(
        DemonstrationError, match=rf"demonstration 'Is it 12\?' \({word}\) is 31 tokens long, .* context is 23; shorten"
    ):
        check_context(model, sequences, NUMBERED)


def test_a_planned_sequence_is_named(tokenizer: Any, demonstrations: Any) -> None:
    long = Demonstration("What is bread?", "It is food.", "It is " + "a very " * 30 + "old clock.")
    items = [*demonstrations[:4], long, *demonstrations[4:]]
    sequences = plan_sequences(tokenizer, items, CollectConfig(prompt_format=PLAIN), None)
    length = len(PLAIN.encode(tokenizer, long.prompt, long.negative))
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=length)
    check_context(model, sequences, items)  # as long as the context, and not longer
    model = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=length - 1)
    with pytest.raises(
        DemonstrationError, match=rf"'What is bread\?' \(negative\) is {length} tokens .* is {length - 1};"
    ):
        check_context(model, sequences, items)


def test_wrappers_have_the_models_context(tokenizer: Any) -> None:
    model: Any = nn.Module()  # as torch.compile does
    model._orig_mod = build_model("llama", vocab_size=len(tokenizer), max_position_embeddings=23)
    check_context(model, [_sequence(23, (1, 0))], NUMBERED)
    with pytest.raises(DemonstrationError, match="context is 23"):
        check_context(model, [_sequence(24, (1, 0))], NUMBERED)


def test_without_a_limit_every_length_passes() -> None:
    model: Any = nn.Module()
    model.config = BloomConfig()  # its positions have no bound
    assert not hasattr(model.config, "max_position_embeddings")
    check_context(model, [_sequence(100_000, (1, 0))], NUMBERED)
    model.config.max_position_embeddings = None
    check_context(model, [_sequence(100_000, (1, 0))], NUMBERED)


def test_plans_are_repeatable(tokenizer: Any, demonstrations: Any) -> None:
    config = CollectConfig(token="random", seed=4)
    first, second = (plan_sequences(tokenizer, demonstrations, config, None) for _ in range(2))
    other = plan_sequences(tokenizer, demonstrations, config.replace(seed=5), None)
    assert first == second
    assert [sequence.ids for sequence in first] == [sequence.ids for sequence in other]
    assert first != other
