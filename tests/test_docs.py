"""What the documents promise: README's own task, the numbers of QUESTIONS.md, and who is to be cited."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

import benchmark
import plot
import report
import scope_rl
import train

ROOT = Path(__file__).parents[1]
THEORY = ROOT / "theory"


@pytest.fixture(scope="module")
def my_task(tmp_path_factory):
    """README's ten lines, as a file in a folder of its own."""
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("own") / "my_task.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("9+9+6", 1), ("9+9+5+1", 1), ("8+8+8", 1), ("9+9+9-3", 1), ("9+9+4+1+1", 0.5), ("9+9+9-2-1", 0.5),
        ("9+9+5", 0), ("9+9+6+1-1+2-2", 0), ("24", 0), ("9+9+6=24", 0), (" 9+9+6", 0), ("9+9+6\n", 0), ("", 0),
        ("9+15", 0), ("__import__('os')", 0), ("9**9**9", 0), ("9+" * 10**6, 0), ("٩+٩+٦", 0),
    ],
)  # fmt: skip
def test_the_reward_of_readmes_own_task(my_task, completion, expected):
    task = train.runpy.run_path(str(my_task))["task"](None)
    assert task.reward(task.train[0], completion) == expected
    assert not set(task.train) & set(task.test)


def test_readmes_own_task_trains_as_readme_says(my_task, tmp_path):
    """README's command in a folder of one's own, but for a few steps; its rewards are graded; it can be drawn."""
    (line,) = re.findall(r"^`python (train.py .*--task my_task.py[^`]*)`", (ROOT / "README.md").read_text(), re.M)
    command = [sys.executable, str(ROOT / line.split()[0]), *line.split()[1:]]
    few = ["--max_steps", "3", "--generation_batch_size", "64", "--num_eval_problems", "2", "--output_dir", "run"]
    subprocess.run([*command, *few], cwd=my_task.parent, check=True, capture_output=True)
    folder = my_task.parent / "run"
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert any(row["reward"] * 64 % 1 == 0.5 for row in rows)  # a half was among the rewards
    assert all(row["grad_norm"] > 0 for row in rows)
    curves, target = plot.read(folder)
    assert [step for step, _ in curves["pass@1"]] == [0, 3]
    assert target == 0.4


@pytest.mark.slow
def test_readmes_own_task_is_learnt(my_task):
    """Reward above 0.9 from 0.3, and different right answers a problem from 3 to 14, or nearly."""
    (line,) = re.findall(r"^`python (train.py .*--task my_task.py[^`]*)`", (ROOT / "README.md").read_text(), re.M)
    command = [sys.executable, str(ROOT / line.split()[0]), *line.split()[1:], "--output_dir", "learnt"]
    subprocess.run(command, cwd=my_task.parent, check=True, capture_output=True)
    folder = my_task.parent / "learnt"
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = json.loads((folder / "eval.json").read_text())
    assert rows[0]["reward"] < 0.35
    assert np.mean([row["reward"] for row in rows[-30:]]) > 0.9
    assert evaluations["before"]["distinct_correct"] < 4
    assert evaluations["after"]["distinct_correct"] > 10


def test_the_questions_that_everyone_asks_are_answered_with_these_numbers(monkeypatch):
    """theory/QUESTIONS.md against the rows, and its calculations again."""
    page = (THEORY / "QUESTIONS.md").read_text()
    text = " ".join(page.split())

    def last_fifth(experiment: str, label: str, name: str) -> float:
        return np.mean([row[name] for row in report.cells_of(experiment)[label].values()])

    def two_digits(value: float) -> str:
        return f"{value:.2f}".removeprefix("0")

    rewards, hot = torch.randint(2, (16, 8)).double(), torch.randint(2, (32,)).double()
    table = scope_rl.objective_table(rewards, hot, scope_weight=0.7)
    at_ratio_1 = (table.weights * table.advantages).sum().item()
    assert at_ratio_1 == pytest.approx(0.7 * hot.mean().item())  # nothing of GRPO's is left
    start = np.mean([row["entropies"][0] for row in report.cells_of("control")["GRPO"].values()])
    end = last_fifth("control", "GRPO", "entropy")
    assert f"goes from {two_digits(start)} to {two_digits(end)}; the most" in text
    assert f"is log V = {math.log(151936):.1f}" in text
    assert f"1 nat is {1 / math.log(2):.2f} bits" in text
    same = {(p, n): f"{p**n + (1 - p) ** n:.0%}" for p in (0.5, 0.1, 0.02) for n in (8, 16)}
    assert (
        f"50% this happens to {same[0.5, 8]} of groups of 8, at 10% or 90% to {same[0.1, 8]}, at 2% to {same[0.02, 8]}"
        in text
    )
    assert f"of groups of 16 at 10% to {same[0.1, 16]}" in text
    assert f"standard error of up to {math.sqrt(0.25 / 128):.3f}".replace("0.", ".") in text
    dropped, kept = (
        last_fifth("ingredients", label, "entropy") for label in ("equal groups dropped", "as it is, H0 0.4")
    )
    assert f"{two_digits(dropped)} instead of {two_digits(kept)} in the lab" in text

    # What alpha's weight held, as a share of the way from GRPO to the target; and what few samples cost.
    held = {w: (last_fifth("alpha", label, "entropy") - end) / (0.4 - end) for w, label in (
        ("1/16", "share 1/4, weight 1/16"), ("1/4", "share and weight 1/4"), ("1", "share 1/4, weight 1"),
    )}  # fmt: skip
    assert held["1/16"] == pytest.approx(1 / 5, abs=0.05)
    assert held["1/4"] == pytest.approx(2 / 3, abs=0.05)
    assert held["1"] == pytest.approx(1, abs=0.02)
    cells = report.cells_of("alpha")
    few, none = cells["share 1/64, weight 1"], cells["0 (GRPO)"]
    cost = np.mean([none[seed]["reward"] - row["reward"] for seed, row in few.items()])
    assert f"with 8 samples 1 cost {two_digits(cost)} of reward" in text

    # Half of the distance between neighbours in bfloat16 passes 1e-6 there, to a power of 2.
    w = 2.0**-11
    for weight, moves in ((0.99 * w, True), (w, False), (0.02, False)):
        before = torch.tensor(weight).bfloat16()
        assert ((before.float() + 1e-6).bfloat16() != before) == moves
    assert f"every weight above {w:.4f}" in text

    # Memory, of Qwen3-0.6B's shape.
    shape = transformers.Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        number = transformers.AutoModelForCausalLM.from_config(shape).num_parameters()
    assert number == 596_049_920
    monkeypatch.setattr(benchmark, "parameters_and_shape", lambda name: (number, shape))
    rows = re.findall(r"^\| \d+ GB \| (.*) \| (.*) GB \| (.*) GB \|$", page, re.M)
    assert len(rows) == 3
    for options, sampling, updating in rows:
        own = [] if options == "none" else options.strip("`").split()
        parts = benchmark.memory(train.parse_config(["--preset", "qwen3-0.6b", "--output_dir", "x", *own]), 200)
        fixed = parts["weights"] + parts["optimizer"] + parts["half-precision copies"]
        assert f"{fixed + parts['cache']:.1f}" == sampling
        assert f"{fixed + parts['gradients'] + parts['activations'] + parts['logits']:.1f}" == updating
    assert f"{2 / 128:.1%}" in text


def test_the_citation_names_the_paper_and_this_version():
    """The fields that version 1.2.0 of the citation file format requires; the paper; the package's version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["title"] == "SCOPE-RL: Stable and Quantitative Control of Policy Entropy in RL Post-Training"
    assert paper["url"].endswith("2510.08141")
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project
    assert 'name = "scope-rl"' not in project  # another project's, on the package index
