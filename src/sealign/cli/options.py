"""Options that several commands share, spelled and explained once.

Defaults that the library decides are named in the help texts; a backslash keeps them from being read as markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sealign.demonstrations.demonstration import Demonstration

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=r"Hub id, local folder, GGUF file, or smollm2, the embedded model. "
        r"\[default: smollm2]",
    ),
]
EditedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help=r"Hub id, local folder or GGUF file. \[default: the one the edit was fitted on]",
    ),
]
Edit = Annotated[
    str,
    typer.Option("--edit", metavar="EDIT", help="Folder of an edit, or its repository on the Hub as owner/name."),
]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder to write the edit to.")]
Demonstrations = Annotated[
    list[str],
    typer.Option(
        "--demonstrations",
        metavar="SOURCE",
        help="A .jsonl or .csv file with prompt, positive and negative; bundled:truthfulness or bundled:fairness; "
        "halueval_qa; bbq; truthfulqa; or a Hub dataset id. Give it several times for a joint edit.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir", metavar="DIR", help="Folder with the named sources in the Hub's schemas, in place of the Hub."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="Use this many demonstrations of each source, drawn with --seed."),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="TASK,TASK,...",
        help="Tasks of the evaluation harness by name, such as truthfulqa_mc2 or bbq, with commas between several.",
    ),
]
TaskDataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", metavar="DIR", help="Folder with the tasks' data in the Hub's schemas, for no Hub."),
]
TaskLimit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Score the first N items of each task only.")
]
MaxDamage = Annotated[
    float,
    typer.Option("--max-damage", min=0, metavar="X", help="Budget: rise of the loss on neutral text, nats a token."),
]
ExplainedVariance = Annotated[
    str | None,
    typer.Option(
        "--explained-variance",
        metavar="K",
        help="Share of variance in (0, 1] that the kept directions hold; two, as 0.9,0.99, for positives and "
        r"negatives. \[default: 0.998]",
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        "--rank", metavar="N", help="Number of directions, in place of a share of variance; two, as 8,4, likewise."
    ),
]
Normalization = Annotated[
    str | None,
    typer.Option(
        "--normalization",
        metavar="NAME",
        help=r"Rescale to the norm of each token, of each feature, or not: token, feature or none. \[default: token]",
    ),
]
FitStrength = Annotated[
    float | None,
    typer.Option("--strength", metavar="X", help=r"How far the edit goes: 0 is none, 1 the whole. \[default: 1]"),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--strength", metavar="X", help=r"How far the edit goes: 0 is none, 1 the whole. \[default: the edit's own]"
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="WHICH",
        help="all, last:L, first:L, a share of the depth as last:21/32, signature:L, or indices as 4,5,-1. "
        r"\[default: last:21/32]",
    ),
]
Site = Annotated[
    str | None,
    typer.Option("--site", metavar="NAME", help=r"Where the edit acts: mlp, attention or residual. \[default: mlp]"),
]
FitSite = Annotated[
    str | None,
    typer.Option("--fit-site", metavar="NAME", help=r"Where activations are read. \[default: where the edit acts]"),
]
ModulePattern = Annotated[
    str | None,
    typer.Option(
        "--module-pattern",
        metavar="PATH",
        help="Paths of the modules to edit, with {layer} for its index, where they are not found.",
    ),
]
Centered = Annotated[
    bool | None,
    typer.Option("--centered/--uncentered", help=r"Edit about the mean activation. \[default: uncentered]"),
]
FeatureMap = Annotated[
    str | None,
    typer.Option(
        "--feature-map", metavar="NAME", help=r"identity, squared_exponential, tanh or elu. \[default: identity]"
    ),
]
Combine = Annotated[
    str | None,
    typer.Option("--combine", metavar="NAME", help=r"both, positive, negative, average or reversed. \[default: both]"),
]
Token = Annotated[
    str | None,
    typer.Option("--token", metavar="NAME", help=r"Whose activation is read: last, mean or random. \[default: last]"),
]
Neutral = Annotated[
    str | None,
    typer.Option(
        "--neutral", metavar="NAME", help=r"Neutral text: the prompt, or generated after it. \[default: prompt]"
    ),
]
PromptStyle = Annotated[
    str | None,
    typer.Option(
        "--prompt-format", metavar="NAME", help=r"auto, chat, few_shot, few_shot_chat or plain. \[default: auto]"
    ),
]
FittedPromptStyle = Annotated[
    str | None,
    typer.Option(
        "--prompt-format",
        metavar="NAME",
        help=r"auto, chat, few_shot, few_shot_chat or plain. \[default: as the edit was fitted]",
    ),
]
Preamble = Annotated[
    Path | None,
    typer.Option(
        "--preamble",
        metavar="FILE",
        help="Text before the question in the few-shot formats, in place of the bundled one.",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help=r"Sequences run together. \[default: 16]")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ..., or split over all of them.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Length of an answer in tokens, at most.")
]
NeutralMaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens", metavar="N", help=r"Length of a generated neutral text in tokens, at most. \[default: 32]"
    ),
]
IgnoreMismatch = Annotated[
    bool, typer.Option("--ignore-mismatch", help="Apply the edit to a model that it was not fitted on.")
]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="MODEL",
        help="Judges Truth and Info of truthfulqa_gen: a model to load, or, with --judge-url, its name there.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="OpenAI-compatible endpoint of the judge, up to and with /v1; its key is read from OPENAI_API_KEY.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def load_sources(sources: Sequence[str], data_dir: Path | None, limit: int | None, seed: int) -> list[Demonstration]:
    """Return the demonstrations of several sources as one list."""
    from sealign.demonstrations.sources import load_demonstrations

    return [
        item for source in sources for item in load_demonstrations(source, data_dir=data_dir, limit=limit, seed=seed)
    ]


def names(text: str) -> list[str]:
    """Return the names in a text that commas part."""
    return [name.strip() for name in text.split(",") if name.strip()]
