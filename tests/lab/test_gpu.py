"""theory/lab/gpu.py on a CPU: all its parts run at small sizes, and its checks can fail."""

import argparse
import json
import shutil

import pytest
import torch

import gpu
import graphs
import rollout


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_at_small_sizes(part, model_folder, tmp_path):
    """The folder of the larger model has no weights yet, as where there is no network."""
    shape = shutil.copytree(model_folder, tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(SystemExit) as end:
        gpu.main([part, str(tmp_path), "--toy", "--qwen", str(shape), "--smollm", str(model_folder)])
    assert end.value.code == 0
    content = json.loads((tmp_path / f"{part}.json").read_text())
    assert content["finished"] and content["random weights"] == [str(shape)] and len(content["figures"]) >= 5
    assert not list(shape.glob("*.safetensors"))
    if part == "works":
        assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 5


def test_a_failed_check_is_noted_and_ends_with_1(tmp_path, monkeypatch):
    def part(report):
        for name, value in (("fine", 1.0), ("too large", 2.0), ("no number", float("nan"))):
            report.note(name, value, at_most=1.5)
        report.note("too large for a real one", 2.0, at_most=1.5, of_size=True)
        raise torch.OutOfMemoryError("there is none")

    monkeypatch.setitem(gpu.PARTS, "right", part)
    for toy, failed in ((["--toy"], 3), ([], 4)):
        with pytest.raises(SystemExit) as end:
            gpu.main(["right", str(tmp_path), "--qwen", "x", "--smollm", "x", *toy])
        assert end.value.code == 1
        content = json.loads((tmp_path / "right.json").read_text())
        assert len(content["failed"]) == failed and not content["finished"]


def test_scores_of_another_policy_are_found(model_folder, tmp_path, monkeypatch):
    args = argparse.Namespace(
        part="right", out=tmp_path, qwen=str(model_folder), smollm=str(model_folder), toy=True
    )
    score = rollout.score

    def of_another(model, samples, rows):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1.001)
        return score(model, samples, rows)

    monkeypatch.setattr(rollout, "score", of_another)
    report = gpu.Report(args, tmp_path)
    gpu.right(report)
    assert "bf16 false, log p: mean distance, nats" in report.failed


@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 0.1)])
def test_decoding_from_a_recording_draws_the_same_tokens(bf16, tolerance, model_folder, monkeypatch):
    """On a CPU all of it but the capture: the fixed cache, copied inputs, prompts of three lengths."""
    model, tokenizer = rollout.load_policy(str(model_folder), bf16)
    prompts = ["1+2=", "12+34+5=", "7="] * 4
    uniforms = torch.rand(12, 20, dtype=torch.float64)
    temperatures = torch.linspace(0.7, 1.5, 12)
    plain = rollout.generate(model, tokenizer, prompts, temperatures, 20, uniforms)
    forward = model.base_model.forward
    monkeypatch.setattr(rollout, "decode", graphs.decode)
    other = rollout.generate(model, tokenizer, prompts, temperatures, 20, uniforms)
    assert model.base_model.forward == forward
    if not bf16:  # whose rounding may turn a draw
        assert other.texts == plain.texts and not plain.truncated.all()
        torch.testing.assert_close(other.entropies, plain.entropies, atol=tolerance, rtol=0)
    scored, _ = rollout.score(model, other, torch.arange(12))
    torch.testing.assert_close(other.logprobs, scored, atol=tolerance, rtol=0)
