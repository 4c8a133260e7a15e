from __future__ import annotations

import copy
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.cli.consoles import output
from sealign.cli.line_input import LineInput
from sealign.errors import ModelError
from sealign.models.sampling import Sampling
from sealign.playground.conversation import Conversation
from tests.cli import test_app as shared
from tests.cli.test_app import CONTEXT, passed, program, refused, run

cache = shared.cache
edit_folder = shared.edit_folder
model_folder = shared.model_folder
one_thread = shared.one_thread

QUESTION = "What is ice?"


def chat(edit: Path, *lines: str, args: tuple[object, ...] = ()) -> list[str]:
    """What is printed after the help text: a prompt and what follows it, for each line and for the end."""
    text = passed("chat", "--edit", edit, "--max-new-tokens", 8, *args, stdin="".join(f"{line}\n" for line in lines))
    greeting, *turns = text.split("(edit ")
    assert greeting.startswith("/on ")
    assert len(turns) == ([*lines, "/quit"].index("/quit") + 1)
    return [turn.rstrip("\n") for turn in turns]


class Said:
    """What the library answers to the same."""

    def __init__(self, model_folder: Path, edit: Path, **options: Any) -> None:
        model, tokenizer = sealign.load_model(str(model_folder))
        self.handle = sealign.attach(model, sealign.load_edit(edit))
        self.conversation = Conversation(model, tokenizer, max_new_tokens=8, **options)

    def __call__(self, text: str, *, strength: float = 0.7) -> str:
        self.handle.set_strength(strength)
        return printed(self.conversation.say(text))

    def once(self, text: str, *, strength: float) -> str:
        self.handle.set_strength(strength)
        return printed(self.conversation.answer_once(text))


def printed(text: str) -> str:
    """A text as the console shows it: without control characters, with tabs and long lines as they come out."""
    with output.capture() as captured:
        output.print(text, markup=False)
    return captured.get().rstrip("\n")


@pytest.fixture
def said(model_folder: Path, edit_folder: Path) -> Said:
    return Said(model_folder, edit_folder)


def test_a_conversation_with_every_command(edit_folder: Path, said: Said) -> None:
    turns = chat(
        edit_folder,
        QUESTION,
        "/off",
        "Why?",
        "/on",
        "And?",
        "/strength -1",
        "So?",
        "/reset",
        QUESTION,
        "/help",
        "/quit",
    )
    on, off, reverse = "on, strength 0.7)> ", "off)> ", "on, strength -1)> "
    first = said(QUESTION)
    assert turns[0] == on + first
    assert turns[1:3] == [on, off + said("Why?", strength=0)]
    assert turns[3:5] == [off, on + said("And?")]
    assert turns[5:7] == [on, reverse + said("So?", strength=-1)]
    said.conversation.reset()
    assert turns[7:9] == [reverse, reverse + said(QUESTION, strength=-1)]
    assert turns[9].startswith(f"{reverse}/on ")
    assert turns[10:] == [reverse]
    assert first != turns[8].removeprefix(reverse)


def test_comparing_leaves_the_conversation_and_the_edit_as_they_are(edit_folder: Path, said: Said) -> None:
    turns = chat(edit_folder, "/off", f"/compare   {QUESTION}", QUESTION)
    base, edited = said.once(QUESTION, strength=0), said.once(QUESTION, strength=0.7)
    assert base != edited
    assert turns[1] == f"off)> base: {base}\nedited: {edited}"
    assert turns[2] == f"off)> {base}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/strength abc", "error: strength is 'abc', but it must be a number; try 0.5"),
        ("/strength 1,x", "error: strength is 'x', but it must be a number; try 0.5"),
        ("/strength", "error: strength is '', but it must be a number; try 0.5"),
        ("/strength nan", "error: strength is nan, but it must be finite"),
        ("/strength 0.5 0.6", "error: strength is '0.5 0.6', but it must be a number"),
        ("/of", "error: unknown command '/of' (did you mean '/off'?); choose one of: /on, /off"),
        ("/[bold]x", "error: unknown command '/[bold]x'"),
        ("/compare", "/on "),
        ("ice " * CONTEXT, f"but the context of the model is {CONTEXT} tokens"),
    ],
)
def test_wrong_lines_are_told_and_change_nothing(edit_folder: Path, said: Said, line: str, words: str) -> None:
    turns = chat(edit_folder, line, "", QUESTION)
    told = " ".join(turns[0].split())
    assert words in told + " "
    assert turns[1:3] == ["on, strength 0.7)> ", "on, strength 0.7)> " + said(QUESTION)]


def test_the_end_of_input_ends_the_chat(edit_folder: Path) -> None:
    assert chat(edit_folder) == ["on, strength 0.7)> "]
    assert chat(edit_folder, "/quit", "not read") == ["on, strength 0.7)> "]


def test_settings(edit_folder: Path, model_folder: Path, said: Said) -> None:
    assert chat(edit_folder, QUESTION, args=("--strength", 2))[0] == "on, strength 2)> " + said(QUESTION, strength=2)
    brief = Said(model_folder, edit_folder, system="Be brief.")(QUESTION)
    args = ("--system", "Be brief.", "--model", model_folder)
    assert chat(edit_folder, QUESTION, args=args)[0] == f"on, strength 0.7)> {brief}"
    assert brief != Said(model_folder, edit_folder)(QUESTION)


def test_each_of_several_strengths_has_a_conversation_of_its_own(
    edit_folder: Path, model_folder: Path, said: Said
) -> None:
    args = ("--strength", "0.7,2")
    turns = chat(edit_folder, QUESTION, "Why?", "/strength -1, 0.5", "So?", f"/compare {QUESTION}", args=args)
    weak, strong = said, Said(model_folder, edit_folder)
    for number, text in enumerate((QUESTION, "Why?")):
        answers = f"strength 0.7: {weak(text)}\nstrength 2: {strong(text, strength=2)}"
        assert turns[number] == "on, strength 0.7, 2)> " + answers
    assert weak.conversation._turns != strong.conversation._turns
    other = copy.copy(weak)
    other.conversation = weak.conversation.branch()
    answers = f"strength -1: {weak('So?', strength=-1)}\nstrength 0.5: {other('So?', strength=0.5)}"
    assert turns[3] == "on, strength -1, 0.5)> " + answers
    base, edited = weak.once(QUESTION, strength=0), weak.once(QUESTION, strength=-1)
    third = other.once(QUESTION, strength=0.5)
    assert turns[4] == f"on, strength -1, 0.5)> base: {base}\nstrength -1: {edited}\nstrength 0.5: {third}"


def test_sampling(edit_folder: Path, model_folder: Path) -> None:
    args = ("--temperature", 0.9, "--seed", 4)
    said = Said(model_folder, edit_folder, sampling=Sampling(temperature=0.9, seed=4))
    first = said(QUESTION)
    assert chat(edit_folder, QUESTION, args=args)[0] == "on, strength 0.7)> " + first
    assert first != Said(model_folder, edit_folder)(QUESTION)


@pytest.mark.parametrize(("line", "said"), [("/strength 9", "strength is 9, "), ("/strength 1,-2", "strength is -2, ")])
def test_an_unusual_strength_is_said(edit_folder: Path, line: str, said: str) -> None:
    result = run("chat", "--edit", edit_folder, stdin=f"/strength 0.9\n{line}\n")
    assert result.stderr.startswith(f"note: {said}")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_lines_are_edited_kept_and_answered_as_they_come_on_a_terminal(
    edit_folder: Path, tmp_path: Path, said: Said
) -> None:
    """A real terminal: the second line is the first one again, by the key for the line before, and corrected."""
    pty = pytest.importorskip("pty")
    pytest.importorskip("readline")
    history = tmp_path / "cache" / "chat_history"
    environment = os.environ | {"SEALIGN_CACHE": str(history.parent), "TERM": "xterm", "COLUMNS": "300"}
    main, side = pty.openpty()
    command = program("chat", "--edit", edit_folder, "--max-new-tokens", 8)
    process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side, env=environment, close_fds=True)
    os.close(side)
    seen = ""
    keys = ["What is wet?\n", "\x1b[A\x7f\x7f\x7f\x7fice?\n", "/quit\n"]
    with suppress(OSError):  # the terminal is closed
        while chunk := os.read(main, 65536).decode("utf-8", "replace"):
            seen += chunk
            while keys and seen.count("strength 0.7)>") > 3 - len(keys):
                os.write(main, keys.pop(0).encode())
    os.close(main)
    assert process.wait() == 0
    assert history.read_text().split("\n")[-4:] == ["What is wet?", "What is ice?", "/quit", ""]
    assert history.stat().st_mode & 0o077 == 0
    said.conversation.say("What is wet?")
    answer = "".join(c for c in said.conversation.say(QUESTION) if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    printed = "".join(c for c in seen if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    assert answer in printed


def test_edits_that_are_rescaled_per_feature(model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = sealign.load_model(str(model_folder))
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=5)
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=sealign.SEAConfig(rank=2, normalization="feature"))
    edit.save_pretrained(tmp_path / "edit")
    turns = chat(tmp_path / "edit", QUESTION, f"/compare {QUESTION}", "/off", "Why?")
    said = Said(model_folder, tmp_path / "edit", use_cache=False)
    assert turns[0] == "on, strength 1)> " + said(QUESTION, strength=1)
    assert "error" not in "".join(turns)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("when", ["at the prompt", "during an answer"])
def test_ctrl_c(edit_folder: Path, said: Said, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """A real signal: at the prompt it ends the chat, during an answer it ends the answer."""

    def interrupted(*_: object, **__: object) -> str:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    if when == "at the prompt":
        monkeypatch.setattr(LineInput, "read", interrupted)
        assert passed("chat", "--edit", edit_folder).startswith("/on ")
        return
    say = Conversation.say
    monkeypatch.setattr(
        Conversation, "say", lambda self, *text: interrupted() if text == ("Count.",) else say(self, *text)
    )
    turns = chat(edit_folder, "Count.", QUESTION)
    assert turns[:2] == ["on, strength 0.7)> stopped", "on, strength 0.7)> " + said(QUESTION)]


def test_a_template_that_refuses(edit_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise ModelError("the model's chat template refuses the conversation (no system); leave out --system")

    monkeypatch.setattr(Conversation, "say", refuse)
    assert "leave out --system" in " ".join(chat(edit_folder, "Hello.")[0].split())


def test_refusals(edit_folder: Path) -> None:
    refused("chat", "--edit", edit_folder, "--strength", "nan", words=("strength is nan", "must be finite"))
    refused("chat", "--edit", edit_folder, "--device", "gpu", words=("device 'gpu'", "try cpu"))
    refused("chat", "--edit", edit_folder, "--model", "nowhere", words=("there is no model 'nowhere'",))
    assert run("chat", "--edit", edit_folder, "--max-new-tokens", 0).exit_code == 2


def test_a_method_without_strength(model_folder: Path, tmp_path: Path) -> None:
    passed("fit", "--method", "dola", "--model", model_folder, "--output", tmp_path / "dola")
    turns = chat(tmp_path / "dola", "/off", "/strength 2", "/on")
    assert turns[:2] == ["on)> ", turns[1]]
    assert "dola has no strength" in " ".join(turns[1].split())
    assert turns[2:] == ["off)> ", "on)> "]
