"""theory/tools/trl_scope.py: TRL's loss and steps against scope_rl's, on the same completions."""

import copy
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import types

import pytest
import torch
import transformers
from lab_helpers import json_lines
from run_helpers import EASY, ROOT, START, refused
from tokenizers.processors import TemplateProcessing

import countdown
import reward
import rollout
import scope_rl
import train

trl = pytest.importorskip("trl")
import trl_scope  # noqa: E402

# N = 16 in groups of G = 4, in micro-batches of 4. M = round(0.6 N) = 10; to make equal parts, 12 are drawn.
# A gradient step is a generation.
SMALL = shlex.split(
    f"--model {START} --generation_batch_size 16 --num_generations 4 --per_device_train_batch_size 4 "
    "--gradient_accumulation_steps 4 --max_completion_length 10 --bf16 false --gradient_checkpointing false "
    "--report_to none --disable_tqdm true --use_cpu true --save_strategy no --logging_steps 1 "
    "--scope_share 0.6 --scope_alpha 0.7 --scope_target_entropy 0.9 --scope_gain 0.3 --scope_integral_gain 0.2 "
    "--scope_temperature_min 0.5 --scope_temperature_max 1.5"
)
ALPHA, M, DRAWN = 0.7, 10, 12  # DRAWN is with the surplus


@pytest.fixture
def arguments(tmp_path):
    (tmp_path / "task.py").write_text(EASY)
    return [*SMALL, "--task", str(tmp_path / "task.py"), "--output_dir", str(tmp_path / "run")]


def rows_of(trainer):
    """A generation batch as TRL's sampler makes it, of the first prompts."""
    count, G = trainer.args.generation_batch_size, trainer.num_generations
    return [trainer.train_dataset[i // G] for i in range(count)]


def generate(trainer, kind=trl_scope.ScopeTrainer):
    """A generation of these rows, as this kind of trainer makes it."""
    trainer.model.train()
    torch.manual_seed(0)
    return kind._generate_and_score_completions(trainer, rows_of(trainer))


def as_rollout(batch, tokenizer):
    """TRL's rows as ours, with a prompt for each; and the reward of each."""
    ids, mask = batch["completion_ids"], batch["completion_mask"] == 1
    tokens = [row[kept] for row, kept in zip(ids, mask, strict=True)]
    truncated = torch.tensor([tokenizer.eos_token_id not in row for row in tokens])
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    rewards = torch.tensor([float(sum(map(ord, text)) % 2) for text in texts]).double() * ~truncated
    prompts, owner = (batch["prompt_ids"], batch["prompt_mask"]), torch.arange(len(ids))
    noted = torch.zeros(ids.shape)  # which TRL's samples come without
    return rollout.Rollout(*prompts, owner, ids, mask, noted, noted, truncated, texts, seconds=0.0), rewards


def sample_advantages(rewards):
    """TRL's: divided by the standard deviation of the sample, ours by the population's."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


# --- The objective
@pytest.mark.parametrize("parts, boost", [(1, 1.0), (4, 1.5)])
@pytest.mark.parametrize("with_auxiliary", [True, False])
def test_loss_and_gradient_are_ours(arguments, tokenizer, monkeypatch, with_auxiliary, parts, boost):
    # Two mini-batches: TRL keeps log pi_old, which is then moved away, for ratios beyond the clip.
    trainer = trl_scope.set_up([*arguments, "--gradient_accumulation_steps", "2"])
    trainer.rule.boost = boost
    model = trainer.model.double()
    batch = generate(trainer, trl_scope.ScopeTrainer if with_auxiliary else trl.GRPOTrainer)
    batch["old_per_token_logps"] += 0.5 * torch.randn(batch["completion_mask"].shape, dtype=torch.float64)
    samples, rewards = as_rollout(batch, tokenizer)
    B = 16 + DRAWN if with_auxiliary else 16
    groups, auxiliary = rewards[:16].view(4, 4), rewards[16:][:M]
    assert len(rewards) == B and groups.std(1).max() > 0
    assert not with_auxiliary or 0 < auxiliary.sum() < M

    monkeypatch.setattr(scope_rl, "group_advantages", sample_advantages)
    table = scope_rl.objective_table(groups, auxiliary, ALPHA * boost)
    rows = torch.arange(len(table.weights))
    logprobs, entropies = rollout.score(model, samples, rows)
    columns = logprobs, batch["old_per_token_logps"][rows], entropies, samples.completion_mask[rows]
    loss, _ = scope_rl.scope_loss(*columns, table)
    for some in (table.advantages > 0, table.advantages < 0, rows >= 16):  # some of each kind are clipped
        _, clipped = scope_rl.scope_loss(*(x[some] for x in columns), table.rows(some))
        assert clipped > 0 or not some.any()

    trainer.current_gradient_accumulation_steps = parts
    total = 0.0
    for part in torch.randperm(B).view(parts, -1):
        part_of_batch = {name: x[part] if x.ndim else x for name, x in batch.items()}
        total = total + trainer._compute_loss(model, part_of_batch)
    assert total.item() == pytest.approx(loss.item(), abs=1e-5)
    gradients = [torch.autograd.grad(value, list(model.parameters())) for value in (loss, total)]
    ours, theirs = (torch.cat([g.flatten() for g in of_one]) for of_one in gradients)
    assert (theirs - ours).norm() < 1e-5 * ours.norm()  # their output head computes in float32


def test_auxiliary_completions_are_drawn_at_T_for_all_prompts(arguments, tokenizer):
    trainer = trl_scope.set_up(arguments)
    trainer.rule.temperature, metrics = 1e-4, trainer._metrics
    batch = generate(trainer)
    samples, rewards = as_rollout(batch, tokenizer)
    assert len(samples.texts) == 16 + DRAWN
    cold_texts = {}  # the most likely completion of each prompt, in their order
    for row in rows_of(trainer):
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        ids = trainer.model.eval().generate(**inputs, max_new_tokens=10, do_sample=False)[0]
        cold_texts[tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)] = None
    assert list(dict.fromkeys(samples.texts[16:][:M])) == list(cold_texts) and len(cold_texts) > 1
    assert len(set(samples.texts[:16])) > 8  # the ordinary ones were drawn at 1
    assert trainer.generation_config.temperature == 1 and trainer.num_generations == 4
    assert trainer._metrics is metrics and len(metrics["train"]["reward"]) == 1  # of the ordinary ones only
    # Surplus rows are in no mean: neither in the objective nor in scope_positive_frac.
    assert batch["advantages"][16 + M :].eq(0).all()
    assert metrics["train"]["scope_positive_frac"] == [rewards[16:][:M].mean().item()]


def test_prompts_and_rewards_are_train_py_s(arguments, tokenizer):
    trainer = trl_scope.set_up([*arguments, "--task", countdown.__file__])
    task = countdown.task(train.Config(seed=trainer.args.seed, output_dir="x"))
    questions = [problem.question for problem in task.train]
    prompts = rollout.format_prompts(tokenizer, questions, task.instruction)
    ids = trainer.processing_class(text=trainer.train_dataset["prompt"][:]).input_ids
    assert ids == tokenizer(prompts, add_special_tokens=False).input_ids
    assert [reward.Problem(row["question"], row["answer"]) for row in trainer.train_dataset] == task.train
    columns = {"question": ["2,5,7:19="] * 3, "answer": ["19"] * 3}
    texts, end = ["7+2+5+5", "7+2+5+5", "7"], tokenizer.eos_token_id
    rewards = trainer.reward_funcs[0](completions=texts, completion_ids=[[5, end], [5], [5, end]], **columns)
    assert rewards == [1.0, 0.0, 0.0]  # right, cut off, wrong


def test_a_begin_token_comes_once(arguments, monkeypatch):
    """train.py's prompts begin with it, and some tokenizers put one before every text."""
    template, token = "{{ bos_token + messages[0]['content'][:8] }}", [("<eos>", 1)]
    plain = transformers.AutoTokenizer.from_pretrained(START, bos_token="<eos>", chat_template=template)
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=token)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: plain)
    trainer = trl_scope.set_up(arguments)
    row = trainer.train_dataset[0]
    ids = trainer.processing_class(text=row["prompt"]).input_ids
    assert ids == plain("<eos>" + row["question"][:8], add_special_tokens=False).input_ids
    assert ids.count(1) == 1


def test_a_file_of_questions(tmp_path):
    rows = [{"question": f"2,5,7:{i}=", "answer": str(i)} for i in range(10)]
    (tmp_path / "data.jsonl").write_text(json_lines(rows))
    (tmp_path / "test.jsonl").write_text(json_lines(rows[5:]))
    shutil.copytree(START, tmp_path / "mine")  # with tiny's own, train.py refuses a file of questions
    options = f"--model {tmp_path}/mine --train_file {tmp_path}/data.jsonl --output_dir {tmp_path} --bf16 no"
    assert len(trl_scope.set_up(options.split()).train_dataset) == 9  # the last tenth is there to evaluate on
    trainer = trl_scope.set_up([*options.split(), f"--test_file={tmp_path}/test.jsonl"])
    assert list(trainer.train_dataset["question"]) == [row["question"] for row in rows[:5]]
    assert trainer.args.use_cpu == (not torch.accelerator.is_available())
    for name in train.OPTIONS:
        if name.startswith("scope_"):
            assert getattr(trainer.config, name) == getattr(train.Config(output_dir="x"), name)
    columns = {"question": ["?", "?"], "answer": ["3", "3"], "completion_ids": [[5, 1], [5, 1]]}
    assert trainer.reward_funcs[0](completions=["#### 3", "#### 4"], **columns) == [1.0, 0.0]


# --- Runs
def record(argv, path):
    """Train, and keep what every generation started from and what it drew, on this process."""
    trainer = trl_scope.set_up(argv)
    model, generate, generations = trainer.model, trainer._generate_and_score_completions, []

    def recording(inputs):
        generations.append({"weights": copy.deepcopy(model.state_dict()), "batch": generate(inputs)})
        generations[-1]["T"] = trainer._metrics["train"]["scope_temperature"][-1]
        return generations[-1]["batch"]

    trainer._generate_and_score_completions = recording
    trainer.train()
    result = {"generations": generations, "weights": model.state_dict(), "log": trainer.state.log_history}
    result["processes"] = trainer.accelerator.num_processes
    torch.save(result, f"{path}.{trainer.accelerator.process_index}")


def test_two_processes_take_the_steps_of_one(arguments, tokenizer, tmp_path, monkeypatch):
    """Three steps of plain gradient descent, each on a whole generation; recomputed with scope_rl on one process."""
    folders = "", "tests", "theory", "theory/tools", "theory/tiny", "theory/lab"
    paths = [str(ROOT / folder) for folder in folders]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = f"-m torch.distributed.run --standalone --nproc_per_node 2 {__file__} {tmp_path}/record"
    descent = "--optim sgd --learning_rate 0.2 --lr_scheduler_type constant --max_grad_norm 1e9 --max_steps 3"
    descent += " --gradient_accumulation_steps 2"  # of each process
    command = [sys.executable, *launch.split(), *arguments, *descent.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"record.{rank}", weights_only=False) for rank in (0, 1)]
    assert [rank["processes"] for rank in ranks] == [2, 2]
    for name, x in ranks[0]["weights"].items():
        assert torch.equal(x, ranks[1]["weights"][name]), name
    T, again = ([generation["T"] for generation in rank["generations"]] for rank in ranks)
    assert again == T and len(set(T)) == 3

    monkeypatch.setattr(scope_rl, "group_advantages", sample_advantages)
    model = transformers.AutoModelForCausalLM.from_pretrained(START).eval()
    last, expected, tokens, surplus = None, 1.0, [], []
    for step, pair in enumerate(zip(*(rank["generations"] for rank in ranks), strict=True)):
        assert T[step] == pytest.approx(expected, abs=1e-5)
        model.load_state_dict(pair[0]["weights"])
        both, rewards = zip(*(as_rollout(generation["batch"], tokenizer) for generation in pair), strict=True)
        assert both[0].texts[:8] != both[1].texts[:8]
        # H is a mean over tokens: the processes' means differ, and so do their numbers of tokens.
        entropies = [rollout.score(model, own, torch.arange(8))[1][own.completion_mask[:8]] for own in both]
        H = torch.cat(entropies).mean().item()
        tokens.append([len(those) for those in entropies])
        log = ranks[0]["log"][step]
        assert log["entropy"] == pytest.approx(H, abs=1e-5) and log["scope_temperature"] == T[step]
        fall = 0.0 if last is None else last - H
        expected, last = min(1.5, max(0.5, expected + 0.3 * fall + 0.2 * (0.9 - H))), H

        surplus.extend(rewards[0][13:].tolist() + rewards[1][13:].tolist())
        turns = [(i % 2, 8 + i // 2) for i in range(M)]  # process and row of each auxiliary completion
        auxiliary = torch.stack([rewards[rank][row] for rank, row in turns])
        assert log["scope_positive_frac"] == pytest.approx(auxiliary.mean().item())
        groups = torch.cat([rewards[0][:8], rewards[1][:8]]).view(4, 4)
        table = scope_rl.objective_table(groups.float(), auxiliary.float(), ALPHA)
        places, loss = [(rank, row) for rank in (0, 1) for row in range(8)] + turns, 0.0
        for i, (rank, row) in enumerate(places):
            logprobs, entropies = rollout.score(model, both[rank], torch.tensor([row]))
            mask, share = both[rank].completion_mask[[row]], table.rows(torch.tensor([i]))
            loss = loss + scope_rl.scope_loss(logprobs, logprobs.detach(), entropies, mask, share)[0]
        model.zero_grad()
        loss.backward()
        after = ranks[0]["generations"][step + 1]["weights"] if step < 2 else ranks[0]["weights"]
        for name, p in model.named_parameters():
            change = after[name] - pair[0]["weights"][name]
            assert (change + 0.2 * p.grad).norm() < 1e-3 * change.norm() + 1e-6, (step, name)
    assert any(a != b for a, b in tokens)
    assert len(surplus) == 6 and 1 in surplus  # rewarded, and without weight


def test_checkpoints_keep_the_rule(arguments, tmp_path):
    options = shlex.split("--max_steps 4 --save_strategy steps --save_steps 2 --learning_rate 1e-2")
    straight, resumed = (trl_scope.set_up([*arguments, *options]) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name in ("entropy", "scope_temperature", "scope_positive_frac", "reward"):
        ours, theirs = ([row[name] for row in run.state.log_history[:4]] for run in (straight, resumed))
        assert ours == theirs
    assert len({row["scope_temperature"] for row in straight.state.log_history[:4]}) == 4
    state = straight.state.stateful_callbacks["scope"]
    assert state == resumed.state.stateful_callbacks["scope"] == straight.rule.state_dict()
    resumed.state.stateful_callbacks["scope"] = {"entropy": 0.5, "integral": 0.1}  # an older version's
    with pytest.raises(ValueError, match="another version"):
        generate(resumed)


def test_the_models_own_generation_config_is_put_aside(arguments):
    """It would change the policy where TRL leaves something open. Options that change nothing are taken."""
    arguments += ["--reward_weights", "1", "--min_p", "0", "--generation_kwargs", "{}"]
    drawn = []
    for own in ({}, {"suppress_tokens": list(range(2, 8)), "no_repeat_ngram_size": 1}):
        trainer = trl_scope.set_up(arguments)
        trainer.model.generation_config.update(**own)
        drawn.append(generate(trainer)["completion_ids"])
        assert own.items() <= trainer.model.generation_config.to_dict().items()
    assert torch.equal(*drawn)


def test_vllm_samples_at_T_and_its_correction_is_for_ordinary_rows(arguments):
    """A stand-in for TRL's vLLM backend: its log-probabilities are off, and it reports how it was called."""
    trainer, calls = trl_scope.set_up(arguments), []
    trainer.rule.temperature = 0.6

    def answer(prompts, num_generations, **_):
        calls.append((trainer.vllm_generation.temperature, num_generations, len(prompts)))
        return prompts, [[5, 1]] * len(prompts), [[[-0.1], [-0.1]]] * len(prompts), None

    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.vllm_generation = types.SimpleNamespace(temperature=1.0, generate=answer)
    ratios = generate(trainer)["importance_sampling_ratio"]
    assert calls == [(1.0, 4, 16), (0.6, 1, DRAWN)] and trainer.vllm_generation.temperature == 1.0
    assert (ratios[:16] != 1).all() and (ratios[16:] == 1).all()


# --- Bad input
@pytest.mark.parametrize("options, message", [
    ("--loss_type dapo", "loss_type"), ("--beta 0.1", "beta"), ("--temperature 0.7", "temperature 1, not 0.7"),
    ("--top_k 5", "top_k"), ("--top_p 0.9", "top_p"), ("--min_p 0.1", "min_p"),
    ("--repetition_penalty 1.1", "repetition_penalty"), ("--reward_weights 2", "reward_weights"),
    ("--generation_kwargs '{\"temperature\":0.3}'", "generation_kwargs"), ("--disable_dropout false", "disable_dropout"),
    ("--mask_truncated_completions true", "mask_truncated_completions"), ("--entropy_coef 0.1", "entropy_coef"),
    ("--scope_share 0", "scope_alpha"), ("--scope_weight 1", "scope_weight"),  # the last is an older version's
    ("--model /no/such/folder", "folder"), ("--task /no/such.py", "such.py"),
])  # fmt: skip
def test_what_cannot_work_ends_in_one_line(arguments, options, message):
    refused(f"{shlex.join(arguments)} {options}", message, trl_scope.main)


def test_a_reward_that_fails_ends_in_one_line(arguments, tmp_path):
    (tmp_path / "task.py").write_text(EASY.replace("float(sum(map(ord, completion)) % 2)", "2.0"))
    with pytest.raises(SystemExit, match=r"2\.0 is not a number"):
        trl_scope.main(arguments)


@pytest.mark.parametrize("name", [name for name in trl_scope.INTERNALS if hasattr(trl.GRPOTrainer, name)])
def test_another_trl_without_a_method_ends_in_one_line(arguments, monkeypatch, name):
    monkeypatch.delattr(trl.GRPOTrainer, name)
    refused(shlex.join(arguments), f"{name}: install trl", trl_scope.main)


@pytest.mark.parametrize("missing", ["trl", "datasets"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"^error: .*{missing}.*pip install -e '.\[trl\]'$"):
        runpy.run_path(trl_scope.__file__, run_name="__main__")


def test_the_extra_installs_the_versions_that_the_messages_name():
    assert f'trl = ["{trl_scope.VERSIONS}"]' in (ROOT / "pyproject.toml").read_text()


if __name__ == "__main__":
    record(sys.argv[2:], sys.argv[1])
