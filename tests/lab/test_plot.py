"""theory/tools/plot.py: pictures of runs whose files are made by hand, and what it says to what is none."""

import json
import sys
from pathlib import Path

import pytest
from lab_helpers import json_lines
from run_helpers import refused

import plot

pytest.importorskip("matplotlib")
BEFORE = {"before": {"pass@1": 0.1, "pass@4": 0.9, "distinct_correct": 7.5}}
EVALUATED = BEFORE | {"after": {"pass@1": 0.4, "pass@4": 0.9, "distinct_correct": 2.0}}


def write_run(folder: Path, algorithm: str, rewards: list[float], evaluations: dict) -> Path:
    """A run's files, made by hand; metrics end in half a line, as while one is being written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algorithm": algorithm, "scope_target_entropy": 0.4}))
    rows = []
    for i, reward in enumerate(rewards, start=1):
        rows.append({"step": i, "reward": reward, "entropy": reward / 2, "scope_temperature": 1 + reward})
    (folder / "metrics.jsonl").write_text(json_lines(rows) + '{"step": 9, "rew')
    if evaluations:
        (folder / "eval.json").write_text(json.dumps(evaluations))
    return folder


def test_a_picture_shows_what_the_files_of_its_runs_hold(tmp_path):
    """Every point of every panel; H0 and T belong to SCOPE alone; a run that goes on has no end yet."""
    write_run(tmp_path / "a", "scope", [0.1, 0.3, 0.2], EVALUATED)
    write_run(tmp_path / "b", "grpo", [0.5, 0.6], BEFORE)
    write_run(tmp_path / "c", "grpo", [0.8], {})
    runs = {name: plot.read(tmp_path / name) for name in "abc"}
    figure, shown = plot.draw(runs), []
    for axis in figure.axes:
        lines = [line for line in axis.get_lines() if len(line.get_xydata())]
        shown.append([(line.get_label(), line.get_color(), line.get_xydata().tolist()) for line in lines])
    reward, entropy, temperature, pass_at_1, distinct = shown
    assert reward[:2] == [("a", "C0", [[1, 0.1], [2, 0.3], [3, 0.2]]), ("b", "C1", [[1, 0.5], [2, 0.6]])]
    assert entropy[0] == ("a", "C0", [[1, 0.05], [2, 0.15], [3, 0.1]])
    assert entropy[1][2] == [[0, 0.4], [1, 0.4]]  # H0 of a, across the panel
    assert [line[1] for line in entropy] == ["C0", "C0", "C1", "C2"]
    assert temperature == [("a", "C0", [[1, 1.1], [2, 1.3], [3, 1.2]])]
    assert pass_at_1 == [("a", "C0", [[0, 0.1], [3, 0.4]]), ("b", "C1", [[0, 0.1]])]
    assert distinct == [("a", "C0", [[0, 7.5], [3, 2.0]]), ("b", "C1", [[0, 7.5]])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert [len(plot.draw({name: runs[name]}).axes) for name in "abc"] == [5, 4, 2]  # no panel is empty


def test_means_are_over_the_last_twenty_steps(tmp_path, monkeypatch, capsys):
    """Of runs longer and shorter than that, and also without matplotlib."""
    for name, rewards in (("a", [0.9] * 5 + [0.1, 0.3] * 10), ("b", [0.5, 0.6]), ("c", [])):
        write_run(tmp_path / name, "scope" if name == "a" else "grpo", rewards, {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"^error: .*pip install -e '.\[plot\]'$"):
        plot.main(["a", "b", "c"])
    a, b, c = capsys.readouterr().out.splitlines()
    assert a == "a: means over the last 20 steps: entropy 0.100, reward 0.200, T 1.200"
    assert b == "b: means over the last 2 steps: entropy 0.275, reward 0.550"
    assert c == "c: no steps yet"


def test_no_picture_is_overwritten_unless_it_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "qwen3-0.6b", "scope", [0.1], {})
    (tmp_path / "x.svg").touch()
    for name in ("qwen3-0.6b.png", "qwen3-0.6b-2.png", "x.svg"):
        plot.main([str(run)] + (["--output", str(tmp_path / name)] if name == "x.svg" else []))
        assert capsys.readouterr().out.endswith(f"\nthe picture is {tmp_path / name}\n")
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize("file, content, message", [
    ("config.json", "[]", "no run"), ("config.json", "{}", "no run"), ("metrics.jsonl", "1\n", "no run"),
    ("metrics.jsonl", "{}\n", "no run"), ("eval.json", "{", "no run"), ("eval.json", "[]", "no run"),
    ("eval.json", '{"before": {"pass@4": 1}}', "no run"), ("eval.json", '{"step": {"pass@1": 1}}', "no run"),
    ("missing", None, "no run"), ("/nowhere/x.png", None, "nowhere"), ("x.xyz", None, "xyz"),
    ("metrics.jsonl", "", "nothing to draw"),
])  # fmt: skip
def test_what_is_no_run_or_cannot_be_drawn_ends_in_one_line(tmp_path, file, content, message):
    run = write_run(tmp_path / "run", "scope", [0.1], {} if content == "" else EVALUATED)
    if content is not None:
        (run / file).write_text(content)
    line = f"{tmp_path}/missing" if file == "missing" else f"{run} --output {tmp_path / file}"
    refused(line, message.replace("no run", "is not a run of train.py"), plot.main)
