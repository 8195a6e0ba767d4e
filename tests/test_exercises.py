"""theory/EXERCISES.md: each diff is applied to a copy of the project, and there its answer must be true."""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pytest import approx
from run_helpers import ROOT, rows_of

PAGE = (ROOT / "theory" / "EXERCISES.md").read_text()
EXERCISES = {int(part.split(".")[0]): part for part in PAGE.split("\n## ")[1:] if part[0].isdigit()}
DIFFS = {n: re.findall(r"```diff\n(.*?)```", text, re.DOTALL) for n, text in EXERCISES.items()}
FAILING = [(n, test) for n, text in EXERCISES.items() for test in re.findall(r"Fails: `(\S+)`", text)]
SNIPPETS = {n: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for n, text in EXERCISES.items()}
COMMANDS = {n: re.findall(r"^python (train.py .*)$", text, re.M) for n, text in EXERCISES.items()}
CORE = "entropy", "reward", "rollout", "scope_rl", "train", "countdown"


def copy_of_the_project(folder: Path, diffs: list[str]) -> Path:
    """The core, theory/tiny and the tests, with diffs applied by git as a reader would."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "theory" / "tiny", folder / "theory" / "tiny", ignore=ignore)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignore)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for diff in diffs:
        subprocess.run(["git", "apply", "-"], cwd=folder, env=alone, input=diff, text=True, check=True)
    return folder


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A function that makes a changed copy what `import train` and the like find, in this process."""
    before = {name: sys.modules[name] for name in CORE if name in sys.modules}

    def change(diffs: list[str]) -> Path:
        folder = copy_of_the_project(tmp_path / f"copy-{len(diffs)}", diffs)
        for name in CORE:
            sys.modules.pop(name, None)
        monkeypatch.syspath_prepend(str(folder / "theory" / "tiny"))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.chdir(folder)
        assert importlib.import_module("train").__file__ == str(folder / "train.py")
        return folder

    yield change
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    sys.modules.update(before)


def test_each_of_the_twelve_exercises_has_a_change_and_something_to_run():
    assert list(EXERCISES) == list(range(1, 13))
    for number in EXERCISES:
        assert DIFFS[number] or number == 12
        assert SNIPPETS[number] or COMMANDS[number]


@pytest.mark.parametrize(("number", "test"), FAILING)
def test_the_tests_that_an_exercise_names_fail(number, test, changed):
    """By what they assert, not for another reason. Unchanged they pass, or the whole suite would say so."""
    folder = changed(DIFFS[number][:1])
    options = ["-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = pytest.main([*options, "-c", str(folder / "pyproject.toml"), str(folder / test)])
    assert code == pytest.ExitCode.TESTS_FAILED, printed.getvalue()
    assert re.search(r"^E +(AssertionError|assert )", printed.getvalue(), re.M), printed.getvalue()


def printed_numbers(code: str) -> list[float]:
    """The numbers that lines of Python print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return [float(number) for number in printed.getvalue().split()]


@pytest.mark.parametrize("number", [n for n, text in EXERCISES.items() if "It prints" in text])
def test_what_is_printed_is_what_the_answer_says(number, changed):
    """Before and after the change, to the digits that the answer shows (`before -> after`, in the order printed)."""
    (shown,) = re.findall(r"It prints (.*?)\.\s", EXERCISES[number], re.DOTALL)
    pairs = re.findall(r"([\d.]+%?) -> ([\d.]+%?)", " ".join(shown.split()))
    for diffs, texts in zip(([], DIFFS[number]), zip(*pairs, strict=True), strict=True):
        changed(diffs)
        for text, value in zip(texts, printed_numbers(SNIPPETS[number][0]), strict=True):
            digits = len(text.rstrip("%").partition(".")[2])
            scale = 100 if text.endswith("%") else 1
            assert value * scale == approx(float(text.rstrip("%")), abs=3 * 10**-digits), text


def test_the_rule_of_the_challenge_runs_and_is_measured(tmp_path):
    (tmp_path / "my_rule.py").write_text(SNIPPETS[12][0])
    (command,) = re.findall(r"^python (theory/lab/beat.py my_rule.py)$", EXERCISES[12], re.M)
    script, rule = command.split()
    words = [sys.executable, ROOT / script, rule, "--max_steps=35", "--generation_batch_size=16"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two would wait for each other on a busy machine
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True, env=one_thread)
    lines = [line for line in done.stdout.splitlines() if "settled" in line]
    own = [line for line in lines if line.startswith("yours")]
    assert own == [lines[0], lines[len(lines) // 2]]
    assert set(lines) - set(own) <= set(EXERCISES[12].splitlines())


# --- The curves that move
def trained(folder: Path, command: str) -> dict[str, float]:
    """Means over the last 20 of the steps that a command of the page takes, and the lowest ten-step entropy."""
    words = shlex.split(command)
    output = folder / words[words.index("--output_dir") + 1]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
    rows = rows_of(output)
    tens = np.array([row["entropy"] for row in rows]).reshape(-1, 10).mean(1)
    means = {key: float(np.mean([row[key] for row in rows[-20:]])) for key in rows[0]}
    return means | {"lowest": float(tens.min())}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The two runs at the head of the page, to compare with: SCOPE and GRPO."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("unchanged") / "copy", [])
    commands = re.findall(r"^python (train.py .*)$", PAGE.split("\n## ")[0], re.M)
    return [trained(folder, command) for command in commands]


MOVES = {  # what run i of an exercise must show, with room for another machine's rounding
    (2, 0): lambda own, scope, grpo: own["grad_norm"] < 0.8 * grpo["grad_norm"],
    (5, 0): lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.08,
    (6, 0): lambda own, scope, grpo: own["lowest"] < scope["lowest"] - 0.06,
    (6, 1): lambda own, *_: own["entropy"] == approx(0.4 - (own["scope_temperature"] - 1) / 2, abs=0.01),
    (7, 0): lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.03,
    (8, 0): lambda own, scope, grpo: own["entropy"] == approx(scope["entropy"], abs=0.03),
    (9, 0): lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.03,
    (10, 0): lambda own, scope, grpo: own["entropy"] == approx(0.4, abs=0.03),
    (11, 0): lambda own, scope, grpo: own["entropy"] > grpo["entropy"] + 0.08,
    (11, 1): lambda own, scope, grpo: own["entropy"] > grpo["entropy"] + 0.15,
}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "i"), [(n, i) for n, runs in COMMANDS.items() for i in range(len(runs))])
def test_the_curve_moves_as_the_answer_says(number, i, unchanged, tmp_path):
    """The runs of an exercise against SCOPE's and GRPO's. The second diff, if there is one, is for the second run."""
    folder = copy_of_the_project(tmp_path / "copy", DIFFS[number][: i + 1])
    own = trained(folder, COMMANDS[number][i])
    assert MOVES[number, i](own, *unchanged), own
