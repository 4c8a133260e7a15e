"""What a page asks for: the bodies of its requests, read strictly."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealign.errors import SettingError
from sealign.models.sampling import Sampling

MAX_BODY = 2**20
"""Largest body of a request, in bytes."""

MAX_NEW_TOKENS = 4096
"""Largest number of tokens of an answer."""

Body = TypeVar("Body", bound="PageRequest")


class PageRequest(BaseModel):
    """Base class of requests: unknown keys and values of other types are refused."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ActiveEdit(PageRequest):
    """An edit that is switched on.

    Attributes:
        name: Name of the edit.
        strength: Its strength; None for a method that has none.
    """

    name: str
    strength: float | None = None


class Exchange(PageRequest):
    """A message of the user and the two answers to it.

    Attributes:
        user: The message.
        base: Answer of the base model.
        edited: Answer of the edited model.
    """

    user: str
    base: str
    edited: str


class EditsRequest(PageRequest):
    """A request that names the edits that act, in order.

    Attributes:
        edits: The edits that are switched on.
    """

    edits: Annotated[list[ActiveEdit], Field(max_length=64)] = []

    @property
    def strengths(self) -> list[tuple[str, float | None]]:
        """Name and strength of each edit."""
        return [(edit.name, edit.strength) for edit in self.edits]


class ConversationRequest(EditsRequest):
    """A message in a conversation.

    Attributes:
        message: Message of the user.
        earlier: What was said before.
        system: System message, or None.
        template_arguments: Arguments of the chat template.
    """

    message: str
    earlier: list[Exchange] = []
    system: str | None = None
    template_arguments: dict[str, Any] = {}


class AnswerRequest(ConversationRequest):
    """A message to be answered by the base model and the edited model.

    Attributes:
        temperature: Sampling temperature; None for greedy decoding.
        top_p: Nucleus sampling threshold.
        seed: Seed of the sampling.
        max_new_tokens: Largest number of tokens of an answer.
    """

    temperature: float | None = None
    top_p: float = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 128

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for greedy decoding.

        Raises:
            SettingError: A value is out of range.
        """
        if self.temperature is None:
            return None
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


class EffectsRequest(ConversationRequest):
    """An answer of the edited model, whose tokens are to be scored under both models.

    Attributes:
        answer: Token ids of the answer.
    """

    answer: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_NEW_TOKENS)]


class LoadRequest(PageRequest):
    """An edit to be loaded.

    Attributes:
        path: Its path in the folder of edits.
    """

    path: Annotated[str, Field(min_length=1, max_length=1000)]


class TableRow(PageRequest):
    """A row of the table of demonstrations.

    Attributes:
        prompt: The prompt.
        positive: The completion that is wanted.
        negative: The completion that is not wanted.
    """

    prompt: str
    positive: str
    negative: str


class DemonstrationsRequest(PageRequest):
    """Demonstrations to make an edit from, in one of three forms.

    Attributes:
        name: Name of the edit.
        behaviour: Name of a bundled behaviour, or None.
        rows: Demonstrations as text, or None.
        table: Demonstrations as rows of a table, or None.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    behaviour: str | None = None
    rows: str | None = None
    table: list[TableRow] | None = None


class FitRequest(DemonstrationsRequest):
    """Demonstrations to fit an edit on and to judge it by.

    Attributes:
        method: Name of a method that edits activations.
    """

    method: str


class SearchRequest(DemonstrationsRequest):
    """Demonstrations to search the best edit with; see ``TuneConfig`` for the settings.

    Attributes:
        methods: Names of the methods to search.
        layers: Layers to search.
        max_minutes: Largest duration of the search in minutes.
        deployable: Whether to search only edits that are exactly a LoRA.
    """

    methods: list[str]
    layers: str = "all"
    max_minutes: float
    deployable: bool = False


class FormsRequest(PageRequest):
    """An edit whose forms to download are asked for.

    Attributes:
        name: Name of the edit.
    """

    name: str


class DownloadRequest(ActiveEdit):
    """An edit to be downloaded at a strength.

    Attributes:
        form: ``edit`` or the form of an export.
    """

    form: str


class SaveRequest(ActiveEdit):
    """An edit that was fitted on the page, to be saved at a strength.

    Attributes:
        folder: Name of the new folder in the folder of edits.
    """

    folder: str


class PushRequest(ActiveEdit):
    """An edit to be pushed to the Hub at a strength.

    Attributes:
        repository: Repository as ``owner/name``.
        private: Whether a new repository is private.
    """

    repository: Annotated[str, Field(min_length=1, max_length=200)]
    private: bool


def read_request(kind: type[Body], body: bytes) -> Body:
    """Return the request in a body of JSON.

    Args:
        kind: Class of the request.
        body: The body.

    Raises:
        SettingError: The body is not JSON, or a value is missing, unknown, of another type or out of range.

    Example:
        >>> read_request(LoadRequest, b'{"path": "mild"}').path
        'mild'
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        if not first["loc"]:
            raise SettingError(f"the request is refused: {reason}") from error
        shown = "missing" if first["type"] == "missing" else reprlib.repr(first["input"])
        raise SettingError(f"{'.'.join(map(str, first['loc']))} is {shown}: {reason}") from error
