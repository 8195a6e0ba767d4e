"""theory/tools/benchmark.py: what is measured learns, and what is added up is there."""

import re
import sys

import pytest
import torch
import transformers
from run_helpers import refused

import benchmark
import train

SMALL = "--generation_batch_size 16 --num_generations 4 --max_completion_length 6 --num_eval_problems 0"


def said(capsys, arguments: str) -> list[str]:
    benchmark.main(arguments.split())
    return capsys.readouterr().out.splitlines()


def test_every_completion_teaches_though_none_is_right(capsys, model_folder):
    """A random model answers nothing. Its auxiliary completions teach as well."""
    lines = said(capsys, f"speed --repeats 2 --preset tiny --model {model_folder} {SMALL}")
    for line, name in zip(lines, ("sampling", "update", "step"), strict=False):
        assert re.fullmatch(rf"{name} +[\d.]+ s +\([\d.]+ to [\d.]+ s\)", line)
    assert lines[3] == "a step: 4 prompts x 4 completions, gradient steps: 2"
    assert lines[4].startswith("ours: 20 of 20 completions taught in each step")
    assert lines[5].endswith(" GB")


def test_the_peer_takes_the_same_steps(capsys):
    pytest.importorskip("trl")
    lines = said(capsys, f"speed --peer --repeats 2 --preset tiny {SMALL} --per_device_train_batch_size 8")
    assert re.fullmatch(r"TRL's step / ours +[\d.]+ times +\([\d.]+ to [\d.]+ times\)", lines[4])
    assert lines[5] == "a step: 4 prompts x 4 completions, gradient steps: 1"
    assert [line.partition(" completions")[0] for line in lines[6:8]] == ["ours: 16 of 16", "TRL: 16 of 16"]


def test_memory_counts_what_a_model_holds(model_folder):
    """Weights and cache of a real model, in bytes; AdamW's two moments; what exists at once."""
    options = f"--preset tiny --output_dir x --model {model_folder} {SMALL} --bf16 false".split()
    parts = benchmark.memory(train.parse_config(options), prompt_length=10)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    bytes = sum(weight.nbytes for weight in model.parameters())
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] / 2 == bytes / 1e9
    rows, tokens = 20, 10 + 6
    cache = transformers.DynamicCache()
    model(torch.ones(rows, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert parts["cache"] == pytest.approx(bytes / 1e9)
    always = parts["weights"] + parts["optimizer"]
    assert parts["peak while sampling"] == pytest.approx(always + parts["cache"] + parts["drawing a token"])
    updating = parts["gradients"] + parts["activations"] + parts["logits"]
    assert parts["peak while updating"] == pytest.approx(always + updating)


@pytest.mark.parametrize("arguments, message", [
    ("speed --peer --algorithm scope", "--algorithm grpo"), ("speed --peer --num_mini_batches 2", "one mini-batch"),
    ("memory --model /no/such/folder", "cannot read the config of /no/such/folder"),
    ("memory --scope_weight 1", "scope_weight"), ("speed", r"datasets.*pip install -e '.\[trl\]'$"),
])  # fmt: skip
def test_what_cannot_work_ends_in_one_line(monkeypatch, arguments, message):
    if arguments == "speed":
        arguments = "speed --peer --preset tiny"
        monkeypatch.setitem(sys.modules, "datasets", None)
    else:
        pytest.importorskip("trl")
    refused(arguments, message, benchmark.main)
