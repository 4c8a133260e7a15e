from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sealign
from sealign.errors import EditFileError, SettingError
from sealign.methods.edit_sources import collection_of, edited_layers, fit_settings, load_edit_source


@pytest.fixture
def fitted(
    llama: Any, tokenizer: Any, demonstrations: list[sealign.Demonstration], tmp_path: Path
) -> Callable[..., Any]:
    """Fit a method on the tiny Llama and save it under a name; returns the folder."""

    def fit(name: str, config: Any) -> Path:
        folder = tmp_path / name
        sealign.fit_edit(llama, tokenizer, demonstrations, config=config).save_pretrained(folder)
        return folder

    return fit


def test_one_edit_and_several(fitted: Callable[..., Path]) -> None:
    first = fitted("a", sealign.SEAConfig(rank=2, layers=[1, 2]))
    second = fitted("b", sealign.MeanDifferenceConfig(layers=[0], site="mlp", token="mean"))
    single = load_edit_source(str(first), strength=0.5)
    assert single.hash == sealign.load_edit(first).with_strength(0.5).hash
    both = load_edit_source(f"{first}+{second}")
    assert [part.method for part in both.parts] == ["sea", "mean_difference"]
    assert [part.strength for part in both.parts] == [1.0, 1.0]
    assert edited_layers(both) == [0, 1, 2]
    assert fit_settings(both)["rank"] == 2
    assert collection_of(load_edit_source(f"{second}+{first}")).token == "mean"


def test_a_strength_holds_for_the_parts_that_have_one(fitted: Callable[..., Path]) -> None:
    edit, decoding = fitted("a", sealign.SEAConfig(rank=2)), fitted("b", sealign.DoLaConfig())
    both = load_edit_source(f"{edit}+{decoding}", strength=2)
    assert [part.strength for part in both.parts] == [2.0, None]
    for source in (str(decoding), f"{decoding}+{decoding}"):
        with pytest.raises(SettingError, match=r"strength is 2.0, but '.+' \(dola\) has no strength; leave it out"):
            load_edit_source(source, strength=2)
    with pytest.raises(SettingError, match="strength is nan"):
        load_edit_source(str(edit), strength=float("nan"))


def test_a_folder_whose_name_has_a_plus(fitted: Callable[..., Path]) -> None:
    folder = fitted("a+b", sealign.SEAConfig(rank=2))
    assert load_edit_source(str(folder)).parts[0].method == "sea"
    with pytest.raises(EditFileError):
        load_edit_source(f"{folder}+nowhere")


def test_the_collection_of_an_edit(fitted: Callable[..., Path]) -> None:
    pattern = "model.layers.{layer}.mlp.down_proj"
    config = sealign.SEAConfig(
        rank=2, token="mean", module_pattern=pattern, prompt_format=sealign.PromptFormat("plain")
    )
    found = collection_of(sealign.load_edit(fitted("a", config)))
    assert (found.site, found.token, found.module_pattern) == ("mlp", "mean", pattern)
    assert found.prompt_format.style == "plain"
    decoding = sealign.load_edit(fitted("b", sealign.DoLaConfig()))
    assert (dict(fit_settings(decoding)), edited_layers(decoding)) == ({}, [])
    with pytest.raises(SettingError, match="dola does not edit activations"):
        collection_of(decoding)
