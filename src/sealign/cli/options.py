"""Options common to several commands: one name, help text, type and metavar for each.

A default that the library chooses is given at the end of the help text, where a backslash escapes the bracket from
rich markup.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer

LOADING = "Loading the model"
"""Title of the panel with the options of ``load_model``."""

MODEL_HELP = "Hub id, local folder, GGUF file, or smollm2, the embedded model."
EDIT_HELP = "Folder of an edit, or its Hub repository as owner/name; first+second applies two in this order."
SINGLE_EDIT_HELP = "Folder of an edit, or its Hub repository as owner/name."
METHOD_HELP = (
    "Method to fit: sea, difference_operator, targeted_shift, mean_difference, iti, leace, icl, dola, cd, icd, "
    "best_of_n or lora_ft."
)
STRENGTH_HELP = (
    "Strength of the edit, in [-1000, 1000]: 0 leaves the activation unchanged, 1 applies the fitted edit in full; "
    "negative values and values above 1 are allowed."
)
PROMPT_FORMAT_HELP = "How prompts are written: auto, chat, few_shot, few_shot_chat or plain."
PREAMBLE_HELP = "Text file put before the question in the few-shot prompt formats, instead of the bundled text."

Model = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=rf"{MODEL_HELP} \[default: smollm2]")]
EditedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help=rf"{MODEL_HELP} \[default: the model that the edit was fitted on]"),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="REVISION",
        help=r"Branch, tag or commit on the Hub. \[default: main]",
        rich_help_panel=LOADING,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that comes with the model's files.", rich_help_panel=LOADING
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        metavar="NAME",
        help=r"Attention kernel of transformers, such as eager, sdpa or flash_attention_2. \[default: transformers' "
        "own choice]",
        rich_help_panel=LOADING,
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="NAME",
        help=r"Quantise the weights with bitsandbytes while loading: 4bit or 8bit. \[default: none]",
        rich_help_panel=LOADING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Data type of the weights: auto (as stored), float32, bfloat16, float16 or float64.",
        rich_help_panel=LOADING,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Device of the model: auto, cpu, cuda, cuda:1, mps, ..., or split, for a model larger than one device.",
        rich_help_panel=LOADING,
    ),
]
Edit = Annotated[str, typer.Option("--edit", metavar="EDIT", help=EDIT_HELP)]
SingleEdit = Annotated[str, typer.Option("--edit", metavar="EDIT", help=SINGLE_EDIT_HELP)]
OUTPUT = typer.Option("--output", metavar="PATH", help="Path to write the result to.")
Output = Annotated[Path, OUTPUT]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an earlier output at the path; otherwise it is an error.")
]
DEMONSTRATIONS = typer.Option(
    "--demonstrations",
    metavar="SOURCE",
    help="Source of demonstrations: a .jsonl, .json, .csv, .tsv or .parquet file with prompt, positive (or chosen) and "
    "negative (or rejected); bundled:NAME, such as bundled:positivity; halueval_qa; bbq; truthfulqa; crows_pairs; or a "
    "Hub dataset as owner/name or owner/name:config:split. Repeat the option to use several sources.",
)
Demonstrations = Annotated[list[str], DEMONSTRATIONS]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Setting of the method, by its name in the Python configuration, such as rank=4, or training.rank=4 in a "
        "nested configuration. Repeat the option for several settings.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="Columns of files and Hub datasets with other names, such as prompt=question and positive=best_answer, "
        "separated by commas.",
    ),
]
DemonstrationsLimit = Annotated[
    int | None,
    typer.Option(
        "--demonstrations-limit",
        min=1,
        metavar="N",
        help="Maximum number of demonstrations per source, drawn with --seed.",
    ),
]
Holdout = Annotated[
    float | None,
    typer.Option(
        "--holdout",
        metavar="X",
        help="Fraction of the prompts not to fit on, drawn with --seed, so that the edit can be measured on them.",
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="Folder with local copies of data sets in the schemas of the Hub; used instead of downloading.",
    ),
]
TASKS = typer.Option(
    "--tasks",
    metavar="TASK,TASK,...",
    help="Comma-separated tasks of the evaluation harness, such as truthfulqa_mc2 or bbq.",
)
Tasks = Annotated[str, TASKS]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="Use only the first N items of each task.")
]
SERVER = typer.Option(
    "--server",
    metavar="URL",
    help="Server of sealign serve that runs the model, instead of loading one. The API key is read from "
    "OPENAI_API_KEY.",
)
EDITS_DIR = typer.Option(
    "--edits-dir", metavar="DIR", help="Folder whose subfolders are edits that can be loaded while the server runs;"
)
MAX_DAMAGE = typer.Option("--max-damage", min=0, metavar="X", help="Damage budget, in nats per token.")
EditStrength = Annotated[float | None, typer.Option("--strength", metavar="X", help=STRENGTH_HELP)]
Strength = Annotated[
    float | None,
    typer.Option("--strength", metavar="X", help=rf"{STRENGTH_HELP} \[default: the edit's own]"),
]
Strengths = Annotated[
    str | None,
    typer.Option(
        "--strength",
        metavar="X[,X,...]",
        help=rf"{STRENGTH_HELP} Several, separated by commas, are applied one after another. \[default: the edit's "
        "own]",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="LAYERS",
        help="Layers to use: all; last:L; first:L; a fraction of the depth such as last:21/32; the layer at a fraction "
        "of the depth such as at:13/32; or indices such as 4,5,-1, where negative indices count from the end.",
    ),
]
Site = Annotated[
    str | None,
    typer.Option(
        "--site", metavar="NAME", help="Site to read activations at in each layer: mlp, attention or residual."
    ),
]
PromptStyle = Annotated[
    str | None, typer.Option("--prompt-format", metavar="NAME", help=rf"{PROMPT_FORMAT_HELP} \[default: auto]")
]
FittedPromptStyle = Annotated[
    str | None,
    typer.Option("--prompt-format", metavar="NAME", help=rf"{PROMPT_FORMAT_HELP} \[default: as the edit was fitted]"),
]
Preamble = Annotated[
    Path | None,
    typer.Option(
        "--preamble",
        metavar="FILE",
        help=PREAMBLE_HELP,
    ),
]
CHAT_TEMPLATE_ARG_HELP = "Argument of the chat template, such as enable_thinking=false. Repeat the option for several."
ChatTemplateArg = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-arg",
        metavar="NAME=VALUE",
        help=rf"{CHAT_TEMPLATE_ARG_HELP} \[default: as the edit was fitted]",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", min=1, metavar="N", help="Number of sequences to run together. Must be at least 1."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of every random choice.")]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", min=1, metavar="N", help="Maximum number of generated tokens. Must be at least 1."
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="X",
        help=r"Sampling temperature. Must be above 0. \[default: none, greedy decoding]",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="X", help=r"Nucleus sampling threshold, in (0, 1]. Needs --temperature. \[default: 1]"
    ),
]
SamplingSeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help=r"Seed of every random choice. Needs --temperature. \[default: 0]"),
]
IgnoreMismatch = Annotated[
    bool, typer.Option("--ignore-mismatch", help="Apply the edit even if the model is not the one it was fitted on.")
]
JudgeModel = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="MODEL",
        help="Model that judges generated answers, for truthfulqa_gen their truthfulness and informativeness: a model "
        "to load, or, with --judge-url, its name on that server.",
    ),
]
JudgeUrl = Annotated[
    str | None,
    typer.Option(
        "--judge-url",
        metavar="URL",
        help="Base URL of an OpenAI-compatible server for the judge, ending in /v1. The API key is read from "
        "OPENAI_API_KEY.",
    ),
]
GgufBase = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="FILE",
        help=r"GGUF file of the base model. \[default: the model's own file, if it is loaded from one]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def with_note(option: Any, note: str) -> Any:
    """Return a copy of an option with a sentence added to its help text.

    Args:
        option: Result of ``typer.Option``.
        note: Sentence to add.
    """
    info = copy.copy(option)
    info.help += f" {note}"
    return info
