"""What the tests of this folder share: a small run, edits of its files, and train.py in processes of their own."""

import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parents[2]
SMALL = "--preset tiny --generation_batch_size 32 --num_generations 4 --max_steps 4 --save_steps 2 --learning_rate 1e-3"
SMALL += " --num_eval_problems 3 --num_eval_generations 4"
EASY = """
import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, completion: float(len(completion) % 2))
"""


def go(line):
    """`python train.py LINE` in this process. Returns what it says when it ends early, else None."""
    try:
        train.main(shlex.split(line))
    except SystemExit as stop:
        return stop.code
    return None


def refused(line, pattern):
    """It ends in one line that matches the pattern and is not cut off."""
    said = str(go(line))
    assert re.match("error: ", said)
    assert re.search(pattern, said), said
    assert not re.search(r"\n|:$", said)


def files_in(folder):
    """All that is in a folder, except the lock, which is empty."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def metrics_of(folder):
    """The metrics of a run without the times."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


def step_of(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["step"]


def same_model(one, other):
    files = [load_file(Path(folder) / "model" / "model.safetensors") for folder in (one, other)]
    return files[0].keys() == files[1].keys() and all(
        torch.equal(files[0][name], files[1][name]) for name in files[0]
    )


# --- Edits of a folder, which are functions of it


def setting(name, **changes):
    """Change values of a JSON file."""
    return rewritten(name, lambda content: json.dumps(json.loads(content) | changes).encode())


def rewritten(name, new):
    """Change the bytes of a file by a function, or to others."""

    def edit(folder):
        path = folder / name
        path.write_bytes(new(path.read_bytes()) if callable(new) else new)

    return edit


def without(*names):
    def edit(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return edit


# --- Processes

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
    """A process of `python train.py LINE`, whose screen is a file and which can write files up to a limit only."""
    process = FORKS.Process(target=child, args=(line, output, limit))
    process.start()
    return process


def end(process, output):
    """The exit status, and the lines said; bars redraw theirs after a carriage return."""
    process.join()
    said = output.read_text()
    assert "Traceback" not in said
    assert "Exception ignored" not in said
    return process.exitcode, [line.rpartition("\r")[2].strip() for line in said.split("\n")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
