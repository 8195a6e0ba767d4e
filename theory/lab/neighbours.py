"""Systems that are named beside SCOPE, as variants of a few lines: what each does, and its source.

Most do not hold a target. They are here to be run alone, and beside SCOPE: does the control survive
them, and does their gain survive the control? Two of SCOPE's neighbours are not here:

- RLRT (arXiv 2605.10781) reweighs each token by how much likelier it is to the student than to the same
  model with a right solution in its context. On the tiny tasks that solution is the answer itself, so
  the teacher would copy it; it needs a model that reasons, and one more scoring pass a step.
- OGER (arXiv 2604.18530) rewards distance from several teachers' solutions in an embedding. It needs the
  teachers and an embedding model, and its exact formula is in no public text that was found.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional as F

import rollout
from variants import FlowBalance, TokenWise, Variant

EXPLORERS = Path("outputs") / "experiments"  # where S2L-PO's smaller models are


@contextmanager
def at_temperature(model, T: float) -> Iterator[None]:
    """Inside, the policy is softmax(z / T). States before the head are divided by T, as it has no bias."""

    def divide(body, inputs, output):
        output.last_hidden_state = output.last_hidden_state / T
        return output

    hook = model.base_model.register_forward_hook(divide)
    try:
        yield
    finally:
        hook.remove()


class Opefo(FlowBalance):
    """OPEFO (arXiv 2605.11491): the flows of entropy up and down are made equal. There is no target.

    Tokens whose update raises H weigh 1 + lam, the others 1 - lam, with the sums of |dH| over the batch
    lam = (S_down - S_up) / (S_down + S_up).   dH = -A g here, without gbar (see FlowBalance).

    Theirs is one gradient step a rollout. Here it is as many as in the runs it is compared with, and
    the batch is a mini-batch. In the sums all tokens count equally, whatever the length of their answer.
    """

    __call__ = Variant.__call__  # not EntroPIC's

    def balance(self, flow):
        return flow.sum() / flow.abs().sum().clamp(min=1e-12)  # a is -lam


class Avspo(Variant):
    """AVSPO (arXiv 2605.21125): virtual rewards give an advantage to groups whose rewards are all equal.

    ACR is the share of such groups. When it exceeds 1/2, each of them gets K = min(G, ceil(G sqrt(ACR)))
    virtual rewards, .1 if all are wrong and .9 if all are right, which count in its mean and standard
    deviation only. By that a sample's advantage is sqrt(K / G) for a right one and -sqrt(K / G) for a
    wrong one, whatever the virtual reward is. (.9 is our choice. Their threshold adapts. This is their
    text; their code adds one virtual reward of the other kind.)
    """

    def change(self, table, rewards, auxiliary, alpha):
        super().change(table, rewards, auxiliary, alpha)
        G = rewards.shape[1]
        is_equal = rewards.std(1, unbiased=False) == 0  # [P]
        acr = is_equal.float().mean().item()
        if acr > 0.5:
            K = min(G, math.ceil(G * acr**0.5))
            virtual = torch.where(rewards[:, :1] > 0.5, 0.9, 0.1)  # [P, 1]
            every = torch.cat([rewards, virtual.expand(-1, K)], 1)  # [P, G + K]
            A = (rewards - every.mean(1, keepdim=True)) / every.std(1, keepdim=True, unbiased=False)
            old = table.advantages[: rewards.numel()].view_as(rewards)
            old.copy_(torch.where(is_equal[:, None], A, old))


class SmallToLarge(Variant):
    """S2L-PO (arXiv 2605.30789): at first the completions are a smaller model's, pi_S, which is not trained.

    G_S of a prompt's G ordinary completions are drawn from pi_S. Advantages are those of the whole
    group, and the ratio of a foreign completion is pi / pi_S, clipped as ever. G_S falls from G to 0,
    here linearly in the first 70% of the run, which is our choice. The entropy is that of the policy, on
    pi_S's contexts as well.
    """

    def __init__(self, run):
        super().__init__(run)
        self.explorer, _ = rollout.load_policy(str(EXPLORERS / f"smaller-{run.config.seed % 2}"))

    def generate(self, model, tokenizer, prompts, temperatures, length):
        config = self.run.config
        own = super().generate(model, tokenizer, prompts, temperatures, length)
        share = max(0.0, 1 - self.run.step / (0.7 * config.max_steps))  # of a group
        numbers = torch.arange(len(prompts), device=own.owner.device)
        is_foreign = numbers % config.num_generations < round(share * config.num_generations)
        rows = (is_foreign & (numbers < config.generation_batch_size)).nonzero()[:, 0]
        if len(rows) == 0:
            return own

        # Both models answer all prompts. pi_S's answers take the place of the policy's in these rows.
        foreign = super().generate(self.explorer, tokenizer, prompts, temperatures, length)
        C = max(own.completions.shape[1], foreign.completions.shape[1])
        for name in ("completions", "completion_mask", "logprobs", "entropies"):
            mine, theirs = getattr(own, name), getattr(foreign, name)
            mine, theirs = (F.pad(values, (0, C - values.shape[1])) for values in (mine, theirs))
            mine[rows] = theirs[rows]
            setattr(own, name, mine)
        own.truncated[rows] = foreign.truncated[rows]
        for i in rows.tolist():
            own.texts[i] = foreign.texts[i]
        with torch.no_grad():
            own.entropies[rows] = rollout.score(model, own, rows)[1]
        return own


class Dcpo(TokenWise):
    """DCPO (arXiv 2601.12730), by the authors' code: a mixture with the policy at another temperature.

        A <- (1 - m) A + m 1[R = 1] pi_old^T(o_t) / pi_old(o_t),   T = 1.2 if H <= H0 else 0.8
        m = a / (1 + a),   a = min(|H0 - H|, 0.1) / (share of samples with R = 1)

    Their H is the mean of -log p of the sampled tokens. Here it is exact, and the step's before.
    """

    is_hot = True
    distance = 0.0  # |H0 - H|

    def __call__(self, entropy):
        self.is_hot = entropy <= self.target
        self.distance = min(abs(self.target - entropy), 0.1)
        return super().__call__(entropy)

    def generate(self, model, tokenizer, prompts, temperatures, length):
        samples = super().generate(model, tokenizer, prompts, temperatures, length)
        rows = torch.arange(len(prompts), device=samples.owner.device)
        with torch.no_grad(), at_temperature(model, 1.2 if self.is_hot else 0.8):
            at_T = rollout.score(model, samples, rows)[0]
        self.ratios = (at_T - samples.logprobs).exp()  # pi^T / pi, 1 outside the completions  [B, C]
        return samples

    def change(self, table, rewards, auxiliary, alpha):
        super().change(table, rewards, auxiliary, alpha)
        is_right = (rewards.flatten() == 1).float()  # [N]
        a = self.distance / max(is_right.mean().item(), 1e-6)
        m = a / (1 + a)

        # The table has the mixture for pi^T / pi = 1, so it keeps right samples of equal groups, too.
        ordinary = table.advantages[: len(is_right)]
        ordinary.copy_((1 - m) * ordinary + m * is_right)
        self.pull = F.pad(m * is_right, (0, len(auxiliary)))  # [B] m 1[R = 1]

    def token_advantages(self, logprobs, entropies, mask, table):
        A = super().token_advantages(logprobs, entropies, mask, table)
        ratios = self.ratios[table.number, : mask.shape[1]]  # [b, C]
        return A + self.pull[table.number, None] * (ratios - 1)


class Stare(TokenWise):
    """STARE (arXiv 2606.19236), variant O1 with its adaptive weight: rare tokens of good samples weigh more.

    While H < H0, the tenth of the tokens with A > 0 that surprise most (-log p) weigh W.
    W <- clip(W + 0.01 sign(H0 - H), 1, 1.5),   W = 1.1 at first

    Their gate takes the entropy of the same step, here it is the step's before; the tenth is that of a
    mini-batch. The numbers .01 and 1.5 are our choice.
    """

    is_low = True
    W = 1.1

    def __call__(self, entropy):
        self.is_low = entropy < self.target
        self.W = min(max(self.W + (0.01 if self.is_low else -0.01), 1.0), 1.5)
        return super().__call__(entropy)

    def token_advantages(self, logprobs, entropies, mask, table):
        A = super().token_advantages(logprobs, entropies, mask, table)
        candidates = mask & (A > 0) & self.is_ordinary(table)
        surprise = torch.where(candidates, -logprobs, -torch.inf)  # [b, C]
        count = math.ceil(0.1 * candidates.sum().item())
        if not self.is_low or count == 0:
            return A
        least = surprise.flatten().topk(count).values[-1]
        return torch.where(surprise >= least, self.W * A, A)


class AllAtT(Variant):
    """E3-RL4LLMs (arXiv 2505.18573): the temperature of all samples follows the entropy.

    T <- T (1 + T log(H0 / H) / (log V + log log V))

    As in the authors' code, ratios and entropies are those of softmax(z / T), too, so the policy that is
    trained is pi^T as a whole. Evaluations are at temperature 1. Their target falls in training, here
    it stays.
    """

    heat = 1.0

    def __init__(self, run):
        super().__init__(run)
        run.model.base_model.register_forward_hook(self.divide)

    def divide(self, body, inputs, output):
        """Divide the states before the output head, which has no bias, by T."""
        if self.run.step < self.run.config.max_steps:  # not in the evaluation after the last step
            output.last_hidden_state = output.last_hidden_state / self.heat
        return output

    def __call__(self, entropy):
        size = math.log(self.run.model.get_input_embeddings().num_embeddings)
        self.heat *= 1 + self.heat * math.log(self.target / max(entropy, 1e-6)) / (size + math.log(size))
        return super().__call__(entropy)


NEIGHBOURS: dict[str, type[Variant]] = {
    "opefo": Opefo,
    "avspo": Avspo,
    "s2l_po": SmallToLarge,
    "dcpo": Dcpo,
    "stare": Stare,
    "all_at_t": AllAtT,
}
