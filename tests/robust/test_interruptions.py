"""Kills, signals, a second run and a full disk: no step that is saved is lost, and resumed it ends as if left alone."""

import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from run_helpers import ROOT, files_in, go, metrics_of, refused, step_of

import train

resource = pytest.importorskip("resource", reason="processes are forked")
FORKS = multiprocessing.get_context("forkserver")  # from a process that has imported everything
FORKS.set_forkserver_preload(["train", "countdown", "transformers.models.qwen3.modeling_qwen3"])


def child(line, output, limit):
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    train.main(shlex.split(line))


def start(line, output, limit=0):
    """A process of `python train.py LINE`, whose screen is a file, and which cannot write beyond a limit."""
    process = FORKS.Process(target=child, args=(line, output, limit))
    process.start()
    return process


def end(process, output):
    """The exit status, and the lines said; bars redraw theirs after a carriage return."""
    process.join()
    said = output.read_text()
    assert not re.search("Traceback|Exception ignored", said)
    return process.exitcode, [line.rpartition("\r")[2].strip() for line in said.split("\n")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def asleep(run_line, judge):
    """A function that gives a command line of eight steps, whose third step sleeps so many seconds."""

    def prepare(seconds):
        path = judge(f"pathlib.Path(__file__).with_name('asleep').touch(); time.sleep({seconds})")
        return f"{run_line} --task {path} --max_steps 8 --save_steps 100 --num_eval_problems 0"

    return prepare


@pytest.mark.parametrize(
    ("signals", "seconds", "kept"), [("SIGTERM", 0.5, 3), ("SIGINT", 0.5, 3), ("SIGINT SIGINT", 600, 0)]
)
def test_a_signal_ends_the_run_with_its_step_saved_and_a_second_ctrl_c_at_once(
    signals, seconds, kept, asleep, home, finished, tmp_path
):
    """In the third step; how to go on is said, and it goes on as if nothing had been."""
    process = start(asleep(seconds), tmp_path / "said")
    wait_for((tmp_path / "asleep").exists)
    begin = time.monotonic()
    for name in signals.split():
        os.kill(process.pid, signal.Signals[name])
        wait_for(lambda name=name: name in (tmp_path / "said").read_text())
    code, lines = end(process, tmp_path / "said")
    assert code == 1
    assert time.monotonic() - begin < 60  # not ten minutes
    assert len(metrics_of(tmp_path / "run")) == (kept or 2)
    assert step_of(tmp_path / "run") == kept
    assert any(line.startswith("stopped: " if kept == 0 else f"stopped: by {signals}") for line in lines)
    (how,) = [line for line in lines if line.startswith("to go on: python train.py ")]
    shutil.copy(home / "easy.py", tmp_path / "judge.py")
    assert go(how.partition("train.py")[2]) is None
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "8")


def test_two_runs_on_one_folder(asleep, home, finished, tmp_path):
    """The second is refused in a line, and the first does not notice; once it is killed the folder is free."""
    line = asleep(600)
    process = start(line, tmp_path / "said")
    wait_for((tmp_path / "asleep").exists)
    before = files_in(tmp_path / "run")
    refused(f"{line} --resume", "cannot lock .*run")
    assert files_in(tmp_path / "run") == before
    process.kill()
    process.join()
    shutil.copy(home / "easy.py", tmp_path / "judge.py")
    assert go(f"{line} --resume") is None
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "8")


DISKS = {  # when it is full: at a share of the size of a file that a run writes, after 4 steps
    "config.json": 0.5, "metrics.jsonl": 1.125, "checkpoint.pt": 0.05, "checkpoint.pt, its end": 0.99, "model.safetensors": 0.99,
}  # fmt: skip


@pytest.mark.parametrize("name", DISKS)
def test_a_full_disk_ends_in_a_line_and_the_last_checkpoint_stays(name, finished, tmp_path):
    """A limit on the size of files stands in for it: writing fails in the same calls."""
    folder, file = tmp_path / "run", name.partition(",")[0]
    shutil.copytree(finished / "4", folder)
    size = (folder / file if file in os.listdir(folder) else folder / "model" / file).stat().st_size
    shutil.rmtree(folder / "model")
    before = files_in(folder)
    steps = 4 if file == "model.safetensors" else 100
    resume = f"--resume --output_dir {folder}"
    line = f"{resume} --max_steps {steps} --save_steps {1000 if file == 'metrics.jsonl' else 2}"
    process = start(line, tmp_path / "said", limit=int(size * DISKS[name]))
    code, lines = end(process, tmp_path / "said")
    assert code == 1
    (said,) = [line for line in lines if re.match("(stopped|error): ", line)]
    assert re.search(f"{folder}/(model|{file})|File too large", said)
    assert file == "config.json" or f"to go on: python train.py --resume --output_dir {folder}" in lines
    after = files_in(folder)
    assert after["checkpoint.pt"] == before["checkpoint.pt"]
    assert not [path for path in after if path.endswith(".tmp")]  # it would take up the room that is missing
    assert go(f"{resume} --max_steps 8") is None
    assert metrics_of(folder) == metrics_of(finished / "8")


MANY = [signal.SIGKILL] * 14 + [signal.SIGTERM] * 8 + [signal.SIGINT] * 8


@pytest.mark.parametrize(
    ("signals", "steps"), [([signal.SIGKILL], 40), pytest.param(MANY, 700, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments_a_run_ends_as_if_left_alone(signals, steps, run_line, tmp_path):
    """`python train.py` itself; after SIGTERM and Ctrl-C not a step is lost, a kill costs those since the last checkpoint."""
    more = f"--max_steps {steps} --save_steps 7 --learning_rate 1e-4"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "theory" / "tiny")}

    def begin(name, resume=""):
        line = f"{run_line} {more} --output_dir {tmp_path}/{name} {resume}"
        command = [sys.executable, "train.py", *shlex.split(line)]
        with open(tmp_path / "said", "wb") as said:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said, stdout=said)

    def rows():
        metrics = tmp_path / "stopped" / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    assert go(f"{run_line} {more} --output_dir {tmp_path}/whole") is None
    rng = random.Random()  # really random: any moment must do
    for number, name in enumerate(rng.sample(signals, len(signals))):
        process = begin("stopped", "--resume" if number else "")
        wait_for(lambda: b" parameters on " in (tmp_path / "said").read_bytes(), 120)
        goal = step_of(tmp_path / "stopped") + rng.randrange(1, 9)
        wait_for(lambda goal=goal: rows() >= goal)
        time.sleep(rng.random() * 0.1)
        before = rows()
        process.send_signal(name)
        code, said = process.wait(), (tmp_path / "said").read_text()
        if name != signal.SIGKILL:
            assert code == 1
            assert f"stopped: by {name.name}" in said and "Traceback" not in said
            assert step_of(tmp_path / "stopped") == rows() >= before
    assert step_of(tmp_path / "stopped") < steps
    assert begin("stopped", "--resume").wait() == 0
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert files_in(tmp_path / "stopped" / "model") == files_in(tmp_path / "whole" / "model")
