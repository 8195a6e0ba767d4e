"""Command lines, tasks and the files of a run: what cannot work ends in one line, before anything begins or is lost."""

import functools
import io
import math
import re
import shlex
import shutil
import signal

import pytest
import torch
from run_helpers import files_in, go, metrics_of, refused, rewritten, setting, step_of, without

import reward
import rollout
import train


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """An empty folder to be in, without a GPU, where neither a model may be loaded nor anything downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rollout, "load_policy", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(reward, "download", lambda *_: pytest.fail("GSM8K is downloaded"))


# --- Command lines
COMMAND_LINES = {  # and what the error names
    "--seed 9000000000001": "seed", "--scope_temperature_min 2 --scope_temperature_max 1": "scope_temperature_min.*scope_temperature_max",
    "--num_generations 5": "generation_batch_size.*multiple of num_generations", "--num_mini_batches 65 --epsilon 2": "num_mini_batches.*epsilon",
    "--model ''": "model cannot be ''", "--output_dir ''": "output_dir cannot be ''", "--instruction ''": "instruction cannot be ''",
    "--train_file x.jsonl": "train_file.*--task gsm8k", "--test_file x.jsonl": "test_file.*--task gsm8k",
    "--task gsm8k --train_file {home}/data.jsonl": "train_file needs --model",
    "--algorithm grpo --scope_alpha 1": "scope_alpha without effect on --algorithm grpo",
    "--algorithm grpo --scope_gain=1 --scope_share 0": "scope_gain, scope_share without effect", "--algorithm ppo": "ppo", "--preset huge": "huge",
    "--max_steps 4.0": "'4.0'", "--bf16 maybe": "--bf16", "--max_steps": "--max_steps.*expected one argument",
    "--max_step 5": "unrecognized.*--max_step 5", "--report_to tensorboard": "unrecognized.*--report_to", "'two words'": "unrecognized",
    "--resume": "--output_dir", "--resume --output_dir nowhere": "--output_dir.*nowhere", "--model no/such/folder": "no folder no/such/folder",
    "--model /etc/hostname": "no folder /etc/hostname", "--task nothing.py": "no file nothing.py",
    "--model m --task gsm8k --train_file nothing.jsonl": "cannot read.*nothing.jsonl",
    "--model m --task gsm8k --train_file {home}/data.jsonl --test_file nothing.jsonl": "cannot read.*nothing.jsonl",
    "--max_steps 0 --seed -1 --model '' --task ''": "seed.*max_steps.*model.*task",
}  # fmt: skip


@pytest.mark.parametrize(("line", "pattern"), COMMAND_LINES.items())
def test_bad_lines_end_in_a_line_before_anything_begins(line, pattern, home, tmp_path, nothing_begins):
    refused(line.replace("{home}", str(home)), pattern)
    assert files_in(tmp_path) == {}


def test_numbers_below_their_least_and_no_numbers_are_refused_for_every_option(nothing_begins):
    count = 0
    for name, option in train.OPTIONS.items():
        if option.type not in (int, float):
            continue
        least = option.metadata.get("minimum", int(option.type is int))
        for value in [least - 1, "-3", "x"] + ["nan", "inf"] * (option.type is float):
            refused(f"--{name}={value}", name)
            count += 1
    assert count > 60


GOOD_LINES = """ | --preset laptop --model m | --preset qwen3-0.6b | --algorithm grpo | --algorithm=grpo | --seed 1000000000 | --max_steps 1 | --epsilon 0 | --epsilon 0.999
--epsilon_high 3 | --epsilon_high 0 | --num_generations 2 --generation_batch_size 4 | --num_mini_batches 64 | --scope_alpha 0 | --scope_share 0
--scope_temperature_min 1 --scope_temperature_max 1 | --scope_temperature_min 0.01 | --learning_rate 0 | --learning_rate 1 | --bf16 | --bf16 true
--bf16 false | --resume false | --num_eval_problems 0 | --model org/name-1.5B | --model gpt2 | --model=m | --instruction 'Be brief.' | --scope_gain 0
"""


def test_what_can_work_is_not_refused(nothing_begins):
    for line in GOOD_LINES.replace("\n", " | ").split(" | "):
        train.parse_config(shlex.split(line))


# --- Tasks and questions
ASKS = "from reward import Problem, Task\ndef task(config): return Task([Problem('1+2=', '3'), Problem({!r}, '1')], [], '', None)"
TASKS = {
    "raises": "def task(config): 1 / 0", "exits": "import sys\nsys.exit(0)", "exits when called": "def task(config): raise SystemExit",
    "syntax": "def task(config:", "None": "def task(config): return None", "a tuple": "def task(config): return [], [], '', None",
    "no problems": "from reward import Task\ndef task(config): return Task([], [], '', None)",
    "texts": "from reward import Task\ndef task(config): return Task(['1+1'], [], '', None)",
    "a generator": "from reward import Problem, Task\ndef task(config): return Task((Problem('1', '1') for _ in range(3)), [], '', None)",
    "an empty question": ASKS.format(""), "a long question": ASKS.format("9+" * 40 + "9="),
}  # fmt: skip
SAYS = {"an empty question": "empty", "a long question": r"9\+9\+"}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_or_a_question_that_cannot_be_used_ends_in_a_line(name, run_line, tmp_path):
    (tmp_path / "mine.py").write_text(TASKS[name])
    refused(f"{run_line} --task {tmp_path}/mine.py", SAYS.get(name, "mine.py fails"))
    assert not (tmp_path / "run").exists()


def test_a_task_imports_a_module_beside_it(run_line, tmp_path):
    (tmp_path / "beside_mine.py").write_text("import countdown\ntask = countdown.task")
    (tmp_path / "mine.py").write_text("from beside_mine import task")
    assert go(f"{run_line} --task {tmp_path}/mine.py --max_steps 1") is None


@pytest.mark.parametrize("value", ["-1.0", "2.0", "float('nan')", "None", "'good'", "1 / 0"])
def test_a_reward_that_is_none_interrupts_the_run(value, odd_line, home, finished, tmp_path):
    """In the third step; the two before it are saved, and mended it goes on as if nothing had been."""
    said, how = go(odd_line(f"return {value}")).split("\n")
    assert re.match("stopped: the reward of '.*' for '.*:.*='", said)
    assert len(metrics_of(tmp_path / "run")) == step_of(tmp_path / "run") == 2
    shutil.copy(home / "easy.py", tmp_path / "judge.py")
    assert go(how.partition("train.py")[2]) is None
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "8")


# --- The folder of a run
nothing, values = without(), functools.partial(setting, "config.json")


def checkpoint(new):
    """A checkpoint with other values, or something else in its place."""

    def edit(folder):
        path = folder / "checkpoint.pt"
        torch.save(torch.load(path, weights_only=True) | new if isinstance(new, dict) else new, path)

    return edit


def folder_for(name):
    """A folder of the user's where a file should be."""

    def edit(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "of mine").write_text("keep me")

    return edit


FOLDERS = [  # what is edited, what is added to the command line, and what the error names, or None: it goes on
    (nothing, "", None),
    # config.json: values
    (values(resume=True, output_dir="/nowhere/else", learning_rate=0.001), "", None), (values(max_steps=0), "", "max_steps"),
    (values(max_steps="6"), "", "max_steps"), (values(max_steps=6.5), "", "max_steps"), (values(max_steps=None), "", "max_steps"),
    (values(learning_rate="high"), "", "learning_rate"), (values(learning_rate=math.nan), "", "learning_rate"), (values(bf16="no"), "", "bf16"),
    (values(instruction=3), "", "instruction"), (values(model=None), "", "model"), (values(model=["m"]), "", "model"), (values(model=""), "", "model"),
    (values(model="/no/such/folder"), "", "/no/such/folder"), (values(model="a\x00b/c"), "", "no folder"), (values(task=7), "", "task"),
    (values(task="/no/task.py"), "", "/no/task.py"), (values(algorithm="ppo"), "", "algorithm"), (values(algorithm=None), "", "algorithm"),
    (values(preset="huge"), "", "preset"), (values(num_generations=5), "", "num_generations"),
    (values(scope_temperature_min=9), "", "scope_temperature_min"), (values(seed=-1), "", "seed"), (values(seed=[]), "", "seed"),
    (values(max_completion_length=60), "", "exceed 64"), (values(scope_target_entropy=9.0), "", "scope_target_entropy"),
    (values(warmstart=3), "", "warmstart"),
    # config.json: no JSON, or another one
    *[(rewritten("config.json", content), "", "") for content in (b"", b"{", b"[1]", b"null", b"3", b'"text"', b"\xff\xfe{}", b"[" * 10**5, b"\x00" * 100)],
    (without("config.json"), "", "config.json"), (folder_for("config.json"), "", "config.json"),
    # a command line that does not fit the run
    (nothing, "--model no/such/folder", "no/such/folder"), (nothing, "--seed 1", "keeps its seed"),
    (nothing, "--algorithm grpo", "keeps its algorithm"), (nothing, "--preset laptop", "keeps its preset"),
    (nothing, "--instruction Hm", "keeps its instruction"), (nothing, "--max_steps 3", "4 steps are done.*--max_steps"),
    (nothing, "--task gsm8k --train_file {home}/data.jsonl", "other problems"),
    # what has moved, when it is told where
    (values(model="/gone/policy", task="/gone/easy.py"), "--model {home}/policy --task {home}/easy.py", None),
    (values(model="/gone/policy", task="/gone/easy.py"), "--model {home}/policy", "/gone/easy.py"),
    # the checkpoint
    (rewritten("checkpoint.pt", lambda content: content[:-1]), "", "checkpoint.pt"), (rewritten("checkpoint.pt", b""), "", "checkpoint.pt"),
    (rewritten("checkpoint.pt", lambda content: content[: len(content) // 2]), "", "checkpoint.pt"), (folder_for("checkpoint.pt"), "", "checkpoint.pt"),
    (rewritten("checkpoint.pt", b"PK" + bytes(10**4)), "", "checkpoint.pt"),
    (checkpoint([1, 2]), "", "checkpoint.pt"), (checkpoint(torch.nn.Linear(2, 2)), "", "checkpoint.pt"),  # a pickle of a class, whose code must not run
    (checkpoint({"step": "four"}), "", "checkpoint.pt"), (checkpoint({"step": 5}), "", "metrics.jsonl is shorter"),
    (checkpoint({"model": {}}), "", "checkpoint.pt"), (checkpoint({"problems": []}), "", "other problems"),
    (checkpoint({"prompts": ["a"]}), "", "checkpoint.pt"), (checkpoint({"optimizer": 3}), "", "checkpoint.pt"),
    (without("checkpoint.pt"), "", None),  # from the start
    # the other files
    (rewritten("metrics.jsonl", lambda content: content[:-100]), "", "is shorter"), (without("metrics.jsonl"), "", "is shorter"),
    (rewritten("metrics.jsonl", lambda content: content + b'{"step": 5}\n{"ste'), "", None), (folder_for("metrics.jsonl"), "", "directory"),
    (rewritten("eval.json", lambda content: content[:10]), "", None), (without("eval.json"), "", None), (without("model"), "", None),
    (rewritten("model/config.json", b"{"), "", None), (lambda folder: (folder / "checkpoint.pt.tmp").write_bytes(b"half"), "", None),
    (folder_for("lock"), "", "lock"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FOLDERS)))
def test_edited_run_folders_go_on_rightly_or_are_left_alone_with_a_line(case, home, finished, tmp_path):
    (edit, line, pattern), folder, whole = FOLDERS[case], tmp_path / "run", finished / "6"
    shutil.copytree(finished / "4", folder)
    edit(folder)
    before = files_in(folder)
    steps = "" if "max_steps" in f"{line}{pattern}" else "--max_steps 6"
    line = f"--resume --output_dir {folder} {steps} {line}".replace("{home}", str(home))
    if pattern is not None:
        refused(line, pattern)
        assert files_in(folder) == before
        return
    assert go(line) is None
    assert metrics_of(folder) == metrics_of(whole)
    assert (folder / "eval.json").read_text() == (whole / "eval.json").read_text()
    assert files_in(folder / "model") == files_in(whole / "model")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoint.pt", "model"])
def test_a_new_run_does_not_write_over_what_another_left(name, run_line, finished, tmp_path, nothing_begins):
    """One file of a run is enough, and a folder `model` may be the very model that is trained."""
    shutil.copytree(finished / "4", tmp_path / "run")
    without(*{path.name for path in (tmp_path / "run").iterdir()} - {name})(tmp_path / "run")
    before = files_in(tmp_path)
    refused(run_line, f"holds {name}: add --resume, or take another folder")
    assert files_in(tmp_path) == before


def test_a_file_where_the_folder_should_go_ends_in_a_line_and_stays(run_line, home):
    before = files_in(home)
    refused(f"{run_line} --output_dir {home}/data.jsonl", "exists: .*data.jsonl")
    assert files_in(home) == before


def test_in_a_notebook_it_runs_and_resumes_and_leaves_ctrl_c_alone(run_line, finished, monkeypatch, tmp_path):
    """Its stdout cannot be reconfigured, its sys.argv is another program's, and the kernel lives on after the run."""
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    train.main(shlex.split(run_line))
    train.main(["--resume", "--output_dir", f"{tmp_path}/run", "--max_steps", "6"])
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "6")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_terminal_that_cannot_show_a_completion_does_not_end_the_run(run_line, home, tmp_path, monkeypatch):
    """Redirected output on Windows, or a plain C locale, has only a few characters."""
    easy = (home / "easy.py").read_text().replace("return countdown", "task = countdown")
    more = "    return task._replace(train=[problem._replace(question=problem.question + 'Ä') for problem in task.train])"
    (tmp_path / "foreign.py").write_text(easy + more, encoding="utf-8")
    with open(tmp_path / "said", "w", encoding="ascii") as said:
        monkeypatch.setattr("sys.stdout", said)
        assert go(f"{run_line} --max_steps 1 --task {tmp_path}/foreign.py") is None
    assert r"=\xc4" in (tmp_path / "said").read_text()


def test_interrupted_while_it_loads_it_says_so_and_leaves_nothing(run_line, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "load_policy", lambda *_: signal.raise_signal(signal.SIGINT))
    assert "interrupted" in go(run_line)
    assert not (tmp_path / "run").exists()
