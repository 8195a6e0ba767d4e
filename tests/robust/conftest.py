"""Runs to resume, and a place where nothing may begin."""

import pytest
import torch
from run_helpers import SMALL, go

import reward
import rollout

JUDGE = """
import pathlib, time
import countdown
calls = 0

def reward(problem, completion):
    global calls
    calls += 1
    if calls == 90:  # in the third step, of 40 completions each
        {}
    return float(len(completion) % 2)

def task(config):
    return countdown.task(config)._replace(reward=reward)
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def judge(tmp_path):
    """A function that writes a task whose reward does something odd in the third step."""

    def write(statement):
        (tmp_path / "judge.py").write_text(JUDGE.format(statement))
        return tmp_path / "judge.py"

    return write
