"""The canary: one prompt, with an edit and without, whose answers by the server are compared with the hooks'."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sealign.edits.attach import apply_edit
from sealign.edits.edit import Edit
from sealign.errors import ServingError
from sealign.export.verify import PROMPTS
from sealign.fitting.free_memory import free_memory
from sealign.models.checkpoint_tensors import weight_files
from sealign.models.devices import choose_device
from sealign.models.eval_mode import eval_mode
from sealign.models.structure import input_device
from sealign.serving.vllm_version import TESTED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CANARY_VARIABLE = "SEALIGN_CANARY"
"""Environment variable that carries the answers by the hooks to the front end of the server."""

PROMPT = PROMPTS[0]
"""Text of the canary."""

COMPLETION = 3
"""Number of tokens of its greedy completion, so that decoding is checked beside reading."""

TOLERANCE = 1e-3
"""Largest accepted difference of a log-probability in nats, where the base models agree exactly."""

COARSE = 2e-3
"""Difference of the base models' log-probabilities, in nats, above which edits are compared by their changes alone."""


@dataclass(frozen=True)
class CanaryAnswer:
    """What a model makes of the canary.

    Attributes:
        prompt: Log-probabilities of the tokens of the prompt, from the second on, in nats.
        completion: Token ids of the greedy completion.
        greedy: Log-probability of each of them, in nats.
    """

    prompt: tuple[float, ...]
    completion: tuple[int, ...]
    greedy: tuple[float, ...]

    def distance(self, other: CanaryAnswer) -> float:
        """Return the largest difference of log-probabilities from another answer, in nats; NaN if one is NaN.

        Completions are compared up to the first token that differs: the probabilities of the two are maxima of the same
        distribution, which agree also where the tokens are a close call.

        Args:
            other: Answer of another model to the same prompt.

        Example:
            >>> one, other = CanaryAnswer((-1.0,), (5, 6), (-2.0, -1.0)), CanaryAnswer((-1.5,), (7, 6), (-2.25, -9.0))
            >>> one.distance(other)
            0.5
        """
        pairs = zip(self.completion, other.completion, strict=True)
        same = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(self.completion))
        ours = np.array([*self.prompt, *self.greedy[: same + 1]])
        return float(np.abs(ours - np.array([*other.prompt, *other.greedy[: same + 1]])).max())

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> CanaryAnswer:
        """Return the answer of a record that ``dataclasses.asdict`` made, and JSON kept."""
        return cls(**{name: tuple(values) for name, values in record.items()})


@dataclass(frozen=True)
class Canary:
    """The canary and its answers by the hooks.

    Attributes:
        ids: Token ids of the prompt.
        plain: Answer of the base model.
        edited: Mapping from the hash of an edit to the answer of the edited model.
    """

    ids: tuple[int, ...]
    plain: CanaryAnswer
    edited: dict[str, CanaryAnswer]

    def to_environment(self) -> dict[str, str]:
        """Return the environment variable that carries the canary, with its value."""
        return {CANARY_VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Canary | None:
        """Return the canary in the environment, or None if ``sealign serve`` computed none."""
        text = os.environ.get(CANARY_VARIABLE)
        if text is None:
            return None
        record = json.loads(text)
        edited = {key: CanaryAnswer.of_record(answer) for key, answer in record["edited"].items()}
        return cls(tuple(record["ids"]), CanaryAnswer.of_record(record["plain"]), edited)


@torch.no_grad()
def hooks_canary(model: PreTrainedModel, ids: Sequence[int], edits: Sequence[Edit]) -> Canary:
    """Return the canary with its answers by a transformers model, plain and with each edit attached by hooks.

    Args:
        model: The base model.
        ids: Token ids of the prompt, at least 2.
        edits: Edits of this model.

    Raises:
        FingerprintError: An edit was fitted on another model.
    """
    edited = {}
    with eval_mode(model):
        plain = _model_answer(model, ids)
        for edit in edits:
            with apply_edit(model, edit):
                edited[edit.hash] = _model_answer(model, ids)
    return Canary(tuple(ids), plain, edited)


def _model_answer(model: Any, ids: Sequence[int]) -> CanaryAnswer:
    tokens = list(ids)
    logs: Any = None
    for _ in range(COMPLETION + 1):
        tensor = torch.tensor([tokens], device=input_device(model))
        logs = torch.log_softmax(model(input_ids=tensor, use_cache=False).logits[0].double(), dim=-1)
        tokens.append(int(logs[-1].argmax()))
    given = logs[:-1].gather(1, tensor[0, 1:, None])[:, 0].tolist()
    rounded = [round(value, 6) for value in given]
    start = len(ids) - 1
    return CanaryAnswer(tuple(rounded[:start]), tuple(tokens[len(ids) : -1]), tuple(rounded[start:]))


def fits_in_memory(folder: Path, dtype: str) -> bool:
    """Return whether a model can be loaded to compute the canary: by the sizes of its files, with a quarter to spare.

    Args:
        folder: Folder of the checkpoint.
        dtype: Type that it is loaded in; float32 counts twice, since weights are mostly stored in two bytes.
    """
    size = sum((folder / name).stat().st_size for name in weight_files(folder))
    needed = size * (2 if dtype == "float32" else 1) * 1.25
    device = choose_device()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return 0 < needed < free


def check_canary(name: str, plain: CanaryAnswer, edited: CanaryAnswer, canary: Canary, edit_hash: str) -> float:
    """Return by how much a server's edit differs from the hooks', in nats, or raise if it is another one.

    Where the server's base model agrees with the hooks' within 0.002 nats, each log-probability must agree within 0.001
    nats and five times the difference of the base models. Where it does not, since one of them is rounded or quantised,
    the changes of the prompt's log-probabilities must agree: their difference must be less than three quarters as
    long as the hooks' change, if that is four times as long as the difference of the base models.

    Args:
        name: Name of the edit, for the message.
        plain: The server's answer without an edit.
        edited: The server's answer with the edit.
        canary: The answers by the hooks.
        edit_hash: Hash of the edit, which the canary holds.

    Raises:
        ServingError: The server does nothing, or something else.
    """
    expected = canary.edited[edit_hash]
    change = expected.distance(canary.plain)
    noise = plain.distance(canary.plain)
    if noise <= COARSE:
        allowed, found = TOLERANCE + 5 * noise, edited.distance(expected)
        wrong = not found <= allowed  # also where it is NaN
    else:
        wanted, base = _changes(expected, canary.plain), _changes(plain, canary.plain)
        off = _changes(edited, plain) - wanted
        found, allowed = float(np.abs(off).max()), 0.75 * float(np.abs(wanted).max())
        wrong = bool(_length(wanted) > 4 * _length(base)) and not _length(off) < 0.75 * _length(wanted)
    if wrong:
        raise ServingError(
            f"the server does not apply the edit '{name}' as the hooks do: log-probabilities of the canary differ by "
            f"up to {found:.2g} nats, where the edit changes them by up to {change:.2g} and {allowed:.2g} are allowed; "
            f"serve it with vllm=={TESTED}.*, or compare with sealign verify"
        )
    if change > 10 * TOLERANCE:  # less may vanish in the rounding of a server
        check_changes(name, plain, edited)
    return found


def check_changes(name: str, plain: CanaryAnswer, edited: CanaryAnswer) -> None:
    """Raise if an edit changes nothing of the server's answer.

    Args:
        name: Name of the edit, for the message.
        plain: The server's answer without an edit.
        edited: The server's answer with the edit.

    Raises:
        ServingError: The answers are equal.
    """
    if plain == edited:
        raise ServingError(
            f"the edit '{name}' changes no output of the server; serve it with vllm=={TESTED}.*, or start the server "
            "with --no-lora if the edit is a LoRA"
        )


def _changes(answer: CanaryAnswer, of: CanaryAnswer) -> NDArray[np.float64]:
    return np.array(answer.prompt, dtype=np.float64) - np.array(of.prompt, dtype=np.float64)


def _length(values: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(values))
