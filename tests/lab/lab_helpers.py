"""What several test files of the lab need."""

import json
import types

import torch

import experiments
import train
import variants

REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
AUXILIARY = torch.tensor([1.0, 0, 1, 1, 0])


def json_lines(rows) -> str:
    """The text of a file of one JSON value a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def plain_table(variant: variants.Variant, rewards=REWARDS, bonus=0.0) -> variants.Table:
    """The variant's table of a step without auxiliary samples."""
    return variant.objective_table(rewards, torch.zeros(0), 0.0, bonus)


def make_variant(options: str, **run) -> variants.Variant:
    """A variant as it is put into a run of the preset tiny, which is only its config and a step."""
    kinds, arguments = experiments.kinds_and_arguments(options)
    config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])
    run = types.SimpleNamespace(config=config, step=0, **run)
    return type("Made", tuple(kinds) or (variants.Variant,), {})(run)
