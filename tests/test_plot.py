"""theory/lab/plot.py: pictures of runs whose files are made by hand, and what it says to what is none."""

import json
import sys
from pathlib import Path

import pytest

import plot


def write_run(folder: Path, algorithm: str, rewards: list[float], evaluations: dict) -> Path:
    """A run's files, made by hand; metrics end in half a line, as while one is being written."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"algorithm": algorithm, "scope_target_entropy": 0.4}))
    lines = [
        {"step": i, "reward": reward, "entropy": reward / 2, "scope_temperature": 1 + reward, "loss": 9.0}
        for i, reward in enumerate(rewards, start=1)
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(metrics + '{"step": 9, "rew')
    (folder / "eval.json").write_text(json.dumps(evaluations))
    return folder


def test_a_picture_shows_what_the_files_of_its_runs_hold(tmp_path):
    """Every point of every panel; H0 and T belong to SCOPE alone; a run that goes on has no end yet."""
    pytest.importorskip("matplotlib")
    passed = {"before": {"pass@1": 0.1, "pass@4": 0.9}, "step 1": {"pass@1": 0.2}, "step 2": {"pass@1": 0.3}}
    passed["after"] = {"pass@1": 0.4}
    scope = write_run(tmp_path / "a", "scope", [0.1, 0.3, 0.2], passed)
    grpo = write_run(tmp_path / "b", "grpo", [0.5, 0.6], {"before": {"pass@1": 0.7}})
    unevaluated = write_run(tmp_path / "c", "grpo", [0.8], {"before": {}})
    figure = plot.draw({run.name: plot.read(run) for run in (scope, grpo, unevaluated)})
    shown = []
    for axis in figure.axes:
        shown.append([(line.get_label(), line.get_color(), line.get_xydata().tolist()) for line in axis.get_lines()])
    reward, entropy, temperature, pass_at_1 = shown
    assert reward == [
        ("a", "C0", [[1, 0.1], [2, 0.3], [3, 0.2]]), ("b", "C1", [[1, 0.5], [2, 0.6]]), ("c", "C2", [[1, 0.8]]),
    ]  # fmt: skip
    assert entropy[0] == ("a", "C0", [[1, 0.05], [2, 0.15], [3, 0.1]])
    assert [points for _, color, points in entropy if color == "C0"][1] == [[0, 0.4], [1, 0.4]]  # across the panel
    assert len(entropy) == 4
    assert temperature == [("a", "C0", [[1, 1.1], [2, 1.3], [3, 1.2]])]
    assert pass_at_1[:2] == [("a", "C0", [[0, 0.1], [1, 0.2], [2, 0.3], [3, 0.4]]), ("b", "C1", [[0, 0.7]])]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]


def plotted(monkeypatch, capsys, *arguments) -> str:
    """What the command says, on either channel."""
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments)])
    try:
        plot.main()
    except SystemExit as stop:
        assert stop.code.startswith("error: ")
        return stop.code
    return capsys.readouterr().out


def test_the_picture_lies_beside_the_first_run_or_where_it_is_wanted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "qwen3-0.6b", "scope", [0.1], {"before": {}})
    second = write_run(tmp_path / "other", "grpo", [0.1], {"before": {}})
    for more, picture in (([], tmp_path / "qwen3-0.6b.png"), (["--output", tmp_path / "x.svg"], tmp_path / "x.svg")):
        assert plotted(monkeypatch, capsys, first, second, *more) == f"the picture is {picture}\n"
        assert picture.stat().st_size > 10_000
    monkeypatch.chdir(first)
    assert "qwen3-0.6b.png" in plotted(monkeypatch, capsys, ".")


def test_what_is_no_run_or_cannot_be_drawn_ends_in_one_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", "scope", [0.1], {"before": {}})
    missing = tmp_path / "missing"
    assert f"{missing} is not a run of train.py: FileNotFoundError" in plotted(monkeypatch, capsys, run, missing)
    for file, content in (
        ("config.json", "[]"), ("config.json", "{}"), ("metrics.jsonl", "1\n"), ("metrics.jsonl", "{}\n"), ("eval.json", "{"),
        ("eval.json", "[]"), ("eval.json", '{"before": {"pass@4": 1}}'), ("eval.json", '{"step": {"pass@1": 1}}'),
    ):  # fmt: skip
        whole = (run / file).read_text()
        (run / file).write_text(content)
        said = plotted(monkeypatch, capsys, run)
        assert "is not a run of train.py" in said
        assert "\n" not in said
        (run / file).write_text(whole)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'needs matplotlib: pip install -e ".[plot]"' in plotted(monkeypatch, capsys, run)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert "nowhere" in plotted(monkeypatch, capsys, run, "--output", "/nowhere/x.png")
    assert "xyz" in plotted(monkeypatch, capsys, run, "--output", tmp_path / "x.xyz")
