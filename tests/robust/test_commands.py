"""Command lines, tasks and the files of a run: what cannot work ends in one line, before anything begins or is lost."""

import io
import json
import math
import re
import shlex
import shutil
import signal

import pytest
import torch
from robust_helpers import (
    files_in,
    folder_for,
    go,
    metrics_of,
    rewritten,
    same_model,
    setting,
    step_of,
    without,
)  # fmt: skip

import rollout
import train


def refused(arguments, pattern):
    """It ends in one line that matches the pattern."""
    said = go(arguments)
    assert re.match("error: ", str(said))
    assert re.search(pattern, said), said
    assert "\n" not in said


# --- Command lines

COMMAND_LINES = """
--num_generations 1 --generation_batch_size 8 | num_generations
--seed 9000000000001 | seed
--max_steps 10000000000 | max_steps
--learning_rate 1e10 | learning_rate
--scope_temperature_min 1e-40 | scope_temperature_min
--scope_temperature_max 1e-40 | scope_temperature_max
--scope_temperature_min 2 --scope_temperature_max 1 | scope_temperature_min.*scope_temperature_max
--epsilon 1 | epsilon must be below 1
--epsilon 1.5 | epsilon must be below 1
--epsilon_high -1 | epsilon_high
--epsilon_high nan | epsilon_high
--num_generations 5 | generation_batch_size.*multiple of num_generations
--generation_batch_size 4 --num_generations 8 | generation_batch_size.*multiple
--num_mini_batches 65 --epsilon 2 | num_mini_batches.*epsilon
--model '' | model cannot be ''
--task '' | task cannot be ''
--output_dir '' | output_dir cannot be ''
--train_file '' --task gsm8k | train_file cannot be ''
--test_file '' --task gsm8k | test_file cannot be ''
--instruction '' | instruction cannot be ''
--train_file x.jsonl | train_file.*--task gsm8k
--test_file x.jsonl | test_file.*--task gsm8k
--task gsm8k --train_file {home}/data.jsonl | train_file needs --model
--algorithm grpo --scope_alpha 1 | scope_alpha without effect on --algorithm grpo
--algorithm grpo --scope_gain=1 --scope_share 0 | scope_gain, scope_share without effect
--algorithm ppo | ppo
--algorithm SCOPE | SCOPE
--preset huge | huge
--max_steps ten | --max_steps.*'ten'
--max_steps 4.0 | '4.0'
--max_steps 1e3 | '1e3'
--max_steps '' | --max_steps.*''
--learning_rate 1e-6x | '1e-6x'
--learning_rate 1,5 | '1,5'
--bf16 maybe | --bf16
--max_steps | --max_steps.*expected one argument
--model | --model.*expected one argument
--max_step 5 | unrecognized.*--max_step 5
--lr 1 | unrecognized.*--lr 1
--report_to tensorboard | unrecognized.*--report_to
5 | unrecognized.*5
train | unrecognized.*train
'two words' | unrecognized
--resume | --output_dir
--resume --output_dir '' | --output_dir
--resume --output_dir nowhere | --output_dir.*nowhere
--resume --output_dir /dev/null | --output_dir.*/dev/null
--resume yes --output_dir nowhere | nowhere
--model no/such/folder | no folder no/such/folder
--model ./policy | no folder ./policy
--model /etc/hostname | no folder /etc/hostname
--model 'two words' | no folder two words
--task nothing.py | no file nothing.py
--task GSM8K | no file GSM8K
--task / | no file /
--model m --task gsm8k --train_file nothing.jsonl | cannot read.*nothing.jsonl
--model m --task gsm8k --train_file / | cannot read.*/
--model m --task gsm8k --train_file {home}/data.jsonl --test_file nothing.jsonl | cannot read.*nothing.jsonl
--max_steps 0 --seed -1 --model '' --task '' | seed.*max_steps.*model.*task
"""
COMMAND_LINES = [line.split(" | ") for line in COMMAND_LINES.strip().split("\n")]


@pytest.mark.parametrize(("line", "pattern"), COMMAND_LINES, ids=[line for line, _ in COMMAND_LINES])
def test_bad_command_lines_end_in_a_line_before_anything_begins(
    line, pattern, home, tmp_path, nothing_begins
):
    refused(shlex.split(line.replace("{home}", str(home))), pattern)
    assert files_in(tmp_path) == {}


def test_numbers_below_their_least_and_no_numbers_are_refused_for_every_option(nothing_begins):
    count = 0
    for name, option in train.OPTIONS.items():
        if option.type not in (int, float):
            continue
        least = option.metadata.get("minimum", int(option.type is int))
        for value in [least - 1, "-3", "x"] + ["nan", "inf"] * (option.type is float):
            refused([f"--{name}={value}"], name)
            count += 1
    assert count > 60


GOOD_LINES = """
 | --preset laptop --model m | --preset qwen3-0.6b | --algorithm grpo | --algorithm=grpo | --seed 1000000000 | --max_steps 1 | --epsilon 0 | --epsilon 0.999
--epsilon_high 3 | --epsilon_high 0 | --num_generations 2 --generation_batch_size 4 | --num_mini_batches 64 | --scope_alpha 0 | --scope_share 0
--scope_temperature_min 1 --scope_temperature_max 1 | --scope_temperature_min 0.01 | --learning_rate 0 | --learning_rate 1 | --bf16 | --bf16 true
--bf16 false | --resume false | --num_eval_problems 0 | --model org/name-1.5B | --model gpt2 | --model=m | --instruction 'Be brief.' | --scope_gain 0
"""


def test_what_can_work_is_not_refused(nothing_begins):
    for line in GOOD_LINES.replace("\n", " | ").split(" | "):
        train.parse_config(shlex.split(line))
    for line, preset in (("--model m", "laptop"), ("--model=m", "laptop"), ("--max_steps=2", "tiny")):
        assert train.parse_config(shlex.split(line)).preset == preset


# --- Tasks and questions

TASKS = {
    "raises": "def task(config): 1 / 0", "exits": "import sys\nsys.exit(0)", "exits when called": "def task(config): raise SystemExit",
    "syntax": "def task(config:", "None": "def task(config): return None", "a tuple": "def task(config): return [], [], '', None",
    "no problems": "from reward import Task\ndef task(config): return Task([], [], '', None)",
    "texts": "from reward import Task\ndef task(config): return Task(['1+1'], [], '', None)",
    "a generator": "from reward import Problem, Task\ndef task(config): return Task((Problem('1', '1') for _ in range(3)), [], '', None)",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_file_whose_task_is_none_ends_in_a_line(name, arguments, tmp_path):
    (tmp_path / "mine.py").write_text(TASKS[name])
    refused([*arguments, "--task", tmp_path / "mine.py"], "mine.py fails|a question")
    assert not (tmp_path / "run").exists()


def test_a_task_imports_a_module_beside_it(arguments, tmp_path):
    (tmp_path / "beside_mine.py").write_text("import countdown\ntask = countdown.task")
    (tmp_path / "mine.py").write_text("from beside_mine import task")
    assert go([*arguments, "--task", tmp_path / "mine.py", "--max_steps", 1]) is None


@pytest.mark.parametrize(
    ("questions", "pattern"), [(["", "1+1="], "empty"), (["1+2=", "9+" * 40 + "9="], r"9\+9\+")]
)
def test_a_question_that_the_model_cannot_be_asked_is_named(questions, pattern, arguments, tmp_path):
    problems = [f"Problem({question!r}, '1')" for question in questions]
    text = f"from reward import Problem, Task\ndef task(config): return Task([{', '.join(problems)}], [], '', None)"
    (tmp_path / "mine.py").write_text(text)
    refused([*arguments, "--task", tmp_path / "mine.py"], pattern)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["-1.0", "2.0", "float('nan')", "None", "'good'", "1 / 0"])
def test_a_reward_that_is_none_ends_the_run_like_an_interruption(value, arguments, finished, tmp_path):
    """In the third step; the two before it are saved, and mended it goes on as if nothing had been."""
    lines = "import countdown\ncalls = 0\ndef reward(problem, completion):\n    global calls\n    calls += 1\n    {}"
    lines += "\n    return float(len(completion) % 2)\ndef task(config):\n    return countdown.task(config)._replace(reward=reward)"
    (tmp_path / "judge.py").write_text(lines.format(f"if calls > 90: return {value}"))
    line = [
        *arguments,
        "--num_eval_problems",
        0,
        "--save_steps",
        100,
        "--max_steps",
        8,
        "--task",
        tmp_path / "judge.py",
    ]
    said, how = go(line).split("\n")
    assert re.match("stopped: the reward of '.*' for '.*:.*='", said)
    assert len(metrics_of(tmp_path / "run")) == step_of(tmp_path / "run") == 2
    (tmp_path / "judge.py").write_text(lines.format("pass"))
    assert go(shlex.split(how.partition("train.py")[2])) is None
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "8")


# --- The folder of a run


def checkpoint(**changes):
    def edit(folder):
        path = folder / "checkpoint.pt"
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return edit


def saved(content):
    return lambda folder: torch.save(content, folder / "checkpoint.pt")


def config(content):
    return rewritten("config.json", lambda _: content)


FOLDERS = [  # what is edited, what is added to the command line, and what the error names, or None: it goes on
    (lambda folder: None, "", None),
    # config.json: values
    (setting("config.json", resume=True, output_dir="/nowhere/else", learning_rate=0.001), "", None),
    (setting("config.json", max_steps=0), "", "max_steps"), (setting("config.json", max_steps="6"), "", "max_steps"),
    (setting("config.json", max_steps=6.5), "", "max_steps"), (setting("config.json", max_steps=None), "", "max_steps"),
    (setting("config.json", learning_rate="high"), "", "learning_rate"), (setting("config.json", learning_rate=math.nan), "", "learning_rate"),
    (setting("config.json", bf16="no"), "", "bf16"), (setting("config.json", instruction=3), "", "instruction"),
    (setting("config.json", model=None), "", "model"), (setting("config.json", model=["m"]), "", "model"), (setting("config.json", model=""), "", "model"),
    (setting("config.json", model="/no/such/folder"), "", "/no/such/folder"), (setting("config.json", model="a\x00b/c"), "", "no folder"),
    (setting("config.json", task=7), "", "task"), (setting("config.json", task="/no/task.py"), "", "/no/task.py"),
    (setting("config.json", algorithm="ppo"), "", "algorithm"), (setting("config.json", algorithm=None), "", "algorithm"),
    (setting("config.json", preset="huge"), "", "preset"), (setting("config.json", num_generations=5), "", "num_generations"),
    (setting("config.json", scope_temperature_min=9), "", "scope_temperature_min"), (setting("config.json", seed=-1), "", "seed"),
    (setting("config.json", seed=[]), "", "seed"), (setting("config.json", max_completion_length=60), "", "exceed 64"),
    (setting("config.json", scope_target_entropy=9.0), "", "scope_target_entropy"), (setting("config.json", warmstart=3), "", "warmstart"),
    # config.json: no JSON, or another one
    *[(config(content), "", "") for content in (b"", b"{", b"[1]", b"null", b"3", b'"text"', b"\xff\xfe{}", b"[" * 10**5, b"\x00" * 100)],
    (without("config.json"), "", "config.json"), (folder_for("config.json"), "", "config.json"),
    # a command line that does not fit the run
    (lambda folder: None, "--model no/such/folder", "no/such/folder"), (lambda folder: None, "--seed 1", "keeps its seed"),
    (lambda folder: None, "--algorithm grpo", "keeps its algorithm"), (lambda folder: None, "--preset laptop", "keeps its preset"),
    (lambda folder: None, "--instruction Hm", "keeps its instruction"), (lambda folder: None, "--max_steps 3", "4 steps are done.*--max_steps"),
    (lambda folder: None, "--task gsm8k --train_file {home}/data.jsonl", "other questions"),
    # the checkpoint
    (rewritten("checkpoint.pt", lambda content: content[:-1]), "", "checkpoint.pt"), (rewritten("checkpoint.pt", lambda content: b""), "", "checkpoint.pt"),
    (rewritten("checkpoint.pt", lambda content: content[: len(content) // 2]), "", "checkpoint.pt"), (folder_for("checkpoint.pt"), "", "checkpoint.pt"),
    (rewritten("checkpoint.pt", lambda content: b"PK" + bytes(10**4)), "", "checkpoint.pt"), (saved({"weights": 3}), "", "checkpoint.pt"),
    (saved([1, 2]), "", "checkpoint.pt"), (saved(torch.nn.Linear(2, 2)), "", "checkpoint.pt"),  # a pickle of a class, whose code must not run
    (checkpoint(step="four"), "", "checkpoint.pt"), (checkpoint(step=5), "", "metrics.jsonl is shorter"), (checkpoint(model={}), "", "checkpoint.pt"),
    (checkpoint(questions=[]), "", "other questions"), (checkpoint(prompts=["a"]), "", "checkpoint.pt"), (checkpoint(optimizer=3), "", "checkpoint.pt"),
    (without("checkpoint.pt"), "", None),  # from the start
    # the other files
    (rewritten("metrics.jsonl", lambda content: content[:-100]), "", "is shorter"), (without("metrics.jsonl"), "", "is shorter"),
    (rewritten("metrics.jsonl", lambda content: content + b'{"step": 5}\n{"ste'), "", None), (folder_for("metrics.jsonl"), "", "directory"),
    (rewritten("eval.json", lambda content: content[:10]), "", None), (without("eval.json"), "", None), (without("model"), "", None),
    (rewritten("model/config.json", lambda content: b"{"), "", None), (lambda folder: (folder / "checkpoint.pt.tmp").write_bytes(b"half"), "", None),
    (folder_for("lock"), "", "lock"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FOLDERS)))
def test_edited_run_folders_go_on_rightly_or_are_left_alone_with_a_line(case, home, finished, tmp_path):
    (edit, line, pattern), folder = FOLDERS[case], tmp_path / "run"
    shutil.copytree(finished / "4", folder)
    edit(folder)
    before = files_in(folder)
    steps = [] if "max_steps" in f"{line}{pattern}" else ["--max_steps", 6]
    resume = ["--resume", "--output_dir", folder, *steps, *shlex.split(line.replace("{home}", str(home)))]
    if pattern is not None:
        refused(resume, pattern)
        assert files_in(folder) == before
    else:
        assert go(resume) is None
        assert metrics_of(folder) == metrics_of(finished / "6")
        assert json.loads((folder / "eval.json").read_text()) == json.loads(
            (finished / "6" / "eval.json").read_text()
        )
        assert same_model(folder, finished / "6")


def test_a_run_whose_model_and_task_have_moved_goes_on_when_it_is_told_where(home, finished, tmp_path):
    shutil.copytree(finished / "4", tmp_path / "run")
    shutil.copytree(home, tmp_path / "home")
    setting("config.json", model="/gone/policy", task="/gone/easy.py")(tmp_path / "run")
    resume = ["--resume", "--output_dir", tmp_path / "run", "--max_steps", 6]
    refused([*resume, "--model", tmp_path / "home" / "policy"], "/gone/easy.py")
    assert (
        go([*resume, "--model", tmp_path / "home" / "policy", "--task", tmp_path / "home" / "easy.py"])
        is None
    )
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "6")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt", "model"])
def test_a_new_run_does_not_write_over_what_another_left(name, arguments, finished, tmp_path, nothing_begins):
    """One file of a run is enough, and a folder `model` may be the very model that is trained."""
    (tmp_path / "run").mkdir()
    source = finished / "4" / name
    shutil.copytree(source, tmp_path / "run" / name) if source.is_dir() else shutil.copy(
        source, tmp_path / "run"
    )
    before = files_in(tmp_path)
    refused(arguments, f"holds {name}: add --resume, or take another folder")
    assert files_in(tmp_path) == before


def test_a_file_where_the_folder_should_go_ends_in_a_line_and_stays(arguments, home):
    before = files_in(home)
    refused([*arguments, "--output_dir", home / "data.jsonl"], "exists: .*data.jsonl")
    assert files_in(home) == before


def test_resume_without_a_folder_does_not_take_the_one_it_stands_in(finished, tmp_path, nothing_begins):
    """It would read that config, whose output_dir is meant from elsewhere, and begin anew there."""
    shutil.copy(finished / "4" / "config.json", tmp_path)
    refused(["--resume"], "--output_dir")


# --- Screens and notebooks


def test_in_a_notebook_it_runs_and_resumes_and_leaves_ctrl_c_alone(
    arguments, finished, monkeypatch, tmp_path
):
    """Its stdout cannot be reconfigured, its sys.argv is another program's, and the kernel lives on after the run."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    train.main(arguments)
    train.main(["--resume", "--output_dir", arguments[-1], "--max_steps", "6"])
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "6")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_cannot_show_a_completion_does_not_end_the_run(arguments, tmp_path, monkeypatch):
    """Redirected output on Windows, or a plain C locale, has only a few characters."""
    lines = ["import countdown", "def task(config):", "    task = countdown.task(config)"]
    lines += [
        "    problems = [problem._replace(question=problem.question + '\U0001f600 Ä') for problem in task.train]"
    ]
    (tmp_path / "foreign.py").write_text(
        "\n".join([*lines, "    return task._replace(train=problems)"]), encoding="utf-8"
    )
    with open(tmp_path / "said", "w", encoding="ascii") as said:
        monkeypatch.setattr("sys.stdout", said)
        assert go([*arguments, "--max_steps", 1, "--task", tmp_path / "foreign.py"]) is None
    assert r"=\U0001f600 \xc4" in (tmp_path / "said").read_text()


def test_interrupted_while_it_loads_it_says_so_and_leaves_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "load_policy", lambda *_: signal.raise_signal(signal.SIGINT))
    assert "interrupted" in go(arguments)
    assert not (tmp_path / "run").exists()
