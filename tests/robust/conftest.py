"""A model, a task that a random model is rewarded for half of the time, data, and runs to resume."""

import json
import shutil

import pytest
import torch
from robust_helpers import EASY, SMALL, go

import reward
import rollout


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def home(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(model_folder, folder / "policy")
    (folder / "easy.py").write_text(EASY)
    rows = [{"question": f"{i}+{i}=", "answer": 2 * i} for i in range(1, 21)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run_line(home, tmp_path):
    """Four steps on the small model, into the test's own folder."""
    return f"{SMALL} --model {home}/policy --task {home}/easy.py --output_dir {tmp_path}/run"


@pytest.fixture(scope="session")
def finished(home, tmp_path_factory):
    """Runs that nothing stopped: of four and six steps, and of eight without evaluations."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    for more in ("4", "6", "8 --num_eval_problems 0"):
        run = f"--model {home}/policy --task {home}/easy.py --output_dir {folder}/{more[0]}"
        assert go(f"{SMALL} {run} --max_steps {more}") is None
    return folder


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """An empty folder to be in, without a GPU, where neither a model may be loaded nor anything downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rollout, "load_policy", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(reward, "download", lambda *_: pytest.fail("GSM8K is downloaded"))
