"""theory/lab/probes.py: against autograd, token by token, and by the orders of a step."""

import json
import math

import numpy as np
import pytest
import torch
from lab_helpers import json_lines
from test_neighbours import logits_of

import probes
import train
from entropy import token_entropy


@pytest.fixture
def small_run(home, monkeypatch):
    """A function that sets up a run of one gradient step a step, at a learning rate."""
    monkeypatch.setattr(probes, "SAMPLES", 96)
    monkeypatch.setattr(train, "WARMUP_STEPS", 1)
    options = "--preset tiny --generation_batch_size 32 --num_generations 4 --num_mini_batches 1 "
    options += f"--model {home}/policy --task {home}/easy.py --num_eval_problems 30"

    def make(learning_rate: float = 1e-3, *more: str) -> train.Run:
        torch.manual_seed(0)
        words = [*options.split(), f"--learning_rate={learning_rate}", *more]
        run = train.set_up(train.parse_config(words)) if more else probes.set_up(words)
        # <pad>'s embedding starts as 0, where RMSNorm has a kink, and a random model does sample it.
        pad = run.model.get_input_embeddings().weight.data[run.tokenizer.pad_token_id]
        torch.nn.init.normal_(pad, std=0.3)
        return run

    return make


def test_the_tabular_prediction_token_by_token(small_run):
    run = small_run()
    samples, rewards = probes.draw(run, run.task.train, 20, 1.3)
    assert 0 < rewards.mean() < 1
    _, predicted = probes.direction(run, samples, rewards / 20)
    logits, total = iter(logits_of(run.model, samples).double()), 0.0
    for i, mask in enumerate(samples.completion_mask):
        changes = []
        for token in samples.completions[i][mask]:
            z = next(logits).clone().requires_grad_()
            (of_entropy,) = torch.autograd.grad(token_entropy(z), z)
            (of_logprob,) = torch.autograd.grad(z.log_softmax(0)[token], z)
            changes.append((of_entropy @ of_logprob).item())
        total += rewards[i].item() / 20 * np.mean(changes)
    assert predicted == pytest.approx(total, rel=1e-4)


def test_measured_changes_are_the_gradients_and_the_weights_stay(small_run):
    """The central difference along a step is the inner product of the step and dH / dtheta."""
    run = small_run()
    theta = probes.weights_of(run)
    rows = probes.measure(run, seed=3, batch=40, norm=1e-3)
    assert torch.equal(probes.weights_of(run), theta)
    kinds = {(sign, T) for sign in ("positive", "negative") for T in probes.TEMPERATURES}
    assert {(row["sign"], row["temperature"]) for row in rows} == kinds
    torch.manual_seed(3)
    splits = {"held_out": run.task.test, "training": run.task.train}
    contexts = {name: probes.draw(run, problems, 20, 1.0)[0] for name, problems in splits.items()}
    samples, rewards = probes.draw(run, run.task.train, 40, probes.TEMPERATURES[0])
    for row, weights in zip(rows[:2], (rewards / 40, (rewards - 1) / 40), strict=True):
        assert row["share"] == pytest.approx((weights != 0).float().mean().item())
        gradient, _ = probes.direction(run, samples, weights)
        for name, context in contexts.items():
            expected = (probes.entropy_gradient(run, context) @ gradient).item()
            assert row[name] == pytest.approx(expected, rel=0.02, abs=1e-3)


def test_the_parts_of_a_step_scale_as_their_orders(small_run):
    """AdamW's first step is proportional to the learning rate: `first` doubles with it, `curvature` quadruples."""
    small, large = (probes.one_step(small_run(rate)) for rate in (1e-4, 2e-4))
    assert small["H"] == large["H"]
    assert large["first"] / small["first"] == pytest.approx(2, rel=1e-2)
    assert large["curvature"] / small["curvature"] == pytest.approx(4, rel=0.1)
    rest = [parts["fixed"] - parts["first"] - parts["curvature"] for parts in (small, large)]
    assert rest[1] / rest[0] == pytest.approx(8, rel=0.3)  # third order


def test_taking_a_step_apart_leaves_the_step_alone(small_run):
    run, other = small_run(), small_run()
    probes.one_step(run)
    train.train_step(other)
    assert torch.equal(probes.weights_of(run), probes.weights_of(other))


def test_visited_contexts_weigh_samples_by_their_ratio(small_run):
    run = small_run()
    samples, _ = probes.draw(run, run.task.train, 20, 1.0)
    old, (H, same) = probes.entropies(run, samples, None)
    assert same == H
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    _, (fixed, visited) = probes.entropies(run, samples, old)
    logprobs, token_entropies = probes.score_all(run, samples)
    above, below = 0.0, 0.0
    for i, mask in enumerate(samples.completion_mask):
        ratio = math.exp(sum(logprobs[i, mask].tolist()) - old[i].item())
        above += ratio * sum(token_entropies[i, mask].tolist())
        below += ratio * mask.sum().item()
    assert visited == pytest.approx(above / below, rel=1e-5)
    assert visited != pytest.approx(fixed, rel=1e-3)


def test_the_closed_loop_goes_on_with_a_run_and_leaves_its_folder(small_run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    train.train(small_run(1e-3, f"--output_dir={output}", "--max_steps=2", "--num_eval_problems=0"))
    before = (output / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(probes, "LOOPS", tmp_path / "loops.jsonl")
    arguments = {"output_dir": output, "steps": 2, "save": tmp_path / "mean", "algorithm": "grpo"}
    probes.closed_loop(probes.argparse.Namespace(label="two", **arguments), [])
    assert probes.loop_table().splitlines()[-1].startswith("| two | 2 | ")
    assert set(json.loads(probes.LOOPS.read_text())["steps"]["T"]) == {1}  # GRPO's, of a run of SCOPE
    assert "over 2 steps" in capsys.readouterr().out
    assert (output / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "mean" / "model.safetensors").exists()


def test_one_factor_is_the_weighted_least_squares_fit():
    rows = probes.read_signs()["warm-start"]
    k, chi2, freedom = probes.one_factor(rows, "held_out")
    kinds = sorted({(row["sign"], row["temperature"]) for row in rows})
    groups = [[row for row in rows if (row["sign"], row["temperature"]) == kind] for kind in kinds]
    measured = np.array([[row["held_out"] for row in group] for group in groups])
    predicted = np.array([[row["predicted"] for row in group] for group in groups])
    x, y, w = predicted.mean(1), measured.mean(1), 8**0.5 / measured.std(1, ddof=1)
    (slope,), (misses,), *_ = np.linalg.lstsq((x * w)[:, None], y * w, rcond=None)
    assert (k, chi2, freedom) == (pytest.approx(slope), pytest.approx(misses), 9)


def test_the_closed_loop_s_table_is_in_ten_thousandths_of_a_nat(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "LOOPS", tmp_path / "loops.jsonl")
    steps = {"H": [0.4, 0.5], "T": [1, 1.5], "first": [1e-4, 3e-4], "curvature": [-1e-4, -1e-4]}
    steps |= {"fixed": [5e-4, 5e-4], "visiting": [0.0, 0.0]}
    probes.LOOPS.write_text(json_lines([{"label": "x", "steps": steps}]))
    # Newey and West with one lag: ((1 - 1 / 2 * 1) / 2)^(1/2) = .5, twice
    expected = "| x | 2 | 0.450 | 1.25 | +2.0 ± 1.0 | -1.0 ± 0.0 | +5.0 ± 0.0 | +0.0 ± 0.0 |"
    assert probes.loop_table().splitlines()[-1] == expected
