"""What pages promise: their code runs, their commands work, and calculations that they quote are repeated."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import report
import train

ROOT = Path(__file__).parents[2]
README, QUESTIONS = (ROOT / "README.md").read_text(), (ROOT / "theory" / "QUESTIONS.md").read_text()
OWN_TASK, JUDGE = re.findall(r"```python\n(.*?)```", QUESTIONS, re.DOTALL)
FEW = ["--max_steps=2", "--generation_batch_size=32", "--num_eval_problems=2", "--num_eval_generations=4"]


def run(command: str, folder: Path, *more: str) -> Path:
    """Run a page's `python FILE ...` with more options in a folder of one's own, and return its subfolder run."""
    _, script, *words = shlex.split(command)
    subprocess.run(
        [sys.executable, str(ROOT / script), *words, *more], cwd=folder, check=True, capture_output=True
    )
    return folder / "run"


def test_the_pieces_print_what_their_comments_say(capsys):
    """Each number in the comment behind a `print` is printed, to the digits shown."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(code, {})
    printed = [float(number) for number in re.findall(r"-?\d+\.?\d*", capsys.readouterr().out)]
    for text in re.findall(
        r"(?<!/ )(?<![\d/.])-?\d[\d./]*(?<!\.)", "".join(re.findall(r"\nprint.*  (# .*)", code))
    ):
        top, _, bottom = text.partition("/")
        digits = 4 if bottom else len(top.partition(".")[2])
        assert any(abs(value - float(top) / float(bottom or 1)) <= 0.51 * 10**-digits for value in printed), (
            text
        )


def test_the_first_commands_of_the_readme(tmp_path):
    trainings, (picture,) = (
        re.findall(rf"^python {script} .*$", README, re.M) for script in ("train.py", "theory/tools/plot.py")
    )
    for command in trainings[:2]:
        run(command, tmp_path, *FEW, "--preset=tiny")
    pytest.importorskip("matplotlib")
    run(picture, tmp_path)
    assert len(list(tmp_path.glob("outputs/*.png"))) == 1


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ones_own_task(full, tmp_path):
    """The reward of QUESTIONS' file; its command, for a few steps or all of them, after which it is learnt."""
    path = tmp_path / "my_task.py"
    path.write_text(OWN_TASK)
    task = train.runpy.run_path(str(path))["task"](None)
    assert not set(task.train) & set(task.test)
    right, long = "9+9+6 9+9+5+1 8+8+8 9+9+9-3", "9+9+4+1+1 9+9+9-2-1"
    wrong = [
        "",
        " 9+9+6",
        "9+9+6\n",
        "9+" * 10**6,
        *"9+9+5 9+9+6+1-1+2-2 24 9+9+6=24 9+15 9**9**9 ٩+٩+٦".split(),
    ]
    for expected, completions in ((1, right.split()), (0.5, long.split()), (0, wrong)):
        assert [task.reward(task.train[0], text) for text in completions] == [expected] * len(completions)

    (command,) = re.findall(r"^`(python train.py .*--task my_task.py[^`]*)`", QUESTIONS, re.M)
    folder = run(command, tmp_path, *([] if full else FEW), "--output_dir=run")
    rewards = [json.loads(row)["reward"] for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not full or (rewards[0] < 0.4 and np.mean(rewards[-20:]) > 0.9)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_recipe_for_ones_own_questions(real, tmp_path):
    """A few steps of the tiny model on sums, or training of SmolLM2-135M-Instruct, if SMOLLM2 names its folder."""
    model, question, steps = (
        os.environ.get("SMOLLM2"),
        "Anna has {} apples and gets {} more. How many?",
        ["--max_steps=20"],
    )
    if not real:
        model, question, steps = str(ROOT / "theory" / "tiny" / "start-1"), "{}+{}=", FEW
    if model is None:
        pytest.skip("SMOLLM2 is not set")
    lines = [
        json.dumps({"question": question.format(a, b), "answer": a + b})
        for a in range(2, 15)
        for b in range(2, 15)
    ]
    (tmp_path / "FILE").write_text("\n".join(lines))
    (command,) = re.findall(r"^python train.py .*--train_file FILE.*$", QUESTIONS, re.M)
    evaluations = json.loads(
        (run(command, tmp_path, "--model", model, "--output_dir=run", *steps) / "eval.json").read_text()
    )
    assert not real or evaluations["before"]["pass@1"] < 0.6 < 0.8 < evaluations["after"]["pass@1"]


def test_math_verify_as_a_judge(tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    answers = [r"\frac{1}{2}", "x^2+2x+1", "42"]
    Path("train.jsonl").write_text(
        "\n".join(json.dumps({"question": answer, "answer": answer}) for answer in answers)
    )
    scope = {}
    exec(JUDGE, scope)
    task = scope["task"](None)
    half, square = task.train
    assert [task.reward(half, text) for text in (r"\boxed{\frac{2}{4}}", "so $0.5$", "2", "")] == [1, 1, 0, 0]
    assert task.reward(square, r"\boxed{(x+1)^2}") == 1


def test_the_calculations_of_the_questions():
    """How often groups have equal rewards, and what share of the distance alpha held."""
    for rate, *shares in re.findall(r"^\| (\d+)% .*\| (\d+)% \| (\d+)% \|$", QUESTIONS, re.M):
        p = int(rate) / 100
        assert [int(share) for share in shares] == [round(100 * (p**n + (1 - p) ** n)) for n in (8, 16)]
    H = {
        label: np.mean([row["entropy"] for row in cell.values()])
        for label, cell in report.cells_of("alpha").items()
    }
    labels = {"1/16": "share 1/4, weight 1/16", "1/4": "share and weight 1/4", "1": "share 1/4, weight 1"}
    for alpha, share in re.findall(r"^\| ([\d/]+) \| .* \| (\d+)% \|", QUESTIONS, re.M):
        held = (H[labels[alpha]] - H["0 (GRPO)"]) / (0.4 - H["0 (GRPO)"])
        assert 100 * held == pytest.approx(int(share), abs=1.5)


def test_the_links_of_all_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "theory").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), (page, link)


def test_the_citation_names_the_paper_and_this_version():
    """The fields that version 1.2.0 of the citation file format requires."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()
    assert citation["preferred-citation"]["url"].endswith("2510.08141")
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()
