"""SCOPE beyond one GPU, inside TRL's GRPOTrainer: data parallel, DeepSpeed, FSDP, nodes, vLLM.

    accelerate launch --num_processes 8 theory/tools/trl_scope.py --model NAME --train_file DATA.jsonl

The options of the task and of SCOPE are train.py's. All others are TRL's. TRL's loss (`loss_type`
grpo, `beta` 0) is a mean over the B rows of a gradient step, of all processes, whatever they are:

    J = 1/B sum_i 1/|o_i| sum_t min(r_t a_i, clip(r_t) a_i)

J_SCOPE is a sum with the weights w_i of scope_rl's table. A positive factor passes through min and
clip, so a_i = R w_i A_i makes the two the same, where R counts all rows of a generation:

                 rows    a_i
    ordinary     N       R / N  (R_i - mean) / (std + small)     std divides by G - 1, not by G
    auxiliary    M       R alpha / M  1[R_i = 1]                 drawn at T, over all prompts
    surplus      rest    0                                       as TRL wants equal parts

H is train.py's, and T is set by the same TemperatureRule. Besides the std, three things differ: a
mini-batch is random rows instead of all rows of some prompts, the warm-up starts at 0, and bf16
holds for the output head's input as well. It needs the extra `trl`.
"""

import copy
import math
import sys
from dataclasses import field, make_dataclass

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import reward
import rollout
import train
from reward import Problem, RewardError, one_line_error

try:
    import trl
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"error: {error}: pip install -e '.[trl]'")

VERSIONS = "trl>=1.14.2,!=1.15.0,<1.17"  # 1.15.0 does not run without Triton
INTERNALS = {  # what is known here of TRL's inside; without one of these nothing starts
    "_generate_and_score_completions": "called once a generation: dataset rows, one for each completion"
    " of this process, to tensors [n, columns], advantages [n] and a number that is not used",
    "_generate_single_turn": "samples, and reads the temperature of its sampler each time",
    "_get_per_token_logps_and_entropies": "returns log-probabilities and entropies, [n, C], at T = 1",
    "_calculate_rewards": "returns [rows of process 0, then of 1, ...; reward functions]",
    "num_generations": "the size of a group: so many rows, one after the other",
    "eos_token_ids": "all that end a completion, the model's and the tokenizer's",
    "_metrics": "under train a list for each name, which grows until `log` reports its mean",
}
PLAIN = {  # other values change the sampled policy, the ratio, or what an advantage is worth
    "temperature": [1], "top_k": [0], "top_p": [1], "min_p": [None, 0], "repetition_penalty": [1],
    "generation_kwargs": [None, {}], "vllm_structured_outputs_regex": [None], "disable_dropout": [True],
    "loss_type": ["grpo"], "beta": [0], "importance_sampling_level": ["token"], "delta": [None],
    "reward_weights": [None, [1]], "mask_truncated_completions": [False], "top_entropy_quantile": [1],
    "entropy_coef": [0], "use_adaptive_entropy": [False],
}  # fmt: skip
TASK = "model", "task", "train_file", "test_file", "instruction"
OPTIONS = [name for name in train.OPTIONS if name in TASK or name.startswith("scope_")]


class ScopeTrainer(GRPOTrainer):
    """GRPOTrainer, for text, with auxiliary completions; `config` has the options `scope_*`."""

    def __init__(self, *args, config: train.Config, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name in [*INTERNALS, "vllm_generation" if self.use_vllm else "generation_config"]:
            if name not in vars(self) and not hasattr(GRPOTrainer, name):
                raise ImportError(f"trl {trl.__version__} has no GRPOTrainer.{name}: install {VERSIONS}")
        for name, values in PLAIN.items():
            value = getattr(self.args, name)
            if value not in values:
                raise ValueError(f"SCOPE's objective needs {name} {values[0]}, not {value}")
        if config.num_auxiliary == 0:
            raise ValueError("scope_share must be above 0; for GRPO alone set scope_alpha to 0")
        self.config = config
        self.rule = train.rule_of(config)

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch

        # T and alpha of this generation were set by the last. What the rule keeps is a part of
        # transformers' state, which goes into checkpoints and comes out of them.
        rule, M, saved = self.rule, self.config.num_auxiliary, self.state.stateful_callbacks
        if "scope" in saved:
            if saved["scope"].keys() != rule.state_dict().keys():
                raise ValueError("the checkpoint was written by another version: start a new run")
            rule.load_state_dict(saved["scope"])
        T, alpha = rule.temperature, self.config.scope_alpha * rule.boost
        rule(self.mean_entropy(batch))
        saved["scope"] = rule.state_dict()

        # The advantages a_i of the table above.
        more, positive_frac = self.auxiliary_rows(inputs, T, M)
        N, drawn = (len(rows["advantages"]) * self.accelerator.num_processes for rows in (batch, more))
        R = N + drawn
        batch["advantages"] *= R / N
        more["advantages"] *= R * alpha / M

        metrics = self._metrics["train"]
        metrics["scope_entropy"].append(rule.last_entropy)
        metrics["scope_temperature"].append(T)
        metrics["scope_positive_frac"].append(positive_frac)
        return join(batch, more, self.processing_class.pad_token_id)

    def mean_entropy(self, batch: dict[str, torch.Tensor]) -> float:
        """H(pi_old), nats a token: the mean over the ordinary completions of all processes."""
        mask = batch["completion_mask"]  # [n, C]
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # [n, P + C]
        inputs = ids, torch.cat([batch["prompt_mask"], mask], 1), mask.shape[1]
        options = {"batch_size": self.args.per_device_train_batch_size, "compute_entropy": True}
        with torch.no_grad():
            scored = self._get_per_token_logps_and_entropies(self.model, *inputs, **options)
        entropies = scored[1]
        sums = torch.stack([(entropies * mask).sum(), mask.sum()])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / tokens

    def auxiliary_rows(self, inputs: list[dict], T: float, M: int) -> tuple[dict, float]:
        """This process's share `[m, columns]` of M completions at T, with 1[R = 1] as advantages.

        The second result is the share of the M that is rewarded. m is the same on all processes, and
        a multiple of `steps_per_generation`: what is drawn beyond M for this has advantage 0.
        """
        processes, parts = self.accelerator.num_processes, self.args.steps_per_generation
        share = math.ceil(M / processes)
        m = math.ceil(share / parts) * parts
        chosen = [inputs[i % share * len(inputs) // share] for i in range(m)]

        # Draw at T, in groups of one. A copy of the metrics is changed, and not reported.
        sampler = self.vllm_generation if self.use_vllm else self.generation_config
        kept = sampler.temperature, self.num_generations, self._metrics
        sampler.temperature, self.num_generations, self._metrics = T, 1, copy.deepcopy(self._metrics)
        rows = super()._generate_and_score_completions(chosen)
        sampler.temperature, self.num_generations, self._metrics = kept

        # Of all processes' rows, the first of each come first. Those after the first M are surplus.
        rewards = self.last_rewards.view(processes, m)
        number = torch.arange(m * processes, device=rewards.device).view(m, processes).T
        is_right = (rewards == 1) & (number < M)
        rows["advantages"] = is_right[self.accelerator.process_index].to(rewards.dtype)
        if "importance_sampling_ratio" in rows:  # of the policy to vLLM's, which is at T
            rows["importance_sampling_ratio"] = torch.ones_like(rows["importance_sampling_ratio"])
        return rows, is_right.sum().item() / M

    def _generate_single_turn(self, *args, **kwargs):
        # transformers fills what TRL leaves open, min_p for one, from the model's own
        # generation_config, so that is put aside while it samples.
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        own = model.generation_config
        model.generation_config = self.generation_config
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            model.generation_config = own

    def _calculate_rewards(self, *args, **kwargs) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.last_rewards = rewards.nansum(1)
        return rewards

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        metrics = self._metrics["train"]
        if "entropy" in metrics:  # TRL's is of all rows, and of the policy after some of the updates
            metrics["entropy"] = metrics.pop("scope_entropy", [self.rule.last_entropy])
        super().log(logs, *args, **kwargs)


def join(ordinary: dict, auxiliary: dict, pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of both, `[n + m, columns]`: prompts padded on the left, all else on the right."""
    joined = dict(ordinary)
    for name, rows in ordinary.items():
        fill, side = pad_id if name.endswith("_ids") else 0, "left" if "prompt" in name else "right"
        if rows.ndim == 1:
            joined[name] = torch.cat([rows, auxiliary[name]])
        elif rows.ndim == 2:
            joined[name] = pad_sequence([*rows, *auxiliary[name]], True, fill, side)
    return joined


def set_up(argv: list[str]) -> ScopeTrainer:
    """The trainer of a command line. Raises ValueError, OSError or ImportError if it cannot work."""
    config, args = parse(argv)
    task = train.load_task(config)
    with one_line_error(f"cannot use the model {config.model}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    questions = [problem.question for problem in task.train]
    prompts = rollout.format_prompts(tokenizer, questions, config.instruction or task.instruction)
    if tokenizer("").input_ids == [tokenizer.bos_token_id]:  # TRL tokenizes, which adds it again
        prompts = [prompt.removeprefix(tokenizer.bos_token) for prompt in prompts]
    asked = zip(task.train, prompts, strict=True)
    rows = [problem._asdict() | {"prompt": prompt} for problem, prompt in asked]

    def is_right(completions, completion_ids, question, answer, **_) -> list[float]:
        """R of every completion; 0 for a truncated one."""
        rewards = []
        drawn = zip(map(Problem, question, answer), completions, completion_ids, strict=True)
        for problem, text, ids in drawn:
            R = reward.reward_of(task, problem, text)
            rewards.append(R if ids[-1] in trainer.eos_token_ids else 0.0)
        return rewards

    rest = {"processing_class": tokenizer, "config": config}
    trainer = ScopeTrainer(config.model, is_right, args, Dataset.from_list(rows), **rest)
    return trainer


def parse(argv: list[str]) -> tuple[train.Config, GRPOConfig]:
    """The options of train.py, and TRL's. Raises ValueError."""
    ours = []
    for name in OPTIONS:
        option = train.OPTIONS[name]
        text = {"help": option.metadata["help"]}
        ours.append((name, option.type, field(default=option.default, metadata=text)))
    parser = transformers.HfArgumentParser([make_dataclass("Ours", ours), GRPOConfig], allow_abbrev=False)
    parser.set_defaults(loss_type="grpo", lr_scheduler_type="constant_with_warmup", disable_dropout=True)
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # or the processes do not meet
    options, args = parser.parse_args_into_dataclasses(argv)
    names = "seed", "output_dir", "generation_batch_size", "num_generations"
    shared = {name: getattr(args, name) for name in names}
    return train.Config(**vars(options), **shared, num_mini_batches=1), args


def main(argv: list[str]) -> None:
    """The command line. Bad input ends in one line."""
    try:
        trainer = set_up(argv)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except RewardError as error:
        sys.exit(f"stopped: {error}")
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
