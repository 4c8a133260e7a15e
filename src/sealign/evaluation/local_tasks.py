"""Harness tasks on local files in the Hub's schemas, so that an evaluation runs without a hub."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from sealign.errors import SettingError

LOCAL_FILES: dict[str, dict[str, str]] = {
    "truthfulqa_mc1": {"validation": "truthful_qa/multiple_choice/validation.jsonl"},
    "truthfulqa_mc2": {"validation": "truthful_qa/multiple_choice/validation.jsonl"},
    "truthfulqa_gen": {"validation": "truthful_qa/generation/validation.jsonl"},
    "bbq": {"test": "bbq/test.jsonl"},
    "crows_pairs_english": {"test": "crows_pairs/test.jsonl"},
    "commonsense_qa": {"validation": "commonsense_qa/validation.jsonl"},
    "gsm8k": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"},
    "mmlu": {"dev": "mmlu/dev.jsonl", "test": "mmlu/test.jsonl"},
    "nq_open": {"validation": "nq_open/validation.jsonl"},
    "halueval_qa": {"data": "halueval_qa/train.jsonl"},
    "hellaswag": {"validation": "hellaswag/validation.jsonl"},
    "mathqa": {"test": "mathqa/test.jsonl"},
    "toxigen": {"test": "toxigen/test.jsonl"},
}
"""By task, the file of each split below the data folder."""
