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


SLEEP = "pathlib.Path(__file__).with_name('asleep').touch(); time.sleep({})"


@pytest.mark.parametrize(
    ("signals", "seconds", "kept"), [("SIGTERM", 0.5, 3), ("SIGINT", 0.5, 3), ("SIGINT SIGINT", 600, 0)]
)
def test_a_signal_ends_the_run_with_its_step_saved_and_a_second_ctrl_c_at_once(
    signals, seconds, kept, odd_line, home, finished, tmp_path
):
    """In the third step; how to go on is said, and it goes on as if nothing had been."""
    process = start(odd_line(SLEEP.format(seconds)), tmp_path / "said")
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


def test_two_runs_on_one_folder(odd_line, home, finished, tmp_path):
    """The second is refused in a line, and the first does not notice; once it is killed the folder is free."""
    line = odd_line(SLEEP.format(600))
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


@pytest.mark.parametrize(("times", "steps"), [(1, 40), pytest.param(15, 400, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_if_left_alone(times, steps, run_line, tmp_path):
    """`python train.py` itself; a kill costs the steps since the last checkpoint."""
    line = f"{run_line} --max_steps {steps} --save_steps 7 --learning_rate 1e-4 --output_dir"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "theory" / "tiny")}

    stopped, whole, said = (tmp_path / name for name in ("stopped", "whole", "said"))

    def begin(resume=""):
        command = shlex.split(f"{sys.executable} train.py {line} {stopped} {resume}")
        with said.open("wb") as screen:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=screen, stderr=screen)

    def rows():
        metrics = stopped / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    assert go(f"{line} {whole}") is None
    for number in range(times):
        process = begin("--resume" if number else "")
        wait_for(lambda: b" parameters on " in said.read_bytes(), 120)
        goal = step_of(stopped) + random.Random().randrange(1, 9)  # really random: any moment must do
        wait_for(lambda goal=goal: rows() >= goal)
        time.sleep(random.Random().random() * 0.1)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert step_of(stopped) < steps
    assert begin("--resume").wait() == 0
    assert metrics_of(stopped) == metrics_of(whole)
    assert files_in(stopped / "model") == files_in(whole / "model")
