"""Options that several commands share, spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Hub id, local folder, GGUF file, or smollm2, the embedded default. "
        "Where an edit is given: the model that it was fitted on, if not named.",
        show_default=False,
    ),
]
Edit = Annotated[str, typer.Option("--edit", help="Folder of an edit, or its repository on the Hub as owner/name.")]
Output = Annotated[Path, typer.Option("--output", help="Folder to write the edit to.")]
Demonstrations = Annotated[
    list[str],
    typer.Option(
        "--demonstrations",
        help="A .jsonl or .csv file with prompt, positive and negative; bundled:truthfulness; bundled:fairness; "
        "halueval_qa; bbq; truthfulqa; or a Hub dataset id. Give it several times for a joint edit.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with the named sources in the Hub's schemas, in place of the Hub."),
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Use this many demonstrations of each source, drawn with --seed.")
]
ExplainedVariance = Annotated[
    str | None,
    typer.Option(
        "--explained-variance",
        help="Share of variance K in (0, 1] that the kept directions hold; two, as 0.9,0.99, "
        "for positives and negatives. [default: 0.998]",
    ),
]
Rank = Annotated[
    str | None,
    typer.Option("--rank", help="Number of directions, in place of --explained-variance; two, as 8,4, likewise."),
]
Normalization = Annotated[
    str | None,
    typer.Option(
        "--normalization", help="Rescale the edit to each token's norm, each feature's, or none. [default: token]"
    ),
]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="How far the edit goes: 0 is none, 1 the whole. [default: 1, or the edit's own]"),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        help="all, last:L, first:L, a share of the depth as last:21/32, signature:L, or indices as 4,5,-1. "
        "[default: last:21/32]",
    ),
]
Site = Annotated[
    str | None, typer.Option("--site", help="Where the edit acts: mlp, attention or residual. [default: mlp]")
]
FitSite = Annotated[
    str | None, typer.Option("--fit-site", help="Where activations are read, if not at --site.", show_default=False)
]
ModulePattern = Annotated[
    str | None,
    typer.Option("--module-pattern", help="Modules to edit by path, as 'model.layers.{layer}.mlp', if not found."),
]
Centered = Annotated[
    bool | None,
    typer.Option("--centered/--uncentered", help="Edit about the mean activation. [default: uncentered]"),
]
FeatureMap = Annotated[
    str | None,
    typer.Option("--feature-map", help="identity, squared_exponential, tanh or elu. [default: identity]"),
]
Combine = Annotated[
    str | None,
    typer.Option("--combine", help="both, positive, negative, average or reversed. [default: both]"),
]
Token = Annotated[
    str | None, typer.Option("--token", help="Whose activation is read: last, mean or random. [default: last]")
]
Neutral = Annotated[
    str | None,
    typer.Option("--neutral", help="Neutral text: the prompt, or generated after it. [default: prompt]"),
]
PromptStyle = Annotated[
    str | None,
    typer.Option("--prompt-format", help="auto, chat, few_shot, few_shot_chat or plain. [default: auto]"),
]
Preamble = Annotated[
    Path | None, typer.Option("--preamble", help="File with the text before the question in the few-shot formats.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Sequences run together. [default: 16]")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random choice.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer, at most.")]
IgnoreMismatch = Annotated[
    bool, typer.Option("--ignore-mismatch", help="Apply to a model that the edit was not fitted on.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
