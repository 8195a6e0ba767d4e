"""Exact token entropy, its temperature derivative, and log-probabilities.

A language model turns the logits z of one position into the policy softmax(z / T). Its entropy, in
nats, is

    H(T) = -sum_a p_a log p_a,        p = softmax(z / T),

and heating it can only spread it out:

    dH/dT = Var_p(z) / T^3 >= 0.                            (paper, section 3; proved in theory/)

Both are closed forms: no sampling is involved. The one practical difficulty is memory. With Qwen3's
151,936 tokens a single completion of 1,024 tokens has 622 MB of float32 logits, so
`logprobs_and_entropies` goes from hidden states to numbers a chunk at a time, in the forward and in
the backward pass.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precision to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_policy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """log softmax(z / T) of logits `[..., V]`, in float32 or better; T > 0 is a number or `[...]`."""
    z = at_least_float32(logits)
    T = temperature.to(z)[..., None] if isinstance(temperature, Tensor) else temperature  # [..., 1]
    return torch.log_softmax(z / T, dim=-1)  # [..., V]


def entropy_of(log_p: Tensor) -> Tensor:
    """H = -sum_a p_a log p_a in nats, between 0 and log V, of log-probabilities `[..., V]`."""
    return -(log_p.exp() * log_p).sum(-1)


def token_entropy(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Entropy of softmax(z / T) in nats: `[..., V]` -> `[...]`."""
    return entropy_of(log_policy(logits, temperature))


def entropy_temperature_derivative(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """dH/dT = Var_p(z) / T^3 with p = softmax(z / T), nats per unit of T: `[..., V]` -> `[...]`."""
    p = log_policy(logits, temperature).exp()  # [..., V]
    z = at_least_float32(logits)
    centred = z - (p * z).sum(-1, keepdim=True)
    variance = (p * centred**2).sum(-1)  # Var_p(z)  [...]
    return variance / temperature**3


def logprobs_and_entropies(
    hidden: Tensor, head: torch.nn.Linear, tokens: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and the entropy of its distribution, at temperature 1.

    Only one chunk's logits `[chunk_size, V]` exist at a time: each chunk is a checkpoint, so the
    backward pass computes its logits again instead of having kept them.

    Args:
        hidden: `[N, D]` hidden states, each predicting the token of the same row.
        head: the model's output head, with weight `[V, D]`; applied in float32 or better.
        tokens: `[N]` token ids.

    Returns:
        `[N]` log-probabilities and `[N]` entropies, in nats; they do not depend on `chunk_size`.
    """

    def one_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_policy(F.linear(hidden, head.weight, head.bias))  # [n, V]
        return log_p.gather(-1, tokens[:, None])[:, 0], entropy_of(log_p)  # [n], [n]

    hidden = at_least_float32(hidden)
    chunks = zip(hidden.split(chunk_size), tokens.split(chunk_size), strict=True)
    pairs = [checkpoint(one_chunk, h, t, use_reentrant=False) for h, t in chunks]
    logprobs, entropies = zip(*pairs, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true, over `dim` or over all; 0 where nothing is true."""
    total = torch.where(mask, values, 0.0).sum(dim)
    return total / mask.sum(dim).clamp(min=1)
