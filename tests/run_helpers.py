"""A run of a few steps on a small random model: its command line, what it says and writes, and edits of its files."""

import json
import re
import shlex
import shutil
from pathlib import Path

import torch

import train

ROOT = Path(__file__).parents[1]
START = ROOT / "theory" / "tiny" / "start-0"  # a warm-started model
SMALL = (
    "--preset tiny --generation_batch_size 32 --num_generations 4 --max_steps 4 --save_steps 2 "
    "--learning_rate 1e-3 --num_eval_problems 3 --num_eval_generations 4"
)
JUDGE = """
import pathlib, time
import countdown
calls = 0

def reward(problem, completion):
    global calls
    calls += 1
    if calls == 90:  # in the third step, of 40 completions each
        {}
    return float(sum(map(ord, completion)) % 2)  # about half of all completions are right

def task(config):
    return countdown.task(config)._replace(reward=reward)
"""
EASY = JUDGE.format("pass")


def go(line, main=train.main):
    """`python train.py LINE` (or a script with this `main`) in this process. Returns its error, or None."""
    try:
        main(shlex.split(line))
    except SystemExit as stop:
        return stop.code
    return None


def refused(line, pattern, main=train.main):
    """It ends in one line that matches the pattern and is not cut off."""
    said = str(go(line, main))
    assert re.match("error: ", said)
    assert re.search(pattern, said), said
    assert not re.search(r"\n|:$", said)


def rows_of(folder):
    """The metrics of a run, all of them."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def metrics_of(folder):
    """The metrics of a run without the times, which no two runs share."""
    return [{name: x for name, x in row.items() if not name.endswith("_seconds")} for row in rows_of(folder)]


def step_of(folder):
    """The step of a run's checkpoint; 0 if there is none."""
    path = Path(folder) / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


def files_in(folder):
    """All that is in a folder, except the lock, which is empty."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


# --- Edits of a folder, which are functions of it
def rewritten(name, new):
    """Change the bytes of a file by a function, or to others."""

    def edit(folder):
        path = folder / name
        path.write_bytes(new(path.read_bytes()) if callable(new) else new)

    return edit


def setting(name, **changes):
    """Change values of a JSON file."""
    return rewritten(name, lambda content: json.dumps(json.loads(content) | changes).encode())


def without(*names):
    def edit(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return edit
