"""Small random models and their tokenizer, and a run on one of them, for tests that need no training."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from architectures import make_model
from run_helpers import EASY, SMALL

START = Path(__file__).parents[1] / "theory" / "tiny" / "start-0"

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
def home(random_model, tokenizer, tmp_path_factory):
    """A random model, a task that it is rewarded for half of the time, and data. Tests that change them copy them."""
    folder = tmp_path_factory.mktemp("home")
    random_model().save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    (folder / "easy.py").write_text(EASY)
    rows = [{"question": f"{i}+{i}=", "answer": 2 * i} for i in range(1, 21)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def model_folder(home):
    """A folder that `--model` takes."""
    return home / "policy"


@pytest.fixture
def run_line(home, tmp_path):
    """Four steps on the small model, into the test's own folder."""
    return f"{SMALL} --model {home}/policy --task {home}/easy.py --output_dir {tmp_path}/run"
