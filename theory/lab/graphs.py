"""Decoding with CUDA graphs: a step of `generate` is bound by Python, not by the GPU. **Not measured.**

A token of Qwen3-0.6B takes hundreds of kernels, which a CPU starts one by one. A CUDA graph starts them
all at once: the body's work on one new token a row is recorded, and replayed for all others. That needs
tensors which stay where they are. So keys and values are in a cache of fixed length, all rows stay until
the last has ended, and the inputs of a token are copied to where the recording read them.

`decode` is rollout.py's function with that. It is no part of the core, because it has never run on a
GPU; `gpu.py fast` compares it there. On a CPU it calls the recorded function again instead of a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from rollout import Sampler, empty_cache

ROUND = 64  # tokens: lengths of the cache are multiples


class FixedCache(StaticCache):
    """A cache of fixed length, with keys and values in the type that it began with."""

    def update(self, keys: Tensor, values: Tensor, layer: int, *more, **options) -> tuple[Tensor, Tensor]:
        dtype = self.layers[layer].keys.dtype
        return super().update(keys.to(dtype), values.to(dtype), layer, *more, **options)


class Recorded:
    """The forward pass of a model's body, whose calls for one token a row are one recording."""

    def __init__(self, forward: Callable, cache: StaticCache) -> None:
        self.forward, self.cache, self.replay = forward, cache, None

    def __call__(self, input_ids: Tensor, **given):
        if input_ids.shape[1] > 1:
            return self.forward(input_ids, **given)
        given = {"input_ids": input_ids, **given}
        values, structure = pytree.tree_flatten(given, is_leaf=lambda value: value is self.cache)
        if self.replay is None:
            self.record(values, structure)
        for place, value in zip(self.inputs, values, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value)
        self.replay()
        return self.output

    def record(self, values: list, structure: pytree.TreeSpec) -> None:
        """Record a call on copies of these values."""
        self.inputs = [value.clone() if isinstance(value, Tensor) else value for value in values]

        def call() -> None:
            self.output = self.forward(**pytree.tree_unflatten(self.inputs, structure))

        if not self.cache.layers[0].keys.is_cuda:
            self.replay = call
            return

        # A call before the recording loads kernels. It counts its token in the cache, which is undone.
        lengths = [layer.cumulative_length.clone() for layer in self.cache.layers]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for layer, length in zip(self.cache.layers, lengths, strict=True):
            layer.cumulative_length.copy_(length)
        with torch.cuda.graph(graph):
            call()
        self.replay = graph.replay


@contextmanager
def recorded(model: PreTrainedModel, cache: StaticCache) -> Iterator[None]:
    """Inside, the body records and replays what it does for one token a row."""
    body = model.base_model
    own = body.forward
    body.forward = Recorded(own, cache)
    try:
        yield
    finally:
        body.forward = own


def decode(
    model: PreTrainedModel, inputs, owner: Tensor, temperatures: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Continue prompt owner[i] in row i. Token ids `[B, C]`, and `Sampler`'s notes `[2, B, C]`.

    Raises ValueError for a model whose cache is not of plain layers, as with sliding windows.
    """
    C = uniforms.shape[1]
    prompts, mask = inputs.input_ids, inputs.attention_mask  # [P, L]
    L = prompts.shape[1]
    config = model.generation_config
    config.disable_compile = True  # `generate` would compile for a static cache

    # A cache of fixed length.
    length = -(-(L + C) // ROUND) * ROUND
    cache = FixedCache(config=model.config, max_cache_len=length)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise ValueError("graphs need a model whose layers all attend to all that came before")

    # Read each prompt once, and copy its keys and values to its rows.
    read = empty_cache(model)
    model.generate(prompts[:, :-1], attention_mask=mask[:, :-1], max_new_tokens=1, past_key_values=read)
    read.batch_select_indices(owner)
    for layer, prompt in zip(cache.layers, read.layers, strict=True):
        layer.update(prompt.keys, prompt.values)
    del read

    # Draw all tokens in one call.
    sampler = Sampler(temperatures, uniforms)
    options = {"max_new_tokens": C, "logits_processor": [sampler], "past_key_values": cache}
    with recorded(model, cache):
        sequences = model.generate(prompts[owner], attention_mask=mask[owner], **options)
    completions = sequences[:, L:]  # [B, n]
    unused = C - completions.shape[1]
    notes = torch.stack(sampler.noted, -1)  # [2, B, n]
    return F.pad(completions, (0, unused), value=config.pad_token_id), F.pad(notes, (0, unused))
