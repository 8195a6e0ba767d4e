"""Small random models and their tokenizer, and runs on one of them, for tests that need no training."""

import json

import pytest
import torch
import transformers
from architectures import make_model
from run_helpers import EASY, JUDGE, SMALL, START, go

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # the sums of other processes, which have one, are equal to the last bit


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


@pytest.fixture(scope="session")
def finished(home, tmp_path_factory):
    """Runs that nothing stopped: of four and six steps, and of eight without evaluations."""
    folder = tmp_path_factory.mktemp("finished")
    for more in ("4", "6", "8 --num_eval_problems 0"):
        run = f"--model {home}/policy --task {home}/easy.py --output_dir {folder}/{more[0]}"
        assert go(f"{SMALL} {run} --max_steps {more}") is None
    return folder


@pytest.fixture
def odd_line(run_line, tmp_path):
    """A function that gives a command line of eight steps, whose reward does something odd in the third."""

    def write(statement):
        (tmp_path / "judge.py").write_text(JUDGE.format(statement))
        return f"{run_line} --task {tmp_path}/judge.py --max_steps 8 --save_steps 100 --num_eval_problems 0"

    return write
