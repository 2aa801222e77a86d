"""Gradients in micro-batches: the three ways of adding them up, what they hold, and odd models."""

import pytest
import torch
from importance_oracle import (
    EVERY,
    VOCABULARY,
    assert_unchanged,
    first_order,
    odd_state,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tokens_of,
)
from torch import nn
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.importance import (
    element_scores,
    estimate_importance,
    measure_importance,
    scale_to_loss,
    score_layers,
)
from pruner_lib.importance.calibration import micro_batches, untouched
from pruner_lib.importance.chain import NotAChain, record
from pruner_lib.importance.gradients import Fold, Passes, check_chain, choose, handing_over, layered_passes
from pruner_lib.pruning import compensate, drop_greedily, plan_pruning, prune


class Bar:
    def update(self, steps=1):
        pass

    def reset(self):
        pass


@pytest.mark.parametrize("name", EVERY)
def test_layer_by_layer_gives_the_same_on_every_architecture(name):
    model = tiny(name)
    dependencies, tokens = discover(model), tokens_of(4, 7) + 3
    chosen = [family.name for family in dependencies.families if family.cuttable][:4]
    options = {"families": chosen, "micro_batch_size": 2}
    with untouched(model, [n for n, _ in model.named_parameters()]):
        assert check_chain(model, tokens[:1, :2])
    whole = first_order(model, dependencies, tokens, accumulate="gradients", **options)
    layered = first_order(model, dependencies, tokens, accumulate="layers", **options)
    for family in chosen:
        torch.testing.assert_close(layered[family], whole[family], rtol=1e-6, atol=0)


@pytest.mark.parametrize("accumulate", ["layers", "gradients"])
@pytest.mark.parametrize("criterion", ["taylor_first", "taylor_vector", "taylor_second", "taylor_mixed"])
@pytest.mark.parametrize("make", [tiny_gpt2, lambda: tiny("starcoder2")], ids=["tied", "untied"])
def test_ways_and_sizes_agree_in_float64(make, criterion, accumulate):
    model = make()  # float64 throughout: no norm of these computes in float32
    dependencies, tokens = discover(model), tokens_of(5, 7)
    whole = estimate_importance(model, dependencies, tokens, criterion=criterion, accumulate="gradients")
    for size in (2, 5):
        options = {"criterion": criterion, "accumulate": accumulate, "micro_batch_size": size}
        parts = estimate_importance(model, dependencies, tokens, **options)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=0)


def fold_of(model, names, accumulate_peak):
    """A fold that notes the most elements it ever held."""

    class Watched(Fold):
        def take(self, name, gradient):
            super().take(name, gradient)
            held = sum(t.numel() for sums in self.sums.values() for t in sums.values())
            accumulate_peak.append(held)

    scored = []
    return Watched(("g",), names, lambda name, known: scored.append(name)), scored


def test_layer_by_layer_holds_one_layers_gradients():
    model = tiny_llama(num_hidden_layers=4, tie_word_embeddings=False)
    names = [name for name, _ in model.named_parameters() if ".layers." in name]
    tokens, peak = tokens_of(6, 5), []
    with untouched(model, names) as wanted:
        fold, scored = fold_of(model, wanted, peak)
        layered_passes(Passes(model, list(tokens.split(2)), 6, Bar()), fold)
    one_layer = sum(p.numel() for p in model.model.layers[0].parameters())
    assert max(peak) == one_layer
    assert sorted(scored) == sorted(names) and scored[0].startswith("model.layers.3")


def test_one_micro_batch_is_scored_directly_and_holds_nothing():
    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    with untouched(model, names) as wanted:
        fold = Fold(("g",), wanted, lambda name, known: None)
        pieces = [tokens_of(2, 5)]
        assert choose("auto", Passes(model, pieces, 2, Bar()), fold) == "direct"
        assert choose("layers", Passes(model, pieces, 2, Bar()), fold) == "layers"
        assert choose("auto", Passes(model, pieces * 2, 4, Bar()), fold) in ("layers", "gradients")
        second = Fold(("h",), wanted, lambda name, known: None)
        assert choose("auto", Passes(model, pieces, 1, Bar()), second) != "direct"


def test_what_holds_less_is_chosen():
    model = tiny_llama(num_hidden_layers=2)
    names = [name for name, _ in model.named_parameters() if ".layers." in name]
    with untouched(model, names) as wanted:
        fold = Fold(("g",), wanted, lambda name, known: None)
        few, many = [tokens_of(1, 4)] * 2, [tokens_of(500, 64)] * 2
        assert choose("auto", Passes(model, few, 2, Bar()), fold) == "layers"
        assert choose("auto", Passes(model, many, 1000, Bar()), fold) == "gradients"


def test_only_layers_that_are_scored_are_gone_back_through():
    model = tiny_llama(num_hidden_layers=4)
    dependencies, calls = discover(model), []
    handles = [
        layer.register_forward_hook(lambda module, args, output, n=n: calls.append(n))
        for n, layer in enumerate(model.model.layers)
    ]
    names = ["layers.2.mlp_neuron", "layers.3.mlp_neuron"]
    options = {"families": names, "accumulate": "layers"}
    first_order(model, dependencies, tokens_of(2, 300), micro_batch_size=1, **options)
    for handle in handles:
        handle.remove()
    graphed = calls[-4:]
    assert graphed == [3, 3, 2, 2]  # recomputed with a graph, for two micro-batches each


class Skipping(nn.Module):
    """Adds the embedding again behind the layers, so that they are no chain."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden) + self.embedded[0]


def test_a_model_that_passes_its_layers_by_falls_back_to_whole_passes():
    model = tiny_llama()
    kept = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: kept.append(output))
    model.model.norm = Skipping(model.model.norm)
    model.model.norm.embedded = kept
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: kept.clear())
    names = [name for name, _ in model.named_parameters()]
    with untouched(model, names), pytest.raises(NotAChain, match="passes the layers by"):
        check_chain(model, tokens_of(1, 2))
    plain = tiny_llama()
    dependencies = discover(plain)
    families, tokens = ["layers.0.mlp_neuron"], tokens_of(4, 6)
    options = {"families": families, "micro_batch_size": 2}
    whole = first_order(model, dependencies, tokens, accumulate="gradients", **options)
    asked = first_order(model, dependencies, tokens, accumulate="layers", **options)
    assert torch.equal(asked[families[0]], whole[families[0]])


def test_layers_called_twice_are_no_chain():
    model = tiny_llama()
    model.model.layers[1] = model.model.layers[0]
    with torch.no_grad(), pytest.raises(NotAChain):
        record(model, tokens_of(1, 4))


@pytest.mark.parametrize("accumulate", ["layers", "gradients"])
def test_the_model_comes_back_as_it_was(accumulate):
    model = odd_state(tiny_llama())
    dependencies = discover(model)
    before = snapshot(model)
    first_order(model, dependencies, tokens_of(4, 5), micro_batch_size=1, accumulate=accumulate)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", range(1, 8))
def test_the_model_comes_back_after_an_exception_anywhere(call):
    model = odd_state(tiny_llama())
    dependencies, calls = discover(model), []

    def fail(module, args):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.register_forward_pre_hook(fail)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        first_order(model, dependencies, tokens_of(4, 5), micro_batch_size=1, accumulate="layers")
    assert_unchanged(model, before)
    handle.remove()


def test_running_out_of_memory_names_the_knobs():
    model = tiny_llama()
    dependencies = discover(model)

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[1].register_forward_pre_hook(full)
    before = snapshot(model)
    for criterion in ("taylor_first", "wanda"):
        with pytest.raises(MemoryError, match=r"3 sequences of 5 tokens; lower micro_batch_size.*families=…"):
            estimate_importance(model, dependencies, tokens_of(3, 5), criterion=criterion)
    assert_unchanged(model, before)
    handle.remove()


def other_passes(model, batches):
    """Calls that run text through a model and have neither ``families`` nor ``accumulate``, by name."""
    dependencies = discover(model)
    scores = estimate_importance(model, dependencies, None, criterion="l2")
    plan = plan_pruning(dependencies, scores, ratio=0.25)
    pruned = prune(model, plan)
    neurons = dependencies.select("mlp_neuron")[0].name
    return {
        "score_layers": lambda: score_layers(model, dependencies, batches),
        "scale_to_loss": lambda: scale_to_loss(model, dependencies, scores, batches),
        "measure_importance": lambda: measure_importance(model, dependencies, batches, neurons),
        "element_scores": lambda: element_scores(model, ["lm_head.weight"], batches),
        "compensate": lambda: compensate(model, pruned, plan, batches),
        "drop_greedily": lambda: drop_greedily(model, dependencies, batches, 1),
    }


@pytest.mark.parametrize(
    "name", ["score_layers", "scale_to_loss", "measure_importance", "element_scores", "compensate"]
)
def test_advice_names_no_argument_that_the_call_lacks(name):
    model = tiny_llama()
    call = other_passes(model, tokens_of(3, 5))[name]

    def full(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[1].register_forward_pre_hook(full)
    with pytest.raises(MemoryError, match=r"tokens; lower micro_batch_size or use shorter sequences$"):
        call()


@pytest.mark.parametrize("name", ["score_layers", "scale_to_loss", "measure_importance", "drop_greedily"])
def test_a_loss_that_is_not_finite_ends_every_call_alike(name):
    model = tiny_llama()
    call = other_passes(model, tokens_of(3, 5))[name]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"up_proj\. No scores, plan or model were made"):
        call()


def test_a_size_below_one_is_refused_with_what_is_true_of_every_caller():
    # None is all sequences for some callers, about 2048 tokens for others.
    with pytest.raises(ValueError, match=r"must be at least 1, not 0: .*leave it out to have it chosen"):
        micro_batches(tokens_of(3, 5), 0)


def test_the_cpu_allocators_failure_is_out_of_memory_too():
    model = tiny_llama()
    dependencies = discover(model)
    handle = model.model.norm.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match="lower micro_batch_size"):
        first_order(model, dependencies, tokens_of(3, 5))
    handle.remove()


def test_an_unknown_way_lists_the_valid_ones():
    model = tiny_llama()
    with pytest.raises(ValueError, match="unknown accumulate 'all'; valid are auto, layers, gradients"):
        first_order(model, discover(model), tokens_of(2, 5), accumulate="all")


@pytest.mark.parametrize("criterion", ["taylor_first", "taylor_mixed", "wanda"])
def test_half_precision_models_are_scored_in_float32(criterion):
    """Gradients are those of the bf16 model; everything after them is float32."""
    model = tiny_llama().to(torch.bfloat16)
    dependencies, tokens = discover(model), tokens_of(4, 8)
    scores = estimate_importance(model, dependencies, tokens, criterion=criterion)
    exact = estimate_importance(model.float(), dependencies, tokens, criterion=criterion)
    for name in ("layers.0.mlp_neuron", "layers.1.mlp_neuron"):
        assert scores[name].dtype == torch.float64
        torch.testing.assert_close(scores[name], exact[name], rtol=0.1, atol=0)


def test_second_order_terms_do_not_vanish_in_half_precision():
    model = tiny_llama().to(torch.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    dependencies, tokens = discover(model), tokens_of(4, 8)
    second = estimate_importance(model, dependencies, tokens, criterion="taylor_second")
    first = estimate_importance(model, dependencies, tokens, criterion="taylor_first")
    mixed = estimate_importance(model, dependencies, tokens, criterion="taylor_mixed")
    assert all((values > 0).all() for values in second.scores.values())
    assert any(not torch.equal(mixed[name], first[name]) for name in first)


def test_accelerates_hooks_survive():
    """A model as device_map leaves it: accelerate has replaced every module's forward."""
    from accelerate import dispatch_model

    model = tiny_llama(tie_word_embeddings=False)
    dependencies, tokens = discover(model), tokens_of(4, 6)
    expected = first_order(model, dependencies, tokens, micro_batch_size=2)
    spread = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    forward = model.model.layers[0].mlp.__dict__.get("forward")
    hooked = [module for module in spread.modules() if "forward" in module.__dict__]
    own = [module.__dict__["forward"] for module in hooked]
    assert hooked
    for accumulate in ("layers", "gradients"):
        options = {"micro_batch_size": 2, "accumulate": accumulate}
        scores = first_order(spread, dependencies, tokens, **options)
        for name in expected:
            torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=0)
    assert model.model.layers[0].mlp.__dict__.get("forward") is forward
    assert [module.__dict__["forward"] for module in hooked] == own


def test_handing_over_frees_each_gradient():
    model, seen = tiny_llama(), []
    names = [name for name, _ in model.named_parameters()]
    with untouched(model, names) as wanted, handing_over(wanted, lambda name, g: seen.append(name)):
        model(input_ids=tokens_of(2, 5) % VOCABULARY).logits.sum().backward()
        assert all(parameter.grad is None for parameter in wanted.values())
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("criterion", ["taylor_first", "wanda"])
def test_a_bar_is_shown_where_asked_for(capsys, criterion):
    model = tiny_llama()
    options = {"criterion": criterion, "families": ["layers.0.mlp_neuron"], "micro_batch_size": 1}
    dependencies, tokens = discover(model), tokens_of(2, 5)
    estimate_importance(model, dependencies, tokens, **options)
    assert capsys.readouterr().err == ""  # standard error is no terminal here
    estimate_importance(model, dependencies, tokens, progress=True, **options)
    shown = capsys.readouterr().err
    assert criterion in shown and "100%" in shown


@pytest.mark.parametrize("criterion", ["taylor_first", "wanda"])
def test_an_optimizer_that_steps_in_the_backward_pass_waits(criterion):
    model = tiny_llama()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    dependencies, steps = discover(model), []

    def step(parameter):
        steps.append(parameter)
        parameter.data -= 0.1 * parameter.grad

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    estimate_importance(model, dependencies, tokens_of(3, 5), criterion=criterion)
    assert not steps
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model(input_ids=tokens_of(1, 5)).logits.sum().backward()
    assert steps, "the hooks are back"
