"""Edits that are made on the page: fitted by one method, or found by a search over methods and layers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sealign.demonstrations.bundled import BUNDLED_PREFIX
from sealign.demonstrations.demonstration import Demonstration
from sealign.demonstrations.sources import load_demonstrations
from sealign.edits.edit import Edit
from sealign.errors import SettingError, check_choice
from sealign.evaluation.candidates import SEARCHED
from sealign.evaluation.fit_and_judge import fit_and_judge
from sealign.evaluation.preference import length_note
from sealign.evaluation.tuning_config import TuneConfig
from sealign.fitting.edit_config import EditConfig
from sealign.methods.registry import METHODS, get_method
from sealign.models.structure import text_config, unwrap_model
from sealign.playground.model_queue import Job
from sealign.playground.page_requests import DemonstrationsRequest, FitRequest, SearchRequest
from sealign.playground.pasted_rows import read_pasted, read_table
from sealign.progress import Track
from sealign.serving.settings import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sealign.evaluation.comparison import EditReport
    from sealign.evaluation.damage import Damage
    from sealign.evaluation.results import Results
    from sealign.evaluation.scan import ScannedCandidate
    from sealign.evaluation.statistics import Difference
    from sealign.evaluation.tuning import TuneResult

FITTED_METHODS = tuple(name for name, method in METHODS.items() if issubclass(method.config, EditConfig))
"""Methods that an edit can be fitted with on the page: those that edit activations."""


@dataclass(frozen=True)
class MadeEdit:
    """An edit that was made on the page.

    Attributes:
        edit: The edit.
        evaluated: Results of its evaluation and what they say of it; None after a fit, which writes no results.
    """

    edit: Edit
    evaluated: tuple[Results, EditReport] | None = None


def describe_search() -> dict[str, Any]:
    """Return what the page shows of a search at first: all methods, and those that are searched by default.

    The obstacle is a sentence that says why no search can run, or None.
    """
    missing = [name for name in ("lm_eval", "datasets") if find_spec(name) is None]
    them = "it" if len(missing) == 1 else "them"
    obstacle = f"A search needs {' and '.join(missing)}; install {them} with: pip install 'sealign[eval]'"
    return {
        "methods": list(SEARCHED),
        "searched": list(TuneConfig().methods),
        "obstacle": obstacle if missing else None,
    }


def fit_on_page(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: FitRequest, job: Job) -> MadeEdit:
    """Fit an edit on a part of the demonstrations, judge it on the others, and report the verdict.

    The strength is the largest one within the damage budget, as in ``sealign fit``.

    Args:
        model: The base model.
        tokenizer: Tokenizer of the model.
        request: Demonstrations and method.
        job: Job to report to.

    Raises:
        DemonstrationError: A demonstration is malformed, or there are too few.
        ServingError: The name is not valid.
        SettingError: The method edits no activations.
    """
    check_name(request.name)
    check_choice("method", request.method, FITTED_METHODS)
    config = get_method(request.method).config()
    assert isinstance(config, EditConfig)
    demonstrations = _demonstrations(request, tokenizer, job)
    found = fit_and_judge(model, tokenizer, demonstrations, config=config, track=_reporting(job))
    margin = found.effects[0]
    job.tell(
        "verdict",
        word=found.verdict.word,
        sentence=found.verdict.sentence,
        held_out=found.held_out,
        margin=_interval(margin.edited),
        random=_interval(margin.random),
        reversed=_interval(margin.reversed),
        **_damage(found.damage["edited"], found.domain_damage.get("edited")),
    )
    return MadeEdit(found.edit)


def search_on_page(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: SearchRequest, job: Job
) -> MadeEdit | None:
    """Find the edit of the largest gain within the damage budget, as ``sealign tune`` does, and report how it goes.

    The candidates are reported after each round of layers. The files of the search are removed at its end.

    Args:
        model: The base model; it must be differentiable.
        tokenizer: Tokenizer of the model.
        request: Demonstrations of at least 8 prompts, and settings.
        job: Job to report to.

    Returns:
        The edit; None if no candidate has a gain.

    Raises:
        DemonstrationError: A demonstration is malformed.
        ModelError: The model cannot be differentiated.
        ServingError: The name is not valid.
        SettingError: A setting is out of range, there are too few demonstrations, no candidate is left, or a package is
            missing.
    """
    check_name(request.name)
    if obstacle := describe_search()["obstacle"]:
        raise SettingError(obstacle)
    from sealign.evaluation.tuning import tune

    config = TuneConfig(
        methods=request.methods,
        layers=request.layers,
        max_minutes=request.max_minutes,
        deployable=request.deployable,
    )
    demonstrations = _demonstrations(request, tokenizer, job)
    layers = int(text_config(unwrap_model(model)).num_hidden_layers)

    def show_round(scanned: list[ScannedCandidate]) -> None:
        job.tell("scanned", layers=layers, candidates=[_candidate(each) for each in scanned])

    with tempfile.TemporaryDirectory(prefix="sealign-search-") as folder:
        found = tune(
            model,
            tokenizer,
            demonstrations,
            config=config,
            output=folder,
            on_round=show_round,
            track=_reporting(job),
        )
    if found.left_out:
        left_out = ", ".join(map(str, found.left_out))
        job.tell("remark", message=f"The time limit left these layers out of the scan: {left_out}.")
    job.tell("verdict", **_tuned_verdict(found))
    if found.edit is None or found.results is None or found.report is None:
        return None
    return MadeEdit(found.edit, (found.results, found.report))


def _demonstrations(
    request: DemonstrationsRequest, tokenizer: PreTrainedTokenizerBase, job: Job
) -> list[Demonstration]:
    """Return the demonstrations of a request, and remark on what their lengths may do."""
    if [request.behaviour, request.rows, request.table].count(None) != 2:
        raise SettingError("demonstrations are a table, a text or those of a bundled behaviour; give one of the three")
    if request.table is not None:
        demonstrations = read_table([row.model_dump() for row in request.table])
    elif request.rows is not None:
        demonstrations = read_pasted(request.rows)
    else:
        demonstrations = load_demonstrations(f"{BUNDLED_PREFIX}{request.behaviour}")
    if remark := length_note(tokenizer, demonstrations):
        job.tell("remark", message=remark)
    return demonstrations


def _reporting(job: Job) -> Track:
    """Return a function that reports progress to a job, and ends when the job was stopped."""

    def track(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        for done, item in enumerate(items):
            job.check()
            job.tell("progress", stage=description, done=done, total=total)
            yield item

    return track


def _candidate(scanned: ScannedCandidate) -> dict[str, Any]:
    edit = scanned.candidate.edit
    return {
        "method": edit.method,
        "site": edit.site,
        "layers": list(edit.layers),
        "token": scanned.candidate.config.token,
        "efficiency": finite(scanned.efficiency),
        "at_least": finite(scanned.efficiency_bound),
    }


def _tuned_verdict(found: TuneResult) -> dict[str, Any]:
    """Return what is told of the winner of a search, or of the lack of one."""
    if found.winner is None or found.results is None or found.report is None:
        sentence = "No evidence: no candidate has a gain on the part to compare within the budget, so none was tested."
        return {"word": "no evidence", "sentence": sentence, "winner": None}
    report, row = found.report, found.report.main
    return {
        "word": report.verdict.word,
        "sentence": report.verdict.sentence,
        "winner": found.winner.scanned.candidate.describe(),
        "place": _candidate(found.winner.scanned),
        "held_out": len(found.results.tasks["preference"].questions),
        "margin": None if row is None else _interval(row.difference),
        "random": None if row is None else _interval(row.random),
        "reversed": None if row is None else _interval(row.reversed),
        **_damage(report.damage[report.edit], report.domain_damage.get(report.edit)),
    }


def _damage(neutral: Damage, domain: Damage | None) -> dict[str, Any]:
    return {
        "loss": [finite(neutral.loss_increase), *map(finite, neutral.loss_interval)],
        "divergence": finite(neutral.mean_divergence),
        "domain_divergence": None if domain is None else finite(domain.mean_divergence),
    }


def _interval(difference: Difference | None) -> list[float | None] | None:
    if difference is None:
        return None
    return [finite(difference.difference), finite(difference.low), finite(difference.high)]


def finite(value: float) -> float | None:
    """Return a number, or None, which JSON can hold, if it is infinite or not a number.

    Example:
        >>> finite(float("inf")) is None
        True
    """
    return value if math.isfinite(value) else None
