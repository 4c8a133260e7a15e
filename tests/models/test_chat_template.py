"""Chat templates of every kind: the model reads the whole conversation, and the same text every day."""

from __future__ import annotations

import copy
import datetime
import json
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from sealign.demonstrations.demonstration import Turn
from sealign.errors import ModelError, SettingError
from sealign.models.prompt_format import PromptFormat, prompt_format_of

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
STRICT_PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no text') }}{% endif %}"
    "<{{ m.role }}>{{ m.content[0].text }}\n{% endfor %}"
)
THINKING = PLAIN + "<model>{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
SYSTEM_FIRST = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('The first message must be from system') }}{% endif %}"
    + PLAIN
)
TURNS = (Turn("system", "Be brief. "), Turn("user", "What is 1?"), Turn("assistant", "One."))
CHAT = PromptFormat("chat")


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    def make(template: Any) -> Any:
        copied = copy.deepcopy(tokenizer)
        copied.chat_template = template
        return copied

    return make


@pytest.mark.parametrize("template", [PLAIN, PARTS, STRICT_PARTS])
def test_the_whole_conversation_is_read(with_template: Any, template: str) -> None:
    text = CHAT.prompt_text(with_template(template), "What is ice?", history=TURNS)
    assert text == "<system>Be brief. \n<user>What is 1?\n<assistant>One.\n<user>What is ice?\n"


@pytest.mark.parametrize(
    ("template", "history", "message"),
    [
        (
            SYSTEM_FIRST,
            (),
            r"refuses the conversation \(The first message must be from system\); begin with a system tu",
        ),
        (NO_SYSTEM, TURNS, r"refuses the conversation \(System role not supported\); leave out the system turn"),
        (
            "<user>{{ messages[-1].content }}",
            TURNS,
            r"refuses .* \(it leaves out the text of the system turn\); leave out",
        ),
        ("<model>", (), r"refuses .* \(it leaves out the text of the user turn\); .* or use the prompt format"),
        ("{{ messages[0].content + 1 }}", (), r"refuses the conversation \(can only concatenate str"),
        ("{% for m in messages %}", (), r"refuses the conversation \(Unexpected end of template"),
    ],
)
def test_a_template_that_cannot_write_the_conversation(
    with_template: Any, template: str, history: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=f"the model's chat template {message}"):
        CHAT.encode(with_template(template), "What is ice?", "Water.", history=history)


@pytest.mark.parametrize(
    ("opened", "closed"),
    [(f"<{tag}>", f"</{tag}>") for tag in ("think", "thinking", "reasoning", "seed:think")]
    + [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("◁think▷", "◁/think▷")],
)
def test_thoughts_that_the_template_opens_are_closed(with_template: Any, opened: str, closed: str) -> None:
    tokenizer = with_template(PLAIN + f"<model>{opened}\n")
    text = tokenizer.decode(CHAT.encode(tokenizer, "What is ice?", "Frozen water."))
    assert text == f"<user>What is ice?\n<model>{opened}\n\n{closed}\n\nFrozen water."


CHANNELS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<channel>final<message>{% endif %}"
    "{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_answer_follows_what_the_template_writes_before_answers(with_template: Any) -> None:
    """Without the channel of gpt-oss, the completion would be part of the name of the role."""
    asked = "<user>What is 1?<end><assistant><channel>final<message>"
    assert CHAT.prompt_text(with_template(CHANNELS), "What is 1?") == asked
    later = CHAT.prompt_text(with_template(CHANNELS), "What is ice?", history=TURNS[1:])
    assert later == f"{asked}One.<end>" + asked.replace("1", "ice")
    # Thoughts and blanks are the model's own, and a template that takes no answer is used as it is.
    thinking = CHANNELS.replace("<channel>final<message>", "<think>\n\n</think>\n\n")
    assert CHAT.prompt_text(with_template(thinking), "Why?") == "<user>Why?<end><assistant>"
    refusing = CHANNELS.replace("<channel>final<message>", "{{ raise_exception('no answers') }}")
    assert CHAT.prompt_text(with_template(refusing), "Why?") == "<user>Why?<end><assistant>"


def test_arguments_of_the_template(with_template: Any) -> None:
    tokenizer = with_template(THINKING + "{{ effort }}")
    written = PromptFormat("chat", chat_template_kwargs={"enable_thinking": False, "effort": "low"})
    expected = "<user>What is ice?\n<model><think>\n\n</think>\n\nlow"
    assert written.prompt_text(tokenizer, "What is ice?") == expected
    recorded = json.loads(json.dumps({"prompt_format": written.__dict__}))
    assert prompt_format_of(recorded) == written
    changed = prompt_format_of(recorded, chat_template_kwargs={"effort": "high"})
    assert changed.prompt_text(tokenizer, "What is ice?") == expected.replace("low", "high")
    for name in ("effrt", "enable"):
        with pytest.raises(SettingError, match=f"does not use the argument '{name}'; check its name"):
            PromptFormat(chat_template_kwargs={name: 1}).resolve(tokenizer)
    for name in ("messages", "add_generation_prompt", "tokenize"):
        with pytest.raises(SettingError, match=f"argument '{name}' is set by Sealign; leave it out"):
            PromptFormat(chat_template_kwargs={name: 1}).resolve(tokenizer)


@pytest.mark.parametrize("style", ["few_shot", "plain"])
def test_arguments_without_a_template_are_refused(with_template: Any, style: Any) -> None:
    message = f"prompt style '{style}' uses no chat template, so that its arguments .a, b. would have no effect"
    with pytest.raises(SettingError, match=message):
        PromptFormat(style, chat_template_kwargs={"a": 1, "b": 2})
    with pytest.raises(SettingError, match="'few_shot' uses no chat template"):
        PromptFormat(chat_template_kwargs={"a": 1}).resolve(with_template(None))


def test_one_of_several_templates(with_template: Any) -> None:
    several = with_template({"default": PLAIN, "rag": "<rag>" + PLAIN})
    assert CHAT.prompt_text(several, "Why?") == "<user>Why?\n"
    named = PromptFormat("chat", chat_template_kwargs={"chat_template": "rag"})
    assert named.prompt_text(several, "Why?") == "<rag><user>Why?\n"
    without_default = with_template({"tool_use": PLAIN, "rag": "<rag>" + PLAIN})
    assert named.prompt_text(without_default, "Why?") == "<rag><user>Why?\n"
    with pytest.raises(ModelError, match="the chat templates rag, tool_use and no default; choose one by .*=rag"):
        CHAT.prompt_text(without_default, "Why?")


DATED = (
    "\n{%- macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    "{% if strftime_now is defined %}{% set date = strftime_now('%A, %-d.%m.%y %H:%M:%S.%f 100%%') %}{% endif %}"
    "{{ date }}|{{ today() }}\n" + PLAIN
)


@pytest.mark.parametrize("template", [DATED, "\n" + DATED])
def test_the_date_is_fixed(with_template: Any, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 3, 4, 5, 6)

    monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
    tokenizer = with_template(template)
    dated = PromptFormat("chat", date="2031-03-04T05:06")
    messages = [{"role": "user", "content": "Why?"}]
    assert dated.prompt_text(tokenizer, "Why?") == tokenizer.apply_chat_template(messages, tokenize=False)
    text = CHAT.prompt_text(tokenizer, "Why?")
    assert text.strip() == "Friday, 26.07.24 00:00:00.000000 100%|26 Jul 2024\n<user>Why?"
    named = PromptFormat("chat", chat_template_kwargs={"chat_template": "dated"})
    assert named.prompt_text(with_template({"dated": template}), "Why?") == text


def test_a_date_that_is_none() -> None:
    with pytest.raises(SettingError, match="date is 'today', but it must be a date such as 2024-07-26"):
        PromptFormat(date="today")


def test_history_without_a_template(tokenizer: Any) -> None:
    few_shot = PromptFormat("few_shot", "Answer.").prompt_text(tokenizer, "What is ice?", history=TURNS)
    assert few_shot == "Answer.\n\nBe brief.\n\nQ: What is 1?\nA: One.\n\nQ: What is ice?\nA:"
    plain = PromptFormat("plain").prompt_text(tokenizer, "What is ice?", history=TURNS)
    assert plain == "Be brief. \n\nWhat is 1?\n\nOne.\n\nWhat is ice?"
    chat = PromptFormat("few_shot_chat", "Answer.").prompt_text(tokenizer, "What is ice?", history=TURNS)
    assert chat == "<model>Be brief. \n<user>What is 1?\n<model>One.\n<user>Answer.\n\nQ: What is ice?\nA:\n<model>"
