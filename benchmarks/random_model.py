"""Shared by the benchmarks: random models, with demonstrations and a tokenizer that need no files."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from sealign.demonstrations.demonstration import Demonstration
from sealign.models.prompt_format import default_preamble


def random_llama(tokenizer: Any, device: str, dtype: torch.dtype, sizes: Mapping[str, float] | None = None) -> Any:
    """Return a Llama with random weights, drawn on the device; of Llama-2-7B's shape unless other sizes are given."""
    settings: dict[str, Any] = {"max_position_embeddings": 4096, **(sizes or {})}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=dtype).eval()
    return model.requires_grad_(False)


def twin(model: Any, layers: int | None = None) -> Any:
    """Return a copy of a model with the same weights in memory, of the first layers only if a number is given."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    if layers is not None:
        copied.model.layers = copied.model.layers[:layers]
        copied.config.num_hidden_layers = layers
    return copied


def demonstrations_of(count: int) -> list[Demonstration]:
    """Return demonstrations of random words, with the lengths of short questions and answers."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(f"word{draw.randrange(4000)}" for _ in range(draw.randint(least, most)))

    return [Demonstration(text(8, 40), text(3, 20), text(3, 20)) for _ in range(count)]


def tokenizer_of(demonstrations: Sequence[Demonstration]) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows the words of demonstrations and of the few-shot preamble."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [default_preamble(), *(f"{one.prompt} {one.positive} {one.negative}" for one in demonstrations)]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
