"""theory/tools/benchmark.py: what it measures learns, what it adds up is there, and what it says has units."""

import re

import pytest

import benchmark

SMALL = "--generation_batch_size 16 --num_generations 4 --max_completion_length 6 --num_eval_problems 0"


def said(capsys, arguments: str) -> list[str]:
    benchmark.main(arguments.split())
    return capsys.readouterr().out.splitlines()


def test_every_completion_teaches_though_none_is_right(capsys, model_folder):
    """A random model answers nothing; its auxiliary completions teach as well."""
    lines = said(capsys, f"speed --repeats 2 --preset tiny --model {model_folder} {SMALL}")
    names = ["sampling", "update", "step"]
    for line, name in zip(lines, names, strict=False):
        assert re.fullmatch(rf"{name} +[\d.]+ s +\([\d.]+ to [\d.]+ s\)", line)
    assert lines[3:5] == [
        "a step: 4 prompts x 4 completions, 2 gradient steps",
        lines[4],
    ] and lines[4].startswith("ours: 20 of 20 completions taught in each step")
    assert lines[5].endswith(" GB")


def test_the_peer_takes_the_same_steps(capsys):
    pytest.importorskip("trl")
    lines = said(capsys, f"speed --peer --repeats 2 --preset tiny {SMALL} --per_device_train_batch_size 8")
    assert re.fullmatch(r"TRL's step / ours +[\d.]+ times +\([\d.]+ to [\d.]+ times\)", lines[4])
    assert lines[5] == "a step: 4 prompts x 4 completions, 1 gradient steps"
    assert [line.partition(" completions")[0] for line in lines[6:8]] == ["ours: 16 of 16", "TRL: 16 of 16"]
