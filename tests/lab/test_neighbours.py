"""theory/lab/neighbours.py: each against an independent way to its numbers."""

import math

import numpy as np
import pytest
import torch
from lab_helpers import AUXILIARY, REWARDS, make_variant, plain_table

import neighbours
import rollout
import scope_rl
from entropy import token_entropy

N = REWARDS.numel()
SMALL = "--generation_batch_size 12 --num_generations 4"
PROMPTS = ["1,2,3:6=", "4,5,6:11=", "1,1,9:3="]
TINY = [prompt for prompt in PROMPTS for _ in range(4)]
NUMBER = torch.arange(15)[:, None]


def random_mask(length: int) -> torch.Tensor:
    """`[N, length]`, with one token at least in each row."""
    return (torch.rand(N, length) < 0.8) | (torch.arange(length) == 0)


def logits_of(model, samples) -> torch.Tensor:
    """The logits of each completion's tokens in a row of its own, one after the other: `[tokens, V]`."""
    rows = []
    for i, mask in enumerate(samples.completion_mask):
        p = samples.owner[i]
        prompt, completion = samples.prompts[p][samples.prompt_mask[p] == 1], samples.completions[i][mask]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("name", neighbours.NEIGHBOURS)
def test_auxiliary_samples_count_as_in_the_core(name, random_model, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXPLORERS", tmp_path)
    (tmp_path / "smaller-0").symlink_to(model_folder)
    variant = make_variant(f"@{name} {SMALL}", model=random_model())
    variant(0.3)
    variant.ratios = torch.rand(N + 5, 4)
    x, mask, losses = -torch.rand(5, 4), torch.ones(5, 4, dtype=torch.bool), []
    for own in (variant, scope_rl):
        table = own.objective_table(REWARDS, AUXILIARY, 0.5, 0.0).rows(torch.arange(N, N + 5))
        losses.append(own.scope_loss(x, x - 0.1, -x, mask, table, 0.2, None)[0])
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)


def test_opefo_makes_the_flows_equal():
    variant, mask = make_variant(f"@opefo {SMALL}"), random_mask(6)
    table, logprobs, H = plain_table(variant), -torch.rand(N, 6), 1.5 * torch.rand(N, 6)
    usual = table.advantages[:, None].expand(N, 6)
    A = variant.token_advantages(logprobs, H, mask, table)
    before, after = (-(a * logprobs.exp() * (logprobs + H))[mask].sum() for a in (usual, A))
    assert abs(before) > 0.05 and abs(after) < 1e-5
    assert torch.equal(A.sign(), usual.sign())


def test_avspo_counts_virtual_rewards_in_mean_and_deviation():
    rewards = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
    K = math.ceil(4 * 0.75**0.5)  # three of four are equal
    A = plain_table(make_variant("@avspo"), rewards).advantages.view(4, 4)
    for group, row in zip(rewards.tolist(), A.tolist(), strict=True):
        every = group if len(set(group)) > 1 else group + [0.9 if group[0] else 0.1] * K
        expected = [(r - np.mean(every)) / np.std(every) for r in group]
        assert row == pytest.approx(expected, abs=1e-3)
    assert A[0, 0] == pytest.approx((K / 4) ** 0.5, rel=1e-5)
    few = plain_table(make_variant("@avspo")).advantages  # one of three
    assert few.tolist() == scope_rl.group_advantages(REWARDS).flatten().tolist()


@pytest.mark.parametrize(("step", "foreign"), [(0, 4), (35, 2), (69, 0)])
def test_s2l_po_takes_a_smaller_models_answers(step, foreign, random_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(neighbours, "EXPLORERS", tmp_path)
    random_model(hidden_size=16).save_pretrained(tmp_path / "smaller-1")
    tokenizer.save_pretrained(tmp_path / "smaller-1")
    variant, model = make_variant(f"@s2l_po {SMALL} --seed 1 --max_steps 100"), random_model()
    variant.run.step = step
    samples = variant.generate(model, tokenizer, TINY + PROMPTS, torch.ones(15), 6)
    mask, chosen = samples.completion_mask, samples.completions[samples.completion_mask]
    of_policy, of_explorer = (logits_of(m, samples).log_softmax(-1) for m in (model, variant.explorer))
    number = NUMBER.expand(mask.shape)[mask]
    is_foreign = (number < 12) & (number % 4 < foreign)
    expected = torch.where(is_foreign[:, None], of_explorer, of_policy).gather(1, chosen[:, None])[:, 0]
    assert torch.allclose(samples.logprobs[mask], expected, atol=1e-4)
    assert torch.allclose(samples.entropies[mask], token_entropy(of_policy), atol=1e-4)
    kept = [row[m] for row, m in zip(samples.completions, mask, strict=True)]
    assert samples.texts == tokenizer.batch_decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize(("H", "T"), [(0.35, 1.2), (0.9, 0.8)])
def test_dcpo_mixes_in_the_policy_at_another_temperature(H, T, random_model, tokenizer):
    variant, model = make_variant(f"@dcpo {SMALL} --scope_target_entropy 0.4"), random_model()
    variant(H)
    samples = variant.generate(model, tokenizer, TINY, torch.ones(12), 6)
    table = plain_table(variant)
    mask, z = samples.completion_mask, logits_of(model, samples).double()
    tokens = samples.completions[mask][:, None]
    ratio = ((z / T).softmax(-1) / z.softmax(-1)).gather(1, tokens)[:, 0]
    a = min(abs(0.4 - H), 0.1) / (7 / 12)  # 7 of 12 are right
    m = a / (1 + a)
    number = NUMBER[:12].expand(mask.shape)[mask]
    usual = scope_rl.group_advantages(REWARDS).flatten()
    expected = (1 - m) * usual[number] + m * REWARDS.flatten()[number] * ratio
    assert table.has_gradient().tolist() == [True] * 12  # also where all of a group are right, and A = 0
    A = variant.token_advantages(samples.logprobs, samples.entropies, mask, table)
    assert torch.allclose(A[mask].double(), expected, atol=1e-4)
    assert not model.base_model._forward_hooks


def test_stare_raises_the_weight_of_the_rarest_tenth_of_good_tokens():
    variant, mask = make_variant(f"@stare {SMALL} --scope_target_entropy 0.4"), random_mask(8)
    table, logprobs = plain_table(variant), -torch.rand(N, 8)
    variant(0.3)
    variant(0.3)  # W = 1.12
    A = variant.token_advantages(logprobs, -logprobs, mask, table)
    good = [(logprobs[i, t].item(), i, t) for i, t in mask.nonzero().tolist() if table.advantages[i] > 0]
    rare = {(i, t) for _, i, t in sorted(good)[: math.ceil(len(good) / 10)]}
    for i, t in mask.nonzero().tolist():
        factor = 1.12 if (i, t) in rare else 1.0
        assert A[i, t].item() == pytest.approx(factor * table.advantages[i].item())
    variant(0.5)
    assert torch.equal(variant.token_advantages(logprobs, -logprobs, mask, table)[:, 0], table.advantages)
    assert pytest.approx(1.11) == variant.W


def test_all_samples_at_t_are_sampled_and_scored_as_one_policy(random_model, tokenizer):
    model = random_model()
    variant = make_variant("@all_at_t --scope_target_entropy 0.4 --max_steps 9", model=model)
    variant(0.8)
    V = model.get_input_embeddings().num_embeddings
    T = 1 + math.log(0.4 / 0.8) / (math.log(V) + math.log(math.log(V)))
    assert variant.heat == pytest.approx(T)
    samples = rollout.generate(model, tokenizer, TINY, torch.ones(12), 6)
    logprobs = rollout.score(model, samples, torch.arange(12))[0]
    variant.run.step = 9  # the evaluation after the last step
    mask, z = samples.completion_mask, logits_of(model, samples)
    expected = (z / T).log_softmax(-1).gather(1, samples.completions[mask][:, None])[:, 0]
    assert torch.allclose(samples.logprobs[mask], expected, atol=1e-4)
    assert torch.allclose(logprobs[mask], expected, atol=1e-4)
