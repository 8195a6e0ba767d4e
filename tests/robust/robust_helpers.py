"""What the tests of this folder share: a small run, edits of its files, and train.py in processes of their own."""

import json
import os
import shlex
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import train

ROOT = Path(__file__).parents[2]
SMALL = shlex.split(
    "--preset tiny --generation_batch_size 32 --num_generations 4 --max_steps 4 --save_steps 2 "
    "--num_eval_problems 3 --num_eval_generations 4 --learning_rate 1e-3"
)
EASY = """
import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, completion: float(len(completion) % 2))
"""


def go(arguments):
    """train.py's command line in this process. Returns what it says when it ends early, else None."""
    try:
        train.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code
    return None


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


# --- Edits of a file in a folder


def setting(name, **changes):
    """Change values of a JSON file."""
    return rewritten(name, lambda content: json.dumps(json.loads(content) | changes).encode())


def rewritten(name, change):
    def edit(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def without(*names):
    def edit(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return edit


def folder_for(name):
    """A folder of the user's where a file should be."""

    def edit(folder):
        if (folder / name).exists():
            without(name)(folder)
        (folder / name).mkdir()
        (folder / name / "of mine").write_text("keep me")

    return edit


# --- Processes

SERVER = """
import contextlib, json, os, resource, sys
import torch, transformers
import countdown, train

torch.set_num_threads(1)
transformers.AutoTokenizer, transformers.Qwen3ForCausalLM
for line in sys.stdin:  # what a process of train.py is to be, or whose end to wait for
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.close(0)
        os.setsid()
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        code = 0
        try:
            train.main(job["arguments"])
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else stop.code or 0
            with contextlib.suppress(OSError):
                print(stop.code or "", file=sys.stderr)
        os._exit(code)
    print(pid, flush=True)
"""


class Process:
    """train.py's main in a process of its own, forked from one that has imported everything."""

    def __init__(self, server, arguments, output, limit=0):
        self.server, self.output = server, Path(output)
        self.pid = self.ask({"arguments": list(map(str, arguments)), "output": str(output), "limit": limit})

    def ask(self, job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def send(self, name):
        os.kill(self.pid, getattr(signal, name))

    def end(self):
        """The exit status, and the lines said; bars redraw theirs after a carriage return."""
        code, said = self.ask({"wait": self.pid}), self.output.read_text()
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        return code, [line.rpartition("\r")[2].strip() for line in said.split("\n")]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
