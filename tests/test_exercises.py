"""theory/EXERCISES.md: every diff is applied to a copy of the project, and what its answer says is looked at there."""

import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import arguments  # noqa: F401  (a fixture that the tests of train.py take)

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "theory" / "EXERCISES.md").read_text()
EXERCISES = {int(part.split(".")[0]): part for part in PAGE.split("\n## ")[1:] if part[0].isdigit()}
FAILING = {n: re.findall(r"Fails: `(\w+/\w+\.py)::(\w+)`", text) for n, text in EXERCISES.items()}
LOOKS = {n: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for n, text in EXERCISES.items()}
RUNS = {n: re.findall(r"^python (train.py .*)$", text, re.M) for n, text in EXERCISES.items()}
CORE = ("entropy", "reward", "rollout", "scope_rl", "train", "countdown")


def copy_of_the_project(folder: Path, number: int | None) -> Path:
    """The core, theory/tiny and the tests, with the exercise's diff applied by git as its reader would."""
    shutil.copytree(ROOT / "theory" / "tiny", folder / "theory" / "tiny")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    if number is not None:
        (diff,) = re.findall(r"```diff\n(.*?)```", EXERCISES[number], re.DOTALL)
        alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        subprocess.run(["git", "apply", "-"], cwd=folder, env=alone, input=diff, text=True, check=True)
    return folder


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A function that makes the changed copy what `import train` and the like find, in this process."""

    def change(number: int | None) -> Path:
        folder = copy_of_the_project(tmp_path / f"copy-{number}", number)
        for name in CORE:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(folder / "theory" / "tiny"))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.chdir(folder)
        assert importlib.import_module("train").__file__ == str(folder / "train.py")
        return folder

    yield change
    for name in CORE:  # what the copy's modules imported of each other
        sys.modules.pop(name, None)


def test_the_page_has_ten_exercises_of_one_shape():
    assert list(EXERCISES) == list(range(1, 11))
    for number, text in EXERCISES.items():
        order = [text.index(mark) for mark in ("```diff", "**Predict:**", "<details>", "</details>")]
        assert order == sorted(order), number
        assert FAILING[number] or number == 10
        assert LOOKS[number] or RUNS[number]


@pytest.mark.parametrize(("number", "file", "name"), [(n, *where) for n, tests in FAILING.items() for where in tests])
def test_the_tests_that_an_exercise_names_fail(number, file, name, changed, request):
    """By what they assert, not for another reason; unchanged they pass, or the whole suite would say so."""
    specification = importlib.util.spec_from_file_location(f"exercise_{number}", changed(number) / file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    function = getattr(module, name)
    assert not [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    given = {argument: request.getfixturevalue(argument) for argument in inspect.signature(function).parameters}
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        function(**given)


def look(number: int) -> list[float]:
    """The numbers that the exercise's lines of Python print."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(LOOKS[number][0], {})
    return [float(number) for number in printed.getvalue().split()]


@pytest.mark.parametrize("number", [n for n, code in LOOKS.items() if code])
def test_what_is_printed_is_what_the_answer_says(number, changed):
    """Before and after the change, to the digits that the answer shows (`before -> after`, in the order printed)."""
    (shown,) = re.findall(r"It prints (.*?)\.\s", EXERCISES[number], re.DOTALL)
    pairs = re.findall(r"([\d.]+%?) -> ([\d.]+%?)", " ".join(shown.split()))
    changed(None)
    before = look(number)
    changed(number)
    after = look(number)
    assert len(pairs) == len(before) == len(after)
    for pair, values in zip(pairs, zip(before, after, strict=True), strict=True):
        for text, value in zip(pair, values, strict=True):
            scale = 100 if text.endswith("%") else 1
            digits = len(text.rstrip("%").partition(".")[2])
            assert value * scale == pytest.approx(float(text.rstrip("%")), abs=3 * 10**-digits), (number, pair)


# --- The curves that move


def trained(folder: Path, command: str, name: str) -> dict[str, float]:
    """Means over the last 20 of the steps that a command of the page takes, in a copy."""
    output = folder / "outputs" / name
    words = shlex.split(command)
    words[words.index("--output_dir") + 1] = str(output)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, capture_output=True)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][-20:]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The two runs at the head of the page, to compare with: SCOPE and GRPO."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("unchanged") / "copy", None)
    commands = re.findall(r"^python (train.py .*)$", PAGE.split("\n## ")[0], re.M)
    return [trained(folder, command, str(i)) for i, command in enumerate(commands)]


MOVES = {
    2: lambda own, scope, grpo: own["grad_norm"] < 0.7 * grpo["grad_norm"],
    5: lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.06,
    6: lambda own, scope, grpo: (
        own["entropy"] < scope["entropy"] - 0.02
        and own["entropy"] == pytest.approx(0.4 - (own["scope_temperature"] - 1) / 2, abs=0.01)
    ),
    7: lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.02 and own["scope_temperature"] > 1.35,
    8: lambda own, scope, grpo: own["entropy"] == pytest.approx(scope["entropy"], abs=0.04),
    9: lambda own, scope, grpo: own["entropy"] < scope["entropy"] - 0.04 and own["scope_temperature"] > 1.35,
    10: lambda own, scope, grpo: own["entropy"] == pytest.approx(0.4, abs=0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [n for n, commands in RUNS.items() if commands])
def test_the_curve_moves_as_the_answer_says(number, unchanged, tmp_path):
    """The run of the exercise against SCOPE's and GRPO's, with room for another machine's rounding."""
    own = trained(copy_of_the_project(tmp_path / "copy", number), RUNS[number][0], "own")
    assert MOVES[number](own, *unchanged), own
