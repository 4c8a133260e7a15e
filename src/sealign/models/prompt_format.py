"""How a prompt becomes the text and the tokens that a model sees: chat template or few-shot preamble."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sealign.demonstrations.demonstration import Demonstration
from sealign.errors import ModelError, SettingError, unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptStyle = Literal["auto", "chat", "few_shot", "few_shot_chat", "plain"]
"""``chat``: the tokenizer's chat template; ``few_shot``: a preamble of answered questions, then
``Q: ... A:``; ``few_shot_chat``: the same inside the chat template, as in the paper; ``plain``: the prompt
alone; ``auto``: ``chat`` where the tokenizer has a template and no preamble is given, else ``few_shot``."""

PROMPT_STYLES: tuple[str, ...] = get_args(PromptStyle)


def default_preamble() -> str:
    """Return the bundled few-shot preamble: an instruction and six answered questions.

    Example:
        >>> default_preamble().count("Q:")
        6
    """
    return (files("sealign.demonstrations") / "data" / "preamble.txt").read_text(encoding="utf-8").strip()


@dataclass(frozen=True)
class PromptFormat:
    """The way prompts are written for one tokenizer.

    Attributes:
        style: how a prompt is framed; see ``PromptStyle``.
        preamble: the text before the question in the few-shot styles; the bundled one if None.

    Raises:
        SettingError: the style is unknown.

    Example:
        >>> PromptFormat("plain").style
        'plain'
    """

    style: PromptStyle = "auto"
    preamble: str | None = None

    def __post_init__(self) -> None:
        if self.style not in PROMPT_STYLES:
            raise SettingError(unknown_name("prompt style", self.style, PROMPT_STYLES))
        if self.preamble is not None and self.style in ("chat", "plain"):
            raise SettingError(f"prompt style '{self.style}' has no preamble; use few_shot or few_shot_chat with one")

    def resolve(self, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
        """Return the format with ``auto`` decided and the preamble filled in.

        Raises:
            ModelError: a chat style is asked of a tokenizer without a chat template.
        """
        has_template = bool(getattr(tokenizer, "chat_template", None))
        style = self.style
        if style == "auto":
            style = "chat" if has_template and self.preamble is None else "few_shot"
        if style.endswith("chat") and not has_template:
            raise ModelError(
                f"prompt style '{style}' needs a chat template, but the tokenizer has none; use few_shot or plain"
            )
        preamble = self.preamble
        if preamble is None and style.startswith("few_shot"):
            preamble = default_preamble()
        return PromptFormat(style, preamble)

    def prompt_text(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
        """Return the text that the model reads before it answers ``prompt``."""
        resolved = self.resolve(tokenizer)
        text = prompt
        if resolved.style.startswith("few_shot"):
            text = f"{resolved.preamble}\n\nQ: {prompt}\nA:".lstrip()
        if not resolved.style.endswith("chat"):
            return text
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        return rendered

    def encode_prompt(self, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
        """Return the token ids of the formatted prompt."""
        return self._encode(tokenizer, self.prompt_text(tokenizer, prompt))

    def encode(self, tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
        """Return the token ids of the formatted prompt followed by a completion.

        The prompt's tokens are always a prefix of the result, since that is what a model that answers
        the prompt has read: where the tokenizer would merge across the boundary, the two are encoded apart.
        """
        text = self.prompt_text(tokenizer, prompt)
        prefix = self._encode(tokenizer, text)
        separator = "" if text.endswith(("\n", " ")) else " "
        completion = separator + completion.strip()
        joint = self._encode(tokenizer, text + completion)
        if joint[: len(prefix)] == prefix and len(joint) > len(prefix):
            return joint
        return prefix + list(tokenizer.encode(completion, add_special_tokens=False))

    def _encode(self, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        # A chat template writes its own special tokens.
        special = not self.resolve(tokenizer).style.endswith("chat")
        ids = list(tokenizer.encode(text, add_special_tokens=special))
        # Some tokenizers close every text; what is to be continued must stay open.
        return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def read_preamble(path: str | Path) -> str:
    """Return the text of a preamble file, without the space around it.

    Raises:
        SettingError: there is no such file, or it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError as error:
        raise SettingError(f"there is no preamble file '{path}'; check the path") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"preamble file '{path}' is not UTF-8 at byte {error.start}; save it as UTF-8") from error


def prompt_format_of(
    fit: Mapping[str, Any], style: str | None = None, preamble: str | Path | None = None
) -> PromptFormat:
    """Return the prompt format that an edit was fitted with, unless another is named.

    Args:
        fit: the settings of the fit in an edit's record.
        style: a style in place of the fit's.
        preamble: a file with a preamble in place of the fit's.

    Raises:
        SettingError: the style or the record is not one we know, or the file cannot be read.
    """
    recorded: Any = fit.get("prompt_format", {}) if style is None else {"style": style}
    if not isinstance(recorded, Mapping):
        raise SettingError(f"the edit's prompt format is {recorded!r}, but it must be an object; name a prompt style")
    text = recorded.get("preamble") if preamble is None else read_preamble(preamble)
    return PromptFormat(recorded.get("style", "auto"), text)


def few_shot_text(demonstrations: Sequence[Demonstration], instruction: str = "") -> str:
    r"""Return demonstrations as answered questions, ready to be followed by the next one.

    Example:
        >>> few_shot_text([Demonstration("What do bees make?", "Honey.", "Milk.")])
        'Q: What do bees make?\nA: Honey.\n\n'
    """
    shots = [f"Q: {item.prompt.strip()}\nA: {item.positive.strip()}\n\n" for item in demonstrations]
    return (f"{instruction.strip()}\n\n" if instruction.strip() else "") + "".join(shots)
