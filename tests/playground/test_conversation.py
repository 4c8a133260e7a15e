from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sealign
from sealign.errors import ModelError, NormalizationError, SettingError
from sealign.playground import conversation as chat
from sealign.playground.conversation import Conversation
from tests.evaluation.test_answers import greedy
from tests.tiny_models import build_model


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """The token ids of each prompt that is answered, and the maximum length of the answer."""
    calls: list[tuple[list[int], int]] = []
    generate = chat.generate_ids  # type: ignore[attr-defined]

    def generating(model: Any, tokenizer: Any, prompts: Any, length: int, **options: Any) -> Any:
        calls.append((list(prompts[0]), length))
        return generate(model, tokenizer, prompts, length, **options)

    monkeypatch.setattr(chat, "generate_ids", generating)
    return calls


@pytest.fixture
def plain(tokenizer: Any) -> Any:
    """A tokenizer without a chat template."""
    without = copy.deepcopy(tokenizer)
    without.chat_template = None
    return without


def templated(tokenizer: Any, turns: list[tuple[str, str]]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return list(
        tokenizer.encode(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
    )


def test_turns_are_remembered(llama: Any, tokenizer: Any, seen: list[Any]) -> None:
    conversation = Conversation(llama, tokenizer, max_new_tokens=5)
    first = conversation.say("What is ice?")
    second = conversation.say("And water?")
    turns = [("user", "What is ice?"), ("assistant", first), ("user", "And water?")]
    assert [ids for ids, _ in seen] == [templated(tokenizer, turns[:1]), templated(tokenizer, turns)]
    assert first == greedy(llama, tokenizer, "What is ice?", 5, sealign.PromptFormat("chat"))
    assert second != conversation.answer_once("And water?")  # asked twice there


def test_answering_once_is_not_remembered(llama: Any, tokenizer: Any, seen: list[Any]) -> None:
    conversation = Conversation(llama, tokenizer, max_new_tokens=4)
    first = conversation.say("Hello.")
    once = conversation.answer_once("What is ice?")
    assert conversation.answer_once("What is ice?") == once
    assert conversation.say("What is ice?") == once
    turns = [("user", "Hello."), ("assistant", first), ("user", "What is ice?")]
    assert all(ids == templated(tokenizer, turns) for ids, _ in seen[1:])


def test_reset_keeps_the_system_message(llama: Any, tokenizer: Any, seen: list[Any]) -> None:
    conversation = Conversation(llama, tokenizer, system="Be brief.", max_new_tokens=3)
    conversation.say("Hello.")
    conversation.say("Hello again.")
    conversation.reset()
    conversation.say("Hello.")
    expected = templated(tokenizer, [("system", "Be brief."), ("user", "Hello.")])
    assert seen[0][0] == seen[2][0] == expected
    assert len(seen[1][0]) > len(expected)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_without_a_template_turns_are_questions_and_answers(
    llama: Any, plain: Any, seen: list[Any], system: str | None
) -> None:
    conversation = Conversation(llama, plain, system=system, max_new_tokens=4)
    start = "" if system is None else f"{system}\n\n"
    first = conversation.say("What is ice?")
    conversation.say("And water?")
    texts = [
        f"{start}Q: What is ice?\nA:",
        f"{start}Q: What is ice?\nA: {first}\n\nQ: And water?\nA:",
    ]
    assert [ids for ids, _ in seen] == [plain.encode(text) for text in texts]


def test_answers_are_those_of_the_edited_model(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    conversation = Conversation(llama, tokenizer, max_new_tokens=6)
    base = conversation.answer_once("What is ice?")
    with sealign.apply_edit(llama, small_edit) as handle:
        edited = conversation.answer_once("What is ice?")
        assert edited == greedy(llama, tokenizer, "What is ice?", 6, sealign.PromptFormat("chat"))
        with handle.switched(False):
            assert conversation.answer_once("What is ice?") == base
    assert edited != base


def test_rescaling_per_feature_needs_no_cache(llama: Any, tokenizer: Any, small_edit: sealign.Edit) -> None:
    edit = small_edit.with_normalization("feature")
    with sealign.apply_edit(llama, edit):
        answer = Conversation(llama, tokenizer, max_new_tokens=4, use_cache=False).say("What is ice?")
        assert answer == greedy(llama, tokenizer, "What is ice?", 4, sealign.PromptFormat("chat"))
        cached = Conversation(llama, tokenizer, max_new_tokens=4)
        with pytest.raises(NormalizationError, match="not defined in cached decoding"):
            cached.say("What is ice?")
        # What failed was not said.
        assert cached._turns == []


def test_the_conversation_fits_into_the_context(llama: Any, tokenizer: Any, seen: list[Any]) -> None:
    conversation = Conversation(llama, tokenizer, max_new_tokens=200)
    conversation.say("What is ice? " * 8)
    (ids, length) = seen[0]
    assert length == 256 - len(ids) < 200
    with pytest.raises(
        SettingError, match=r"the conversation is \d+ tokens long, .* context of the model is 256 .*\(/reset\)"
    ):
        conversation.say("And water? " * 30)
    conversation.reset()
    conversation.say("Hello.")
    assert seen[-1][1] == 200


def test_a_template_that_refuses_a_system_message(llama: Any, tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}<user>{{ m.content }}{% endfor %}<model>"
    )
    conversation = Conversation(llama, strict, system="Be brief.", max_new_tokens=2)
    with pytest.raises(
        ModelError, match=r"chat template refuses .*System role not supported.*; leave out the system turn"
    ):
        conversation.say("Hello.")
    assert isinstance(Conversation(llama, strict, max_new_tokens=2).say("Hello."), str)


def test_dropout_is_off_during_an_answer(tokenizer: Any) -> None:
    model = build_model("gpt2", vocab_size=len(tokenizer)).train()
    answers = {Conversation(model, tokenizer, max_new_tokens=8).say("What is ice?") for _ in range(3)}
    assert len(answers) == 1
    assert model.training


def test_pieces_of_an_answer_come_as_they_are_generated(llama: Any, tokenizer: Any) -> None:
    pieces: list[str] = []
    conversation = Conversation(llama, tokenizer, max_new_tokens=24)
    answer = conversation.say("What is ice?", pieces.append)
    assert "".join(pieces) == answer == Conversation(llama, tokenizer, max_new_tokens=24).say("What is ice?")
    assert len(pieces) > 5
    pieces.clear()
    assert "".join(pieces) != conversation.answer_once("Why?", pieces.append) == "".join(pieces)


def test_pieces_end_before_the_end_token(llama: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = templated(tokenizer, [("user", "What is ice?")])
    new = llama.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    monkeypatch.setattr(llama.generation_config, "eos_token_id", new[7])
    pieces: list[str] = []
    answer = Conversation(llama, tokenizer, max_new_tokens=12).say("What is ice?", pieces.append)
    assert "".join(pieces) == answer == tokenizer.decode(new[: new.index(new[7])]).strip()


@pytest.mark.parametrize(
    ("decoded", "shown"),
    [
        (["a", "a ", "a b"], ["a", " b"]),  # a blank waits for what follows it
        (["\ufffd", "\ufffd", "\u00e9"], ["\u00e9"]),  # so do the bytes of one character
        (["do n", "do n'", "don't"], ["do n", "'", "\n", "don't"]),  # a tokenizer that joins words afterwards
    ],
)
def test_what_can_still_change_is_kept_back(decoded: list[str], shown: list[str]) -> None:
    found: list[str] = []
    stream = chat._TextStream(lambda tokens: decoded[len(tokens) - 1], [], found.append)
    for token in range(len(decoded) - 1):
        stream(token)
    stream.finish(decoded[-1])
    assert found == shown


def test_a_branch_goes_its_own_way(llama: Any, tokenizer: Any) -> None:
    conversation = Conversation(llama, tokenizer, max_new_tokens=4)
    conversation.say("What is ice?")
    branch = conversation.branch()
    assert branch.say("Why?") == conversation.answer_once("Why?")
    assert len(branch._turns) == len(conversation._turns) + 2 == 4
