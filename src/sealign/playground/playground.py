"""Playground: a model and edits, and the jobs that a page asks for. Everything that a page sets is in its requests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from sealign.demonstrations.demonstration import Turn
from sealign.edits.gallery import push_edit
from sealign.errors import SettingError
from sealign.evaluation.damage import measure_damages
from sealign.evaluation.journal import Journal
from sealign.methods.edit_sources import fit_settings
from sealign.models.generation import end_tokens, room_for_answer
from sealign.models.prompt_format import prompt_format_of
from sealign.playground.answering import BASE_ARM, EDITED_ARM, answer_both
from sealign.playground.conversation import conversation_format
from sealign.playground.downloads import export_obstacles, write_download
from sealign.playground.fit_and_search import (
    FITTED_METHODS,
    MadeEdit,
    describe_search,
    finite,
    fit_on_page,
    search_on_page,
)
from sealign.playground.model_queue import Job
from sealign.playground.offered_edits import OfferedEdits
from sealign.playground.page_requests import (
    AnswerRequest,
    ConversationRequest,
    DownloadRequest,
    EditsRequest,
    EffectsRequest,
    FitRequest,
    FormsRequest,
    LoadRequest,
    PushRequest,
    SaveRequest,
    SearchRequest,
)
from sealign.playground.token_effects import Alternative, token_effects
from sealign.playground.token_texts import TokenTexts, token_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Playground:
    """A model, its tokenizer and the edits that can be tried on it.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        edits: The edits.
        name: Name of the model.

    Attributes:
        at_once: Number of jobs that the model does at the same time.
    """

    at_once = 1

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: OfferedEdits, *, name: str
    ) -> None:
        self._model, self._tokenizer, self._edits, self._name = model, tokenizer, edits, name
        fits = [settings for offered in edits.initial if (settings := fit_settings(offered.edit))]
        self._fitted_format = prompt_format_of(fits[0] if fits else {})
        self._damages = Journal(None)

    def describe(self) -> dict[str, Any]:
        """Return what the page shows of the model and its edits at first, as values that JSON can hold."""
        templated = bool(getattr(self._tokenizer, "chat_template", None))
        return {
            "model": self._name,
            "edits": [offered.describe() for offered in self._edits.initial],
            "folders": self._edits.folders(),
            "template_arguments": dict(self._fitted_format.chat_template_kwargs) if templated else None,
            "methods": list(FITTED_METHODS),
            "search": describe_search(),
            "not_offered": None,
        }

    def answer(self, request: AnswerRequest, job: Job) -> None:
        """Generate both answers, and report each token and each end.

        Args:
            request: The message, the conversation before it, and the settings.
            job: Job to report to.

        Raises:
            SettingError, ModelError: A setting is out of range, or the conversation does not fit the model.
        """
        edit, remarks = self._edits.combine(request.strengths)
        prompts = {arm: self._prompt(request, arm) for arm in (BASE_ARM, EDITED_ARM)}
        lengths = {arm: min(request.max_new_tokens, self._room(ids)) for arm, ids in prompts.items()}
        texts = {arm: TokenTexts(self._tokenizer) for arm in prompts}
        ended = dict.fromkeys(prompts, False)
        ends = set(end_tokens(self._model))
        for remark in remarks:
            job.tell("remark", message=remark)

        def on_token(arm: str, token: int) -> None:
            job.check()
            ended[arm] = token in ends
            job.tell("token", arm=arm, id=token, text=texts[arm].add(token), end=ended[arm])

        def on_end(arm: str) -> None:
            job.tell("end", arm=arm, text=texts[arm].text, complete=ended[arm])

        answer_both(
            self._model,
            self._tokenizer,
            edit,
            prompts,
            max_new_tokens=lengths,
            sampling=request.sampling,
            on_token=on_token,
            on_end=on_end,
        )

    def effects(self, request: EffectsRequest, job: Job) -> None:
        """Score an answer of the edited model under both models, and report what the edit does at each token.

        Args:
            request: The conversation and the answer.
            job: Job to report to.

        Raises:
            SettingError: A setting or a token is out of range.
        """
        edit, _ = self._edits.combine(request.strengths)
        embeddings: Any = self._model.get_input_embeddings()
        size = embeddings.weight.shape[0]
        if max(request.answer) >= size:
            raise SettingError(f"answer has the token {max(request.answer)}, but the model has {size} tokens")
        prompt = self._prompt(request, EDITED_ARM)
        room = self._room(prompt)
        if len(request.answer) > room:
            raise SettingError(f"answer has {len(request.answer)} tokens, but the context has room for {room}")
        found = token_effects(self._model, prompt, request.answer, edit)
        ends = set(end_tokens(self._model))
        spoken = [effect.divergence for effect in found if effect.token not in ends]
        job.tell(
            "effects",
            at_least=False,
            mean_divergence=finite(sum(spoken) / len(spoken)) if spoken else None,
            tokens=[
                {
                    "name": token_name(self._tokenizer, effect.token),
                    "divergence": finite(effect.divergence),
                    "base": finite(effect.base),
                    "edited": finite(effect.edited),
                    "base_alternatives": self._alternatives(effect.base_alternatives),
                    "edited_alternatives": self._alternatives(effect.edited_alternatives),
                }
                for effect in found
            ],
        )

    def damage(self, request: EditsRequest, job: Job) -> None:
        """Measure the edits on the bundled neutral text, and report the progress and the result.

        Args:
            request: The edits.
            job: Job to report to.

        Raises:
            SettingError: No edit is switched on, or a strength is out of range.
        """
        edit, _ = self._edits.combine(request.strengths)
        if edit is None:
            raise SettingError("no edit is switched on, so there is no damage to measure; switch one on")

        def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:  # noqa: ARG001
            for done, item in enumerate(items):
                job.check()
                job.tell("progress", done=done, total=total)
                yield item

        (found,) = measure_damages(
            self._model, self._tokenizer, [edit], journal=self._damages, ignore_mismatch=True, track=track
        )
        job.tell(
            "damage",
            at_least=False,
            texts=len(found.tokens),
            loss_increase=finite(found.loss_increase),
            loss_interval=[finite(end) for end in found.loss_interval],
            divergence=finite(found.mean_divergence),
            divergence_interval=[finite(end) for end in found.divergence_interval],
        )

    def load(self, request: LoadRequest, job: Job) -> None:
        """Load an edit from the folder of edits, and report its description.

        Args:
            request: Its path.
            job: Job to report to.

        Raises:
            SealignError: As for ``OfferedEdits.load``.
        """
        job.tell("edit", **self._edits.load(request.path).describe())

    def fit(self, request: FitRequest, job: Job) -> None:
        """Fit and judge an edit, and report the verdict and the edit; see ``fit_on_page``.

        Args:
            request: Demonstrations and method.
            job: Job to report to.

        Raises:
            SealignError: As for ``fit_on_page``.
        """
        self._offer(request.name, fit_on_page(self._model, self._tokenizer, request, job), job)

    def search(self, request: SearchRequest, job: Job) -> None:
        """Find the best edit, and report how it goes, the verdict and the edit; see ``search_on_page``.

        Args:
            request: Demonstrations and settings.
            job: Job to report to.

        Raises:
            SealignError: As for ``search_on_page``.
        """
        self._offer(request.name, search_on_page(self._model, self._tokenizer, request, job), job)

    def save(self, request: SaveRequest, job: Job) -> None:
        """Save an edit in the folder of edits, and report the path.

        Args:
            request: The edit, its strength and the name of the folder.
            job: Job to report to.

        Raises:
            SealignError: As for ``OfferedEdits.save``.
        """
        job.tell("saved", path=str(self._edits.save(request.name, request.strength, request.folder)))

    def forms(self, request: FormsRequest, job: Job) -> None:
        """Report in which forms an edit can be downloaded, and why not in the others.

        Args:
            request: The edit.
            job: Job to report to.

        Raises:
            SettingError: The edit is unknown.
        """
        edit = self._edits.find(request.name).edit
        job.tell("forms", **export_obstacles(self._model, edit, ignore_mismatch=self._edits.ignore_mismatch))

    def download(self, request: DownloadRequest, job: Job, *, folder: Path) -> None:
        """Write an edit into a folder, and report the path of the file.

        Args:
            request: The edit, its strength and the form.
            job: Job to report to.
            folder: An existing folder that nothing else uses.

        Raises:
            SealignError: As for ``write_download``.
        """
        name, strength, form = request.name, request.strength, request.form
        path = write_download(self._model, self._edits, name, strength, form=form, folder=folder)
        job.tell("file", path=str(path))

    def push(self, request: PushRequest, job: Job) -> None:
        """Push an edit to the Hub with the login of this machine, and report the address of the commit.

        Args:
            request: The edit, its strength and the repository.
            job: Job to report to.

        Raises:
            EditFileError: There is no login, or the Hub cannot be reached or refuses the upload.
            SettingError: The edit is unknown, the strength is out of range, or the repository has no owner.
        """
        if request.repository.count("/") != 1:
            raise SettingError(f"the repository is '{request.repository}', but it must be OWNER/NAME")
        if self._edits.find(request.name).evaluated is None:
            job.tell("remark", message="The card does not say what the edit gains and costs, which a search measures.")
        with TemporaryDirectory(prefix="sealign-push-") as folder:
            self._edits.write(request.name, request.strength, Path(folder) / "edit")
            url = push_edit(Path(folder) / "edit", request.repository, private=request.private)
        job.tell("pushed", url=url)

    def _offer(self, name: str, made: MadeEdit | None, job: Job) -> None:
        if made is not None:
            job.tell("edit", **self._edits.add(name, made.edit, evaluated=made.evaluated).describe())

    def _prompt(self, request: ConversationRequest, arm: str) -> list[int]:
        """Return the token ids of the conversation of an arm, in which its own answers were given."""
        if not request.message.strip():
            raise SettingError("the message is empty; write one")
        arguments, template = request.template_arguments, getattr(self._tokenizer, "chat_template", None)
        if arguments and not template:
            raise SettingError("the model has no chat template, so its arguments would have no effect; leave them out")
        # Any other text would be run as a template.
        if "chat_template" in arguments and not (isinstance(template, dict) and arguments["chat_template"] in template):
            raise SettingError("chat_template must name one of the model's own chat templates; leave it out")
        written = conversation_format(self._tokenizer, self._fitted_format, arguments)
        history = [] if not request.system else [Turn("system", request.system)]
        for exchange in request.earlier:
            history += [Turn("user", exchange.user), Turn("assistant", getattr(exchange, arm))]
        return written.encode_prompt(self._tokenizer, request.message, history=history)

    def _room(self, ids: list[int]) -> int:
        return room_for_answer(self._model, len(ids), "the conversation", "start a new one or say less")

    def _alternatives(self, found: Iterable[Alternative]) -> list[dict[str, Any]]:
        return [
            {"name": token_name(self._tokenizer, one.token), "log_probability": finite(one.log_probability)}
            for one in found
        ]
