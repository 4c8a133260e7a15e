from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.cli.consoles import output
from sealign.evaluation.answers import compare_answers
from sealign.models import loading
from sealign.models.prompt_format import PromptFormat
from sealign.models.sampling import Sampling
from tests.cli import test_app as shared
from tests.cli.test_app import CONTEXT, passed, refused, run, table_rows
from tests.cli.test_inspect import change
from tests.tiny_models import build_model

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

PROMPTS = ["What is ice?", "Who bakes bread?", "Is fire cold, or is it hot?"]


def answers(edit: Path, *args: object, prompts: list[str] = PROMPTS, stdin: str | None = None) -> list[dict[str, Any]]:
    """What ``sealign generate --json`` prints, 12 tokens an answer."""
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    text = passed("generate", "--edit", edit, *given, "--max-new-tokens", 12, *args, "--json", stdin=stdin)
    found: list[dict[str, Any]] = json.loads(text)
    return found


def expected(model_folder: Path, edit: Path, **changes: Any) -> list[dict[str, Any]]:
    """The same from the library."""
    model, tokenizer = sealign.load_model(str(model_folder))
    loaded = sealign.load_edit(edit)
    options = {"max_new_tokens": 12} | changes
    strength = options.get("strength", loaded.strength)
    found = compare_answers(model, tokenizer, loaded, PROMPTS, **options)
    return [{"strength": strength} | vars(answer) for answer in found]


def test_answers_are_those_of_the_library(edit_folder: Path, model_folder: Path) -> None:
    found = answers(edit_folder)
    assert found == expected(model_folder, edit_folder)
    assert [answer["prompt"] for answer in found] == PROMPTS
    assert any(answer["base"] != answer["edited"] for answer in found)


def test_prompts_from_standard_input(edit_folder: Path) -> None:
    stdin = f"{PROMPTS[0]}\n\n  {PROMPTS[1]}  \n{PROMPTS[2]}"
    assert answers(edit_folder, prompts=[], stdin=stdin) == answers(edit_folder)
    assert answers(edit_folder, prompts=PROMPTS[:1], stdin="not read") == answers(edit_folder, prompts=PROMPTS[:1])


def test_the_table_holds_the_same_answers(edit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(edit_folder)
    for width in (80, 120):
        monkeypatch.setattr(output, "width", width)
        given = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        text = passed("generate", "--edit", edit_folder, *given, "--max-new-tokens", 12)
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        for column, name in enumerate(("prompt", "base", "edited")):
            printed = "".join("".join(row[column].split()) for row in table_rows(text))
            # Control characters are not printed.
            wanted = "".join(character for answer in found for character in answer[name] if character.isprintable())
            assert "".join(c for c in printed if c.isprintable()) == "".join(wanted.split())


def test_brackets_are_not_markup(edit_folder: Path) -> None:
    text = passed("generate", "--edit", edit_folder, "--prompt", "[bold]x[/bold]", "--max-new-tokens", 2)
    assert "[bold]x[/bold]" in text


def test_strength_and_model_in_place_of_the_edits_own(edit_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    assert all(answer["base"] == answer["edited"] for answer in answers(edit_folder, "--strength", 0))
    found = answers(edit_folder, "--strength", 2.5)
    assert found == expected(model_folder, edit_folder, strength=2.5)
    assert found != answers(edit_folder)
    moved = shutil.copytree(edit_folder, tmp_path / "edit")
    change(moved, lambda record: record["model"].update(id="/gone"))
    refused("generate", "--edit", moved, "--prompt", "x", words=("there is no model '/gone'", "a local folder"))
    assert answers(moved, "--model", model_folder) == answers(edit_folder)


def test_several_strengths_with_one_model(
    edit_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = loading.load_model

    def counted(name: str, **options: Any) -> Any:
        loads.append(name)
        return load(name, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    found = answers(edit_folder, "--strength", "0, 0.7,2.5,0.7")
    assert loads == [str(model_folder)]
    assert found == [row for s in (0.0, 0.7, 2.5) for row in expected(model_folder, edit_folder, strength=s)]
    given = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    text = passed("generate", "--edit", edit_folder, *given, "--max-new-tokens", 12, "--strength", "0,2.5")
    labels = re.findall(r"^(base|strength [\d.]+):", text, re.MULTILINE)
    assert labels == ["base", "strength 0", "strength 2.5"] * len(PROMPTS)
    assert [line for line in text.splitlines() if line in PROMPTS] == PROMPTS


def test_sampling(edit_folder: Path, model_folder: Path) -> None:
    sampled = answers(edit_folder, "--temperature", 0.9)
    assert sampled == answers(edit_folder, "--temperature", 0.9, "--seed", 0, "--top-p", 1)
    assert sampled == expected(model_folder, edit_folder, sampling=Sampling(temperature=0.9))
    others = [
        answers(edit_folder),
        answers(edit_folder, "--temperature", 0.5),
        answers(edit_folder, "--temperature", 0.9, "--seed", 1),
        answers(edit_folder, "--temperature", 0.9, "--top-p", 0.1),
    ]
    assert all(sampled != other for other in others)
    unedited = answers(edit_folder, "--temperature", 0.9, "--strength", 0)
    assert all(answer["base"] == answer["edited"] for answer in unedited)  # the same random numbers
    assert [answer["base"] for answer in unedited] == [answer["base"] for answer in sampled]


def test_a_method_with_sampling_of_its_own(model_folder: Path, tmp_path: Path) -> None:
    passed("fit", "--method", "best_of_n", "--n", 2, "--model", model_folder, "--output", tmp_path / "best")
    for command in (("generate", "--prompt", "Who?"), ("chat",)):
        args = (*command, "--edit", tmp_path / "best", "--temperature", 0.9)
        refused(*args, words=("temperature is 0.9", "best_of_n samples at a temperature of its own", "leave it out"))


@pytest.mark.parametrize(("strength", "said"), [("-1", "opposite direction"), ("9", "own strength is 0.7")])
def test_an_unusual_strength_is_said(edit_folder: Path, strength: str, said: str) -> None:
    usual = run("generate", "--edit", edit_folder, "--prompt", "Who?", "--strength", "1", "--max-new-tokens", 2)
    assert (usual.exit_code, usual.stderr) == (0, "")
    args = ("--edit", edit_folder, "--prompt", "Who?", "--strength", f"1,{strength}", "--max-new-tokens", 2)
    result = run("generate", *args)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"note: strength is {strength}, ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_prompts_are_written_as_in_the_fit(edit_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """Unless the command says otherwise."""
    preamble = tmp_path / "preamble.txt"
    preamble.write_text("Answer in one word.\n")
    own: dict[str, Any] = {"style": "few_shot", "preamble": "Answer in one word."}
    assert answers(edit_folder, "--prompt-format", "plain") == expected(
        model_folder, edit_folder, prompt_format=PromptFormat("plain")
    )
    assert answers(edit_folder, "--prompt-format", "few_shot", "--preamble", preamble) == expected(
        model_folder, edit_folder, prompt_format=PromptFormat(**own)
    )
    fitted = shutil.copytree(edit_folder, tmp_path / "edit")
    change(fitted, lambda record: record["config"].update(prompt_format=own))
    assert answers(fitted) == expected(model_folder, fitted, prompt_format=PromptFormat(**own))
    assert answers(fitted) != answers(edit_folder)


def test_length(edit_folder: Path, model_folder: Path) -> None:
    short = answers(edit_folder, "--max-new-tokens", 3)
    assert short == expected(model_folder, edit_folder, max_new_tokens=3)
    assert all(len(one["base"]) < len(other["base"]) for one, other in zip(short, answers(edit_folder), strict=True))


def test_edits_that_are_rescaled_per_feature(model_folder: Path, tmp_path: Path) -> None:
    """One prompt at a time and without a cache: each answer is the same alone."""
    model, tokenizer = sealign.load_model(str(model_folder))
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=5)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, normalization="feature"))
    edit.save_pretrained(tmp_path / "edit")
    found = answers(tmp_path / "edit")
    assert found == [answers(tmp_path / "edit", prompts=[prompt])[0] for prompt in PROMPTS]
    assert any(answer["base"] != answer["edited"] for answer in found)
    assert [answer["base"] for answer in found] == [
        answer["base"] for answer in answers(tmp_path / "edit", "--strength", 0)
    ]


# --- other methods and compositions ---


@pytest.fixture(scope="module")
def steering(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit of another method."""
    folder = tmp_path_factory.mktemp("steering") / "edit"
    source = ("--demonstrations", "bundled:truthfulness", "--demonstrations-limit", 6)
    passed("fit", "--method", "mean_difference", "--model", model_folder, *source, "--output", folder)
    return folder


def test_strength_holds_for_every_method_that_has_one(steering: Path) -> None:
    assert answers(steering, "--strength", 30) != answers(steering)
    assert all(answer["base"] == answer["edited"] for answer in answers(steering, "--strength", 0))


def test_a_strength_is_refused_where_there_is_none(model_folder: Path, tmp_path: Path) -> None:
    passed("fit", "--method", "dola", "--model", model_folder, "--output", tmp_path / "dola")
    words = ("strength is 2.0", "(dola) has no strength", "leave it out")
    refused("generate", "--edit", tmp_path / "dola", "--prompt", "Who?", "--strength", "2", words=words)


def test_a_plus_applies_both(edit_folder: Path, steering: Path, model_folder: Path) -> None:
    model, tokenizer = sealign.load_model(str(model_folder))
    both = sealign.Composition([sealign.load_edit(edit_folder), sealign.load_edit(steering)])
    found = compare_answers(model, tokenizer, both, PROMPTS, max_new_tokens=12)
    wanted = [{"strength": None} | vars(answer) for answer in found]
    assert answers(Path(f"{edit_folder}+{steering}")) == wanted
    assert wanted not in (answers(edit_folder), answers(steering))


def test_demonstrations_in_the_context(model_folder: Path, tmp_path: Path) -> None:
    source = ("--demonstrations", "bundled:truthfulness", "--demonstrations-limit", 6)
    passed("fit", "--method", "icl", "--shots", 1, "--model", model_folder, *source, "--output", tmp_path / "icl")
    assert any(answer["base"] != answer["edited"] for answer in answers(tmp_path / "icl"))
    refused("chat", "--edit", tmp_path / "icl", words=("puts demonstrations before each prompt", "sealign generate"))


# --- refusals ---


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ("there is no prompt", "--prompt", "standard input")),
        (["--prompt", " "], ("prompt 1 of 1 is empty", "write a question")),
        (["--prompt", "a", "--prompt", ""], ("prompt 2 of 2 is empty",)),
        (
            ["--prompt", "a", "--prompt", "ice " * CONTEXT],
            ("prompt 2 of 2 is", f"context of the model is {CONTEXT} tokens", "shorten it"),
        ),
        (["--prompt", "a", "--strength", "inf"], ("strength is inf", "must be finite", "try")),
        (["--prompt", "a", "--strength", "1,x"], ("strength is 'x'", "must be a number")),
        (["--prompt", "a", "--strength", ","], ("--strength is ','", "several such as 0.5,1,2")),
        (["--prompt", "a", "--temperature", "0"], ("temperature is 0.0", "above 0", "try 0.7")),
        (["--prompt", "a", "--temperature", "1", "--top-p", "2"], ("top_p is 2.0", "in (0, 1]", "try 0.95")),
        (["--prompt", "a", "--top-p", "0.9"], ("--top-p is 0.9", "add --temperature 0.7")),
        (["--prompt", "a", "--seed", "3"], ("--seed is 3", "add --temperature 0.7")),
        (["--prompt", "a", "--prompt-format", "few-shot"], ("'few-shot' (did you mean 'few_shot'?)",)),
        (["--prompt", "a", "--preamble", "nowhere.txt"], ("there is no preamble file 'nowhere.txt'",)),
        (["--prompt", "a", "--dtype", "bf16"], ("unknown dtype 'bf16' (did you mean", "choose one of")),
        (["--prompt", "a", "--device", "cpuu"], ("device 'cpuu'", "did you mean 'cpu'?")),
        (["--prompt", "a", "--model", "nowhere"], ("there is no model 'nowhere'",)),
    ],
)
def test_refusals(edit_folder: Path, args: list[str], words: tuple[str, ...]) -> None:
    refused("generate", "--edit", edit_folder, *args, words=words)


def test_standard_input_that_is_not_text(edit_folder: Path) -> None:
    refused("generate", "--edit", edit_folder, stdin=b"Caf\xe9?\n", words=("standard input is not UTF-8", "save"))


def test_an_answer_ends_with_the_context(edit_folder: Path, model_folder: Path) -> None:
    tokenizer = sealign.load_model(str(model_folder))[1]
    prompt = "ice"
    while len(PromptFormat().encode_prompt(tokenizer, prompt)) < CONTEXT - 8:
        prompt += " ice"
    room = CONTEXT - len(PromptFormat().encode_prompt(tokenizer, prompt))
    (cut,) = answers(edit_folder, prompts=[prompt])
    (short,) = answers(edit_folder, "--max-new-tokens", room, prompts=[prompt])
    assert 1 <= room < 12
    assert cut == short


# --- a model that the edit was not fitted on ---


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Path]:
    """Models that differ: in what does not matter to the edit, in depth, in width, in architecture."""
    folders = {}
    for name, architecture, changes in (
        ("heads", "llama", {"num_key_value_heads": 4}),
        ("shallow", "llama", {"num_hidden_layers": 3}),
        ("narrow", "llama", {"hidden_size": 32}),
        ("gpt2", "gpt2", {}),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        build_model(architecture, vocab_size=len(tokenizer), **changes).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("heads", ("num_key_value_heads is 4 instead of 2",)),
        ("shallow", ("num_hidden_layers is 3 instead of 4",)),
        ("narrow", ("hidden_size is 32 instead of 48",)),
        ("gpt2", ("model_type is 'gpt2' instead of 'llama'",)),
    ],
)
def test_another_model_is_refused(
    edit_folder: Path, model_folder: Path, other_model: dict[str, Path], name: str, words: tuple[str, ...], command: str
) -> None:
    prompt = ("--prompt", "What is ice?") if command == "generate" else ()
    fitted = f"the edit was fitted on '{model_folder}'"
    words = (*words, fitted, "--ignore-mismatch")
    refused(command, "--edit", edit_folder, "--model", other_model[name], *prompt, words=words)


def test_another_model_on_purpose(edit_folder: Path, other_model: dict[str, Path]) -> None:
    found = answers(edit_folder, "--model", other_model["heads"], "--ignore-mismatch")
    assert any(answer["base"] != answer["edited"] for answer in found)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shallow", ("LlamaForCausalLM has no module 'model.layers.3.mlp'",)),
        ("narrow", ("tokens have 32 features", "the edit has 48")),
        ("gpt2", ("GPT2LMHeadModel has no module 'model.layers.1.mlp'",)),
    ],
)
def test_another_model_that_cannot_be_edited(
    edit_folder: Path, other_model: dict[str, Path], name: str, words: tuple[str, ...]
) -> None:
    args = ("--model", other_model[name], "--prompt", "What is ice?", "--ignore-mismatch")
    refused("generate", "--edit", edit_folder, *args, words=words)
