"""theory/lab: the experiments, their variants, the statistics, the documents, and both probes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import arithmetic
import closed_forms as cf
import experiments
import pretrained
import probes
import report
import reward
import rollout
import scope_rl
import sums
import train
from entropy import token_entropy

THEORY = train.TINY.parent

# --- experiments.py


@pytest.mark.parametrize("experiment", experiments.EXPERIMENTS)
def test_every_cell_of_the_grid_is_a_config_of_its_own(experiment):
    configs = set()
    for options in experiments.EXPERIMENTS[experiment].values():
        variant, arguments = experiments.variant_and_arguments(options)
        config = train.parse_config(["--preset", "tiny", "--output_dir", "x", *arguments])
        configs.add((type(variant), str(config)))
    assert len(configs) == len(experiments.EXPERIMENTS[experiment])


@pytest.mark.parametrize("name", ["as it is", *experiments.VARIANTS])
def test_variants_against_their_definitions_sample_by_sample(name):
    rewards = torch.tensor([[1.0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]])
    auxiliary, alpha, N = torch.tensor([1.0, 0, 1, 1, 0]), 0.5, 12
    variant = experiments.VARIANTS.get(name, experiments.Variant)()
    limits = {"target": 0.4, "minimum": 0.8, "maximum": 1.2, "gain": 1.0}
    variant.scope_temperature(0.3, 0.0, **limits)
    table = variant.objective_table(rewards.clone(), auxiliary.clone(), alpha, 0.1)
    usual = scope_rl.objective_table(rewards, auxiliary, alpha, 0.1)
    assert table.entropy_coefs.tolist() == pytest.approx([0.1] * N + [0.0] * 5)
    for i in range(N):
        counts = 8 if name == "equal_groups_dropped" else N  # the second group is all right
        dropped = name == "equal_groups_dropped" and i // 4 == 1
        assert table.advantages[i] == usual.advantages[i]
        assert table.weights[i] == pytest.approx(0.0 if dropped else 1 / counts)
    for j, right in enumerate(auxiliary.tolist()):
        group = rewards[j % 3].tolist()
        spread = math.sqrt(sum((r - sum(group) / 4) ** 2 for r in group) / 4) + 1e-4
        A = {
            "both_signs": 1.0 if right else -1.0,
            "group_normalised": right * (1 - sum(group) / 4) / spread,
            "aepo": 0.0,  # 60 of 2,560 are none of 12
        }
        w = {"mean_over_positives": alpha / 3, "aepo": 1 / N}
        assert table.advantages[N + j] == pytest.approx(A.get(name, right), rel=1e-5)
        assert table.weights[N + j] == pytest.approx(w.get(name, alpha / 5))


def test_a_mean_over_no_positives_is_finite():
    table = experiments.MeanOverPositives().objective_table(torch.eye(3), torch.zeros(5), 0.5, 0.0)
    assert torch.isfinite(table.weights).all() and torch.isfinite(table.advantages).all()


@pytest.mark.parametrize(("H", "T", "count"), [(0.1, 1.2, 12), (0.4, 1.2, 12), (0.41, 0.8, 6)])
def test_aepo_switches_and_counts_the_first_positives_only(H, T, count):
    """Our batch of 512 is a fifth of theirs, and so are the positives: 60 / 5, and half above the target."""
    aepo, rewards = experiments.Aepo(), torch.zeros(64, 8)
    options = {"target": 0.4, "minimum": 0.8, "maximum": 1.2, "gain": 2.0, "integral_gain": 0.05}
    assert aepo.scope_temperature(H, 0.25, **options) == (T, 0.25)
    auxiliary = (torch.rand(128) < 0.5).float()
    table = aepo.objective_table(rewards, auxiliary, 1.0, 0.0)
    first = auxiliary.nonzero()[:count, 0].tolist()
    assert table.advantages[512:].nonzero()[:, 0].tolist() == first
    assert set(table.advantages[512:].tolist()) == {0.0, 1.0}
    assert table.weights.tolist() == pytest.approx([1 / 512] * 640)


def test_a_variants_run_leaves_a_row_and_resumes_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    usual, train_step, asked = scope_rl.objective_table, train.train_step, []
    options = (
        "@aepo --scope_temperature_min 0.8 --scope_temperature_max 1.3 --scope_target_entropy 2"
        " --scope_gain 0 --max_steps 35 --save_steps 2 --generation_batch_size 8 --num_generations 4"
        " --num_eval_problems 2 --num_eval_generations 4"
    )
    whole = experiments.one_run((options, 1))
    assert scope_rl.objective_table is usual
    assert not list(tmp_path.iterdir())  # what the row keeps is enough
    assert [whole[name] for name in ("options", "seed", "target")] == [options, 1, 2.0]
    assert whole["scope_temperature"] == pytest.approx(1.3)  # SCOPE's rule with a gain of 0 says 1
    assert {"reward", "entropy", "oscillation", "pass@1", "pass@4", "distinct_correct"} < whole.keys()
    assert len(whole["entropies"]) == 35
    assert np.mean(whole["entropies"][-7:]) == pytest.approx(whole["entropy"], abs=1e-4)
    assert np.std(whole["entropies"][-7:]) == pytest.approx(whole["oscillation"], abs=1e-4)

    def stops_at_step_5(run):
        asked.append(run.config.model)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return train_step(run)

    monkeypatch.setattr(train, "train_step", stops_at_step_5)
    with pytest.raises(KeyboardInterrupt):
        experiments.one_run((options, 1))
    assert set(asked) == {str(train.TINY / "start-1")}
    assert experiments.one_run((options, 1)) == whole


def test_the_questions_of_transfer_are_right_and_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path / "folder")
    experiments.write_sums()
    folder = experiments.WORK
    problems = {s: reward.load_problems(folder / f"{s}.jsonl") for s in ("train", "test")}
    assert {split: len(those) for split, those in problems.items()} == {"train": 512, "test": 128}
    assert not set(problems["train"]) & set(problems["test"])
    for question, answer in problems["train"] + problems["test"]:
        a, b = question.removesuffix("=").split("+")
        assert int(answer) == int(a) + int(b)


def test_the_llama_is_made_once_from_its_own_task(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "WORK", tmp_path)
    full, made = experiments.warm_start.warm_start, []

    def short(folder, config, example, steps, seed):
        made.append((example, seed))
        full(folder, config, example, 2, seed)

    monkeypatch.setattr(experiments.warm_start, "warm_start", short)
    folder = experiments.start(f"{experiments.SUMS} --algorithm grpo", 3)
    assert folder == tmp_path / "llama-1"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert experiments.start(f"{experiments.SUMS} --algorithm grpo", 1) == folder
    assert made == [(sums.example, 1)]
    assert experiments.start("--algorithm grpo", 2) == train.TINY / "start-0"


# --- report.py


@pytest.mark.parametrize(
    ("freedom", "level", "t"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (7, 0.95, 2.365), (8, 0.95, 2.306),
        (30, 0.95, 2.042), (1000, 0.95, 1.962), (3, 0.99, 5.841), (7, 0.999, 5.408),
    ],
)  # fmt: skip
def test_students_t_is_the_one_of_the_tables(freedom, level, t):
    assert report.student_t(freedom, level) == pytest.approx(t, abs=6e-4)


def test_an_interval_shows_two_of_its_digits():
    assert report.interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert math.isnan(report.interval([1.0])[1])
    assert report.show([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert report.show([0.1, 0.2, 0.3], "+") == "+0.20 ± 0.25"
    assert report.show([10.0, 20.0, 30.0]) == "20 ± 25"
    assert report.show([0.1234]) == "0.123"
    assert report.show([0.5, 0.5]) == "0.500"


@pytest.fixture
def two_labels(tmp_path, monkeypatch):
    """Cells whose seeds differ a lot, and B - A hardly."""
    monkeypatch.setattr(experiments, "ROWS", tmp_path / "rows.jsonl")
    assert report.cells_of("control") == {}
    monkeypatch.setitem(experiments.EXPERIMENTS, "two", {"A": "a", "B": "b", "none yet": "c"})
    values = {"a": {0: 0.1, 1: 0.5, 2: 0.9}, "b": {0: 0.2, 1: 0.61, 3: 0.0}}
    usual = {"entropy": 0.3, "scope_temperature": 1.2, "target": 0.4, "oscillation": 0.0}
    rows = []
    for options, cell in values.items():
        for seed, value in cell.items():
            entropies = [0.0] * 28 + [value] * 7
            own = {"options": options, "seed": seed, "pass@1": value, "entropies": entropies}
            own |= {"distinct_correct": 9.0}
            rows.append(json.dumps(usual | own) + "\n")
    experiments.ROWS.write_text("".join(rows))
    return report.cells_of("two")


def test_means_and_paired_differences(two_labels):
    text = report.means("two", two_labels, ("entropy", "error", "pass@1"))
    assert "| A | 3 | 0.300 | 0.250 | 0.50 ± 0.99 |" in text
    assert "none yet" not in text
    text = report.differences(two_labels, ("pass@1",))
    assert "| B | 2 | +0.105 ± 0.064 * |" in text  # the two seeds they share


def test_a_difference_among_many_needs_to_be_larger(two_labels):
    """+0.105 ± 0.064 excludes zero alone, not as one of four: then t is 25.5 and not 12.7."""
    many = two_labels | {name: two_labels["B"] for name in "CDE"}
    assert report.differences(many, ("pass@1",)).count("| +0.105 ± 0.064 |") == 4


def test_the_spread_over_seeds_and_warm_starts():
    H = {0: 0.1, 1: 0.3, 2: 0.2, 3: 0.4}
    course = [0.5] * 21 + [0.3] * 7 + [0.2] * 7
    cells = {"A": {seed: {"entropy": h, "entropies": course} for seed, h in H.items()}}
    sd = math.sqrt(sum((h - 0.25) ** 2 for h in H.values()) / 3)
    assert f"| A | 4 | {sd:.3f} | 80% | -0.100 |" in report.spread(cells)  # .15 and .35: .01 of .0125


@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_the_predicted_rest_solves_the_linear_case(slope):
    """T* = 1 + slope (H - 0.1) meets T = 1 + H0 - H at H = (H0 + 0.1 slope) / (1 + slope)."""
    points = [(H, 1 + slope * (H - 0.1)) for H in (0.6, 0.1, 0.35)]
    for H0 in (0.3, 0.5):
        predicted = report.predicted_rest(points, H0)
        assert predicted == pytest.approx((H0 + 0.1 * slope) / (1 + slope), abs=2e-4)


def test_the_documents_show_what_the_rows_say():
    """tables.md as a whole, the two tables of the lab's page, and the one at the top."""
    assert (THEORY / "lab" / "tables.md").read_text() == report.document()
    page = (THEORY / "lab" / "README.md").read_text()
    assert report.shown_control() in page
    assert report.offsets(report.cells_of("control")) in page
    assert report.shown_results() in (THEORY.parent / "README.md").read_text()


def test_the_figures_are_drawn(two_labels, tmp_path):
    pytest.importorskip("matplotlib")
    report.draw(tmp_path / "two.png", two_labels)
    assert (tmp_path / "two.png").stat().st_size > 10_000


def test_the_figure_at_the_top_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    report.draw_entropies(tmp_path / "entropies.png")
    assert (tmp_path / "entropies.png").stat().st_size > 10_000


def test_the_tables_of_signs_and_temperatures_show_what_the_rows_say():
    """theory/README.md against signs.jsonl: means and two standard errors, to the digits that are shown."""
    lines = [line.strip("| ").split("|") for line in (THEORY / "README.md").read_text().splitlines()]
    lines = [line for line in lines if re.match(r"(positive|negative), \d", line[0])]
    columns = [("warm-start", "held_out"), ("collapsed", "training"), ("scope", "training")]
    columns = {7: columns, 5: [("collapsed-averaged", "training"), ("scope-averaged", "training")]}
    assert sorted(map(len, lines)) == [5] * 10 + [7] * 10
    signs = [json.loads(line) for line in probes.SIGNS.read_text().splitlines()]
    for line in lines:
        sign, temperature = line[0].strip().split(", ")
        cells = zip(columns[len(line)], line[1::2], line[2::2], strict=True)
        for (policy, probe), shown, predicted in cells:
            key = (policy, sign, float(temperature))
            rows = [row for row in signs if (row["policy"], row["sign"], row["temperature"]) == key]
            if len(rows) < 8:
                assert shown.strip() == f"({len(rows)} of 8 draws)"
                continue
            values = np.array([[row[probe], row["predicted"]] for row in rows])
            half = 2 * values[:, 0].std(ddof=1) / len(rows) ** 0.5
            digits = len(shown.split(".")[-1].strip())
            assert shown.strip() == f"{values[:, 0].mean():+.{digits}f} ± {half:.{digits}f}"
            assert predicted.strip() == f"{values[:, 1].mean():+.4f}"


# --- probes.py

TASK = """import countdown

def task(config):
    return countdown.task(config)._replace(reward=lambda problem, text: float(len(text) % 2))
"""


@pytest.fixture
def small_run(model_folder, tmp_path, monkeypatch):
    """A function that sets up a run of one gradient step a step, at a learning rate."""
    monkeypatch.setattr(probes, "SAMPLES", 96)
    (tmp_path / "task.py").write_text(TASK)
    options = (
        "--preset tiny --generation_batch_size 32 --num_generations 4 --num_mini_batches 1"
        f" --warmup_steps 0 --model {model_folder} --task {tmp_path / 'task.py'}"
    )

    def make(learning_rate: float) -> train.Run:
        torch.manual_seed(0)
        run = probes.set_up([*options.split(), "--learning_rate", str(learning_rate)])
        # <pad>'s embedding starts as 0, where RMSNorm has a kink, and a random model does sample it.
        pad = run.model.get_input_embeddings().weight.data[run.tokenizer.pad_token_id]
        torch.nn.init.normal_(pad, std=0.3)
        return run

    return make


def test_the_tabular_prediction_token_by_token(small_run):
    run = small_run(1e-3)
    samples, rewards = probes.draw(run, run.task.train, 20, 1.3)
    weights = rewards / 20
    assert 0 < rewards.mean() < 1
    _, predicted = probes.direction(run, samples, weights)
    total = 0.0
    with torch.no_grad():
        logits = run.model(input_ids=samples.sequences).logits.double()
    for i, mask in enumerate(samples.completion_mask):
        changes = []
        for t in mask.nonzero()[:, 0].tolist():
            z = logits[i, t - 1].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(token_entropy(z), z)  # dH / dz
            step = -z.detach().softmax(0)
            step[samples.sequences[i, t]] += 1  # d log p_a / dz
            changes.append((gradient @ step).item())
        total += weights[i].item() * np.mean(changes)
    assert predicted == pytest.approx(total, rel=1e-4)


def test_measured_changes_are_the_gradients_and_the_weights_stay(small_run):
    """The central difference along a step is the inner product of the step and dH / dtheta."""
    run = small_run(1e-3)
    theta = probes.weights_of(run)
    rows = probes.measure(run, seed=3, batch=40, norm=1e-3)
    assert torch.equal(probes.weights_of(run), theta)
    assert {(row["sign"], row["temperature"]) for row in rows} == {
        (sign, T) for sign in ("positive", "negative") for T in probes.TEMPERATURES
    }
    torch.manual_seed(3)
    contexts = {
        "held_out": probes.draw(run, run.task.test, 20, 1.0)[0],
        "training": probes.draw(run, run.task.train, 20, 1.0)[0],
    }
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
    run, other = small_run(1e-3), small_run(2e-3)
    other.optimizer.param_groups[0]["lr"] = other.config.learning_rate = 1e-3
    probes.one_step(run)
    train.train_step(other)
    for mine, plain in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, plain)


def test_visited_contexts_weigh_samples_by_their_ratio(small_run):
    run = small_run(1e-3)
    samples, _ = train.sample(run, run.task.train[:20], torch.ones(20))
    old, (H, same) = probes.entropies(run, samples, None)
    assert same == H
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    new, (fixed, visited) = probes.entropies(run, samples, old)
    logprobs, token_entropies = probes.score_all(run, samples)
    above, below = 0.0, 0.0
    for i, mask in enumerate(samples.completion_mask):
        ratio = math.exp(sum(logprobs[i, mask].tolist()) - old[i].item())
        above += ratio * sum(token_entropies[i, mask].tolist())
        below += ratio * mask.sum().item()
    assert visited == pytest.approx(above / below, rel=1e-5)
    assert visited != pytest.approx(fixed, rel=1e-3)
    assert torch.isfinite(new).all()


def test_the_closed_loop_goes_on_with_a_run_and_leaves_its_folder(small_run, tmp_path, capsys):
    run = small_run(1e-3)
    run.config.output_dir, run.config.max_steps = str(tmp_path / "run"), 2
    run.config.num_eval_problems, run.task = 0, run.task._replace(test=[])
    Path(run.config.output_dir).mkdir()
    train.write_whole(tmp_path / "run" / "config.json", vars(run.config))
    train.train(run)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    arguments = probes.argparse.Namespace(output_dir=tmp_path / "run", steps=2, save=tmp_path / "mean")
    probes.closed_loop(arguments, [])
    assert "over 2 steps" in capsys.readouterr().out
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert (tmp_path / "mean" / "model.safetensors").exists()


# --- pretrained.py and its task


def test_the_sums_asked_are_checked_and_the_splits_share_none():
    config = train.Config(seed=3)
    task, again = arithmetic.task(config), arithmetic.task(train.Config(seed=4))
    assert task.test == again.test and task.train != again.train and sorted(task.train) == sorted(again.train)
    assert len(task.train + task.test) == len({*task.train, *task.test}) == 400
    problem = reward.Problem("What is 7 + 12?", "19")
    assert problem in task.train + task.test
    right = ("19", "19.", "The answer is 19.", "7 + 12 = 19")
    assert [task.reward(problem, text) for text in (*right, "7 + 12", "", "191")] == [1] * 4 + [0] * 3


def test_every_label_is_a_config_of_its_own():
    configs = set()
    for options in pretrained.EXPERIMENT.values():
        words = options.split()
        changes = words.pop(0) if words[0].startswith("@") else ""
        config = train.parse_config([*pretrained.COMMON.split(), "--output_dir", "x", *words])
        configs.add((changes, str(config)))
    assert len(configs) == len(pretrained.EXPERIMENT)


def test_a_prompt_read_once_scores_the_same(random_model, tokenizer):
    model, prompts = random_model(), ["1,2,3:6=", "4,5,6:11=", "1,2,3:6="]
    samples = rollout.generate(model, tokenizer, prompts * 2, torch.ones(6), 8)
    rows = torch.tensor([5, 0, 1, 2])
    results = []
    for score in (rollout.score, pretrained.score):
        logprobs, entropies = score(model, samples, rows)
        (logprobs.sum() + 0.3 * entropies.sum()).backward()
        results.append([logprobs.detach(), entropies.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for usual, once in zip(*results, strict=True):
        assert torch.allclose(usual, once, atol=1e-4)


def test_the_noting_sampler_notes_the_tabular_change_and_draws_hot_rows_from_the_likeliest():
    logits, T = 2 * torch.randn(6, 30), torch.tensor([1.0, 1, 1, 5, 5, 5])
    sampler = type("Sampler", (pretrained.NotingSampler,), {"top_k": 2})(T)
    for _ in range(40):
        tokens = sampler(torch.zeros(6, 1), logits).argmax(1)
        assert (tokens[3:, None] == logits[3:].topk(2).indices).any(1).all()
        g, gbar = cf.sensitivity(logits.double())
        expected = gbar - g.gather(1, tokens[:, None])[:, 0]
        assert sampler.changes[-1].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
        x = torch.log_softmax(logits, 1).gather(1, tokens[:, None])[:, 0]
        assert torch.allclose(sampler.noted[-1], torch.stack([x, token_entropy(logits)]), atol=1e-5)


def test_the_rule_ahead_follows_a_falling_entropy():
    """H falls by .1 a step: smoothed and extrapolated, it is below the target before H is."""
    limits = {"target": 0.5, "minimum": 1.0, "maximum": 2.0, "gain": 1.0}
    rule, state = pretrained.Changed("ahead=5").scope_temperature, 0.0
    temperatures = []
    for H in np.arange(1.5, 0.6, -0.1):
        T, state = rule(H, state, **limits)
        temperatures.append(T)
    assert temperatures[0] == 1 and temperatures[-1] > 1.1


def test_a_short_run_of_the_pretrained_kind_leaves_a_row(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WORK", tmp_path / "work")
    task = Path(train.TINY) / "countdown.py"
    monkeypatch.setattr(
        pretrained, "COMMON", f"--preset tiny --generation_batch_size 8 --num_generations 4 --task {task}"
    )
    options = "@top_k=3,positives --max_steps 3 --num_eval_problems 0 --scope_temperature_min 1.2"
    monkeypatch.setattr(pretrained, "EXPERIMENT", {"short": options})
    usual = rollout.score, train.update, scope_rl.objective_table
    row = pretrained.one_run(str(model_folder), "short", 1, tmp_path / "end")
    assert usual == (rollout.score, train.update, scope_rl.objective_table)
    assert {len(row[name]) for name in pretrained.KEPT} == {3}
    assert (tmp_path / "end" / "model.safetensors").exists() and not list((tmp_path / "work").iterdir())
    assert min(row["scope_temperature"]) >= 1.2


def test_the_page_shows_the_rows_of_the_pretrained_model():
    assert pretrained.table() in (THEORY / "lab" / "README.md").read_text()
    for row in map(json.loads, pretrained.ROWS.read_text().splitlines()):
        assert row["label"].startswith("stopped") or row["options"] == pretrained.EXPERIMENT[row["label"]]
