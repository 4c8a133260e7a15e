from __future__ import annotations

import copy
import ctypes
import dataclasses
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sealign
from sealign import SEAConfig
from sealign.cli.method_options import method_options
from sealign.demonstrations.demonstration import Demonstration, demonstrations_hash
from sealign.demonstrations.splits import split_demonstrations
from sealign.evaluation.damage import measure_passages
from sealign.evaluation.strength_choice import DamageTexts
from sealign.fitting import checkpoints, collector
from sealign.methods.registry import METHODS
from sealign.models import loading as models
from sealign.models.prompt_format import PromptFormat, default_preamble
from tests.cli import test_app as shared
from tests.cli.test_app import (
    CONTEXT,
    assert_told,
    listing,
    passed,
    printed_python,
    program,
    refused,
    replaced,
    run,
    without_progress,
    write_rows,
)

cache = shared.cache
one_thread = shared.one_thread
model_folder = shared.model_folder
rows = shared.rows


@pytest.fixture
def fit(model_folder: Path, rows: Path, tmp_path: Path) -> Callable[..., str]:
    """Fit the tiny model to seven demonstrations; returns what is printed."""

    def fit(*args: object, output: str = "edit") -> str:
        decided = {"--strength", "--max-damage", "--preset", "--plan"} & {str(arg) for arg in args}
        method = str(args[args.index("--method") + 1]) if "--method" in args else "sea"
        decided |= {"strength"} - set(METHODS[method].config.model_fields if method in METHODS else ())
        shutil.rmtree(tmp_path / output, ignore_errors=True)  # of an earlier call, which would not be replaced
        given = args if decided or "strength=" in " ".join(map(str, args)) else (*args, "--strength", 1)
        return passed("fit", "--model", model_folder, "--demonstrations", rows, "--output", tmp_path / output, *given)

    return fit


def read(folder: Path) -> dict[str, Any]:
    """The record of an edit."""
    return json.loads((folder / "edit.json").read_text(encoding="utf-8"))


def config_record(config: sealign.CollectConfig, tokenizer: Any) -> Any:
    """A configuration as it stands in the record of an edit."""
    return config.replace(prompt_format=config.prompt_format.resolve(tokenizer)).dump()


# --- options ---

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("--explained-variance 0.9", {"explained_variance": 0.9}),
    ("--explained-variance 0.9,0.75", {"explained_variance": (0.9, 0.75)}),
    ("--rank 3", {"rank": 3}),
    ("--rank 3,2", {"rank": (3, 2)}),
    ("--centered", {"centered": True}),
    ("--no-centered", {"centered": False}),
    ("--feature-map tanh", {"feature_map": "tanh"}),
    ("--feature-map squared_exponential", {"feature_map": "squared_exponential"}),
    ("--site attention", {"site": "attention"}),
    ("--site residual", {"site": "residual"}),
    ("--fit-site residual", {"fit_site": "residual"}),
    ("--layers all", {"layers": "all"}),
    ("--layers first:2", {"layers": "first:2"}),
    ("--layers signature:1", {"layers": "signature:1"}),
    ("--layers 0,-1", {"layers": "0,-1"}),
    ("--module-pattern model.layers.{layer}.mlp.down_proj", {"module_pattern": "model.layers.{layer}.mlp.down_proj"}),
    ("--combine negative", {"combine": "negative"}),
    ("--normalization none", {"normalization": "none"}),
    ("--normalization feature", {"normalization": "feature"}),
    (
        "--layers 0,2 --layer-weights 0.5,1 --normalization none",
        {
            "layers": "0,2",
            "layer_weights": (0.5, 1.0),
            "normalization": "none",
        },
    ),
    ("--shift --centered", {"shift": True, "centered": True}),
    ("--strength 0.3", {"strength": 0.3}),
    ("--strength=-1", {"strength": -1.0}),
    ("--gate 0.2", {"gate": 0.2}),
    ("--token mean", {"token": "mean"}),
    ("--token random --seed 5", {"token": "random", "seed": 5}),
    ("--neutral generated", {"neutral": "generated"}),
    ("--neutral generated --max-new-tokens 3", {"neutral": "generated", "max_new_tokens": 3}),
    ("--prompt-format plain", {"prompt_format": PromptFormat("plain")}),
    ("--prompt-format few_shot", {"prompt_format": PromptFormat("few_shot")}),
    ("--batch-size 3", {"batch_size": 3}),
    ("--set batch_size=3 --set layers=2", {"batch_size": 3, "layers": "2"}),
    ("--set prompt_format.style=plain --set rank=3,2", {"prompt_format": PromptFormat("plain"), "rank": (3, 2)}),
    ("--seed 7", {"seed": 7}),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[options or "none" for options, _ in OPTIONS])
def test_options_reach_the_fit(
    fit: Callable[..., str], tokenizer: Any, tmp_path: Path, options: str, expected: dict[str, Any]
) -> None:
    fit(*options.split())
    record = read(tmp_path / "edit")
    assert record["config"] == config_record(SEAConfig(**expected), tokenizer)
    for name in ("site", "normalization", "strength", "feature_map"):
        assert record[name] == record["config"][name]


def test_every_setting_of_a_fit_is_covered() -> None:
    tried = {name for _, expected in OPTIONS for name in expected}
    assert set(SEAConfig.model_fields) == tried


def test_layers_and_ranks_are_those_asked_for(fit: Callable[..., str], tmp_path: Path) -> None:
    fit("--layers", "0,-1", "--rank", "3,2", "--module-pattern", "model.layers.{layer}.mlp.down_proj")
    layers = read(tmp_path / "edit")["layers"]
    assert {layer: entry["module"] for layer, entry in layers.items()} == {
        "0": "model.layers.0.mlp.down_proj",
        "3": "model.layers.3.mlp.down_proj",
    }
    assert [entry["groups"] for entry in layers.values()] == [[3, 2], [3, 2]]


def test_a_preamble_of_ones_own(fit: Callable[..., str], tmp_path: Path) -> None:
    preamble = tmp_path / "preamble.txt"
    preamble.write_text("Répondez brièvement.\n", encoding="utf-8")
    fit("--preamble", preamble)
    own = dataclasses.asdict(PromptFormat("few_shot", "Répondez brièvement."))
    assert read(tmp_path / "edit")["config"]["prompt_format"] == own
    fit("--preamble", preamble, "--prompt-format", "few_shot_chat")
    assert read(tmp_path / "edit")["config"]["prompt_format"]["style"] == "few_shot_chat"
    fit("--prompt-format", "few_shot")
    assert read(tmp_path / "edit")["config"]["prompt_format"]["preamble"] == default_preamble()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ((), torch.float32),
        (("--dtype", "bfloat16", "--device", "cpu"), torch.bfloat16),
        (("--dtype", "float64"), torch.float64),
    ],
)
def test_type_and_device(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], dtype: torch.dtype
) -> None:
    seen: list[Any] = []
    load = models.load_model

    def loading(name: str, **kwargs: Any) -> Any:
        loaded = load(name, **kwargs)
        seen.append((kwargs, loaded[0].dtype, loaded[0].device.type))
        return loaded

    monkeypatch.setattr(models, "load_model", loading)
    fit(*options)
    given = dict(zip(options[::2], options[1::2], strict=True))
    wanted: dict[str, Any] = {"dtype": given.get("--dtype", "auto"), "device": given.get("--device", "auto")}
    wanted |= {"revision": None, "trust_remote_code": False, "attn_implementation": None, "quantization_config": None}
    assert seen == [(wanted, dtype, "cuda" if wanted["device"] == "auto" and torch.cuda.is_available() else "cpu")]


def test_the_settings_of_the_paper(
    fit: Callable[..., str], refuse: Callable[..., None], tokenizer: Any, tmp_path: Path
) -> None:
    paper = ("--preset", "paper", "--demonstrations-limit", "2")
    fit(*paper)
    assert read(tmp_path / "edit")["config"] == config_record(SEAConfig.reference(), tokenizer)
    fit(*paper, "--normalization", "token", "--neutral", "prompt", "--prompt-format", "plain", "--rank", "1")
    changed = SEAConfig.reference().replace(
        normalization="token",
        neutral="prompt",
        prompt_format=PromptFormat("plain"),
        rank=1,
        explained_variance=None,
    )
    assert read(tmp_path / "edit")["config"] == config_record(changed, tokenizer)
    refuse("--preset", "papper", words=("unknown preset 'papper' (did you mean 'paper'?)",))
    refuse("--method", "iti", "--preset", "paper", words=("--preset is not an option of iti, but of sea",))


@pytest.mark.usefixtures("model_folder")
def test_options_of_loading_reach_the_loader(fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    load = models.load_model

    def loading(name: str, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return load(name, **{key: kwargs[key] for key in ("dtype", "device", "attn_implementation")})

    monkeypatch.setattr(models, "load_model", loading)
    fit("--revision", "v2", "--trust-remote-code", "--attn-implementation", "eager", "--quantization", "4bit")
    (given,) = seen
    assert (given["revision"], given["trust_remote_code"], given["attn_implementation"]) == ("v2", True, "eager")
    assert given["quantization_config"].load_in_4bit
    words = ("unknown quantization '3bit'", "choose one of: 4bit, 8bit")
    refused("fit", "--method", "dola", "--output", "x", "--quantization", "3bit", words=words)


# --- other methods ---

OTHERS: list[tuple[str, str, dict[str, Any]]] = [
    ("mean_difference", "--layers at:1/2 --strength 2 --normalization token", {"normalization": "token"}),
    ("iti", "--heads 2 --alpha 5 --direction probe --seed 3", {"heads": 2, "alpha": 5.0, "seed": 3}),
    ("leace", "--layers 1,2 --site mlp", {"layers": "1,2", "site": "mlp"}),
    ("icl", "--shots 2 --instruction Hello", {"shots": 2, "instruction": "Hello"}),
    ("dola", "--bucket low --set plausibility=0.2", {"bucket": "low", "plausibility": 0.2}),
    ("icd", "--induce prompt --weight 2", {"induce": "prompt", "weight": 2.0}),
    ("best_of_n", "--n 3 --top-p 0.9 --seed 5", {"n": 3, "top_p": 0.9, "seed": 5}),
    ("lora_ft", "--rank 2 --epochs 1 --seed 4", {"rank": 2, "epochs": 1.0, "seed": 4}),
]


@pytest.mark.parametrize(("method", "options", "expected"), OTHERS, ids=[method for method, *_ in OTHERS])
def test_every_method_is_fitted_with_its_own_options(
    fit: Callable[..., str], tmp_path: Path, method: str, options: str, expected: dict[str, Any]
) -> None:
    printed = fit("--method", method, *options.split())
    record = read(tmp_path / "edit")
    assert record["method"] == method
    assert {name: record["config"][name] for name in expected} == expected
    assert f"Settings of {method}" in printed
    assert sealign.load_edit(tmp_path / "edit").method == method


def test_settings_inside_others(fit: Callable[..., str], tmp_path: Path) -> None:
    options = ("--training-rank", 2, "--set", "training.epochs=1", "--seed", 6)
    fit("--method", "icd", "--demonstrations-limit", 3, *options)
    training = read(tmp_path / "edit")["config"]["training"]
    assert (training["rank"], training["epochs"], training["seed"]) == (2, 1.0, 6)


def test_a_training_continues_from_its_own_checkpoints(fit: Callable[..., str], tmp_path: Path, cache: Path) -> None:
    options = ("--method", "lora_ft", "--epochs", 1, "--rank", 2)
    fit(*options)
    assert len(list(cache.glob("fits/*/checkpoint-*"))) == 1
    first = read(tmp_path / "edit")["tensors_hash"]
    fit(*options)
    assert read(tmp_path / "edit")["tensors_hash"] == first
    fit(*options, "--seed", 1)
    assert len(list(cache.glob("fits/*/checkpoint-*"))) == 2
    assert read(tmp_path / "edit")["tensors_hash"] != first


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("method", METHODS)
def test_help_lists_the_settings_of_one_method(method: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    text = passed("fit", "--method", method, "--help")
    assert "…" not in text
    panel = text[text.index(f"Settings of {method}") :]
    panel = panel[: panel.index("╰")]
    flat = "".join(re.sub("[│╭╰─╮╯]", " ", panel).split())
    listed = set(re.findall(r"^│ (--[a-z-]+)", panel, re.MULTILINE)) - {"--preset"}
    assert listed == {option.flag for option in method_options(method)}
    for option in method_options(method):
        assert "".join(option.help.split()) in flat, option.flag
        assert option.help.endswith("."), option.flag
        assert "``" not in option.help
        if option.default:
            assert "".join(f"{option.help}[default: {option.default}]".split()) in flat, option.flag


def test_every_setting_of_every_method_has_an_option() -> None:
    for name, method in METHODS.items():
        settings = {option.setting.partition(".")[0] for option in method_options(name)}
        fixed = {"site"} if name == "iti" else set()
        assert settings == set(method.config.model_fields) - {"seed"} - fixed, name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method iti --explained-variance 0.9", ("--explained-variance is not an option of iti, but of sea",)),
        ("--heads 3", ("--heads is not an option of sea, but of iti", "sealign fit --method sea --help")),
        ("--method=dola --no-centered", ("--no-centered is not an option of dola, but of sea",)),
        ("--method ittt", ("unknown method 'ittt' (did you mean 'iti'?)",)),
        ("--method cd", ("amateur is empty", "contrastive decoding needs one")),
        ("--method icl --shots 9", ("shots is 9", "7 demonstrations")),
        ("--method iti --heads 99", ("heads is 99", "16 heads")),
        ("--method leace --layers signature:2", ("LEACE needs layers by position",)),
        ("--method dola --set bukket=low", ("unknown setting of dola 'bukket' (did you mean 'bucket'?)",)),
        ("--set rank", ("--set is 'rank'", "such as heads=24")),
        ("--set rank=2.5", ("sea's rank is '2.5'", "must be an integer")),
        ("--set rank=2 --set rank=3", ("--set gives rank twice",)),
        ("--rank 2 --set rank=3", ("rank is given by --rank and by --set",)),
        ("--rank 2 --explained-variance 0.9", ("rank is 2 and explained_variance is 0.9", "only one of them")),
        ("--method dola --plan", ("--plan estimates the collection of activations", "dola collects none")),
    ],
)
def test_wrong_methods_and_settings(refuse: Callable[..., None], options: str, words: tuple[str, ...]) -> None:
    refuse(*options.split(), words=words)


def test_demonstrations_are_needed_by_those_that_learn(model_folder: Path, tmp_path: Path) -> None:
    args = ("--model", model_folder, "--output", tmp_path / "edit")
    refused("fit", *args, words=("there are 0 demonstrations, but sea needs at least 2",))
    refused("fit", "--method", "iti", *args, words=("there are 0 demonstrations, but iti needs at least 2",))
    passed("fit", "--method", "best_of_n", *args)


# --- demonstrations ---


@pytest.mark.usefixtures("rows")
def test_several_sources_give_a_joint_edit(
    fit: Callable[..., str], demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    other = [
        Demonstration(f"Is {n} even?", "It is." if n % 2 == 0 else "It is odd.", "Nobody knows.") for n in range(4)
    ]
    fit("--demonstrations", write_rows(tmp_path / "other.jsonl", list(other)))
    record = read(tmp_path / "edit")
    assert len(record["fitted_on"]) == 11
    assert record["demonstrations_hash"] == demonstrations_hash([*demonstrations, *other])


def test_limits_hold_for_each_source(fit: Callable[..., str], tmp_path: Path) -> None:
    hashes = set()
    for seed in (0, 0, 1):
        fit("--demonstrations-limit", "3", "--demonstrations", "bundled:truthfulness", "--seed", seed)
        assert len(read(tmp_path / "edit")["fitted_on"]) == 6
        hashes.add(read(tmp_path / "edit")["demonstrations_hash"])
    assert len(hashes) == 2  # the seed draws


def test_columns_of_other_names(model_folder: Path, tmp_path: Path) -> None:
    lines = [{"question": f"What is {n}?", "good": f"{n}.", "bad": ["Blue.", "Red."]} for n in range(5)]
    (tmp_path / "x.JSON").write_text(json.dumps(lines))
    args = ("fit", "--model", model_folder, "--demonstrations", tmp_path / "x.JSON", "--output", tmp_path / "edit")
    passed(*args, "--columns", "prompt=question, positive=good, negative=bad", "--rank", "2")
    assert len(read(tmp_path / "edit")["fitted_on"]) == 5
    shutil.rmtree(tmp_path / "edit")
    refused(*args, "--columns", "prompt=question,positive", words=("--columns is 'positive'", "prompt=question"))
    refused(*args, "--columns", "prompt=question", words=("no key 'positive' or 'chosen', found question, good, bad",))


def test_arguments_of_the_chat_template(
    fit: Callable[..., str], model_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template += "{% if mood is defined %}{{ mood }} {% endif %}"
    shutil.copytree(model_folder, tmp_path / "model")
    thinking.save_pretrained(tmp_path / "model")
    text = fit("--model", tmp_path / "model", "--chat-template-arg", "mood=calm", "--rank", "2")
    record = read(tmp_path / "edit")
    assert record["config"]["prompt_format"]["chat_template_kwargs"] == {"mood": "calm"}
    assert record["example"].startswith("<user>")
    assert "<model>calm " in record["example"]
    assert record["example"] in text
    assert record["example"] in passed("inspect", "--edit", tmp_path / "edit")
    answer = ("generate", "--edit", tmp_path / "edit", "--prompt", "What is ice?", "--max-new-tokens", "2")
    assert passed(*answer) == passed(*answer, "--chat-template-arg", "mood=calm")
    words = ("does not use the argument 'moood'; check its name",)
    refused(*answer, "--chat-template-arg", "moood=1", words=words)
    refused("chat", "--edit", tmp_path / "edit", "--chat-template-arg", "moood=1", words=words)


def test_a_holdout_is_split_off_by_prompt_and_recorded(
    fit: Callable[..., str], demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    text = fit("--holdout", "0.3", "--seed", "3", "--rank", "2")
    fitted, held_out = split_demonstrations(demonstrations, holdout=0.3, seed=3)
    record = read(tmp_path / "edit")
    assert record["fitted_on"] == [item.hash for item in fitted]
    assert record["holdout"] == {"fraction": 0.3, "seed": 3}
    assert record["demonstrations_hash"] == demonstrations_hash(fitted)
    assert len(held_out) == 2
    assert {row[0]: row[1:] for row in shared.table_rows(text)}["held out"] == ["30% of the prompts, seed 3"]


def test_a_holdout_that_leaves_too_little_is_refused_before_the_model_is_loaded(rows: Path, tmp_path: Path) -> None:
    args = ("fit", "--model", tmp_path / "nowhere", "--demonstrations", rows, "--output", tmp_path / "edit")
    refused(*args, "--holdout", "1.5", words=("holdout is 1.5, but it must be above 0 and below 1",))
    refused(*args, "--holdout", "0.99", words=("there are 1 demonstrations, but sea needs at least 2",))


def test_named_sources_come_from_a_data_folder(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "halueval_qa").mkdir(parents=True)
    lines = [{"question": f"What is {n}?", "right_answer": f"{n}.", "hallucinated_answer": "Blue."} for n in range(5)]
    write_rows(tmp_path / "data" / "halueval_qa" / "train.jsonl", [line | {"knowledge": ""} for line in lines])
    args = ("fit", "--model", model_folder, "--demonstrations", "halueval_qa", "--output", tmp_path / "edit")
    passed(*args, "--data-dir", tmp_path / "data")
    assert len(read(tmp_path / "edit")["fitted_on"]) == 5
    shutil.rmtree(tmp_path / "edit")
    refused(*args, "--data-dir", tmp_path / "nowhere", words=("there is no file", "nowhere/halueval_qa/train.jsonl"))
    assert not (tmp_path / "edit").exists()


def test_the_edit_is_that_of_the_library(
    fit: Callable[..., str], model_folder: Path, demonstrations: list[Demonstration], tmp_path: Path
) -> None:
    fit("--rank", "3,2", "--centered", "--strength", "0.4")
    model, tokenizer = sealign.load_model(str(model_folder))
    config = SEAConfig(rank=(3, 2), centered=True, strength=0.4)
    expected = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    assert sealign.load_edit(tmp_path / "edit").hash == expected.hash


# --- what is printed ---


def test_tables_and_json_hold_the_same_figures(fit: Callable[..., str], tmp_path: Path) -> None:
    text = fit("--rank", "3,2", "--layers", "all", "--strength", "0.5")
    record = read(tmp_path / "edit")
    again = json.loads(fit("--rank", "3,2", "--layers", "all", "--strength", "0.5", "--json"))
    assert again.pop("fit_seconds") > 0
    assert again == {name: value for name, value in record.items() if name != "fit_seconds"}
    printed = {row[0]: row[1:] for row in shared.table_rows(text)}
    statistics = (*("explained_variance_positive", "explained_variance_negative"), "overlap", "net_share", "signature")
    for layer, entry in record["layers"].items():
        assert printed[layer] == [
            "3 + 2",
            f"{entry['relative_change']:.4f}",
            *(f"{entry['statistics'][name]:.4g}" for name in statistics),
        ]
    assert printed["strength"] == ["0.5"]
    assert printed["demonstrations"] == [f"7 (SHA-256 {record['demonstrations_hash'][:16]})"]
    assert printed["tensors"] == [f"SHA-256 {record['tensors_hash'][:16]}"]


@pytest.mark.parametrize("name", ["edit", 'my [bold]edit[/] "1" é', "deep/" + "long-name-" * 12 + "/edit"])
def test_the_printed_lines_load_the_edit(fit: Callable[..., str], tmp_path: Path, name: str) -> None:
    text = fit("--rank", "2", output=name)
    assert f"Saved to {tmp_path / name}." in text
    space: dict[str, Any] = {}
    exec(printed_python(text), space)
    assert space["edit"].hash == sealign.load_edit(tmp_path / name).hash
    assert space["model"].name_or_path == space["edit"].record.model.id
    assert shlex.split(text.splitlines()[-1])[:4] == ["sealign", "generate", "--edit", str(tmp_path / name)]


def test_an_edit_is_replaced_and_nothing_else_is(
    fit: Callable[..., str], model_folder: Path, rows: Path, tmp_path: Path, cache: Path
) -> None:
    fit("--rank", "2")
    args = ["fit", "--model", model_folder, "--demonstrations", rows, "--output", tmp_path / "edit", "--rank", "3"]
    refused(*args, words=("edit' exists already", "--overwrite"))
    replaced(*args, "--strength", 1)
    assert read(tmp_path / "edit")["config"]["rank"] == 3
    assert listing(tmp_path) == ["edit", "edit/README.md", "edit/edit.json", "edit/edit.safetensors", "rows.jsonl"]
    assert [name for name in listing(cache) if "activations" in name] == []  # finished batches are cleared


# --- refusals ---


@pytest.fixture
def refuse(model_folder: Path, rows: Path, tmp_path: Path) -> Callable[..., None]:
    """Check that a fit is refused in one sentence, and leaves nothing behind."""

    def refuse(*args: object, words: tuple[str, ...], model: object = model_folder, source: object = rows) -> None:
        before = listing(tmp_path)
        command = ("fit", "--model", model, "--demonstrations", source, "--output", tmp_path / "new" / "edit")
        refused(*command, *args, words=words)
        assert listing(tmp_path) == before

    return refuse


GOOD = [Demonstration("What is ice?", "Frozen water.", "Frozen air."), Demonstration("Is fire cold?", "No.", "Yes.")]
LONG = Demonstration("ice " * CONTEXT, "Yes.", "No.")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, ("there is no file", "source.jsonl", "check the path")),
        ([], ("source.jsonl' is empty", "at least 2 demonstrations")),
        (["", " "], ("is empty",)),
        ([*GOOD, '{"prompt": "a"'], ("source.jsonl, line 3", "JSON")),
        ([*GOOD, "", "[1]"], ("line 4", "must be a JSON object")),
        ([*GOOD, {"prompt": "a", "positive": "b"}], ("line 3", "no key 'negative'", "prompt, positive")),
        ([*GOOD, {"prompt": "a", "positive": " ", "negative": "c"}], ("line 3", "'positive' is ' '", "non-empty")),
        ([*GOOD, {"prompt": "a", "positive": "b", "negative": ""}], ("line 3", "'negative' is ''", "non-empty string")),
        ([*GOOD, {"prompt": "a", "positive": 1, "negative": "b"}], ("line 3", "'positive' is 1", "non-empty string")),
        ([*GOOD, {"prompt": "a", "positive": "b", "negative": " b"}], ("line 3", "both 'b'", "must differ")),
        (GOOD[:1], ("has 1 demonstrations", "2 are needed")),
        ([*GOOD, LONG], ("the demonstration 'ice ice ", f"the model's context is {CONTEXT}", "shorten it")),
    ],
)
def test_demonstrations_that_do_not_do(
    refuse: Callable[..., None], tmp_path: Path, lines: list[Any] | None, words: tuple[str, ...]
) -> None:
    source = tmp_path / "source.jsonl"
    if lines is not None:
        write_rows(source, lines)
    refuse(source=source, words=words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("bundled:truthfulnes", ("did you mean 'truthfulness'?",)),
        ("halueval", ("unknown demonstration source 'halueval' (did you mean 'halueval_qa'?)", "bundled:fairness")),
        ("nobody/nothing", ("cannot load dataset 'nobody/nothing'", "--data-dir")),
    ],
)
def test_unknown_sources(refuse: Callable[..., None], source: str, words: tuple[str, ...]) -> None:
    refuse(source=source, words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--site mpl", ("unknown site 'mpl' (did you mean 'mlp'?)", "mlp, attention, residual")),
        ("--fit-site residul", ("unknown fit site 'residul' (did you mean 'residual'?)",)),
        ("--layers 7", ("layer 7 is outside the model", "0 to 3")),
        ("--layers last:5", ("'last:5' selects 5 layers", "has 4")),
        ("--layers lats:2", ("layers is 'lats:2'", "last:L", "4,5,-1")),
        ("--module-pattern model.mlp", ("module_pattern 'model.mlp' has no '{layer}'", "write for example")),
        ("--module-pattern model.layers.{layer}.ffn", ("no module 'model.layers.1.ffn'", "model.layers.1.mlp")),
        ("--feature-map tahn", ("unknown feature map 'tahn' (did you mean 'tanh'?)", "choose one of: identity")),
        ("--combine bth", ("unknown combination 'bth' (did you mean 'both'?)", "reversed")),
        ("--normalization tokens", ("unknown normalization 'tokens' (did you mean 'token'?)", "none")),
        ("--prompt-format cht", ("unknown prompt", "'cht' (did you mean 'chat'?)", "few_shot_chat")),
        ("--token lats", ("unknown token choice 'lats' (did you mean 'last'?)", "random")),
        ("--neutral promt", ("unknown neutral choice 'promt' (did you mean 'prompt'?)", "generated")),
        ("--dtype flaot32", ("unknown dtype 'flaot32' (did you mean 'float32'?)", "bfloat16")),
        ("--device cdua", ("device 'cdua'", "did you mean 'cuda'?", "try cpu")),
        ("--device cuda:99", ("device 'cuda:99' cannot be used here", "try cpu")),
        ("--device meta", ("device 'meta' cannot be used here", "try cpu")),
        ("--device nonsense", ("device 'nonsense' cannot be used here; try cpu",)),
        ("--explained-variance 1.5", ("explained_variance is 1.5", "must be in (0, 1]", "try 0.9")),
        ("--explained-variance 0", ("explained_variance is 0", "must be in (0, 1]")),
        ("--explained-variance nan", ("explained_variance is nan", "must be finite")),
        ("--explained-variance 0.9,2", ("explained_variance is 2.0", "must be in (0, 1]")),
        ("--explained-variance most", ("--explained-variance is 'most'", "must be a number")),
        ("--rank 0", ("rank is 0", "at least 1")),
        ("--rank 49", ("rank is 49", "[1, 48]")),
        ("--rank 2,49", ("rank is 49", "[1, 48]")),
        ("--rank 2.5", ("--rank is '2.5'", "must be an integer")),
        ("--rank 1,2,3", ("--rank is '1,2,3'", "must be an integer")),
        ("--strength nan", ("strength is nan", "must be finite")),
        ("--batch-size 0", ("batch_size is 0", "at least 1")),
        ("--demonstrations-limit 1", ("limit is 1", "at least 2")),
        ("--demonstrations-limit 8", ("has 7 demonstrations", "8 are needed", "lower the limit")),
        ("--preamble nowhere.txt", ("there is no preamble file 'nowhere.txt'", "check the path")),
    ],
)
def test_settings_out_of_bounds(refuse: Callable[..., None], options: str, words: tuple[str, ...]) -> None:
    refuse(*options.split(), words=words)


def test_a_preamble_that_is_not_text(refuse: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "preamble.txt").write_bytes(b"Caf\xe9")
    refuse("--preamble", tmp_path / "preamble.txt", words=("preamble.txt' is not UTF-8 at byte 3", "save it as UTF-8"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smolm2", ("there is no model 'smolm2' (did you mean 'smollm2'?)", "a Hub id as owner/name")),
        ("nobody/nothing", ("cannot load model 'nobody/nothing'", "check the name and the network")),
        ("/nowhere/at/all", ("there is no model '/nowhere/at/all'", "a local folder")),
        ("nowhere.gguf", ("there is no file 'nowhere.gguf'", "check the path")),
    ],
)
def test_unknown_models(refuse: Callable[..., None], model: str, words: tuple[str, ...]) -> None:
    refuse(model=model, words=words)


def _change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


DOWN = "model.layers.2.mlp.down_proj.weight"

BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "NaN in a weight": (
        lambda folder: _change_weights(folder, lambda weights: weights[DOWN].view(-1)[7].fill_(float("nan"))),
        ("NaN or infinity", "layer 2", "demonstration", "use a dtype with a larger range"),
    ),
    "a weight is missing": (
        lambda folder: _change_weights(folder, lambda weights: weights.pop(DOWN)),
        ("1 weights are missing", DOWN, "the checkpoint is incomplete"),
    ),
    "weights of another shape": (
        lambda folder: _change_config(folder, intermediate_size=72),
        ("12 weights are missing or do not have the shape", "config.json"),
    ),
    "weights cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 500),
        ("cannot load model", "check the files"),
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors", "check the files")),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        ("no model in the folder", "no config.json"),
    ),
    "configuration cut short": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("cannot load model", "config.json", "check the files"),
    ),
    "unknown architecture": (
        lambda folder: _change_config(folder, model_type="nosuch"),
        ("model type `nosuch`", "check the files"),
    ),
    "not a language model": (lambda folder: _change_config(folder, model_type="vit"), ("AutoModelForCausalLM",)),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 1}'),
        ("cannot load model", "check the files"),
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_models(refuse: Callable[..., None], model_folder: Path, tmp_path: Path, how: str) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    damage, words = BROKEN[how]
    damage(folder)
    refuse(model=folder, words=words)


def test_a_broken_gguf_file(refuse: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    refuse(model=tmp_path / "x.gguf", words=("cannot load model", "x.gguf", "check the files"))


def test_out_of_memory_on_the_way(refuse: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    # A real failure of torch's allocator: no machine has 2^60 bytes.
    monkeypatch.setattr(collector, "pad_right", lambda *_: torch.empty(2**60, dtype=torch.uint8))
    refuse(words=("out of memory", "--batch-size"))


def test_what_is_wrong_is_found_before_the_model_is_loaded(
    model_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(models, "load_model", loading)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    args = ("fit", "--model", model_folder, "--demonstrations", rows)
    words = ("thesis' is not empty and has no edit.json written by Sealign", "choose a new")
    refused(*args, "--output", tmp_path / "thesis", words=words)
    refused(*args, "--output", rows, words=("rows.jsonl' is a file", "choose another name"))
    refused(*args, "--output", tmp_path / "new", "--combine", "x", words=("unknown combination",))
    assert listing(tmp_path) == ["rows.jsonl", "thesis", "thesis/chapter.tex"]


# --- full disks ---


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let the system refuse to write files longer than this, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [300, 5000])
def test_no_room_for_a_batch_or_for_the_edit(
    refuse: Callable[..., None], tmp_path: Path, cache: Path, size: int
) -> None:
    """300 bytes are too few for a finished batch; 5000 are enough for each batch, but not for the edit."""
    (tmp_path / "new").mkdir()
    with small_files(size):
        refuse("--batch-size", 2, words=("cannot write", "too large", "free some space", "SEALIGN_CACHE"))
    assert not [name for name in listing(cache) if name.endswith(".safetensors") and size == 300]


def _own_mounts(disk: Path, size: str) -> bool:
    """Give this thread mounts of its own, and a small file system on a folder; whether that was allowed."""
    clone_newns = 0x00020000
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare") or libc.unshare(clone_newns):
        return False
    commands = (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)])
    return not any(subprocess.run(command, capture_output=True).returncode for command in commands)


def test_a_full_disk(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    """A file system of 16 kB, which only one thread sees and which ends with it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def fit() -> tuple[Any, list[str]] | None:
        if not _own_mounts(disk, "16k"):
            return None
        result = run("fit", "--model", model_folder, "--demonstrations", rows, "--output", disk / "edit")
        return result, listing(disk)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fit).result()
    if done is None:
        pytest.skip("needs Linux, and the right to mount")
    result, left = done
    assert_told(
        result.exit_code, result.stdout, result.stderr, "no space left on device", "free some space", "--output"
    )
    assert left == []


# --- runs that are stopped ---

DEMONSTRATIONS = 60
BATCHES = 2 * DEMONSTRATIONS
"""With one sequence a batch, and two sequences a demonstration."""


@pytest.fixture(scope="module")
def long_fit(model_folder: Path) -> list[object]:
    """The arguments of a fit in many batches; the output is to follow."""
    source = ["--demonstrations", "bundled:truthfulness", "--demonstrations-limit", DEMONSTRATIONS]
    return ["fit", "--model", model_folder, *source, "--batch-size", 1, "--layers", "1,3", "--strength", 1, "--output"]


@pytest.fixture(scope="module")
def uninterrupted(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "edit"
    model, tokenizer = sealign.load_model(str(model_folder))
    learnt = sealign.load_demonstrations("bundled:truthfulness", limit=DEMONSTRATIONS)
    config = SEAConfig(batch_size=1, layers="1,3")
    sealign.fit_edit(model, tokenizer, learnt, config=config).save_pretrained(folder)
    return folder


def _finished(cache: Path) -> list[Path]:
    return sorted(cache.glob("fits/*/*.safetensors"))


def _writing(cache: Path) -> list[Path]:
    return list(cache.glob("fits/*/.*"))


@dataclass
class Stopped:
    """A fit in a process of its own that was stopped after a few batches."""

    args: list[object]
    cache: Path
    process: subprocess.Popen[str]
    finished: int = 0
    stdout: str = ""
    stderr: str = ""

    def ready(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        return len(_finished(self.cache)) >= 5

    def interrupt(self) -> bool:
        self.process.send_signal(signal.SIGINT)
        return True

    def kill(self) -> bool:
        """Kill between two writes; the other case has a test of its own."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)
        if _writing(self.cache):
            self.process.send_signal(signal.SIGCONT)
            return False
        self.process.kill()
        return True

    def settle(self) -> None:
        self.stdout, self.stderr = self.process.communicate(timeout=60)
        self.finished = len(_finished(self.cache))


@pytest.fixture(scope="module")
def stopped(long_fit: list[object], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stopped]]:
    """The same fit twice at once, one interrupted and one killed."""
    runs = {}
    for how in ("interrupt", "kill"):
        cache = tmp_path_factory.mktemp("cache")
        args = [*long_fit, tmp_path_factory.mktemp(how) / "edit"]
        environment = os.environ | {"SEALIGN_CACHE": str(cache)}
        process = subprocess.Popen(
            program(*args),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A shell starts what runs in the background with SIGINT ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        runs[how] = Stopped(args, cache, process)
    try:
        waiting = set(runs)
        while waiting:
            waiting -= {how for how in waiting if runs[how].ready() and getattr(runs[how], how)()}
            time.sleep(0.005)
        for stopped in runs.values():
            stopped.settle()
        yield runs
    finally:
        for stopped in runs.values():
            stopped.process.kill()


@pytest.fixture
def batches_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the batches that the model is run on in this process."""
    counted = [0]
    run_batch = collector.Collector._run_batch

    def counting(*args: Any) -> Any:
        counted[0] += 1
        return run_batch(*args)

    monkeypatch.setattr(collector.Collector, "_run_batch", counting)
    return counted


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same edit; the durations of the fits may differ."""
    records = [read(folder) | {"fit_seconds": 0.0} for folder in (one, other)]
    tensors = [(folder / "edit.safetensors").read_bytes() for folder in (one, other)]
    return records[0] == records[1] and tensors[0] == tensors[1]


@pytest.mark.slow
def test_interrupted_and_resumed(
    stopped: dict[str, Stopped], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, batches_run: list[int]
) -> None:
    was = stopped["interrupt"]
    output = Path(str(was.args[-1]))
    assert_told(
        was.process.returncode, was.stdout, was.stderr, "interrupted; nothing was written", "same command again"
    )
    assert listing(output.parent) == []
    assert 5 <= was.finished < BATCHES
    assert not _writing(was.cache)
    monkeypatch.setenv("SEALIGN_CACHE", str(was.cache))
    passed(*was.args)
    assert batches_run == [BATCHES - was.finished]
    assert _same(output, uninterrupted)
    assert not _finished(was.cache)


@pytest.mark.slow
def test_killed_and_resumed(
    stopped: dict[str, Stopped], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, batches_run: list[int]
) -> None:
    was = stopped["kill"]
    output = Path(str(was.args[-1]))
    assert (was.process.returncode, was.stdout, without_progress(was.stderr)) == (-signal.SIGKILL, "", "")
    assert listing(output.parent) == []
    assert 5 <= was.finished < BATCHES
    monkeypatch.setenv("SEALIGN_CACHE", str(was.cache))
    _stop_after(7, was.args)  # and stopped again on the way
    assert len(_finished(was.cache)) == was.finished + 7
    passed(*was.args)
    assert batches_run == [BATCHES - was.finished]
    assert _same(output, uninterrupted)


def _stop_after(batches: int, args: list[object]) -> None:
    """Interrupt a fit in this process once it has saved a number of batches."""
    save = checkpoints.BatchStore.save
    saved = [0]

    def saving(self: Any, *rest: Any) -> None:
        save(self, *rest)
        saved[0] += 1
        if saved[0] == batches:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.BatchStore, "save", saving)
        result = run(*args)
    assert_told(result.exit_code, result.stdout, result.stderr, "interrupted")


def test_killed_in_the_middle_of_a_write(
    fit: Callable[..., str], model_folder: Path, rows: Path, tmp_path: Path, cache: Path
) -> None:
    _stop_after(1, ["fit", "--model", model_folder, "--demonstrations", rows, "--output", tmp_path / "edit"])
    finished = _finished(cache)[0]
    (finished.parent / f".{finished.name}.abcd").write_bytes(b"half")
    fit()


def test_finished_batches_of_other_settings_are_not_taken(
    long_fit: list[object], uninterrupted: Path, cache: Path, tmp_path: Path, batches_run: list[int]
) -> None:
    _stop_after(3, [*long_fit, tmp_path / "other", "--prompt-format", "plain"])
    assert len(_finished(cache)) == 3
    batches_run[0] = 0
    passed(*long_fit, tmp_path / "edit")
    assert batches_run == [BATCHES]
    assert _same(tmp_path / "edit", uninterrupted)


@pytest.mark.parametrize("given", [None, 0.01])
def test_the_strength_is_chosen_by_the_damage(
    given: float | None, model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    args = [] if given is None else ["--max-damage", given]
    common = ["fit", "--model", model_folder, "--method", "mean_difference", "--demonstrations", rows]
    text = " ".join(passed(*common, *args, "--output", tmp_path / "edit").split())
    record = read(tmp_path / "edit")
    budget = 0.05 if given is None else given
    assert f"Strength {record['strength']:.4g} was chosen: loss on neutral text" in text
    assert f"budget {budget:g} nats per token" in text
    edit: Any = sealign.load_edit(tmp_path / "edit")
    model, tokenizer = sealign.load_model(str(model_folder))
    items = sealign.load_demonstrations(rows)
    texts = DamageTexts.of(model, tokenizer, items, prompt_format=PromptFormat())
    damages = [measure_passages(model, tokenizer, [edit], part)[0] for part in (texts.neutral, texts.answers)]
    assert 0.5 * budget < max(damages[0].loss_bound, *(damage.divergence_bound for damage in damages)) <= budget


def test_a_strength_that_is_given_is_not_chosen_again(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    args = [
        "fit",
        "--model",
        model_folder,
        "--demonstrations",
        rows,
        "--output",
        tmp_path / "edit",
        "--max-damage",
        0.1,
    ]
    for given in (["--strength", 0.5], ["--set", "strength=0.5"], ["--preset", "paper"], ["--method", "icl"]):
        refused(*args, *given, words=("--max-damage is 0.1", "leave --max-damage out"))
