"""theory/lab/variants.py: each variant against its definition, sample by sample or step by step."""

import itertools
import math

import pytest
import torch
from lab_helpers import AUXILIARY, REWARDS, make_variant, plain_table

import scope_rl

LIMITS = "--scope_target_entropy 0.4 --scope_temperature_min 0.8 --scope_temperature_max 1.2 "
GAINS = "--scope_gain 0.4 --scope_integral_gain 0.1"
N = REWARDS.numel()
USUAL = scope_rl.group_advantages(REWARDS).flatten()
INGREDIENTS = ["both_signs", "mean_over_positives", "group_normalised", "equal_groups_dropped", "aepo"]


@pytest.mark.parametrize("name", ["", *INGREDIENTS])
def test_ingredients_sample_by_sample(name):
    alpha, drops = 0.5, name == "equal_groups_dropped"
    table = make_variant(f"@{name}" if name else "").objective_table(REWARDS, AUXILIARY, alpha, 0.1)
    assert table.entropy_coefs.tolist() == pytest.approx([0.1] * N + [0.0] * 5)
    assert table.advantages[:N].tolist() == USUAL.tolist()
    kept = [1 / 8] * 4 + [0.0] * 4 + [1 / 8] * 4  # the second group is all right
    assert table.weights[:N].tolist() == pytest.approx(kept if drops else [1 / N] * N)
    for j, right in enumerate(AUXILIARY.tolist()):
        group = REWARDS[j % 3].tolist()
        spread = math.sqrt(sum((r - sum(group) / 4) ** 2 for r in group) / 4) + 1e-4
        A = {"both_signs": 1.0 if right else -1.0, "group_normalised": right * (1 - sum(group) / 4) / spread}
        A["aepo"] = 0.0  # 60 of 2,560 are none of 12
        w = {"mean_over_positives": alpha / 3, "aepo": 1 / N}
        assert table.advantages[N + j] == pytest.approx(A.get(name, right), rel=1e-5)
        assert table.weights[N + j] == pytest.approx(w.get(name, alpha / 5))


def test_a_mean_over_no_positives_is_finite():
    table = make_variant("@mean_over_positives").objective_table(torch.eye(3), torch.zeros(5), 0.5, 0.0)
    assert torch.isfinite(table.weights).all() and torch.isfinite(table.advantages).all()


@pytest.mark.parametrize(("H", "T", "count"), [(0.1, 1.2, 12), (0.4, 1.2, 12), (0.41, 0.8, 6)])
def test_aepo_switches_and_counts_the_first_positives_only(H, T, count):
    """Our batch of 512 is a fifth of theirs, and so are the positives: 60 / 5, and half above the target."""
    aepo, rewards = make_variant(f"@aepo {LIMITS}"), torch.zeros(64, 8)
    assert aepo(H) == aepo.temperature == T
    auxiliary = (torch.rand(128) < 0.5).float()
    table = aepo.objective_table(rewards, auxiliary, 1.0, 0.0)
    assert table.advantages[512:].nonzero()[:, 0].tolist() == auxiliary.nonzero()[:count, 0].tolist()
    assert set(table.advantages[512:].tolist()) == {0.0, 1.0}
    assert table.weights.tolist() == pytest.approx([1 / 512] * 640)


def test_the_positional_law_freezes_its_integral():
    law = make_variant(f"@positional {LIMITS} {GAINS}")
    # e = -.4 (far), .05, .08, .2 (far), 0: I is 0, 0, .005, .013, .013 before each.
    assert [law(H) for H in (0.8, 0.35, 0.32, 0.2, 0.4)] == pytest.approx([0.84, 1.02, 1.037, 1.093, 1.013])
    clipped = make_variant(f"@positional --scope_temperature_max 1.01 {GAINS}")
    assert [clipped(H) for H in (0.3, 0.35, 0.4)] == pytest.approx([1.01, 1.01, 1.0])


# The rivals draw no auxiliary samples, and T stays 1.
def tables_after(options: str, entropies: list[float]) -> list[scope_rl.Objective]:
    """The tables of a step each, after these entropies."""
    variant, tables = make_variant(f"{options} {LIMITS} --scope_share 0"), []
    for H in entropies:
        assert variant(H) == variant.temperature == variant.boost == 1
        tables.append(plain_table(variant))
    return tables


@pytest.mark.parametrize("options, entropies, bonuses", [
    # c moves by .4 (H_before - H) + .1 (.4 - H): -.04, .225, .02, .04, and -.25 to the clip.
    (f"@bonus_pi {GAINS}", [0.8, 0.3, 0.3, 0.2, 0.8], [-0.04, 0.17, 0.18, 0.2, -0.08]),
    (f"@bonus_pi @positional {GAINS}", [0.8, 0.35, 0.32, 0.2, 0.4], [-0.16, 0.02, 0.037, 0.093, 0.013]),
    # k = .4, .8, 1, 1, .6, .2, 0, .4, of which those above the target are not applied.
    ("@stepwise_bonus --scope_gain 0.4", [0.4, 0.39, 0.1, 0.1, 0.41, 0.9, 0.9, 0.3], [0.4, 0.8, 1, 1, 0, 0, 0, 0.4]),
    # log (c / .03) = .1 times the sum of e
    ("@dual_ascent --scope_integral_gain 0.1", [0.8, 0.1, 0.1], [0.03 * math.exp(x) for x in (-0.04, -0.01, 0.02)]),
])  # fmt: skip
def test_a_controlled_bonus_step_by_step(options, entropies, bonuses):
    for table, bonus in zip(tables_after(options, entropies), bonuses, strict=True):
        assert table.entropy_coefs.tolist() == pytest.approx([bonus] * N, abs=1e-7)
        assert table.advantages.tolist() == USUAL.tolist()
        assert table.weights.tolist() == pytest.approx([1 / N] * N)


def test_entropic_weighs_positives_and_negatives_separately():
    # a = .4 (H - H0) + .1 times the sum of those before: .16, -.08 + .04, .04 + .02; and -4.9 is clipped
    for H, a in {(0.8,): 0.16, (0.8, 0.2): -0.04, (0.8, 0.2, 0.5): 0.06, (-12.0,): -1.0}.items():
        table = tables_after(f"@entropic {GAINS}", list(H))[-1]
        expected = [(1 + a if A > 0 else 1 - a) * A for A in USUAL.tolist()]
        assert table.advantages.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("H, kept", [(0.4, "1111 1111 1111"), (0.25, "0110 1111 1110"), (0.55, "1001 1111 0001")])  # fmt: skip
def test_the_band_filter_keeps_one_sign_outside_the_band(H, kept):
    expected = [int(k) / group.count("1") / 3 for group in kept.split() for k in group]
    assert tables_after("@band_filter", [0.9, H])[-1].weights.tolist() == pytest.approx(expected)
    assert tables_after("@wide_band_filter", [0.9, 0.43])[-1].weights.tolist() == pytest.approx([1 / N] * N)


def test_the_flow_balance_takes_away_what_lowers_the_entropy_of_a_state():
    """At a = -1 what is left of a step is, token by token, what raises H; at a = 1 what lowers it. gbar is left out."""
    variant, mask = make_variant("@flow_balance"), torch.ones(1, 1, dtype=torch.bool)
    for variant.a, p, A in itertools.product((-1.0, 1.0), (0.6, 0.3, 0.1), (1.0, -1.0)):
        x, H = torch.tensor([[p]]).log(), torch.tensor([[0.8979]])  # H is of the policy of these p
        table = plain_table(variant, torch.eye(1))._replace(advantages=torch.tensor([A]))
        loss, _ = variant.scope_loss(x, x, H, mask, table, 0.2, None)
        lowers = A * (x + H).item() > 0
        assert loss.item() == pytest.approx(-2 * A if lowers == (variant.a > 0) else 0.0, abs=1e-6)


def test_tokens_as_samples_give_the_loss_of_the_core_with_its_gradient():
    variant = make_variant("@flow_balance --generation_batch_size 16 --num_generations 4")
    mask = torch.rand(12, 5) < torch.tensor([1.0, 0.7, 0.7, 0.7, 0.7])
    table = plain_table(variant, bonus=0.1)  # a is 0 at first
    old, H = -torch.rand(12, 5) - 0.1, torch.rand(12, 5, requires_grad=True)
    logprobs = (old + 0.4 * torch.randn(12, 5)).requires_grad_()
    results = []
    for loss in (variant.scope_loss, scope_rl.scope_loss):
        value, clipped = loss(logprobs, old, H, mask, table, 0.2, 0.28)
        results.append([value, clipped, *torch.autograd.grad(value, (logprobs, H))])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-5)


def test_a_moving_target_falls_and_comes_back():
    variant = make_variant("@moving_target @stepwise_bonus --scope_target_entropy 0.5 --scope_gain 1")
    low = []
    for variant.run.step in range(-1, 349):  # the rule is called with the entropy of the step before
        variant(0.4)
        low.append(variant.c == 0)  # .4 lies above the target
    assert low == [False] * 150 + [True] * 100 + [False] * 100


def test_dr_grpo_leaves_the_standard_deviation_out_also_for_a_rival():
    centred = [1 / 2, -1 / 2, -1 / 2, 1 / 2, 0, 0, 0, 0, -1 / 4, -1 / 4, -1 / 4, 3 / 4]
    assert tables_after("@dr_grpo @bonus_pi", [0.3])[0].advantages.tolist() == pytest.approx(centred)
    weighed = [(0.96 if A > 0 else 1.04) * A for A in centred]  # a = .4 (.3 - .4)
    table = tables_after("@dr_grpo @entropic --scope_gain 0.4", [0.3])[0]
    assert table.advantages.tolist() == pytest.approx(weighed)
