"""Wrong answers to the exercises of notebook 06."""

import torch
from torch import nn

import pruner_lib as pl


def attribute(module, values):
    module.kept = values.clone()


def forgotten_when_saved(module, values):
    module.register_buffer("kept", values.clone(), persistent=False)


def trained(module, values):
    module.kept = nn.Parameter(values.clone())


def both(model, dependencies, removal, ids):
    plan = pl.PruningPlan.from_removal(dependencies, removal)
    return pl.prune(model, plan)(input_ids=ids).logits, dependencies.zero(model, removal)(
        input_ids=ids
    ).logits


def against_dense(model, dependencies, removal, ids):
    cut, _ = both(model, dependencies, removal, ids)
    dense = model(input_ids=ids).logits
    return float(((cut - dense).abs().max() / dense.abs().max()).detach())


def signed(model, dependencies, removal, ids):
    cut, zeroed = both(model, dependencies, removal, ids)
    return float((cut - zeroed).max() / zeroed.abs().max())


def not_relative(model, dependencies, removal, ids):
    cut, zeroed = both(model, dependencies, removal, ids)
    return float((cut - zeroed).abs().max())


def averaged(model, dependencies, removal, ids):
    cut, zeroed = both(model, dependencies, removal, ids)
    return float((cut - zeroed).abs().mean() / zeroed.abs().max())


def in_place(model, dependencies, removal, ids):
    with torch.no_grad():
        model.embed.weight.zero_()
    return 0.0


WRONG = {
    "6.1": {
        "ordinary attribute": attribute,
        "would forget which gains": forgotten_when_saved,
        "3 numbers more|6 numbers more": trained,
        "module.kept must be a tensor": lambda module, values: values,
    },
    "6.2": {
        "several indices of a slice": lambda family: sum(
            torch.Size(p.shape).numel() // p.shape[p.dim] for p in family.slices
        ),
        "That counts indices": lambda family: sum(piece.index.shape[1] for piece in family.slices),
        "all groups together": lambda family: sum(
            piece.index.size * torch.Size(piece.shape).numel() // piece.shape[piece.dim]
            for piece in family.slices
        ),
    },
    "6.3": {
        "compared with the dense one": against_dense,
        "Differences have signs": signed,
        "Divide by the largest logit": not_relative,
        "That is the mean": averaged,
        "the given model was changed": in_place,
    },
}
