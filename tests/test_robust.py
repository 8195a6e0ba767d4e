"""What a person meets when something goes wrong: bad command lines, edited run folders, odd data files and models,
tricky and hostile answers, signals, full disks and sick policies. Nothing is lost, nothing fails silently, and every
failure ends in one line."""

import contextlib
import copy
import gc
import http.client
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_train import EASY, SMALL, metrics_of

import gsm8k
import reward
import rollout
import train

ROOT = Path(__file__).parents[1]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def _one_thread_and_the_signal_handlers_restored():
    threads, handlers = torch.get_num_threads(), [signal.getsignal(number) for number in SIGNALS]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, a task that a random model is rewarded for half of the time, and data, for all tests."""
    folder = tmp_path_factory.mktemp("home")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "theory" / "tiny" / "start-0")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    (folder / "easy.py").write_text(EASY)
    rows = [{"question": f"{i}+{i}=", "answer": 2 * i} for i in range(1, 21)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(home, tmp_path):
    """Four steps on the small model, into the test's own folder."""
    return [*SMALL, "--model", f"{home}/policy", "--task", f"{home}/easy.py", "--output_dir", f"{tmp_path}/run"]


def go(arguments, monkeypatch):
    """train.py's command line in this process. Returns what it says when it ends early, else None."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    try:
        train.main()
    except SystemExit as stop:
        return stop.code
    finally:
        for number in SIGNALS:  # their handler keeps the run, and with it the lock on its folder
            signal.signal(number, signal.default_int_handler)
    return None


def files_in(folder):
    """All that is in a folder, but for the lock, which is empty."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def step_of(folder, name="checkpoint.pt"):
    return torch.load(Path(folder) / name, weights_only=True)["state"]["step"]


# --- Command lines ----------------------------------------------------------------------------------------------------------


def below(name, minimum, *values):
    return [(f"--{name} {value}", rf"{name} is .*, must be a number from {minimum} to 1e9") for value in values]


POSITIVE = shlex.split(
    "max_steps save_steps num_train_problems num_eval_generations generation_batch_size max_completion_length "
    "num_mini_batches per_device_train_batch_size per_device_eval_batch_size"
)
FROM_ZERO = shlex.split(
    "eval_steps logging_steps num_eval_problems warmup_steps epsilon epsilon_high entropy_coef learning_rate "
    "scope_target_entropy scope_alpha scope_weight scope_gain scope_integral_gain scope_integral_band seed"
)
COMMAND_LINES = [
    *[case for name in POSITIVE for case in below(name, 1, "0", "-3")],
    *[case for name in FROM_ZERO for case in below(name, 0, "-1")],
    *below("seed", 0, "9000000000001", "-5"),
    *below("max_steps", 1, "10000000000"),
    *below("num_generations", 1, "0", "-8"),
    ("--num_generations 1 --generation_batch_size 8", "num_generations must be above 1"),
    *below("learning_rate", 0, "nan", "inf", "1e10"),
    *below("scope_gain", 0, "nan", "inf"),
    *below("scope_target_entropy", 0, "nan"),
    *below("scope_temperature_min", 0, "-1", "nan"),
    *below("scope_temperature_max", 0, "inf", "nan"),
    ("--max_grad_norm 0", "max_grad_norm must be 1e-6 or more"),
    ("--max_grad_norm 1e-40", "max_grad_norm must be 1e-6 or more"),
    ("--scope_temperature_min 0", "scope_temperature_min must be from 0.01 to scope_temperature_max"),
    ("--scope_temperature_min 1e-40", "scope_temperature_min must be from 0.01 to scope_temperature_max"),
    ("--scope_temperature_max 1e-40", "scope_temperature_min must be from 0.01 to scope_temperature_max"),
    ("--scope_temperature_min 2 --scope_temperature_max 1", "scope_temperature_min must be from 0.01 to scope_temperature_max"),
    ("--epsilon 1", "epsilon must be below 1"),
    ("--epsilon 1.5", "epsilon must be below 1"),
    ("--num_generations 5", "generation_batch_size must be a multiple of num_generations"),
    ("--generation_batch_size 4 --num_generations 8", "generation_batch_size must be a multiple"),
    ("--num_mini_batches 65", "num_mini_batches is more than a step's prompts"),
    ("--model ''", "model is empty"),
    ("--task ''", "task is empty"),
    ("--output_dir ''", "output_dir is empty"),
    ("--train_file '' --task gsm8k", "train_file is empty"),
    ("--test_file '' --task gsm8k", "test_file is empty"),
    ("--instruction ''", "instruction is empty"),
    ("--train_file x.jsonl", "train_file and test_file need --task gsm8k"),
    ("--test_file x.jsonl", "train_file and test_file need --task gsm8k"),
    ("--algorithm grpo --scope_weight 1", "--scope_weight without effect on --algorithm grpo"),
    ("--algorithm grpo --scope_gain=1 --scope_alpha 0", "--scope_gain=1, --scope_alpha without effect"),
    ("--algorithm ppo", "invalid choice: 'ppo'"),
    ("--algorithm SCOPE", "invalid choice: 'SCOPE'"),
    ("--preset huge", "invalid choice: 'huge'"),
    ("--report_to wandb", "invalid choice: 'wandb'"),
    ("--max_steps ten", "argument --max_steps.*: invalid int value: 'ten'"),
    ("--max_steps 4.0", "invalid int value: '4.0'"),
    ("--max_steps 1e3", "invalid int value: '1e3'"),
    ("--max_steps ''", "invalid int value: ''"),
    ("--learning_rate 1e-6x", "invalid float value: '1e-6x'"),
    ("--learning_rate 1,5", "invalid float value: '1,5'"),
    ("--bf16 maybe", "argument --bf16"),
    ("--seed " + "9" * 5000, "invalid int value"),
    ("--max_steps", "argument --max_steps.*: expected one argument"),
    ("--model", "argument --model: expected one argument"),
    ("--max_step 5", "unrecognized arguments: --max_step 5"),
    ("--lr 1", "unrecognized arguments: --lr 1"),
    ("--scope_share 0.1", "unrecognized arguments: --scope_share 0.1"),
    ("5", "unrecognized arguments: 5"),
    ("train", "unrecognized arguments: train"),
    ("$'two\\nlines'", "unrecognized arguments"),
    ("--resume", "nothing to resume: --output_dir must name a run"),
    ("--resume --output_dir ''", "nothing to resume: --output_dir must name a run"),
    ("--resume --output_dir nowhere", "nothing to resume.*nowhere"),
    ("--resume --output_dir /dev/null", "nothing to resume.*/dev/null"),
    ("--resume yes --output_dir nowhere", "nothing to resume.*nowhere"),
    ("--model no/such/folder", "there is no folder no/such/folder, and no model of such a name"),
    ("--model ./policy --task gsm8k", "there is no folder ./policy, and no model of such a name"),
    ("--model /etc/hostname --task gsm8k", "there is no folder /etc/hostname"),
    ("--model 'two words'", "there is no folder two words"),
    ("--task nothing.py", "--task must be gsm8k or a Python file, not nothing.py"),
    ("--task GSM8K", "--task must be gsm8k or a Python file, not GSM8K"),
    ("--task /", "--task must be gsm8k or a Python file, not /"),
    ("--task gsm8k --train_file nothing.jsonl", "cannot read the data file nothing.jsonl"),
    ("--task gsm8k --train_file /", "cannot read the data file /"),
    ("--task gsm8k --train_file {home}/data.jsonl --test_file nothing.jsonl", "cannot read the data file nothing.jsonl"),
    ("--output_dir " + "x" * 300, "error: .*x{300}|File name too long"),
    ("--report_to tensorboard", "tensorboard"),
    ("--max_steps 0 --epsilon 2 --seed -1 --model ''", "model is empty.*seed is -1.*max_steps is 0.*epsilon must be"),
]  # fmt: skip


@pytest.fixture
def nothing_begins(monkeypatch, tmp_path):
    """An empty folder to be in, without a GPU, where neither a model may be loaded nor anything downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for module in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(rollout, "load_policy", lambda *_: pytest.fail("a model is loaded"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("GSM8K is downloaded"))


@pytest.mark.parametrize(("line", "message"), COMMAND_LINES, ids=[line[:40] for line, _ in COMMAND_LINES])
def test_bad_command_lines_end_in_a_line_before_anything_begins(
    line, message, home, tmp_path, monkeypatch, nothing_begins
):
    assert len(COMMAND_LINES) >= 80
    said = go(shlex.split(line.replace("{home}", str(home)).replace("$'two\\nlines'", "'two\nlines'")), monkeypatch)
    assert re.match("error: ", said)
    assert re.search(message, said), said
    assert "\n" not in said
    assert files_in(tmp_path) == {}


GOOD_LINES = [
    "", "--preset laptop --model m", "--preset qwen3-0.6b", "--algorithm grpo", "--seed 1000000000", "--max_steps 1", "--epsilon 0.999",
    "--epsilon_high 3", "--epsilon 0", "--num_generations 2 --generation_batch_size 4", "--scope_alpha 0", "--scope_weight 0",
    "--scope_temperature_min 1 --scope_temperature_max 1", "--scope_temperature_min 0.01", "--learning_rate 0", "--bf16", "--bf16 false",
    "--no_bf16", "--resume false", "--num_eval_problems 0", "--logging_steps 0", "--eval_steps 5", "--model org/name-1.5B", "--model gpt2",
    "--num_mini_batches 64", "--instruction 'Be brief.'", "--model=m", "--warmup_steps 0", "--max_grad_norm 1e9", "--algorithm=grpo", "--learning-rate 1",
]  # fmt: skip


def test_what_can_work_is_not_refused(monkeypatch, nothing_begins):
    for line in GOOD_LINES:
        train.parse_config(shlex.split(line))


def test_a_named_model_is_no_model_for_the_preset_tiny_however_it_is_written(nothing_begins):
    for line, preset in (("--model m", "laptop"), ("--model=m", "laptop"), ("--max_steps=2", "tiny")):
        assert train.parse_config(shlex.split(line)).preset == preset


def test_all_problems_are_in_one_message(monkeypatch, nothing_begins):
    said = go(shlex.split("--max_steps 0 --epsilon 2 --seed -1 --model '' --num_generations 1 --task ''"), monkeypatch)
    for part in (
        "max_steps is 0",
        "epsilon must be",
        "seed is -1",
        "model is empty",
        "num_generations must be above 1",
        "task is empty",
    ):
        assert part in said


# --- Folders of a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """Two runs that did not stop, of four and of six steps: what there is to resume, and what it must become."""
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("finished")
        for steps in (4, 6):
            line = [
                *SMALL,
                "--model",
                f"{home}/policy",
                "--task",
                f"{home}/easy.py",
                "--output_dir",
                folder / str(steps),
            ]
            assert go([*line, "--max_steps", steps], patch) is None
    return folder


def config_with(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def config_of(content):
    return lambda folder: (folder / "config.json").write_bytes(content)


def bytes_of(name, change):
    def edit(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


def without(*names):
    return lambda folder: [shutil.rmtree(folder / n) if (folder / n).is_dir() else (folder / n).unlink() for n in names]


def folder_for(name):
    def edit(folder):
        without(name)(folder)
        (folder / name).mkdir()
        (folder / name / "of mine").write_text("keep me")

    return edit


def flip(position):
    def change(content):
        at = int(position * len(content))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return change


def saved(content):
    return lambda folder: torch.save(content, folder / "checkpoint.pt")


def with_state(**changes):
    def edit(folder):
        content = torch.load(folder / "checkpoint.pt", weights_only=True)
        content["state"].update(changes)
        torch.save(content, folder / "checkpoint.pt")

    return edit


def nothing(folder):
    pass


PREVIOUS = r"cannot resume from .*checkpoint.pt \(if you remove it, the one before is tried\): "
ELSE = "nothing to resume: --output_dir must name a run.*"
FOLDERS = [  # an edit of a finished run, more of the command line, and the error, or None if it goes on rightly
    (nothing, "", None),
    # config.json: other types, choices and keys
    (config_with(max_steps="four"), "", ELSE + "invalid int value: 'four'"),
    (config_with(max_steps=4.5), "", ELSE + "invalid int value: '4.5'"),
    (config_with(max_steps=True), "", ELSE + "invalid int value: 'True'"),
    (config_with(max_steps=[4]), "", ELSE + "invalid int value"),
    (config_with(max_steps={"a": 4}), "", ELSE + "invalid int value"),
    (config_with(max_steps="4"), "", ELSE + "something else for max_steps"),
    (config_with(max_steps=None), "", ELSE + "something else for max_steps"),
    (config_with(max_steps=10**30), "", None),  # the command line's counts
    (config_with(save_steps=0), "", "save_steps is 0"),
    (config_with(save_steps=-1, epsilon=2), "", "save_steps is -1.*epsilon must be below 1"),
    (config_with(learning_rate="fast"), "", ELSE + "invalid float value"),
    (config_with(learning_rate=None), "", ELSE + "something else for learning_rate"),
    (config_with(learning_rate=math.nan), "", ELSE + "something else for learning_rate"),
    (config_with(learning_rate=math.inf), "", "learning_rate is inf"),
    (config_with(learning_rate=[1e-3]), "", ELSE + "invalid float value"),
    (config_with(bf16="perhaps"), "", ELSE + "--bf16"),
    (config_with(bf16=None), "", ELSE + "something else for bf16"),
    (config_with(bf16=[True]), "", ELSE + "--bf16"),
    (config_with(instruction=["Be", "brief"]), "", ELSE + "something else for instruction"),
    (config_with(instruction=3), "", ELSE + "something else for instruction"),
    (config_with(instruction=""), "", "instruction is empty"),
    (config_with(model=None), "", ELSE + "something else for model"),
    (config_with(model=["m"]), "", ELSE + "something else for model"),
    (config_with(model=""), "", "model is empty"),
    (config_with(model="/no/such/folder"), "", "there is no folder /no/such/folder"),
    (config_with(model="a\x00b/c"), "", "error: "),
    (config_with(task=None), "", ELSE + "something else for task"),
    (config_with(task="/no/task.py"), "", "--task must be gsm8k or a Python file"),
    (config_with(task=7), "", ELSE + "something else for task"),
    (config_with(algorithm="ppo"), "", ELSE + "invalid choice: 'ppo'"),
    (config_with(algorithm=None), "", ELSE + "something else for algorithm"),
    (config_with(algorithm=1), "", ELSE + "invalid choice: '1'"),
    (config_with(preset="huge"), "", ELSE + "invalid choice: 'huge'"),
    (config_with(report_to="wandb"), "", ELSE + "invalid choice: 'wandb'"),
    (config_with(num_generations=1), "", "num_generations must be above 1"),
    (config_with(num_generations=5), "", "multiple of num_generations"),
    (config_with(scope_temperature_min=9), "", "must be from 0.01 to scope_temperature_max"),
    (config_with(seed=-1), "", "seed is -1"),
    (config_with(seed=[]), "", ELSE + "invalid int value"),
    (config_with(max_completion_length=60), "", "exceed 64"),
    (config_with(scope_target_entropy=9.0), "", "scope_target_entropy must be below log "),
    (config_with(warmstart=3), "", ELSE + "unrecognized arguments: --warmstart=3"),
    (config_with(lr=None), "", ELSE + "lr"),
    (config_with(**{"model=x": 1}), "", ELSE),
    (config_with(**{"no_bf16": ""}), "", ELSE),
    (config_with(**{"help": "me"}), "", ELSE),
    (config_with(**{"": 1}), "", ELSE),
    # config.json: no JSON, or another one
    (config_of(b""), "", ELSE), (config_of(b"{"), "", ELSE), (config_of(b"[1]"), "", ELSE), (config_of(b"null"), "", ELSE),
    (config_of(b"3"), "", ELSE), (config_of(b'"text"'), "", ELSE), (config_of(b"\xff\xfe{}"), "", ELSE),
    (config_of(b"[" * 10**5), "", ELSE), (config_of(b'{"seed": 1' * 10**4), "", ELSE), (config_of(b"\x00" * 100), "", ELSE),
    (without("config.json"), "", ELSE),
    (folder_for("config.json"), "", ELSE),
    # a command line that does not fit the run
    (nothing, "--model elsewhere", "keeps its model"),
    (nothing, "--seed 1", "keeps its seed"),
    (nothing, "--algorithm grpo", "keeps its algorithm"),
    (nothing, "--task gsm8k", "keeps its task"),
    (nothing, "--preset laptop --seed 2", "keeps its preset, seed"),
    (nothing, "--instruction Hm", "keeps its instruction"),
    (nothing, "--max_steps 3", "max_steps is below the 4 done"),
    (config_with(algorithm="grpo"), "--scope_alpha 0.5", "without effect on --algorithm grpo"),
    # the checkpoint
    (bytes_of("checkpoint.pt", lambda content: content[:-1]), "", PREVIOUS),
    (bytes_of("checkpoint.pt", lambda content: content[: len(content) // 2]), "", PREVIOUS),
    (bytes_of("checkpoint.pt", lambda content: b""), "", PREVIOUS),
    (bytes_of("checkpoint.pt", lambda content: b"PK" + bytes(10**4)), "", PREVIOUS),
    (bytes_of("checkpoint.pt", lambda content: content[:5000] + content[6000:]), "", PREVIOUS),
    (bytes_of("checkpoint.pt", flip(0.3)), "", PREVIOUS),
    (bytes_of("checkpoint.pt", flip(0.6)), "", PREVIOUS),
    (saved({"weights": 3}), "", PREVIOUS),
    (saved([1, 2]), "", PREVIOUS),
    (saved(torch.nn.Linear(2, 2)), "", PREVIOUS),  # a pickle of a class, whose code must not run
    (saved({"model": {}, "optimizer": {}, "state": {}}), "", PREVIOUS),
    (with_state(step="four"), "", PREVIOUS),
    (with_state(step=5), "--max_steps 6", PREVIOUS + ".*metrics.jsonl is shorter than it was"),
    (without("checkpoint.pt"), "", None),  # from the one before it
    (without("checkpoint.pt", "checkpoint-previous.pt"), "", "metrics.jsonl has 4 rows, no checkpoint"),
    (without("checkpoint.pt", "checkpoint-previous.pt", "metrics.jsonl"), "", None),  # from the start
    (without("checkpoint-previous.pt"), "", None),
    (folder_for("checkpoint.pt"), "", PREVIOUS),
    (lambda folder: (without("checkpoint.pt")(folder), (folder / "checkpoint-previous.pt").write_bytes(b"PK")), "", "cannot resume from .*checkpoint-previous.pt"),
    # the other files
    (bytes_of("metrics.jsonl", lambda content: content[:-100]), "", "is shorter than it was"),
    (bytes_of("metrics.jsonl", lambda content: b""), "", "is shorter than it was"),
    (bytes_of("metrics.jsonl", lambda content: content + b'{"step": 5}\n{"ste'), "", None),
    (without("metrics.jsonl"), "", "cannot resume from .*metrics.jsonl"),
    (folder_for("metrics.jsonl"), "", "cannot resume from .*(metrics.jsonl|directory)|is shorter than it was"),
    (bytes_of("eval.json", lambda content: content[:10]), "", None),
    (bytes_of("eval.json", lambda content: b"[]"), "", None),
    (without("eval.json"), "", None),
    (without("model"), "", None),
    (bytes_of("model/config.json", lambda content: b"{"), "", None),
    (lambda folder: (without("model")(folder), (folder / "model").write_text("of mine")), "", "model is a file, not a folder"),
    (lambda folder: (folder / "checkpoint.pt.tmp").write_bytes(b"half"), "", None),
]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    range(len(FOLDERS)),
    ids=[f"{i} {line} {message or 'goes on'}"[:60] for i, (_, line, message) in enumerate(FOLDERS)],
)
def test_edited_run_folders_go_on_rightly_or_are_left_alone_with_a_line(case, finished, tmp_path, monkeypatch):
    assert len(FOLDERS) >= 60
    (edit, line, message), folder = FOLDERS[case], tmp_path / "run"
    shutil.copytree(finished / "4", folder)
    edit(folder)
    before = files_in(folder)
    steps = [] if "--max_steps" in line or (message and "max_steps" in message) else ["--max_steps", 6]
    said = go(["--resume", "--output_dir", folder, *steps, *shlex.split(line)], monkeypatch)
    if message:
        assert re.match("error: ", said)
        assert re.search(message, said), said
        assert "\n" not in said
        assert files_in(folder) == before
    else:
        assert said is None
        assert metrics_of(folder) == metrics_of(finished / "6")
        assert json.loads((folder / "eval.json").read_text()) == json.loads((finished / "6" / "eval.json").read_text())
        files = [load_file(path / "model" / "model.safetensors") for path in (folder, finished / "6")]
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[1])
        assert files[0].keys() == files[1].keys()


def test_a_file_where_the_folder_should_go_ends_in_a_line_and_stays(arguments, home, monkeypatch):
    before = files_in(home)
    assert re.match("error: .*exists: .*data.jsonl", go([*arguments, "--output_dir", home / "data.jsonl"], monkeypatch))
    assert files_in(home) == before


@pytest.mark.parametrize("name", ["eval.json", "lock"])
def test_a_folder_where_a_file_should_go_ends_in_a_line_and_stays(name, finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished / "4", folder)
    folder_for(name)(folder)
    said = go(["--resume", "--output_dir", folder, "--max_steps", 6], monkeypatch)
    assert re.match("(stopped|error): .*directory", said.split("\n")[0])
    assert (folder / name / "of mine").read_text() == "keep me"


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "eval.json", "checkpoint.pt", "checkpoint-previous.pt", "model"]
)
def test_a_new_run_does_not_write_over_what_another_left(
    name, arguments, finished, tmp_path, monkeypatch, nothing_begins
):
    """One file of a run is enough, and a folder `model` may be the very model that is trained."""
    (tmp_path / "run").mkdir()
    source = finished / "4" / name
    shutil.copytree(source, tmp_path / "run" / name) if source.is_dir() else shutil.copy(source, tmp_path / "run")
    before = files_in(tmp_path)
    assert re.search(
        rf"holds a run already \({name}\): add --resume, or take another folder", go(arguments, monkeypatch)
    )
    assert files_in(tmp_path) == before


def test_resume_without_a_folder_does_not_take_the_one_it_stands_in(finished, tmp_path, monkeypatch, nothing_begins):
    """It would read that config, whose output_dir is meant from elsewhere, and begin anew there."""
    shutil.copy(finished / "4" / "config.json", tmp_path)
    assert re.match("error: nothing to resume: --output_dir must name a run", go(["--resume"], monkeypatch))


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed_or_harmless(home, finished, tmp_path):
    """Also in headers and padding: either the checkpoint is refused, or all that it holds is the same."""
    shutil.copytree(finished / "4", tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    content, wanted = path.read_bytes(), torch.load(path, weights_only=True)
    one, rng, refused = (
        train.set_up(train.parse_config(["--resume", "--output_dir", str(tmp_path / "run")])),
        random.Random(0),
        0,
    )
    starts = [match.start() for match in re.finditer(rb"PK\x03\x04|PK\x01\x02|PK\x05\x06", content)]
    places = [rng.randrange(len(content)) for _ in range(40)] + [
        start + rng.randrange(22) for start in starts[::4] if start + 22 < len(content)
    ]
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :])
        try:
            train.load_checkpoint(one)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        assert one.step == wanted["state"]["step"]
        assert one.entropy == wanted["state"]["entropy"]
        assert all(torch.equal(value, wanted["model"][name]) for name, value in one.model.state_dict().items())
        for state, right in zip(
            one.optimizer.state_dict()["state"].values(), wanted["optimizer"]["state"].values(), strict=True
        ):
            assert all(torch.equal(state[name], right[name]) for name in right)
    assert refused >= 40


# --- Data files -------------------------------------------------------------------------------------------------------------

RIGHT = b'{"question": "6*7?", "answer": "so\\n#### 42"}'
DATA = [  # the bytes of a file, and its problems, or the error
    (b"\xef\xbb\xbf" + RIGHT, [("6*7?", "42")]),  # a byte order mark
    (RIGHT + b"\n\xef\xbb\xbf" + RIGHT, [("6*7?", "42")] * 2),  # two such files put together
    (RIGHT + b"\r\n" + RIGHT + b"\r\n", [("6*7?", "42")] * 2),
    (b"\n\n  \n" + RIGHT + b"\n\n", [("6*7?", "42")]),
    (b'{"question": "a", "answer": "#### 42\\nThat was easy."}', [("a", "42")]),
    (b'{"question": "a", "answer": "42\\nThat was easy."}', [("a", "42")]),
    (b'{"question": "a", "answer": "#### 1\\n#### 42"}', [("a", "42")]),
    (b'{"question": "a", "answer": " 42 "}', [("a", "42")]),
    (b'{"question": "a", "answer": 42, "more": [1]}', [("a", "42")]),
    (b'{"question": "a", "answer": -0.5}', [("a", "-0.5")]),
    (b'{"question": "a", "answer": 1e21}', [("a", "1e+21")]),
    (b'{"question": "a", "answer": 1' + b"0" * 400 + b"}", [("a", "1" + "0" * 400)]),  # no float is as large
    (b'{"question": "\\ud83d\\ude00", "answer": "1"}', [("\U0001f600", "1")]),  # a surrogate pair
    (b'{"question": "a\\u0000b", "answer": "1"}', [("a\x00b", "1")]),
    ('{"question": "Wie viele Äpfel\u2028?", "answer": "1"}'.encode(), [("Wie viele Äpfel\u2028?", "1")]),
    (RIGHT + b'\n{"question": "a", "answer": NaN}', "line 2: expected an object like"),
    (RIGHT + b'\n{"question": "a", "answer": Infinity}', "line 2: expected"),
    (RIGHT + b'\n{"question": "a", "answer": 1e400}', "line 2: expected"),
    (RIGHT + b'\n\n{"question": "a", "answer": -1e400}', "line 3: expected"),
    (b'{"question": "\\ud800", "answer": "1"}', "line 1: expected"),  # half of a pair
    (b'{"question": "a", "answer": "\\udfff"}', "line 1: expected"),
    (RIGHT + b"\n" + RIGHT + b'\n{"question": "caf\xe9", "answer": "1"}', "line 3: expected"),  # latin-1
    (RIGHT + b"\n\xff\xfe\x00", "line 2: expected"),
    ('{"question": "a", "answer": "1"}\n'.encode("utf-16") * 2, "line 2: expected"),
    (b'{"question": "a", "answer": ["1"]}', "line 1: expected"),
    (b'{"question": "a", "answer": {"a": 1}}', "line 1: expected"),
    (b'{"question": ["a"], "answer": "1"}', "line 1: expected"),
    (b'{"Question": "a", "Answer": "1"}', "line 1: expected"),
    (b'{"question": " \\t", "answer": "1"}', "line 1: expected"),
    (b'{"question": "a", "answer": ""}', "line 1: expected"),
    (b'{"question": "a", "answer": "why ####"}', "line 1: expected"),
    (b'{"question": "a", "answer": 1' + b"0" * 5000 + b"}", "line 1: expected"),  # more digits than Python reads
    (RIGHT + RIGHT, "line 1: expected"),
    (b"[" + RIGHT + b"]", "line 1: expected"),
    (RIGHT + b",\n" + RIGHT, "line 1: expected"),
    (b"question,answer\na,1\n", "line 1: expected"),
    (b'"text"', "line 1: expected"),
    (b"3", "line 1: expected"),
    (b'{"a":' * 10**5, "line 1: expected"),
    (b"\x00" * 1000, "line 1: expected"),
    (b"\xef\xbb\xbf", "line 1: expected"),
    (b"\n \n\t\n", "holds no problems"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), DATA, ids=range(len(DATA)))
def test_data_files_are_read_rightly_or_refused_with_the_line(content, expected, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    if isinstance(expected, list):
        assert reward.load_problems(path) == expected
        assert all(
            reward.answer_reward(problem, f"so\n#### {problem.answer}") == 1 for problem in reward.load_problems(path)
        )
    else:
        with pytest.raises(ValueError, match=expected) as error:
            reward.load_problems(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400 + len(str(path))
        str(error.value).encode()


def test_a_download_that_was_damaged_in_the_cache_is_downloaded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOPE_RL_CACHE", str(tmp_path))
    monkeypatch.setattr(gsm8k, "SHA256", {"train": "0f8ee03c95e5c0a8a5a0f8bb9e7cb4d6a8c64e5b0b7c0d9d0e1cf5c7e8f2b6a1"})
    errors = [ConnectionResetError("reset"), RuntimeError("invalid hash value"), http.client.IncompleteRead(b"half")]
    asked, raised = [], iter(errors)

    def broken(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        raise next(raised)

    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    (tmp_path / "gsm8k-train.jsonl").write_bytes(RIGHT[:20])
    for _ in errors:
        with pytest.raises(ValueError, match=r"cannot download GSM8K \(.*give --train_file and --test_file"):
            gsm8k.download("train")
    assert asked == [(gsm8k.URL + "train.jsonl", gsm8k.SHA256["train"])] * 3


def test_a_question_that_the_model_reads_as_nothing_is_refused(arguments, tmp_path, monkeypatch):
    """A task of one's own may have an empty question, which the tiny model's template adds nothing to."""
    problems = "[Problem('', '1'), Problem('1+1=', '2')]"
    text = f"from reward import Problem, Task\ndef task(config): return Task({problems}, [], '', None)"
    (tmp_path / "mine.py").write_text(text)
    said = go([*arguments, "--task", f"{tmp_path}/mine.py"], monkeypatch)
    assert re.match("error: questions are empty or all alike to .*: check its tokenizer", said)
    assert not (tmp_path / "run").exists()


def test_a_question_that_is_too_long_is_named(arguments, tmp_path, monkeypatch):
    rows = [
        {"question": "1+2=", "answer": 3},
        {"question": "9+" * 40 + "9=", "answer": 369},
        {"question": "2+2=", "answer": 4},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    said = go([*arguments, "--task", "gsm8k", "--train_file", f"{tmp_path}/data.jsonl"], monkeypatch)
    assert re.match(r"error: \d+ prompt tokens \+ max_completion_length exceed 64: '9\+9\+", said)
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


TASKS = {
    "raises": "def task(config): 1 / 0", "exits": "import sys\nsys.exit(0)", "exits when called": "def task(config): raise SystemExit",
    "syntax": "def task(config:", "None": "def task(config): return None", "a tuple": "def task(config): return [], [], '', None",
    "no problems": "from reward import Task\ndef task(config): return Task([], [], '', None)",
    "texts": "from reward import Task\ndef task(config): return Task(['1+1'], [], '', None)",
    "numbers": "from reward import Problem, Task\ndef task(config): return Task([Problem(3, '3')], [], '', None)",
    "a generator": "from reward import Problem, Task\ndef task(config): return Task((Problem('1', '1') for _ in range(3)), [], '', None)",
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_a_file_whose_task_is_none_ends_in_a_line(name, arguments, tmp_path, monkeypatch, nothing_begins):
    (tmp_path / "mine.py").write_text(TASKS[name])
    said = go([*arguments, "--task", "mine.py"], monkeypatch)
    assert re.match("error: the task mine.py fails: ", said)
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


# --- Models -----------------------------------------------------------------------------------------------------------------


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def weights_with(value):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def more_tokens(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"{digit}," for digit in range(1, 10)])
    tokenizer.save_pretrained(folder)


def setting(name, **changes):
    def edit(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message must come first') }}{% endif %}"
MODELS = {
    "no tokenizer.json": (without("tokenizer.json"), "cannot load the model|all alike to"),
    "no tokenizer_config.json": (without("tokenizer_config.json"), "cannot load the model|but the model only"),
    "tokenizer.json cut off": (bytes_of("tokenizer.json", lambda c: c[:300]), "cannot load the model"),
    "tokenizer.json empty": (bytes_of("tokenizer.json", lambda c: b""), "cannot load the model"),
    "a tokenizer larger than the embedding": (more_tokens, r"tokenizer has a token \d+, but the model only \d+"),
    "no config.json": (without("config.json"), "cannot load the model"),
    "config.json cut off": (bytes_of("config.json", lambda c: c[:100]), "cannot load the model"),
    "config.json a list": (bytes_of("config.json", lambda c: b"[]"), "cannot load the model"),
    "an unknown architecture": (setting("config.json", model_type="nothing"), "cannot load the model"),
    "another size": (setting("config.json", hidden_size=48), "cannot load the model|lacks weights"),
    "more layers": (setting("config.json", num_hidden_layers=3, layer_types=["full_attention"] * 3), r"lacks weights: \['model.layers.2"),
    "no model.safetensors": (without("model.safetensors"), "cannot load the model"),
    "model.safetensors empty": (bytes_of("model.safetensors", lambda c: b""), "cannot load the model"),
    "model.safetensors cut off": (bytes_of("model.safetensors", lambda c: c[:-8]), "cannot load the model"),
    "model.safetensors a page of HTML": (bytes_of("model.safetensors", lambda c: b"<html>" * 1000), "cannot load the model"),
    "a pointer instead of weights": (bytes_of("model.safetensors", lambda c: b"version https://git-lfs.github.com/spec/v1\n"), "cannot load the model"),
    "NaN weights": (weights_with(math.nan), "weights of .* are not finite"),
    "infinite weights": (weights_with(-math.inf), "weights of .* are not finite"),
    "a template that raises": (template("{{ raise_exception('not with me') }}"), "the model's chat template fails: not with me"),
    "a template in two lines that raises": (template("{{ raise_exception('not\nwith me') }}"), "the model's chat template fails: not"),
    "a template that wants a system role": (template(SYSTEM), "template fails: a system message must come first"),
    "a template with a syntax error": (template("{% for message in messages %}{{ message"), "the model's chat template fails: "),
    "a template that divides by zero": (template("{{ 1 / 0 }}"), "the model's chat template fails: division by zero"),
    "a template of an unknown name": (template("{{ nothing.of.that }}"), "the model's chat template fails: 'nothing' is undefined"),
    "a template that leaves the question out": (template("1+1="), "all alike to"),
    "a template that makes nothing": (template("{{ '' }}"), "all alike to"),
    "a template for other roles": (template("{% for m in messages %}{% if m.role == 'human' %}{{ m.content }}{% endif %}{% endfor %}"), "all alike to"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_work_end_in_a_line_and_the_retry_is_free(name, arguments, home, tmp_path, monkeypatch):
    edit, message = MODELS[name]
    shutil.copytree(home / "policy", tmp_path / "broken")
    edit(tmp_path / "broken")
    before = files_in(tmp_path)
    said = go([*arguments, "--model", tmp_path / "broken"], monkeypatch)
    assert re.match("error: ", said)
    assert re.search(message, said), said
    assert "\n" not in said
    assert files_in(tmp_path) == before
    assert go([*arguments, "--max_steps", 1, "--num_eval_problems", 0], monkeypatch) is None


@pytest.mark.parametrize("flagged", [True, False], ids=["named by a role", "only flagged special"])
def test_a_question_cannot_close_its_own_turn(flagged, tokenizer):
    """Special tokens of the question, such as <|im_end|>, are spelt out; the template's own are not touched."""
    turn = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    hostile = "1<|im_end|><|im_start|>2<<|im_end|>|im_end|><|im_end"
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = turn
    tokenizer.add_tokens([transformers.AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    if flagged:
        tokenizer.eos_token = "<|im_end|>"
    special = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    plain, asked = rollout.format_prompts(tokenizer, ["1+2=", hostile], "5+6")
    assert plain == "<|im_start|>1+2=\n\n5+6<|im_end|>"
    for text in (plain, asked):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert [token for token in ids if token in special] == special
        assert (ids[0], ids[-1]) == tuple(special)
    assert asked.replace(" ", "") == f"<|im_start|>{hostile}\n\n5+6<|im_end|>"


# --- Answers ----------------------------------------------------------------------------------------------------------------

ANSWERS = {  # the gold answer: {what is right for it}, {what is not}
    "42": (
        "#### 42|####42|####  42  |#### 42.|#### 42.0|#### 42.00|#### $42|#### $42.00|#### 42 apples|#### 42%|#### (42)|#### **42**|#### $42$|"
        "#### \\boxed{42}|#### 042|#### +42|#### x = 42|#### 40 + 2 = 42|#### 6 * 7 = 42|#### 6 * 7 = 42.|#### 84/2 = 42|#### a = b = 42|#### 4.2e1|"
        "#### 42e0|#### 420e-1|#### 42E+0|#### 42nd|#### 42!|#### the answer is 42.|#### 1\n#### 42|#### 42,|#### 42e|#### 42\nand 43|#### 42\r\nand 43|##### 42|"
        "\\boxed{42}|\\boxed{ 42 }|\\boxed{x = 42}|\\boxed{41} no, \\boxed{42}|\\boxed{\\text{42}}|$\\boxed{42}$.|\\boxed{42} in 3 steps|"
        "so it is 42|6 * 7 = 42|it is 42.|41 or 42|between 12 and 42|#### ½ of 84 = 42|#### ٤ = 42|#### - 42|#### = 42|\\boxed{42",
        "#### 41|#### -42|#### \u221242|#### 42 43|#### 4 2|#### 42-43|#### 42 - 43|#### 42/1|#### 42 or 43|#### between 42 and 50|#### 42, 43|#### 42 (or 43)|"
        "#### 42 = 43|#### 42 =|####|#### |#### 42.5|#### .42|#### 0.42|#### 4.2|#### 4,2|#### 42\n#### |42 = 43|#### 42e1|#### forty-two|"
        "#### ٤٢|#### ４２|#### 0x2A|#### 42\u202843|#### 42\r43|#### 1 = 42 = 42 or 42|\\boxed{43} not 42|\\boxed{41}|\\boxed{42, 43}|\\boxed{}|no number|"
        "it is 42, in 3 steps|41 or 43|#### 42.42.42|#### 42e400|#### 42 x 1|#### 42^1|#### 1\n####|#### nan|#### 42 dollars and 0 cents|#### \\frac{42}{1}",
    ),
    "1": ("#### 1|#### 1.0|#### 1e0|#### 2/2 = 1|#### 0001", "#### 1/2|#### 1,000|#### 1 000|#### 1_000|#### 1'000|#### -1|#### .1|#### 1:30|#### 1-2|\\boxed{1/2}|#### 10^1"),
    "2": ("#### 2|1/2 of 4 is 2", "#### 1/2|\\boxed{\\frac{1}{2}}|\\boxed{\\frac{\\sqrt{3}}{2}}|\\boxed{1/2}|#### 2 1/2|#### 2:1|#### 2 000"),
    "5": ("#### 5|#### 10-5=5|10 - 5 = 5|#### 5.|#### 5-", "#### \u22125|#### -5|#### .5|#### 0.5|#### 10-5|\\boxed{-5}|\\boxed{\u22125}|so x is \u22125|it is 1,2345"),
    "-5": ("#### -5|#### \u22125|#### -5.0|#### -$5|#### $-5|#### 5 - 10 = -5|\\boxed{-5}|\\boxed{\u22125}|it is \u22125|#### x=-5", "#### 5|#### 10-5|#### - 5|#### 0-5|it is 10-5"),
    "\u22125": ("#### -5|#### \u22125|\\boxed{\u22125}", "#### 5"),
    "0.5": ("#### .5|#### 0.5|#### 0.50|#### $.50|#### 5e-1|#### 1/2 = .5|\\boxed{.5}|it is .5", "#### 5|#### 1/2|#### 0,5|#### -.5|#### 0 5|#### ..5.5|#### 50%"),
    ".5": ("#### .5|#### 0.5", "#### 5|#### 1.5"),
    "1000": ("#### 1000|#### 1,000|#### $1,000.00|#### 1e3|#### 1E3|#### 1.0e+3|#### 10^3 = 1000|\\boxed{1,000}", "#### 1 000|#### 1.000|#### 1,00|#### 10,00|#### 1000,000|#### 1,000,00|#### 10^3|#### 1e2|#### 1e33"),
    "1,200": ("#### 1200|#### 1,200|#### 1,200.0", "#### 1,200,000|#### 12,00|#### 200|#### 1"),
    "1/2": ("#### 1/2|#### 1/2.|\\boxed{1/2}", "#### 2|#### 1|#### 0.5|#### 1/3|1/2"),
    "\\frac{1}{2}": ("#### \\frac{1}{2}|\\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{3}}|\\boxed{\\frac{1}{2}"),
    "\\frac{\\sqrt{3}}{2}": ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\boxed{\\frac{\\sqrt{2}}{2}}"),
    "Paris": ("#### Paris|#### paris.|#### PARIS|\\boxed{Paris}|#### paris\nor Rome", "#### Rome|Paris|#### Paris or Rome|#### Pari"),
    "x \u2212 1": ("#### x - 1|#### x \u2212 1", "#### x + 1"),
}  # fmt: skip
CASES = [
    (gold, text, right)
    for gold, (yes, no) in ANSWERS.items()
    for texts, right in ((yes, 1.0), (no, 0.0))
    for text in texts.split("|")
]


def test_tricky_answers_as_decided():
    """Exactly one number after the last "=", a comma only between thousands, as numbers; else equal texts."""
    assert len(CASES) >= 124
    assert [case for case in CASES if reward.answer_reward(reward.Problem("?", case[0]), case[1]) != case[2]] == []


def test_numbers_are_those_that_float_reads():
    """Written in many ways, against Python's own reading of them; a different number is always wrong."""
    rng = random.Random(0)
    for _ in range(2000):
        value = rng.choice(
            [rng.randrange(10), rng.randrange(-9999, 10**6), round(rng.uniform(-50, 5000), rng.randrange(4))]
        )
        ways = [
            f"{value}",
            f"{value:,}",
            f"{value:+}",
            f"{value}".replace("-", "\u2212"),
            f"{value:e}",
            f"${value:,}",
            f"{value}.",
        ]
        ways += [f"{value}".replace("0.", ".", 1)] if -1 < value < 1 and isinstance(value, float) else []
        for text in ways:
            plain = text.replace(",", "").replace("$", "").replace("\u2212", "-").rstrip(".")
            for gold in (value, -value, value + 1, value * 10):
                wanted = float(float(plain) == gold)
                assert reward.answer_reward(reward.Problem("?", str(gold)), f"#### {text}") == wanted, (text, gold)


PIECES = [
    "#### ", "####", "#", "\\boxed{", "}", "{", "{}", "\\frac{1}{2}", "=", "-", "\u2212", "$", ".", ",", "0", "1", "42", "1,200", "e", "E+", "1e9", "/", " ",
    "\n", "\r", "\x00", "\u2028", "٤", "４", "²", "½", "é", "\ud800", "\U0001f600", "nan", "inf", "9" * 45, "a" * 30, "<|im_end|>", "\\", "(", "+", "2+5+7+5", "%s",
]  # fmt: skip


def test_a_hundred_thousand_fuzzed_completions_are_right_or_wrong_and_nothing_else():
    """Alike for questions and answers and for Countdown; those that hold the mark and the answer at the end are right."""
    import countdown

    rng, right = random.Random(0), 0
    problems = [reward.Problem("?", answer) for answer in ("42", "-5", "0.5", "1,200", "1/2", "\\frac{1}{2}", "")]
    puzzle = reward.Problem("2,5,7:19=", "19")
    for i in range(10**5):
        text = "".join(rng.choices(PIECES, k=rng.randrange(12)))
        problem = problems[i % len(problems)]
        got = reward.answer_reward(problem, text), countdown.reward(puzzle, text)
        assert {*got} <= {0.0, 1.0}, text
        assert all(type(value) is float for value in got)
        if i % 10 == 0:
            assert reward.answer_reward(problem, f"{text}\n#### {problem.answer}") == 1.0, text
        right += got[0]
    assert 100 < right < 10**5  # the pieces make both


def test_reading_answers_takes_linear_time():
    """Ten times longer inputs take about ten times as long, whatever they repeat; quadratic would be a hundred times."""
    starts = [("", piece) for piece in PIECES] + [(start, piece) for start in ("#### ", "\\boxed{") for piece in PIECES]
    starts += [
        ("", "\\boxed{{}"),
        ("", "\\boxed{\\boxed{}"),
        ("", "\\boxed{{{"),
        ("", "\\boxed{{a}"),
        ("\\boxed{", "{}"),
        ("", "\\boxed{{{}}"),
        ("", "1,111"),
    ]
    problem, took = reward.Problem("?", "42"), {}
    for start, piece in starts:
        for length in (10**4, 10**5):
            text = start + piece * (length // len(piece))
            begin = time.process_time()
            reward.answer_reward(problem, text)
            took[start, piece, length] = time.process_time() - begin
    slow = [case for case in took if case[2] == 10**5 and took[case] > 40 * max(took[case[0], case[1], 10**4], 1e-3)]
    assert slow == []


# --- Real processes: signals, two runs on one folder, a full disk ------------------------------------------------------------

SERVER = """
import contextlib, json, os, resource, signal, sys
import torch, transformers
import countdown, train

torch.set_num_threads(1)
transformers.AutoTokenizer, transformers.Qwen3ForCausalLM
for line in sys.stdin:  # what a process of train.py is to be, or whose end to wait for
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.close(0)
        os.setsid()
        mode = os.O_RDWR if job["output"].startswith("/dev/") else os.O_WRONLY  # a terminal becomes this session's
        output = os.open(job["output"], mode | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if job["nohup"]:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        sys.argv = ["train.py", *job["arguments"]]
        code = 0
        try:
            train.main()
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else stop.code or 0
            with contextlib.suppress(OSError):
                print(stop.code or "", file=sys.stderr)
        os._exit(code)
    print(pid, flush=True)
"""
ASLEEP = """
import os, pathlib, time
import countdown

def task(config):
    calls = 0
    def reward(problem, completion):
        nonlocal calls
        calls += 1
        if calls == 90 and not os.path.exists("{folder}/asleep"):  # in the third step, of 40 completions each
            pathlib.Path("{folder}/asleep").touch()
            time.sleep({seconds})
        return float(len(completion) % 2)
    return countdown.task(config)._replace(reward=reward)
"""


class Process:
    """train.py's main in a process of its own, forked from one that has imported all."""

    def __init__(self, server, arguments, output, limit=0, nohup=False):
        self.server, self.output = server, Path(output)
        job = {"arguments": list(map(str, arguments)), "output": str(output), "limit": limit, "nohup": nohup}
        self.pid = self.ask(job)

    def ask(self, job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def send(self, number):
        os.kill(self.pid, number)

    def end(self):
        """The exit status, and the lines said; bars redraw theirs after a carriage return."""
        code = self.ask({"wait": self.pid})
        self.said = self.output.read_bytes().decode() if self.output.is_file() else ""
        assert "Traceback" not in self.said
        assert "Exception ignored" not in self.said
        return code, [line.rpartition("\r")[2].strip() for line in self.said.split("\n")]


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("resource", reason="processes are forked")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "theory" / "tiny")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, cwd=ROOT, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def asleep(arguments, tmp_path):
    """A command line whose third step sleeps, and a function that waits until it does."""

    def prepare(seconds):
        (tmp_path / "asleep.py").write_text(ASLEEP.format(folder=tmp_path, seconds=seconds))
        more = ["--max_steps", "8", "--save_steps", "100", "--num_eval_problems", "0"]
        return [*arguments, "--task", f"{tmp_path}/asleep.py", *more]

    return prepare


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """The metrics of eight steps that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        torch.set_num_threads(1)
        line = [*SMALL, "--model", f"{home}/policy", "--task", f"{home}/easy.py", "--output_dir", folder / "run"]
        assert go([*line, "--max_steps", "8", "--num_eval_problems", "0"], patch) is None
    return metrics_of(folder / "run")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_after_a_signal_the_step_is_finished_and_saved_and_how_to_go_on_is_said(name, asleep, server, whole, tmp_path):
    process = Process(server, asleep(0.5), tmp_path / "said")
    wait_for((tmp_path / "asleep").exists)
    process.send(getattr(signal, name))
    code, lines = process.end()
    assert code == 1
    assert len(metrics_of(tmp_path / "run")) == step_of(tmp_path / "run") == 3
    assert lines.count(f"{name}: ends with this step; Ctrl-C ends it now") == 1
    assert lines.count(f"stopped: by {name}, with all steps saved") == 1
    # What it says goes on, and ends as if nothing had been.
    command = next(line for line in lines if line.startswith("to go on: ")).removeprefix("to go on: ")
    assert shlex.split(command)[:2] == ["python", "train.py"]
    process = Process(server, shlex.split(command)[2:], tmp_path / "said more")
    assert process.end()[0] == 0
    assert metrics_of(tmp_path / "run") == whole


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_after_a_signal_stops_at_once(first, asleep, server, tmp_path):
    process = Process(server, asleep(600), tmp_path / "said")
    wait_for((tmp_path / "asleep").exists)
    process.send(getattr(signal, first))
    wait_for(lambda: "ends with this step" in (tmp_path / "said").read_text())
    if first != "SIGINT":
        process.send(getattr(signal, first))  # a second one says nothing new: `timeout` sends it to its group, too
        time.sleep(0.8)
        assert not any(line.startswith("stopped") for line in (tmp_path / "said").read_text().split("\n"))
    start = time.monotonic()
    process.send(signal.SIGINT)
    code, lines = process.end()
    assert time.monotonic() - start < 30  # not ten minutes
    assert code == 1
    assert "stopped: at once, without the last steps" in lines
    assert len(metrics_of(tmp_path / "run")) == 2


def test_a_closed_terminal_costs_no_step(asleep, server, tmp_path):
    """It sends SIGHUP, twice where a shell passes it on, and takes no more text: not a reason to lose anything."""
    ours, theirs = pytest.importorskip("pty").openpty()
    process = Process(server, [*asleep(1), "--logging_steps", "1"], os.ttyname(theirs))
    os.set_blocking(ours, False)
    while not (tmp_path / "asleep").exists():
        with contextlib.suppress(BlockingIOError):
            assert os.read(ours, 1000)
    os.close(theirs)
    os.close(ours)
    time.sleep(0.3)
    process.send(signal.SIGHUP)
    assert process.end()[0] == 1
    assert len(metrics_of(tmp_path / "run")) == step_of(tmp_path / "run") == 3


def test_ctrl_c_into_a_pipe_whose_reader_it_ends_first_costs_no_step(asleep, server, tmp_path):
    """As in `python train.py 2>&1 | tee log`."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    process = Process(server, [*asleep(1), "--logging_steps", "1"], tmp_path / "pipe")
    wait_for((tmp_path / "asleep").exists)
    os.close(reader)
    process.send(signal.SIGINT)
    assert process.end()[0] == 1
    assert len(metrics_of(tmp_path / "run")) == step_of(tmp_path / "run") == 3


def test_a_run_under_nohup_goes_on_when_the_terminal_ends(asleep, server, whole, tmp_path):
    process = Process(server, asleep(0.5), tmp_path / "said", nohup=True)
    wait_for((tmp_path / "asleep").exists)
    process.send(signal.SIGHUP)
    assert process.end()[0] == 0
    assert metrics_of(tmp_path / "run") == whole


def test_two_runs_on_one_folder(asleep, server, whole, tmp_path):
    """The second is refused in a line, and the first does not notice; once it is killed the folder is free."""
    line = asleep(2)
    process = Process(server, line, tmp_path / "said")
    wait_for((tmp_path / "asleep").exists)
    before = files_in(tmp_path / "run")
    code, lines = Process(server, [*line, "--resume"], tmp_path / "said by the second").end()
    assert code == 1
    (said,) = [line for line in lines if line]
    assert said.startswith(f"error: cannot lock {tmp_path}/run (does another run write into it?): ")
    assert files_in(tmp_path / "run") == before
    process.send(signal.SIGKILL)
    process.end()
    assert Process(server, [*line, "--resume"], tmp_path / "said by the third").end()[0] == 0
    assert metrics_of(tmp_path / "run") == whole


def test_two_runs_that_begin_at_once_on_one_folder(arguments, tmp_path, monkeypatch):
    """The other has the lock, but has not written its config yet; the lock is the system's, whoever takes it."""
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert re.match(r"error: cannot lock .*run \(does another run write into it\?\): ", go(arguments, monkeypatch))
        assert files_in(tmp_path / "run") == {}
    assert go([*arguments, "--max_steps", 1], monkeypatch) is None


def sizes(folder):
    return {path.name: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


DISKS = {  # when it is full: at a size of a file that a run writes, of a run with a checkpoint of 2 steps
    "config.json": lambda size: size["config.json"] // 2,
    "metrics.jsonl": lambda size: size["metrics.jsonl"] * 9 // 8,
    "checkpoint.pt, its beginning": lambda size: 20_000,
    "checkpoint.pt, its end": lambda size: size["checkpoint.pt"] - 100,
    "model.safetensors": lambda size: size["model.safetensors"] - 100,
}


@pytest.mark.parametrize("name", DISKS)
def test_a_full_disk_ends_in_a_line_and_the_last_checkpoint_loads(name, arguments, finished, server, whole, tmp_path):
    """A limit on the size of files stands in for it: writing fails in the same calls."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "4", folder)
    shutil.rmtree(folder / "model")
    save = "1000" if name == "metrics.jsonl" else "2"
    steps = 4 if name == "model.safetensors" else 100
    resume = ["--resume", "--output_dir", folder, "--num_eval_problems", 0]
    before = {path: content for path, content in files_in(folder).items() if "checkpoint" in path}
    process = Process(
        server,
        [*resume, "--max_steps", steps, "--save_steps", save],
        tmp_path / "said",
        limit=DISKS[name](sizes(finished / "4")),
    )
    code, lines = process.end()
    assert code == 1
    said = [line for line in lines if line.startswith(("stopped: ", "error: "))]
    assert len(said) == 1
    if name == "config.json":
        assert said[0].startswith(f"error: cannot write {folder}/config.json (is the disk full?): ")
    else:
        assert said[0].startswith(
            "stopped: [Errno 27] File too large"
            if name == "metrics.jsonl"
            else f"stopped: cannot write {folder}/{name.split(',')[0].split('.s')[0]} (is the disk full?): "
        )
        assert f"to go on: python train.py --resume --output_dir {folder}" in lines
    after = files_in(folder)  # while a checkpoint is written, the last one goes by the other name
    last = before["checkpoint.pt"]
    assert last in (after.get("checkpoint.pt"), after["checkpoint-previous.pt"])
    assert "checkpoint.pt" in after or name.startswith("checkpoint.pt")
    assert Process(server, [*resume, "--max_steps", 8], tmp_path / "said more").end()[0] == 0
    assert metrics_of(folder) == whole


# --- Sick runs, and what a run says --------------------------------------------------------------------------------------------


def sick(monkeypatch, **parts):
    """A change to what rollout's functions return, from the third step on."""
    for name, change in parts.items():
        inner, calls = getattr(rollout, name), []

        def broken(*given, inner=inner, calls=calls, change=change):
            calls.append(1)
            return inner(*given) if len(calls) <= 2 else change(inner(*given))

        monkeypatch.setattr(rollout, name, broken)


def nan_entropies(samples):
    samples.entropies[:] = math.nan
    return samples


@pytest.mark.parametrize("what", ["entropy", "gradient"])
def test_a_policy_that_has_diverged_stops_before_the_weights_with_a_lower_learning_rate_to_try(
    what, arguments, tmp_path, monkeypatch
):
    more = ["--num_eval_problems", 0, "--save_steps", 1, "--per_device_train_batch_size", 1000, "--num_mini_batches", 1]
    broken = (
        {"generate": nan_entropies}
        if what == "entropy"
        else {"score": lambda scored: (scored[0] * math.nan, scored[1])}
    )
    with pytest.MonkeyPatch.context() as patch:
        sick(patch, **broken)
        said = go([*arguments, *more], monkeypatch).split("\n")
    assert re.match(f"stopped: the {what} of step 3 is not finite", said[0])
    assert len(said) == 2
    command = shlex.split(said[1].removeprefix("to go on: "))
    assert command == ["python", "train.py", "--resume", "--output_dir", f"{tmp_path}/run", "--learning_rate", "0.0005"]
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in rows
    assert len(rows.split("\n")) == 3
    assert go(command[2:], monkeypatch) is None  # what it says works
    rows = metrics_of(tmp_path / "run")
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-4, 2e-4, 1.5e-4, 2e-4])


def test_sampling_from_a_policy_that_is_not_finite_does_not_break_the_device():
    """On a GPU an index out of range would end all further work there; the entropy says what is wrong instead."""
    sampler = rollout.Sampler(torch.ones(3))
    logits = torch.tensor([[0.0, 0.0, 50.0], [math.nan, 0.0, 0.0], [math.inf, 0.0, 0.0]])
    forced = sampler(torch.zeros(3, 1), logits)
    assert forced[0].argmax() == 2
    assert forced.isfinite().sum(1).tolist() == [1, 1, 1]
    assert sampler.noted[0][1].isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize(("rewarded", "said"), [(None, 1), (10, 0), (7, 0), (11, 1)])
def test_ten_idle_steps_in_a_row_are_said_once(rewarded, said, arguments, tmp_path, monkeypatch, capsys):
    """Of 13 steps, each of 40 completions, only one has rewards, or none: nothing to learn from in the others."""
    lines = ["import countdown", "calls = 0", "def reward(problem, completion):", "    global calls", "    calls += 1"]
    lines += [f"    return float((calls - 1) // 40 + 1 == {rewarded} and len(completion) % 2)", "def task(config):"]
    lines += ["    return countdown.task(config)._replace(reward=reward)"]
    (tmp_path / "dull.py").write_text("\n".join(lines))
    more = ["--task", f"{tmp_path}/dull.py", "--max_steps", 13, "--num_eval_problems", 0]
    assert go([*arguments, *more], monkeypatch) is None
    assert capsys.readouterr().out.count("ten steps taught nothing: in each group all rewards are equal") == said
    assert [row["grad_norm"] > 0 for row in metrics_of(tmp_path / "run")] == [step == rewarded for step in range(1, 14)]


def test_the_checkpoint_before_the_last_is_kept_and_taken_if_the_last_is_missing(
    arguments, finished, tmp_path, monkeypatch
):
    saved, save = [], train.save_checkpoint

    def spy(run):
        save(run)
        previous = (tmp_path / "run" / "checkpoint-previous.pt").exists()
        saved.append((step_of(tmp_path / "run"), previous and step_of(tmp_path / "run", "checkpoint-previous.pt")))

    monkeypatch.setattr(train, "save_checkpoint", spy)
    assert go([*arguments, "--save_steps", 1], monkeypatch) is None
    assert saved == [(1, False), (2, 1), (3, 2), (4, 3)]
    # A crash between the two moves leaves the one before, and the new one under its temporary name.
    (tmp_path / "run" / "checkpoint.pt").rename(tmp_path / "run" / "checkpoint.pt.tmp")
    saved.clear()
    assert go(["--resume", "--output_dir", tmp_path / "run", "--max_steps", 6], monkeypatch) is None
    assert saved == [(4, 3), (5, 4), (6, 5)]
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "6")


def test_evaluations_on_the_way_change_nothing_and_are_kept_by_name(arguments, finished, tmp_path, monkeypatch):
    """The same metrics with and without; a run that ends in between has the same eval.json when it is resumed."""
    line = [*arguments, "--max_steps", 6, "--eval_steps", 2, "--save_steps", 3]
    assert go(line, monkeypatch) is None
    assert metrics_of(tmp_path / "run") == metrics_of(finished / "6")
    whole = (tmp_path / "run" / "eval.json").read_text()
    assert list(json.loads(whole)) == ["before", "step 2", "step 4", "after"]
    alone = json.loads((finished / "6" / "eval.json").read_text())
    assert {name: json.loads(whole)[name] for name in alone} == alone
    at_two = [*arguments, "--max_steps", 2, "--output_dir", tmp_path / "two"]
    assert go(at_two, monkeypatch) is None
    assert json.loads((tmp_path / "two" / "eval.json").read_text())["after"] == json.loads(whole)["step 2"]
    for last in (2, 4, 5):  # in the step after an evaluation, or not; the checkpoint is from step 0 or 3
        with pytest.MonkeyPatch.context() as patch:
            step = train.train_step
            patch.setattr(
                train, "train_step", lambda run, last=last, step=step: step(run) if run.step < last else 1 / 0
            )
            with pytest.raises(ZeroDivisionError):
                go([*line, "--output_dir", tmp_path / f"{last}"], monkeypatch)
        gc.collect()  # the lock, which the traceback has held
        assert go([*line, "--output_dir", tmp_path / f"{last}", "--resume"], monkeypatch) is None
        assert (tmp_path / f"{last}" / "eval.json").read_text() == whole
        assert metrics_of(tmp_path / f"{last}") == metrics_of(finished / "6")


def test_tensorboard_gets_every_metric_of_every_step_also_after_a_resume(arguments, tmp_path, monkeypatch):
    written, purged = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            purged.append((str(folder), purge_step))

        def add_scalar(self, name, value, step):
            written.append((step, name, value))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    assert go([*arguments, "--report_to", "tensorboard", "--max_steps", 2], monkeypatch) is None
    assert go(["--resume", "--output_dir", tmp_path / "run", "--max_steps", 3], monkeypatch) is None
    rows = metrics_of(tmp_path / "run", without=())
    scalars = [(row["step"], name, value) for row in rows for name, value in row.items()]
    assert written == scalars
    assert purged == [(f"{tmp_path}/run", 1), (f"{tmp_path}/run", 3)]


def test_a_terminal_that_cannot_show_a_completion_does_not_end_the_run(arguments, tmp_path, monkeypatch):
    """Redirected output on Windows, or a plain C locale, has only a few characters."""
    generate = rollout.generate

    def foreign(*given):
        samples = generate(*given)
        samples.texts[:] = ["\U0001f600 Äpfel"] * len(samples.texts)
        return samples

    monkeypatch.setattr(rollout, "generate", foreign)
    said = open(tmp_path / "said", "w", encoding="ascii")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", said)
    assert go([*arguments, "--logging_steps", 1, "--max_steps", 2], monkeypatch) is None
    said.close()
    assert r"\U0001f600 \xc4pfel" in (tmp_path / "said").read_text()


def test_interrupted_while_it_loads_it_says_so_and_leaves_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(rollout, "load_policy", lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert go(arguments, monkeypatch) == "error: interrupted before it began"
    assert not (tmp_path / "run").exists()


# --- Long ones ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_terminated_and_interrupted_forty_times_a_run_ends_as_if_left_alone(arguments, tmp_path):
    """`python train.py` itself; after SIGTERM and Ctrl-C not a step is lost. A kill in between steps may cost all since
    the last checkpoint, a signal during the start ends it before it began."""
    line = [*arguments, "--max_steps", "700", "--save_steps", "7", "--eval_steps", "50", "--learning_rate", "1e-4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "theory" / "tiny")}

    def start(name, *more):
        command = [sys.executable, "train.py", *line, "--output_dir", str(tmp_path / name), *more]
        with open(tmp_path / "said", "wb") as said:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said, stdout=said, preexec_fn=heed)

    def heed():  # a shell's background job ignores Ctrl-C, and so would what it starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def rows():
        metrics = tmp_path / "stopped" / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def saved():
        names = ("checkpoint.pt", "checkpoint-previous.pt")  # the first is missing while it is written
        found = [name for name in names if (tmp_path / "stopped" / name).exists()]
        return step_of(tmp_path / "stopped", found[0]) if found else 0

    assert start("whole").wait() == 0
    signals = [signal.SIGKILL] * 20 + [signal.SIGTERM] * 10 + [signal.SIGINT] * 10
    rng, lost = random.Random(), 0  # really random: any moment must do
    rng.shuffle(signals)
    for number, name in enumerate(signals):
        process = start("stopped", *(["--resume"] if number else []))
        wait_for(lambda: b" parameters on " in (tmp_path / "said").read_bytes(), 120)
        goal = saved() + rng.randrange(1, 9)
        wait_for(lambda goal=goal: rows() >= goal)
        time.sleep(rng.random() * 0.1)
        before = rows()
        process.send_signal(name)
        code, said = process.wait(), (tmp_path / "said").read_text()
        if name == signal.SIGKILL:
            assert code == -signal.SIGKILL
            lost += rows() - saved()
        else:
            assert code == 1
            assert f"stopped: by {name.name}, with all steps saved" in said
            assert "Traceback" not in said
            assert saved() == rows() >= before
    done = saved()
    print(f"stopped {len(signals)} times, {lost} rows lost to SIGKILL, {done} steps done by then")
    assert done < 700
    assert start("stopped", "--resume").wait() == 0
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "whole")
    assert (tmp_path / "stopped" / "eval.json").read_text() == (tmp_path / "whole" / "eval.json").read_text()
    files = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("stopped", "whole")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_thousand_steps_take_no_more_memory_or_files_than_a_hundred(arguments, tmp_path, monkeypatch):
    seen, step, proc = {}, train.train_step, Path("/proc/self")

    def watched(run):
        if run.step % 100 == 0:
            gc.collect()
            memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20  # MiB
            counts = [len(list((proc / kind).iterdir())) for kind in ("fd", "task")]
            seen[run.step] = (memory, *counts, len(gc.get_objects()))
            print(run.step, seen[run.step])
        return step(run)

    monkeypatch.setattr(train, "train_step", watched)
    more = [
        "--max_steps",
        1001,
        "--save_steps",
        20,
        "--num_eval_problems",
        3,
        "--eval_steps",
        100,
        "--learning_rate",
        "1e-5",
    ]
    assert go([*arguments, *more], monkeypatch) is None
    memory, handles, threads, objects = zip(*(seen[number] for number in range(200, 1001, 100)), strict=True)
    assert len(set(handles)) == len(set(threads)) == 1
    assert max(memory[4:]) < memory[0] + 20  # MiB
    assert objects[-1] < objects[0] + 500
