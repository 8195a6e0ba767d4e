"""What several test files of the lab need."""

import types

import torch

import experiments
import train
import variants

REWARDS = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
AUXILIARY = torch.tensor([1.0, 0, 1, 1, 0])


def make_variant(options: str, **run) -> variants.Variant:
    """A variant as it is put into a run of the preset tiny, which is only its config and a step."""
    kinds, arguments = experiments.kinds_and_arguments(options)
    config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])
    run = types.SimpleNamespace(config=config, step=0, **run)
    return type("Made", tuple(kinds) or (variants.Variant,), {})(run)
