"""What pages promise: their code runs, their commands work, and calculations that they quote are repeated."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from lab_helpers import json_lines

import benchmark
import report
import train

ROOT = Path(__file__).parents[2]
README, QUESTIONS = (ROOT / "README.md").read_text(), (ROOT / "theory" / "QUESTIONS.md").read_text()
(PIECES,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OWN_TASK, JUDGE = re.findall(r"```python\n(.*?)```", QUESTIONS, re.DOTALL)
FEW = shlex.split("--max_steps 2 --generation_batch_size 32 --num_eval_problems 2 --num_eval_generations 4")


def run(pattern: str, page: str, folder: Path, *more: str) -> None:
    """Run all of a page's commands that match, with more options, in a folder of one's own."""
    commands = re.findall(rf"^`?(python {pattern}[^`\n]*)", page, re.M)
    assert commands
    for _, script, *words in map(shlex.split, commands):
        subprocess.run([sys.executable, ROOT / script, *words, *more], cwd=folder, check=True, stdout=-3)


def test_the_pieces_print_what_their_comments_say(capsys):
    """Each number in the comment behind a `print` is printed, to the digits shown."""
    exec(PIECES, {})
    printed = [float(number) for number in re.findall(r"-?\d+\.?\d*", capsys.readouterr().out)]
    comments = " ".join(re.findall(r"\nprint.*  # (.*)", PIECES))
    for top, bottom in re.findall(r"(?<![\d/.])(?<!/ )(-?\d+(?:\.\d+)?)/?(\d*)", comments):
        value, digits = float(top) / float(bottom or 1), 3 if bottom else len(top.partition(".")[2])
        assert min(abs(value - number) for number in printed) <= 0.51 * 10**-digits, (top, bottom)


def test_the_first_commands_of_the_readme(tmp_path):
    pytest.importorskip("matplotlib")
    run("train.py --preset tiny", README, tmp_path, *FEW)
    run("theory/tools/plot.py", README, tmp_path)
    assert len(list(tmp_path.glob("outputs/*.png"))) == 1


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ones_own_task(full, tmp_path):
    """The reward of QUESTIONS' file; its command, for a few steps or all of them, after which it is learnt."""
    (tmp_path / "my_task.py").write_text(OWN_TASK)
    task = train.runpy.run_path(str(tmp_path / "my_task.py"))["task"](None)
    assert not set(task.train) & set(task.test)
    earns = {1: "9+9+6 9+9+5+1 9+9+9-3", 0.5: "9+9+4+1+1"}
    earns[0] = "9+9+5 24 9+9+6=24 9+15 9**9**9 '9+9+6\n' ٩+٩+٦"
    for expected, completions in earns.items():
        for text in shlex.split(completions):
            assert task.reward(task.train[0], text) == expected, text

    run("train.py.*--task my_task.py", QUESTIONS, tmp_path, *([] if full else FEW), "--output_dir=run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(row)["reward"] for row in rows]
    assert not full or (rewards[0] < 0.4 and np.mean(rewards[-20:]) > 0.9)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_recipe_for_ones_own_questions(real, tmp_path):
    """A few steps of the tiny model on sums, or training of SmolLM2-135M-Instruct, if SMOLLM2 names its folder."""
    model, question, steps = ROOT / "theory" / "tiny" / "start-1", "{}+{}=", FEW
    if real:
        model, steps = os.environ.get("SMOLLM2") or pytest.skip("SMOLLM2 is not set"), ["--max_steps=25"]
        question = "Which number is larger, {} or {}?"
    pairs = itertools.product(range(11, 25), range(31, 45))
    rows = [{"question": question.format(a, b), "answer": b if real else a + b} for a, b in pairs]
    (tmp_path / "FILE").write_text(json_lines(rows))
    run("train.py.*--train_file FILE", QUESTIONS, tmp_path, f"--model={model}", "--output_dir=run", *steps)
    evaluations = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert not real or evaluations["before"]["pass@1"] < 0.3 < 0.6 < evaluations["after"]["pass@1"]


def test_math_verify_as_a_judge(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    rows = [{"question": answer, "answer": answer} for answer in (r"\frac{1}{2}", "x^2+2x+1", "42")]
    Path("train.jsonl").write_text(json_lines(rows))
    exec(JUDGE, scope := {})
    task = scope["task"](None)
    half, square = task.train
    assert [task.reward(half, text) for text in (r"\boxed{\frac{2}{4}}", "so $0.5$", "2", "")] == [1, 1, 0, 0]
    assert task.reward(square, r"\boxed{(x+1)^2}") == 1


def test_the_calculations_of_the_questions(monkeypatch):
    """How often groups have equal rewards, what share of the distance alpha held, and memory."""
    for rate, *shares in re.findall(r"^\| (\d+)% .*\| (\d+)% \| (\d+)% \|$", QUESTIONS, re.M):
        p = int(rate) / 100
        assert [int(share) for share in shares] == [round(100 * (p**n + (1 - p) ** n)) for n in (8, 16)]

    cells = report.cells_of("alpha").items()
    H = {label: np.mean([row["entropy"] for row in cell.values()]) for label, cell in cells}
    labels = {"1/16": "share 1/4, weight 1/16", "1/4": "share and weight 1/4", "1": "share 1/4, weight 1"}
    for alpha, share in re.findall(r"^\| ([\d/]+) \| .* \| (\d+)% \|", QUESTIONS, re.M):
        held = (H[labels[alpha]] - H["0 (GRPO)"]) / (0.4 - H["0 (GRPO)"])
        assert 100 * held == pytest.approx(int(share), abs=1.5)

    shape = {"hidden_size": 1024, "num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128}
    qwen3 = transformers.Qwen3Config(vocab_size=151_936, num_attention_heads=16, **shape)
    monkeypatch.setattr(benchmark, "parameters_and_shape", lambda name: (596_049_920, qwen3))
    rows = re.findall(r"^\| \d+ GB \| `?(.*?)`? \| (.*) GB \| (.*) GB \|$", QUESTIONS, re.M)
    for options, *shown in rows:
        words = [] if options == "none" else options.split()
        config = train.parse_config(["--preset", "qwen3-0.6b", "--output_dir", "x", *words])
        parts = benchmark.memory(config, prompt_length=200)
        assert [f"{parts[f'peak while {phase}']:.1f}" for phase in ("sampling", "updating")] == shown
