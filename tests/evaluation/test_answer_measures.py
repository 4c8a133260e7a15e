"""Measures of answers: built-in scorers, functions of the user, a classifier, and what they say when they fail."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sealign.demonstrations import Prompt
from sealign.errors import MeasureError, SettingError
from sealign.evaluation.answer_classifier import load_classifier
from sealign.evaluation.answer_measures import AnswerMeasure, ArmAnswer, distinct_share, load_scorer, split_name


def answer(text: str, ids: Sequence[int] = (1, 2, 3), *, arm: str = "mild", prompt: str = "Why?") -> ArmAnswer:
    return ArmAnswer(arm, Prompt(prompt), text, tuple(ids))


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ((7, 7, 7, 7), 1, 1 / 4),
        ((7, 8, 7, 8, 7), 2, 2 / 4),
        ((7, 8, 9), 3, 1.0),
        ((7, 8), 3, 1.0),  # no sequence of three
        ((), 1, 1.0),
    ],
)
def test_the_share_of_different_sequences(ids: tuple[int, ...], n: int, expected: float) -> None:
    assert distinct_share(ids, n) == expected
    assert load_scorer(f"distinct-{n}").score([answer("x", ids)]) == [expected]


def test_repetition_counts_sequences_of_four_tokens() -> None:
    ids = (1, 2, 3, 4, 1, 2, 3, 4, 5)  # of six sequences, one occurred before
    assert load_scorer("repetition").score([answer("x", ids)]) == [pytest.approx(1 / 6)]
    assert load_scorer("tokens").score([answer("x", ids)]) == [9.0]


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("As an AI language model, I have no hair.", True),
        ("Well, I am unable to say.", True),
        ("I canter on horses; sorry to say I won.", False),
        ("Water can't burn.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refuses: bool) -> None:
    assert load_scorer("refusal").score([answer(text)]) == [float(refuses)]


def test_patterns_and_names() -> None:
    scorer = load_scorer("says thanks=regex:(?i)thank")
    assert (scorer.name, scorer.identity) == ("says thanks", "regex:(?i)thank")
    assert scorer.score([answer("Thanks!"), answer("No.")]) == [1.0, 0.0]
    assert load_scorer("regex:a=b").score([answer("a=b")]) == [1.0]
    assert split_name("distinct-2") == (None, "distinct-2")
    assert isinstance(scorer, AnswerMeasure)


@pytest.fixture
def own_scorers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "own_scorers.py"
    path.write_text(
        "def words(prompt, answer):\n    return len(answer.split()) / len(prompt.split())\n"
        "def fails(prompt, answer):\n    return 1 / len(answer)\n"
        "def nothing(prompt, answer):\n    return float('nan') if 'b' in answer else 1\n"
        "def text(prompt, answer):\n    return '1'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scorers", raising=False)
    return path


def test_a_function_of_the_texts_of_prompt_and_answer(own_scorers: Path) -> None:
    scorer = load_scorer("own_scorers:words")
    assert scorer.name == "words"
    assert scorer.score([answer("a b c", prompt="Why not?"), answer("", prompt="Why?")]) == [1.5, 0.0]
    before = scorer.identity
    own_scorers.write_text(own_scorers.read_text().replace("len(prompt.split())", "2"))
    assert load_scorer("own_scorers:words").identity != before  # the file has changed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "fails",
            r"scorer 'fails', for the answer of 'mild' to 'Who\?', raised ZeroDivisionError \(division",
        ),
        (
            "nothing",
            r"scorer 'nothing', for the answer of 'base' to 'How\?', returned nan, but it must return a",
        ),
        ("text", r"scorer 'text', for the answer of 'base' to 'Why\?', returned '1', but it must return a finite"),
    ],
)
@pytest.mark.usefixtures("own_scorers")
def test_a_failure_names_prompt_and_arm(name: str, words: str) -> None:
    answers = [
        answer("a", arm="base"),
        answer("b", arm="base", prompt="How?"),
        answer("", prompt="Who?"),
    ]
    with pytest.raises(MeasureError, match=words):
        load_scorer(f"own_scorers:{name}").score(answers)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lenght", "unknown scorer 'lenght'"),
        ("tokns", "did you mean 'tokens'"),
        ("distinct-0", "unknown scorer 'distinct-0' .did you mean 'distinct-2'"),
        ("regex:(", "scorer 'regex:\\(' is no regular expression"),
        ("regex:", "scorer 'regex:' has no pattern"),
        ("no_such_module:x", "scorer 'no_such_module:x' cannot be imported .*give it as module:function"),
        ("own_scorers:no_such", "scorer 'own_scorers:no_such' cannot be imported"),
        ("own_scorers:number", "scorer 'own_scorers:number' is of type int, but it must be a function"),
        (" =tokens", "has the name '', but it must have a name"),
    ],
)
@pytest.mark.usefixtures("own_scorers")
def test_scorers_that_do_not_exist(text: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_scorer(text)


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny random classifier of three labels in a folder."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        id2label={0: "gloomy", 1: "plain/flat", 2: "glad"},
        label2id={"gloomy": 0, "plain/flat": 1, "glad": 2},
        initializer_range=0.8,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("classifier")
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_classifier_gives_the_probability_of_its_label(classifier_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    texts = ["The baker is glad.", "Water", "It rains in the town by the river, and the clock is late."]
    expected = [torch.softmax(model(torch.tensor([tokenizer.encode(text)])).logits[0], -1) for text in texts]
    for label, index in (("glad", 2), ("plain/flat", 1)):
        found = load_classifier(f"{classifier_folder}:{label}")
        assert found.name == label.replace("/", " ")
        scores = found.score([answer(text) for text in texts])
        assert scores == pytest.approx([float(row[index]) for row in expected], abs=1e-5)
    named = load_classifier(f"mood={classifier_folder}:glad")
    assert named.name == "mood"
    assert named.identity.startswith(f"classifier {classifier_folder}:glad ")


def test_a_classifier_of_other_weights_has_another_identity(classifier_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    with torch.no_grad():
        model.classifier.bias[0] += 1
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    digests = [load_classifier(f"{folder}:glad").identity.split()[-1] for folder in (classifier_folder, tmp_path)]
    assert len(set(digests)) == 2
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(MeasureError, match=r"classifier 'glad', for the answer of 'mild' to 'Why\?', gave nan"):
        load_classifier(f"{tmp_path}:glad").score([answer("x")])


def test_a_long_answer_is_cut_to_the_context_of_the_classifier(classifier_folder: Path, tokenizer: Any) -> None:
    tokenizer_length = 64
    long = "ice " * 200
    assert len(tokenizer.encode(long)) > tokenizer_length
    (score,) = load_classifier(f"{classifier_folder}:glad").score([answer(long)])
    (begun,) = load_classifier(f"{classifier_folder}:glad").score([answer("ice " * 180)])
    assert score == begun


def test_classifiers_that_cannot_be_used(classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"has the labels gloomy, plain/flat, glad; name one, as in .*:glad"):
        load_classifier(str(classifier_folder))
    with pytest.raises(SettingError, match="unknown label of the classifier .* 'gald' .did you mean 'glad'"):
        load_classifier(f"{classifier_folder}:gald")
    with pytest.raises(SettingError, match="cannot load the classifier '.*nowhere'"):
        load_classifier(f"{tmp_path / 'nowhere'}:glad")
