"""Tiny models, and importance by plain loops over stored full gradients and inputs."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D
from zoo import CONFIGURATIONS

from pruner_lib.importance import estimate_importance

# The paper's criterion, where a test names no other: one backward pass, the path that holds least.
first_order = partial(estimate_importance, criterion="taylor_first")
VOCABULARY = 40
# The quick ones differ in what importance sees: how layers are called, what computes a product.
QUICK = ("llama", "gemma2", "gpt2", "falcon_new", "bloom", "opt", "mixtral", "deepseek_v3")
EVERY = [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in CONFIGURATIONS]


def tiny_llama(**changes):
    usual = {"intermediate_size": 12, "num_hidden_layers": 2, "tie_word_embeddings": True}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=18, num_attention_heads=6, num_key_value_heads=3, head_dim=4,
        **{**usual, **changes},
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


def tiny_gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=12, n_layer=2, n_head=3))
    for parameter in model.parameters():  # biases and norms away from 0 and 1, so that they count
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.double()


def tiny_phi3():
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=12, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return Phi3ForCausalLM(config).double()


LAYOUTS = {"grouped-query, tied": tiny_llama, "fused, Conv1D": tiny_gpt2, "fused gate and up": tiny_phi3}


def tokens_of(samples, length, seed=1):
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def stored(model, tokens):
    """Per parameter W, g of the whole batch, the g_j of every sequence, and the inputs of its uses."""
    model.eval()
    inputs = stored_inputs(model, tokens)
    found = []
    for rows in (tokens, *tokens.split(1)):
        model.zero_grad()
        logits = model(input_ids=rows).logits[:, :-1]
        functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    whole, *single = found
    return {
        name: (
            p.detach().numpy(),
            whole[name].numpy(),
            torch.stack([gradients[name] for gradients in single]).numpy(),
            inputs.get(name, [(0, np.ones((1, len(p))))]),
        )
        for name, p in model.named_parameters()
    }


def stored_inputs(model, tokens):
    """Per matrix, of each module that uses it: the inputs' dimension, and all inputs [tokens, width]."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}

    def keep(module, args):
        matrix = args[0].detach()
        if isinstance(module, nn.Embedding):
            matrix = functional.one_hot(matrix, module.num_embeddings).double()
        dim = 1 if isinstance(module, nn.Linear) else 0
        found.setdefault(names[id(module.weight)], []).append((dim, matrix.flatten(0, -2).numpy()))

    kinds = (nn.Linear, nn.Embedding, Conv1D)
    handles = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return found


def element_scores(name, W, g, each, uses):
    h = (each**2).mean(0)
    # Norms inside these models compute in float32, so the mean of the g_j is g only to about 1e-7;
    # what comes from passes over single sequences is compared with such passes.
    g = each.mean(0) if name == "taylor_mixed" else g

    def along(dim, vector):
        return vector.reshape([-1 if d == dim else 1 for d in range(W.ndim)])

    return {
        "l1": lambda: abs(W), "l2": lambda: W * W, "taylor_vector": lambda: W * g,
        "taylor_first": lambda: abs(W * g), "taylor_second": lambda: abs(W * W * h),
        "taylor_mixed": lambda: abs(W * g - 0.5 * W * W * h),
        "wanda": lambda: sum(abs(W) * along(d, np.sqrt((x**2).mean(0))) for d, x in uses),
        "fluctuation": lambda: sum(W * W * along(d, ((x - x.mean(0)) ** 2).mean(0)) for d, x in uses),
    }[name]()  # fmt: skip


def slice_score(criterion, piece, matrix, uses, group):
    """One number of one slice of one group, or None if it takes no part."""
    indices = piece.index[group]
    if criterion == "activation":
        read = [abs(x).mean(0) for dim, x in uses if dim == piece.dim and matrix.ndim > 1]
        return sum(np.mean([mean[i] for i in indices]) for mean in read) if read else None
    rows = [np.take(matrix, int(i), axis=piece.dim).sum() for i in indices]
    return sum(abs(row) if criterion == "taylor_vector" else row for row in rows)


def brute_force(family, known, criterion, reduction, vectors=True):
    """One number per group, with plain loops over groups, slices and indices."""
    reduce = {"sum": sum, "product": np.prod, "max": max, "last": lambda x: x[-1], "mean": np.mean}[reduction]
    parts = []
    for piece in family.slices:
        if piece.parameter in known and (known[piece.parameter][0].ndim > 1 or vectors):
            W, _, _, uses = known[piece.parameter]
            matrix = W if criterion == "activation" else element_scores(criterion, *known[piece.parameter])
            parts.append((piece, matrix, uses))
    scores = []
    for group in range(family.size):
        slices = [slice_score(criterion, *part, group) for part in parts]
        scores.append(float(reduce([score for score in slices if score is not None])))
    return torch.tensor(scores, dtype=torch.float64)


def snapshot(model):
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "gradients": {name: (g, None if g is None else g.clone()) for name, g in gradients.items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        + [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    for name, weight in before["weights"].items():
        assert torch.equal(weight, after["weights"][name])
        gradient, copy = before["gradients"][name]
        assert gradient is after["gradients"][name][0]
        assert gradient is None or torch.equal(gradient, copy)
    for part in ("requires_grad", "training", "attributes", "hooks"):
        assert before[part] == after[part]


def odd_state(model):
    """A model in the middle of something: some gradients, some frozen, some modules in evaluation mode."""
    model.train()
    model.model.layers[1].eval()
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if place % 2 else None
    return model
