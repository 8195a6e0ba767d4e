"""What pages promise: their blocks of code run, their commands work, and calculations that they quote are repeated."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import report
import reward
import train

ROOT = Path(__file__).parents[2]
README, QUESTIONS = (ROOT / "README.md").read_text(), (ROOT / "theory" / "QUESTIONS.md").read_text()
OWN_TASK, JUDGE = re.findall(r"```python\n(.*?)```", QUESTIONS, re.DOTALL)
FEW = "--max_steps 2 --generation_batch_size 32 --num_eval_problems 2 --num_eval_generations 4".split()


def run(command: str, folder: Path, *more: str) -> str:
    """What a page's `python ...` prints in a folder of one's own."""
    words = [sys.executable, str(ROOT / command.split()[1]), *command.split()[2:], *more]
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_pieces_print_what_their_comments_say():
    """Each number in the comment behind a `print` is printed, to the digits shown."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    values = [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", printed.getvalue())]
    for comment in re.findall(r"^print.*  # (.*)$", code, re.M):
        for text in re.findall(r"(?<!/ )(?<![\d/.])-?\d[\d./]*(?<!\.)", comment):
            top, _, bottom = text.partition("/")
            digits = 4 if bottom else len(top.partition(".")[2])
            assert any(abs(value - float(top) / float(bottom or 1)) <= 0.51 * 10**-digits for value in values), text


def test_the_first_commands_of_the_readme(tmp_path):
    for command in re.findall(r"^python train.py --output_dir .*$", README, re.M):
        run(command, tmp_path, *FEW, "--preset", "tiny")
    (command,) = re.findall(r"^python theory/tools/plot.py .*$", README, re.M)
    pytest.importorskip("matplotlib")
    run(command, tmp_path)
    assert len(list(tmp_path.glob("outputs/*.png"))) == 1


@pytest.fixture
def my_task(tmp_path):
    """QUESTIONS' own task, as a file in a folder of its own."""
    (tmp_path / "my_task.py").write_text(OWN_TASK)
    return tmp_path / "my_task.py"


def test_the_reward_of_ones_own_task(my_task):
    task = train.runpy.run_path(str(my_task))["task"](None)
    assert not set(task.train) & set(task.test)
    cases = {1: "9+9+6 9+9+5+1 8+8+8 9+9+9-3", 0.5: "9+9+4+1+1 9+9+9-2-1"}
    cases[0] = "9+9+5 9+9+6+1-1+2-2 24 9+9+6=24 9+15 9**9**9 ٩+٩+٦"
    for expected, completions in cases.items():
        for completion in completions.split():
            assert task.reward(task.train[0], completion) == expected, completion
    for completion in ("", " 9+9+6", "9+9+6\n", "__import__('os')", "9+" * 10**6):
        assert task.reward(task.train[0], completion) == 0


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ones_own_task_is_trained(my_task, full):
    """QUESTIONS' command: a few steps, or all of them, after which it is learnt."""
    (command,) = re.findall(r"^`(python train.py .*--task my_task.py[^`]*)`", QUESTIONS, re.M)
    run(command, my_task.parent, *([] if full else FEW), "--output_dir", "run")
    rows = [json.loads(row) for row in (my_task.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    if full:
        assert rows[0]["reward"] < 0.4 and sum(row["reward"] for row in rows[-20:]) / 20 > 0.9


@pytest.mark.parametrize("model", ["tiny", pytest.param("real", marks=pytest.mark.slow)])
def test_the_recipe_for_ones_own_questions(model, tmp_path):
    """With the tiny model on sums. With that in the folder SMOLLM2 on questions as they are meant, which it learns."""
    names = ["Anna", "Ben", "Carla"]
    words = "{} has {} apples and gets {} more. How many apples does {} have now?"
    asked = {words.format(n, a, b, n): a + b for n in names for a in range(2, 9) for b in range(2, 9)}
    if model == "tiny":
        asked = {f"{a}+{b}=": a + b for a in range(1, 9) for b in range(1, 9)}
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in asked.items()]
    (tmp_path / "FILE").write_text("\n".join(lines))
    (command,) = re.findall(r"^python train.py .*--train_file FILE.*$", QUESTIONS, re.M)
