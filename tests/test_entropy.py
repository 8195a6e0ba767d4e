"""entropy.py against float64, autograd, finite differences, and a watch on every tensor made."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entropy
from entropy import logprobs_and_entropies, masked_mean, token_entropy


def test_entropy_of_known_distributions():
    assert token_entropy(torch.zeros(17)).item() == pytest.approx(math.log(17))  # uniform
    assert token_entropy(torch.tensor([1000.0, 0.0, -1000.0])).item() == 0.0  # certain, with huge logits
    log_p = torch.tensor([0.5, 0.25, 0.25]).log()
    for T in (1.0, 2.0):  # which undoes the factor
        assert token_entropy(log_p * T, T).item() == pytest.approx(1.5 * math.log(2))


def test_entropy_at_a_temperature_per_distribution():
    logits, T = torch.randn(5, 11), torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0])
    weights = (logits.double() / T.double()[:, None]).exp()
    p = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(token_entropy(logits, T).double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("impossible", [-math.inf, -3e38])
def test_a_token_that_cannot_be_drawn_adds_nothing(impossible, T=0.7):
    """As top-k leaves it, or as huge logits do: entropy and its two derivatives are those of the other tokens."""
    rest = torch.tensor([0.3, -1.0, 2.0], requires_grad=True)
    results = []
    for z in (rest, torch.cat([rest, torch.tensor([impossible])])):
        H = token_entropy(z, T)
        gradient = torch.autograd.grad(H, rest, retain_graph=True)[0]
        results.append([H.detach(), gradient, entropy.entropy_temperature_derivative(z.detach(), T)])
    torch.testing.assert_close(results[0], results[1])
    assert token_entropy(torch.tensor([0.0, impossible])).item() == 0.0


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_temperature_derivative_against_autograd_and_finite_differences(scale):
    logits = torch.randn(50, 23, dtype=torch.float64) * scale
    T = (torch.rand(50, dtype=torch.float64) * 3 + 0.3).requires_grad_()
    (by_autograd,) = torch.autograd.grad(token_entropy(logits, T).sum(), T)
    h = 1e-5
    by_difference = (token_entropy(logits, T.detach() + h) - token_entropy(logits, T.detach() - h)) / (2 * h)
    closed_form = entropy.entropy_temperature_derivative(logits, T.detach())
    assert (closed_form >= 0).all()
    torch.testing.assert_close(closed_form, by_autograd, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(closed_form, by_difference, atol=1e-8, rtol=1e-6)


def linear(weight):
    """An output head whose weights are the given tensor."""
    head = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    head.weight.data = weight.clone()
    return head


@pytest.mark.parametrize("chunk_size", [1, 7, 40, 1000])
@pytest.mark.parametrize("used", ["both", "logprobs", "entropies"])
def test_chunked_scoring_equals_float64_log_softmax(chunk_size, used):
    """Values and gradients, to hidden states and to the head, for any chunk size, by a formula without chunks."""
    N, D, V = 40, 16, 101
    hidden, weight, tokens = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))
    upstream = torch.randn(2, N) * torch.tensor([[used != "entropies"], [used != "logprobs"]])

    def reference(hidden, head):
        log_p = torch.log_softmax(hidden @ head.weight.T, dim=-1)
        return log_p[torch.arange(N), tokens], -(log_p.exp() * log_p).sum(-1)

    results = []
    for dtype in (torch.float32, torch.float64):
        h, head = hidden.to(dtype, copy=True).requires_grad_(), linear(weight.to(dtype))
        values = logprobs_and_entropies(h, head, tokens, chunk_size) if not results else reference(h, head)
        terms = [(value * u).sum() for value, u in zip(values, upstream, strict=True) if u.any()]
        sum(terms).backward()
        results.append([x.detach().double() for x in (*values, h.grad, head.weight.grad)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())


def test_the_gradient_in_closed_form_is_that_of_finite_differences_in_float64():
    hidden, tokens = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randint(13, (9,))
    weight = torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, w: entropy.ChunkedHead.apply(h, w, tokens, 4), (hidden, weight))


def test_no_tensor_of_all_logits_ever_exists():
    N, D, V, chunk, largest = 64, 8, 500, 4, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    hidden, head = torch.randn(N, D, requires_grad=True), linear(torch.randn(V, D))
    with Watch():
        sum(logprobs_and_entropies(hidden, head, torch.randint(V, (N,)), chunk)).sum().backward()
    assert hidden.grad is not None
    assert chunk * V <= largest <= max(chunk * V, V * D) < N * V / 4


def test_half_precision_logits_are_raised_to_float32():
    logits = (torch.randn(8, 50) * 5).bfloat16()
    H = token_entropy(logits)
    assert H.dtype == torch.float32
    torch.testing.assert_close(H.double(), token_entropy(logits.double()), atol=1e-5, rtol=0)


def test_half_precision_states_meet_the_head_in_float32():
    """A body in bfloat16 may end in bfloat16; from there on it is float32, and the gradient comes back in bfloat16."""
    hidden = torch.randn(9, 4).bfloat16().requires_grad_()
    head, tokens = linear(torch.randn(13, 4)), torch.arange(9)
    got, wanted = (logprobs_and_entropies(h, head, tokens, 4) for h in (hidden, hidden.detach().float()))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, wanted, strict=True))
    got[0].sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_masked_mean_ignores_what_is_masked_even_nan():
    values = torch.tensor([[1, 3, math.nan], [5, math.inf, math.nan], [math.nan] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    per_row = masked_mean(values, mask, dim=1)
    assert per_row.tolist() == [2.0, 5.0, 0.0]
    assert masked_mean(values, mask).item() == 3.0
    per_row.sum().backward()
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
