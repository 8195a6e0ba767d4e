"""Exact token entropy, its temperature derivative, and log-probabilities.

Logits z make a policy p = softmax(z / T). Its entropy, in nats, can only grow with T:

    H(T) = -sum_a p_a log p_a,        dH/dT = Var_p(z) / T^3 >= 0.    (paper, section 3; theory/)

What is difficult is memory: with Qwen3's 151,936 tokens, 1,024 positions have 622 MB of logits. So
`logprobs_and_entropies` goes from hidden states to numbers a chunk at a time, and back by closed
forms (theory/README.md, section 1): with x = log p,

    d log p_a / dz_b = 1[a = b] - p_b,        dH / dz_b = -p_b (x_b + H).
"""

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_policy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(z / T) of logits `[..., V]`, in float32 or better; T > 0 is a number or `[...]`."""
    z = at_least_float32(logits)
    T = temperature.to(z)[..., None] if isinstance(temperature, Tensor) else temperature  # [..., 1]
    return torch.log_softmax(z / T, dim=-1)


def entropy_of(log_p: Tensor) -> Tensor:
    """H = -sum_a p_a log p_a in nats, between 0 and log V, of log-probabilities `[..., V]`."""
    return -(log_p.exp() * log_p).sum(-1)


def token_entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax(z / T) in nats: `[..., V]` -> `[...]`."""
    return entropy_of(log_policy(logits, temperature))


def entropy_temperature_derivative(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """dH/dT = Var_p(z) / T^3 with p = softmax(z / T), nats per unit of T: `[..., V]` -> `[...]`."""
    p = log_policy(logits, temperature).exp()  # [..., V], in float32 or better, as are the next two
    centred = logits - (p * logits).sum(-1, keepdim=True)
    return (p * centred**2).sum(-1) / temperature**3  # Var_p(z) / T^3  [...]


class ChunkedHead(torch.autograd.Function):
    """`logprobs_and_entropies` with its gradient, both a chunk of logits `[n, V]` at a time."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, chunk_size: int):
        logprobs, entropies = [], []
        for h, a in zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True):
            x = log_policy(h @ weight.T)  # log p  [n, V]
            logprobs.append(x.gather(1, a[:, None])[:, 0])
            entropies.append(entropy_of(x))
        ctx.save_for_backward(hidden, weight, tokens, torch.cat(entropies))
        ctx.chunk_size = chunk_size
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, d_entropies: Tensor):
        hidden, weight, tokens, entropies = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(tokens), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            x = log_policy(hidden[rows] @ weight.T)  # [n, V]
            d, d_H, H = (y[rows, None] for y in (d_logprobs, d_entropies, entropies))  # [n, 1]
            u = (x + H).mul_(d_H).add_(d)  # [n, V]; in place, as these are what takes memory
            dz = x.exp_().neg_().mul_(u)  # -p_b (d + (x_b + H) d_H)
            dz.scatter_add_(1, tokens[rows, None], d)  # + 1[a = b] d
            d_hidden[rows] = dz @ weight
            d_weight.addmm_(dz.T, hidden[rows])
        return d_hidden, d_weight, None, None


def logprobs_and_entropies(hidden: Tensor, head: nn.Linear, tokens: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """log p of each token id, `[N]`, and H of its distribution, `[N]` nats, at T = 1, from states
    `[N, D]` and a head `[V, D]` without bias; in float32 or better, and independent of the chunk size."""
    return ChunkedHead.apply(at_least_float32(hidden), head.weight, tokens, chunk_size)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true, over `dim` or over all; 0 where nothing is true."""
    total = torch.where(mask, values, 0.0).sum(dim)
    return total / mask.sum(dim).clamp(min=1)
