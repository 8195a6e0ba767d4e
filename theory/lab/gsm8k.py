"""GSM8K, the task of the preset `qwen3-0.6b`, or questions and answers from your own files like it.

`--task gsm8k` downloads GSM8K (Cobbe et al. 2021, MIT licence) once, into $SCOPE_RL_CACHE or
~/.cache/scope_rl, and checks it by its hash; `--train_file` and `--test_file` name files of your own.
"""

import hashlib
import os
from pathlib import Path

import torch

from reward import Task, answer_reward, check, explaining, load_problems

INSTRUCTION = "Reason step by step, briefly. Then give the final answer alone on the last line, after ####."
URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}


def download(split: str) -> Path:
    """The "train" or "test" file, from the cache if it is whole there; ValueError if it cannot be had."""
    folder = Path(os.environ.get("SCOPE_RL_CACHE") or Path.home() / ".cache" / "scope_rl")
    path = folder / f"gsm8k-{split}.jsonl"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[split]:
        with explaining("cannot download GSM8K (give --train_file and --test_file)"):
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{URL}{split}.jsonl", str(path), SHA256[split])
    return path


def task(config) -> Task:
    """GSM8K's two files, or others; without a test file the last tenth of one's own file is kept for evaluation."""
    train = load_problems(config.train_file or download("train"))
    if config.test_file or not config.train_file:
        test = load_problems(config.test_file or download("test"))
    else:
        held_out = -(-len(train) // 10)
        train, test = train[:-held_out], train[-held_out:]
        check(len(train) > 0, f"{config.train_file} holds one problem: without --test_file it takes two or more")
    return Task(train, test, INSTRUCTION, answer_reward)
