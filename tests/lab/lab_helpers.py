"""What several test files of the lab need."""

import json
import types

import pytest
import torch

import experiments
import train
import variants

REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
AUXILIARY = torch.tensor([1.0, 0, 1, 1, 0])
TASK = """
import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, text: float(sum(map(ord, text)) % 2))
"""  # about half of all completions are right


def json_lines(rows) -> str:
    """The text of a file of one JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def stops_with_one_line(main, arguments: list[str], message: str) -> None:
    """Assert that a command line ends in an error of one line that matches the message."""
    with pytest.raises(SystemExit, match=message) as stop:
        main(arguments)
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code


def plain_table(variant: variants.Variant, rewards=REWARDS, bonus=0.0) -> variants.Table:
    """The variant's table of a step without auxiliary samples."""
    return variant.objective_table(rewards, torch.zeros(0), 0.0, bonus)


def make_variant(options: str, **run) -> variants.Variant:
    """A variant as it is put into a run of the preset tiny, which is only its config and a step."""
    kinds, arguments = experiments.kinds_and_arguments(options)
    config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])
    run = types.SimpleNamespace(config=config, step=0, **run)
    return type("Made", tuple(kinds) or (variants.Variant,), {})(run)
