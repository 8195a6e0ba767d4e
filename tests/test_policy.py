"""rollout.load_policy: what a model is turned into, and which models are refused."""

import json
import math
import shutil

import pytest
import torch
import transformers
from architectures import make_model
from torch.utils._python_dispatch import TorchDispatchMode

import rollout


@pytest.fixture
def load(random_model, tokenizer, tmp_path):
    """A function that saves a model and loads it as train.py does; options go to load_policy."""

    def make(model=None, **options):
        (model or random_model()).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return rollout.load_policy(str(tmp_path), **options)[0]

    return make


def test_dropout_is_off_for_good_and_checkpointing_changes_no_value(random_model, tokenizer, load):
    results, calls = [], []
    for enabled in (False, True):
        model = load(random_model(attention_dropout=0.5).bfloat16())  # stored in half precision
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not [m for m in model.modules() if getattr(m, "attention_dropout", 0.0)]
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        uniforms = torch.full((2, 5), 0.3)
        samples = rollout.generate(model, tokenizer, ["1+2=", "1="], torch.ones(2), 5, uniforms)
        calls.clear()
        model.train().model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        logprobs, entropies = rollout.score(model, samples, torch.arange(2))
        (logprobs + 0.1 * entropies).sum().backward()
        results.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters())])
        assert len(calls) == 2  # the prompts and the completions, or whole rows that are recomputed
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-5)
    gpt2 = make_model("gpt2", tokenizer, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model, ids = load(gpt2).train(), torch.arange(6)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_under_bfloat16_sampling_and_scoring_share_float32_logits(tokenizer, load, monkeypatch):
    """The logits that `generate` samples from are those that `score` uses, not their bfloat16 rounding."""
    model, seen, draw = load(bf16=True), [], rollout.Sampler.__call__
    spy = lambda self, ids, z: seen.append(z) or draw(self, ids, z)  # noqa: E731
    monkeypatch.setattr(rollout.Sampler, "__call__", spy)
    samples = rollout.generate(model, tokenizer, ["1+2="] * 8, torch.ones(8), 6)
    logprobs, _ = rollout.score(model.train(), samples, torch.arange(8))
    assert logprobs.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert any((x.bfloat16().float() != x).any() for x in seen)  # not rounded
    gap = (samples.logprobs - logprobs).abs()[samples.completion_mask]
    assert gap.max() < 0.1  # bfloat16 inside the layers, once with a cache and once without
    hidden = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: hidden.append(out.dtype))
    rollout.score(model, samples, torch.arange(8))
    assert hidden == [torch.bfloat16]  # the body does run in bfloat16


def test_the_head_is_in_float32_on_a_body_that_ends_in_bfloat16(load, monkeypatch):
    """Qwen3's last norm, with float32 weights, happens to return float32; another model's need not."""
    model, ids = load(bf16=True), torch.arange(4)[None]
    norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda self, x: forward(self, x).bfloat16())
    assert model.base_model(ids).last_hidden_state.dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.float32


def test_the_cache_is_bfloat16_and_no_token_changes(tokenizer, load, monkeypatch):
    """Qwen3's k_norm makes keys float32 under autocast; attention rounds them to bfloat16 in any case."""
    model, made, uniforms = load(bf16=True), [], torch.rand(16, 8, dtype=torch.float64)
    completions = []
    for kind in (rollout.AutocastCache, transformers.DynamicCache):
        make = lambda kind=kind, **given: made.append(kind(**given)) or made[-1]  # noqa: E731
        monkeypatch.setattr(rollout, "AutocastCache", make)
        samples = rollout.generate(model, tokenizer, ["1+2=", "3="] * 8, torch.ones(16), 8, uniforms)
        completions.append(samples.completions)
    assert torch.equal(*completions)
    assert [cache.layers[0].keys.dtype for cache in made] == [torch.bfloat16, torch.float32]


def test_bfloat16_copies_of_weights_are_made_once_a_rollout(tokenizer, load):
    """Not once a token: the cast of a weight outlives the forward pass that made it."""
    model, copies = load(bf16=True), []
    shapes = {p.shape for p in model.base_model.layers.parameters() if p.dim() == 2}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].shape in shapes:
                copies.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    with Watch():
        rollout.generate(model, tokenizer, ["1+2="] * 4, torch.ones(4), 8)
    assert 0 < len(copies) <= sum(p.dim() == 2 for p in model.base_model.layers.parameters())


def test_a_model_that_is_not_causal_or_is_random_in_training_is_refused(load, tokenizer, monkeypatch):
    """Dropout by any name that the config does not show must not slip through either."""
    with pytest.raises(ValueError, match="log p in sampling and in scoring differ"):
        load(make_model("looking ahead", tokenizer))
    mlp = transformers.models.qwen3.modeling_qwen3.Qwen3MLP
    forward = mlp.forward
    shaky = lambda self, x: torch.nn.functional.dropout(forward(self, x), 0.5, self.training)  # noqa: E731
    monkeypatch.setattr(mlp, "forward", shaky)
    with pytest.raises(ValueError, match="log p in sampling and in scoring differ"):
        load()


@pytest.mark.parametrize(
    "change", [lambda w: w.requires_grad_(False), lambda w: setattr(w, "data", w.data.half())]
)
def test_frozen_weights_and_those_in_half_precision_are_refused(change, load, random_model, monkeypatch):
    model = random_model()
    change(model.model.layers[1].mlp.up_proj.weight)
    loaded = lambda *_, **options: (model, {"missing_keys": []})  # noqa: E731
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight cannot be trained"):
        load()


@pytest.mark.parametrize("odd", [{"temperature": 0.9}, {"early_stopping": True, "length_penalty": 2.0}])
def test_a_model_can_be_saved_whatever_its_generation_config_says(odd, load, model_folder, tmp_path):
    """transformers 5.17 saves none with options that have no effect. The tokens in it stay."""
    folder = shutil.copytree(model_folder, tmp_path / "odd")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 5]} | odd))
    model, _ = rollout.load_policy(str(folder))
    model.generation_config.validate(strict=True)
    assert model.generation_config.eos_token_id == [1, 5]


def test_the_room_ends_where_positions_change_their_meaning(random_model, tokenizer):
    """LongRoPE turns to other frequencies beyond the original length, in the middle of a completion."""
    assert rollout.room(random_model()) == 64
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
    long = rope | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    llama3 = rope | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert rollout.room(random_model(rope_parameters=long)) == 24
    assert rollout.room(random_model(rope_parameters=llama3)) == 64
    assert rollout.room(make_model("bloom", tokenizer)) == math.inf
