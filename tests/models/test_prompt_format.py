from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealign.demonstrations.sources import load_demonstrations
from sealign.errors import ModelError, SettingError
from sealign.models.fingerprint import template_hash, tokenizer_hash
from sealign.models.prompt_format import PROMPT_STYLES, PromptFormat, default_preamble, prompt_format_of

texts = st.text(min_size=1, max_size=25).filter(lambda text: bool(text.strip()))
completions = st.one_of(texts, st.sampled_from([" Ice.", "\n\nIt is.\n", "ed", "'s", "é", "9"]))


@pytest.fixture(scope="module")
def without_template(tokenizer: Any) -> Any:
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = None
    return copied


@pytest.fixture(scope="module")
def with_start(tokenizer: Any) -> Any:
    """A tokenizer that puts a token before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    copied = copy.deepcopy(tokenizer)
    start = copied.eos_token_id
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", pair="<eos> $A $B", special_tokens=[("<eos>", start)]
    )
    return copied


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


PREAMBLE = "Be brief.\n\nQ: 1?\nA: 2."

TEXTS = {
    "plain": "Why?",
    "few_shot": f"{PREAMBLE}\n\nQ: Why?\nA:",
    "chat": "<user>Why?\n<model>",
    "few_shot_chat": f"<user>{PREAMBLE}\n\nQ: Why?\nA:\n<model>",
}


def format_of(style: str) -> PromptFormat:
    """A format of a style, with the preamble where the style has one."""
    return PromptFormat(style, PREAMBLE if style.startswith("few_shot") else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_a_preamble_that_would_not_be_used_is_refused(style: str) -> None:
    with pytest.raises(SettingError, match=f"prompt style '{style}' takes no preamble; choose few_shot"):
        PromptFormat(style, PREAMBLE)  # type: ignore[arg-type]


def test_a_preamble_decides_an_open_style(tokenizer: Any) -> None:
    assert PromptFormat("auto", PREAMBLE).resolve(tokenizer).style == "few_shot"
    assert PromptFormat("auto").resolve(tokenizer).style == "chat"


def test_every_style_is_tested() -> None:
    assert set(PROMPT_STYLES) == {*TEXTS, "auto"}


@pytest.mark.parametrize("style", TEXTS)
def test_the_text_of_each_style(tokenizer: Any, style: Any) -> None:
    prompt_format = format_of(style)
    assert prompt_format.prompt_text(tokenizer, "Why?") == TEXTS[style]
    assert decode(tokenizer, prompt_format.encode_prompt(tokenizer, "Why?")) == TEXTS[style]


@pytest.mark.parametrize("style", ["plain", "few_shot"])
def test_styles_without_a_chat_template(without_template: Any, style: Any) -> None:
    assert format_of(style).prompt_text(without_template, "Why?") == TEXTS[style]


@pytest.mark.parametrize("style", ["chat", "few_shot_chat"])
def test_chat_styles_need_a_template(without_template: Any, style: Any) -> None:
    message = f"prompt style '{style}' needs a chat template, but the tokenizer has none; use few_shot or plain"
    for call in (
        lambda: PromptFormat(style).resolve(without_template),
        lambda: PromptFormat(style).encode(without_template, "Why?", "So."),
    ):
        with pytest.raises(ModelError, match=re.escape(message)):
            call()


def test_auto_is_decided_by_the_template(tokenizer: Any, without_template: Any) -> None:
    assert PromptFormat().resolve(tokenizer) == PromptFormat("chat", None)
    assert PromptFormat().resolve(without_template) == PromptFormat("few_shot", default_preamble())
    assert PromptFormat("auto", "x").resolve(without_template) == PromptFormat("few_shot", "x")
    for style in PROMPT_STYLES:
        resolved = PromptFormat(style).resolve(tokenizer)  # type: ignore[arg-type]
        assert resolved.style != "auto"
        assert resolved.resolve(tokenizer) == resolved


@pytest.mark.parametrize(("style", "near"), [("fewshot", "few_shot"), ("Chat", "chat"), ("plian", "plain")])
def test_unknown_styles(style: Any, near: str) -> None:
    message = f"unknown prompt style '{style}' (did you mean '{near}'?); choose one of: auto, chat, few_shot"
    with pytest.raises(SettingError, match=re.escape(message)):
        PromptFormat(style)


def test_bundled_preamble(without_template: Any) -> None:
    preamble = default_preamble()
    assert preamble == preamble.strip()
    assert re.findall("^[QA]:", preamble, re.MULTILINE) == ["Q:", "A:"] * 6
    assert preamble.startswith("Answer each question")
    text = PromptFormat("few_shot").prompt_text(without_template, "Why?")
    assert text == f"{preamble}\n\nQ: Why?\nA:"


def test_an_empty_preamble_leaves_the_question(without_template: Any) -> None:
    assert PromptFormat("few_shot", "").prompt_text(without_template, "Why?") == "Q: Why?\nA:"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(prompt=texts, completion=completions, style=st.sampled_from(sorted(TEXTS)))
def test_a_completion_follows_the_prompts_own_tokens(tokenizer: Any, prompt: str, completion: str, style: Any) -> None:
    prompt_format = format_of(style)
    before = prompt_format.encode_prompt(tokenizer, prompt)
    ids = prompt_format.encode(tokenizer, prompt, completion)
    assert ids[: len(before)] == before
    assert len(ids) > len(before)
    text = prompt_format.prompt_text(tokenizer, prompt)
    separator = "" if text[-1] in " \n" else " "
    assert decode(tokenizer, ids) == text + separator + completion.strip()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(prompt=texts, completion=completions, style=st.sampled_from(sorted(TEXTS)))
def test_a_start_token_comes_once_and_not_into_a_chat(
    with_start: Any, prompt: str, completion: str, style: Any
) -> None:
    ids = format_of(style).encode(with_start, prompt, completion)
    starts = [index for index, token in enumerate(ids) if token == with_start.eos_token_id]
    assert starts == ([] if "chat" in style else [0])


def test_tokens_across_the_boundary_are_taken_apart(tokenizer: Any) -> None:
    prompt, completion = "What is ice? ", "the water"
    plain = PromptFormat("plain")
    before = tokenizer.encode(prompt)
    joint = tokenizer.encode(prompt + completion)
    assert joint[: len(before)] != before  # the tokenizer would merge the space with the completion
    assert plain.encode(tokenizer, prompt, completion) == before + tokenizer.encode(completion)


def test_a_completion_taken_apart_gets_no_start_token(with_start: Any) -> None:
    prompt, completion = "What is ice? ", "the water"
    before, joint = with_start.encode(prompt), with_start.encode(prompt + completion)
    assert joint[: len(before)] != before
    ids = PromptFormat("plain").encode(with_start, prompt, completion)
    assert ids == before + with_start.encode(completion)[1:]


def test_tokens_are_encoded_jointly_where_they_can_be(tokenizer: Any) -> None:
    from tokenizers.normalizers import Prepend

    # As Llama's: each text that is encoded by itself gets a space before it.
    spacing = copy.deepcopy(tokenizer)
    spacing.backend_tokenizer.normalizer = Prepend(" ")
    joint = spacing.encode("What is ice? the water")
    assert spacing.encode("What is ice?") + spacing.encode(" the water") != joint
    assert PromptFormat("plain").encode(spacing, "What is ice?", "the water") == joint


def test_spaces_around_a_completion_do_not_count(tokenizer: Any) -> None:
    for style in ("plain", "chat"):
        prompt_format = PromptFormat(style)
        variants = [prompt_format.encode(tokenizer, "Why?", text) for text in ("So.", " So.", "So.\n", "\n So. ")]
        assert all(variant == variants[0] for variant in variants)


def test_the_tokenizer_is_not_changed(tokenizer: Any) -> None:
    before = tokenizer.chat_template, tokenizer_hash(tokenizer), template_hash(tokenizer)
    for style in TEXTS:
        PromptFormat(style).encode(tokenizer, "Why?", "So.")  # type: ignore[arg-type]
    assert (tokenizer.chat_template, tokenizer_hash(tokenizer), template_hash(tokenizer)) == before


def test_hashes_know_vocabulary_and_template(tokenizer: Any, without_template: Any) -> None:
    entries = [[token, number] for token, number in sorted(tokenizer.get_vocab().items())]
    assert tokenizer_hash(tokenizer) == hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    assert tokenizer_hash(without_template) == tokenizer_hash(tokenizer)
    assert template_hash(tokenizer) == hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert template_hash(without_template) == hashlib.sha256(b"").hexdigest()
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<extra>"])
    assert tokenizer_hash(larger) != tokenizer_hash(tokenizer)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template += " "
    assert template_hash(changed) != template_hash(tokenizer)


def test_prompt_format_of_a_fit(tmp_path: Path) -> None:
    fit = {"prompt_format": {"style": "few_shot", "preamble": "Be brief."}}
    assert prompt_format_of(fit) == PromptFormat("few_shot", "Be brief.")
    assert prompt_format_of({}) == PromptFormat()
    # Another style does not take over the preamble that the fit had.
    assert prompt_format_of(fit, "few_shot_chat") == PromptFormat("few_shot_chat", None)
    file = tmp_path / "preamble.txt"
    file.write_bytes("\ufeffSois bref, s'il te plaît.\r\n\r\n".encode())
    for path in (file, str(file)):
        assert prompt_format_of(fit, preamble=path) == PromptFormat("few_shot", "Sois bref, s'il te plaît.")
        assert prompt_format_of(fit, "few_shot_chat", path) == PromptFormat(
            "few_shot_chat", "Sois bref, s'il te plaît."
        )


def test_prompt_format_of_a_fit_refuses(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="unknown prompt style 'chatt'"):
        prompt_format_of({}, "chatt")
    with pytest.raises(SettingError, match="unknown prompt style 'chatt'"):
        prompt_format_of({"prompt_format": {"style": "chatt", "preamble": None}})
    with pytest.raises(SettingError, match=r"there is no preamble file '.*none\.txt'; check the path"):
        prompt_format_of({}, preamble=tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("s'il te plaît".encode("latin-1"))
    with pytest.raises(SettingError, match=r"preamble file '.*latin\.txt' is not UTF-8 at byte 11; save it as UTF-8"):
        prompt_format_of({}, preamble=tmp_path / "latin.txt")


@pytest.mark.slow
def test_with_a_real_tokenizer(smollm2: Any) -> None:
    _, tokenizer = smollm2
    for style in TEXTS:
        prompt_format = PromptFormat(style)  # type: ignore[arg-type]
        for item in load_demonstrations("bundled:truthfulness", limit=9):
            before = prompt_format.encode_prompt(tokenizer, item.prompt)
            ids = prompt_format.encode(tokenizer, item.prompt, item.positive)
            assert ids[: len(before)] == before
            assert decode(tokenizer, ids[len(before) :]).strip() == item.positive
    message = [{"role": "user", "content": "Why?"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert PromptFormat().encode_prompt(tokenizer, "Why?") == expected
