"""SCOPE beyond one GPU, inside TRL's GRPOTrainer: data parallel, DeepSpeed, FSDP, nodes, vLLM.

    accelerate launch --num_processes 8 theory/lab/trl_scope.py --model NAME --train_file DATA.jsonl

Options are TRL's, but for the task's and SCOPE's, which are train.py's. TRL's loss (`loss_type`
grpo, `beta` 0) is a mean over the B rows of a gradient step, of all processes, whatever they are:

    J = 1/B sum_i 1/|o_i| sum_t min(r_t a_i, clip(r_t) a_i)

J_SCOPE is a sum with the weights w_i of scope_rl's table. A positive factor passes through min and
clip, so a_i = R w_i A_i makes the two the same, where R counts all rows of a generation:

                 rows    a_i
    ordinary     N       R / N  (R_i - mean) / (std + small)     std divides by G - 1, not by G
    auxiliary    N'      R alpha / N'  1[R_i = 1]                drawn at T, over all prompts
    surplus      rest    0                                       as TRL wants equal parts

H and T are train.py's. Not the same, besides the std: a mini-batch is random rows instead of all
rows of some prompts, the warm-up starts at 0, and bf16 holds for the output head's input as well.
"""

import copy
import math
import sys
from dataclasses import fields, make_dataclass
from types import SimpleNamespace

import torch
import transformers
import trl
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

import reward
import rollout
import train

VERSIONS = "trl>=1.14.2,!=1.15.0,<1.17"  # 1.15.0 does not run without Triton
INTERNALS = {  # what is known here of TRL's inside; without one of these nothing starts
    "_generate_and_score_completions": "called once a generation: dataset rows, one for each completion"
    " of this process, to tensors [n, columns], advantages [n] and a number that is not used",
    "_get_per_token_logps_and_entropies": "returns log-probabilities and entropies, [n, C], at T = 1",
    "_calculate_rewards": "returns [rows of process 0, then of 1, ...; reward functions]",
    "reward_weights": "of the reward functions",
    "num_generations": "the size of a group: so many rows in turn",
    "eos_token_ids": "all that end a completion, the model's and the tokenizer's",
    "_metrics": "under train a list for each name, which grows until `log` reports its mean",
}
TASK = "model", "task", "train_file", "test_file", "instruction", "num_train_problems", "num_eval_problems"
OPTIONS = [field for field in fields(train.Config) if field.name in TASK or field.name.startswith("scope_")]


class ScopeTrainer(trl.GRPOTrainer):
    """GRPOTrainer, for text, with auxiliary completions; `config` has the options `scope_*`."""

    def __init__(self, *args, config: train.Config, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name in [*INTERNALS, "vllm_generation" if self.use_vllm else "generation_config"]:
            if name not in vars(self) and not hasattr(trl.GRPOTrainer, name):
                raise ImportError(f"trl {trl.__version__} has no GRPOTrainer.{name}: install {VERSIONS}")
        train.check(self.loss_type == "grpo" and self.beta == 0, "SCOPE needs loss_type grpo, beta 0")
        plain = {"temperature": 1, "top_k": 0, "top_p": 1, "importance_sampling_level": "token"}
        other = [name for name, value in plain.items() if getattr(self.args, name) != value]
        train.check(not other, f"SCOPE's ratio is of the whole policy at temperature 1: without {other}")
        train.check(config.scope_alpha > 0, "for GRPO alone set scope_weight to 0, not scope_alpha")
        self.config = config

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        # H and the integral, in a part of transformers' state that goes into checkpoints as it is.
        state = self.state.stateful_callbacks.setdefault("scope", {"entropy": None, "integral": 0.0})
        run = SimpleNamespace(config=self.config, **state)
        T, count = train.control(run)  # count is N'
        state.update(entropy=self.mean_entropy(batch), integral=run.integral)
        more, positive_frac = self.auxiliary_rows(inputs, T, count)

        N, M = (len(rows["advantages"]) * self.accelerator.num_processes for rows in (batch, more))
        batch["advantages"] *= (N + M) / N
        weight = self.config.scope_alpha if self.config.scope_weight is None else self.config.scope_weight
        more["advantages"] *= (N + M) * weight / count
        metrics = self._metrics["train"]
        metrics["scope_entropy"].append(state["entropy"])
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
            entropies = self._get_per_token_logps_and_entropies(self.model, *inputs, **options)[1]
        sums = torch.stack([(entropies * mask).sum(), mask.sum()])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / tokens

    def auxiliary_rows(self, inputs: list[dict], T: float, count: int) -> tuple[dict, float]:
        """This process's share `[m, columns]` of N' = `count` completions at T, with 1[R = 1] as
        advantages; and the share of the N' that is rewarded. m is the same on all processes, and a
        multiple of `steps_per_generation`: what is drawn beyond N' for this has advantage 0."""
        processes, parts = self.accelerator.num_processes, self.args.steps_per_generation
        share = math.ceil(count / processes)
        m = math.ceil(share / parts) * parts
        chosen = [inputs[i % share * len(inputs) // share] for i in range(m)]
        # The sampler reads its temperature at every call. A copy of the metrics is not reported.
        sampler = self.vllm_generation if self.use_vllm else self.generation_config
        kept = sampler.temperature, self.num_generations, self._metrics
        sampler.temperature, self.num_generations, self._metrics = T, 1, copy.deepcopy(self._metrics)
        rows = super()._generate_and_score_completions(chosen)
        sampler.temperature, self.num_generations, self._metrics = kept

        rewards = self.last_rewards.view(processes, m)
        number = torch.arange(m * processes, device=rewards.device).view(m, processes).T  # in turn
        is_right = (rewards == 1) & (number < count)
        rows["advantages"] = is_right[self.accelerator.process_index].to(rewards.dtype)
        if "importance_sampling_ratio" in rows:  # of the policy to vLLM's, which is at T
            rows["importance_sampling_ratio"] = torch.ones_like(rows["importance_sampling_ratio"])
        return rows, is_right.sum().item() / count

    def _calculate_rewards(self, *args, **kwargs) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        self.last_rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return rewards

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        metrics = self._metrics["train"]
        if "entropy" in metrics:  # TRL's is of all rows, and of the policy after some of the updates
            last = self.state.stateful_callbacks["scope"]["entropy"]
            metrics["entropy"] = metrics.pop("scope_entropy", [last])
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


def set_up(argv: list[str] | None = None) -> ScopeTrainer:
    """The trainer of a command line. Raises ValueError, OSError or ImportError if it cannot work."""
    options_class = make_dataclass("Options", [(field.name, field.type, field) for field in OPTIONS])
    parser = transformers.HfArgumentParser([options_class, trl.GRPOConfig], allow_abbrev=False)
    parser.set_defaults(loss_type="grpo", lr_scheduler_type="constant_with_warmup", disable_dropout=True)
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())  # or the processes do not meet
    options, args = parser.parse_args_into_dataclasses(argv)
    shared = {name: getattr(args, name) for name in ("seed", "generation_batch_size", "num_generations")}
    config = train.Config(**vars(options), **shared, num_mini_batches=1)

    task = train.load_task(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    questions = [problem.question for problem in task.train]
    prompts = rollout.format_prompts(tokenizer, questions, config.instruction or task.instruction)
    if tokenizer("").input_ids == [tokenizer.bos_token_id]:  # TRL tokenizes, which adds it again
        prompts = [prompt.removeprefix(tokenizer.bos_token) for prompt in prompts]
    rows = [{"prompt": text, **problem._asdict()} for text, problem in zip(prompts, task.train, strict=True)]

    def is_right(completions, completion_ids, question, answer, **_) -> list[float]:
        """R of every completion; 0 for a truncated one."""
        problems, ends = map(reward.Problem, question, answer), trainer.eos_token_ids
        drawn = zip(problems, completions, completion_ids, strict=True)
        return [task.reward(problem, text) if ids[-1] in ends else 0.0 for problem, text, ids in drawn]

    rest = {"processing_class": tokenizer, "config": config}
    trainer = ScopeTrainer(config.model, is_right, args, Dataset.from_list(rows), **rest)
    return trainer


def main() -> None:
    """The command line; bad input ends in one line."""
    try:
        trainer = set_up()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()
