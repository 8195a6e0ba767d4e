"""Small random models and their tokenizer, for tests that need no training."""

from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_model

ROOT = Path(__file__).parents[1]
START = ROOT / "theory" / "tiny" / "start-0"

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(START)


@pytest.fixture(scope="session")
def random_model(tokenizer):
    """A function that makes a random Qwen3 of two layers; keyword arguments go to its config."""
    return lambda **changes: make_model("qwen3", tokenizer, **changes)


@pytest.fixture(scope="session")
def model_folder(random_model, tokenizer, tmp_path_factory):
    """A folder that `--model` takes: a random model with its tokenizer. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("model")
    random_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
