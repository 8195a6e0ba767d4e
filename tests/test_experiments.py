"""theory/experiments.py: its grid is made of options that train.py takes, and its intervals are Student's."""

import json
import math

import pytest

import experiments
import train


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_cell_of_the_grid_is_a_config_of_its_own(experiment):
    configs = {}
    for label, options in experiments.EXPERIMENTS[experiment].items():
        config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *options.split()])
        configs[label] = str(config)
    assert len(set(configs.values())) == len(configs)


def test_intervals_and_what_is_known(tmp_path, monkeypatch):
    mean, half = experiments.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    assert math.isnan(experiments.interval([1.0])[1])
    monkeypatch.setattr(experiments, "RESULTS", tmp_path / "results.jsonl")
    assert experiments.read_results("control") == []
    rows = [{"experiment": "control", "label": "a"}, {"experiment": "alpha", "label": "b"}]
    experiments.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert experiments.read_results("control") == rows[:1]
