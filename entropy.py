"""Exact token entropy, its temperature derivative, and log-probabilities.

Logits z make a policy p = softmax(z / T). Its entropy, in nats, can only grow with T:

    H(T) = -sum_a p_a log p_a,        dH/dT = Var_p(z) / T^3 >= 0.    (paper, section 3; theory/)

What is difficult is memory. With Qwen3's 151,936 tokens, the logits of 1,024 positions take 622 MB.
So `logprobs_and_entropies` goes from hidden states to numbers a chunk at a time. It comes back by
closed forms (theory/README.md, section 1). With x = log p they are

    d log p_a / dz_b = 1[a = b] - p_b,        dH / dz_b = -p_b (x_b + H).
"""

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32. Leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_policy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(z / T): `[..., V]` -> `[..., V]`, in float32 or better.

    T > 0 is a number, or a tensor `[...]` with one T for each distribution.
    """
    z = at_least_float32(logits)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z)[..., None]  # [..., 1]
    return torch.log_softmax(z / temperature, dim=-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """H = -sum_a p_a log p_a of log-probabilities: `[..., V]` -> `[...]`, from 0 to log V nats.

    A token of probability 0 adds 0 to it, and nothing to its gradient.
    """
    x = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 * log 0 is 0, not NaN
    return -(log_p.exp() * x).sum(-1)


def token_entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax(z / T) in nats: `[..., V]` -> `[...]`."""
    return entropy_of(log_policy(logits, temperature))


def entropy_temperature_derivative(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """dH/dT = Var_p(z) / T^3 with p = softmax(z / T): `[..., V]` -> `[...]`, nats per unit of T."""
    p = log_policy(logits, temperature).exp()  # [..., V]
    largest = logits.amax(-1, keepdim=True)
    z = torch.where(p > 0, logits, largest)  # a token that cannot be drawn adds nothing
    mean = (p * z).sum(-1, keepdim=True)  # E_p[z]  [..., 1]
    centred = z - mean
    variance = (p * centred**2).sum(-1)  # Var_p(z)  [...]
    return variance / temperature**3


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true, over `dim` or over all; 0 where nothing is true."""
    total = torch.where(mask, values, 0.0).sum(dim)
    count = mask.sum(dim)
    return total / count.clamp(min=1)


class ChunkedHead(torch.autograd.Function):
    """`logprobs_and_entropies` with its gradient. At most one chunk of logits `[n, V]` exists."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = hidden.new_empty(len(tokens))  # [N]
        entropies = hidden.new_empty(len(tokens))  # [N]
        for start in range(0, len(tokens), chunk_size):
            rows = slice(start, start + chunk_size)
            x = log_policy(hidden[rows] @ weight.T)  # log p  [n, V]
            logprobs[rows] = x.gather(1, tokens[rows, None])[:, 0]
            entropies[rows] = entropy_of(x)
        ctx.save_for_backward(hidden, weight, tokens, entropies)
        ctx.chunk_size = chunk_size
        return logprobs, entropies

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropies: Tensor):
        hidden, weight, tokens, entropies = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight)
        for start in range(0, len(tokens), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            d_logprob = d_logprobs[rows, None]  # [n, 1]
            d_H = d_entropies[rows, None]
            H = entropies[rows, None]

            # dz_b = 1[a = b] d_logprob - p_b (d_logprob + (x_b + H) d_H). All of it is done in
            # place, since tensors of this size are what takes the memory.
            x = log_policy(hidden[rows] @ weight.T)  # [n, V]
            bracket = (x + H).mul_(d_H).add_(d_logprob)
            minus_p = x.exp_().neg_()  # x is gone from here on
            dz = minus_p.mul_(bracket)
            dz.scatter_add_(1, tokens[rows, None], d_logprob)

            d_hidden[rows] = dz @ weight
            d_weight.addmm_(dz.T, hidden[rows])
        return d_hidden, d_weight, None, None


def logprobs_and_entropies(
    hidden: Tensor,
    head: nn.Linear,
    tokens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """log p of each token, and the entropy H of its distribution in nats, at T = 1: both `[N]`.

    They come from hidden states `[N, D]`, token ids `[N]` and a head `[V, D]` without bias, in
    float32 or better. The chunk size, in states, changes the memory and not the result.
    """
    return ChunkedHead.apply(at_least_float32(hidden), head.weight, tokens, chunk_size)
