"""Forward-only statistics, and the granularities finer than a group."""

import pytest
import torch
from importance_oracle import (
    LAYOUTS,
    assert_unchanged,
    odd_state,
    snapshot,
    stored,
    stored_inputs,
    tiny_gpt2,
    tiny_llama,
    tokens_of,
)
from importance_oracle import (
    element_scores as element_by_hand,
)
from zoo import tiny

from pruner_lib.discovery import discover
from pruner_lib.importance import (
    CRITERIA,
    Criterion,
    element_scores,
    estimate_importance,
    vector_scores,
)
from pruner_lib.importance.inputs import Moments, dense_terms, token_terms
from pruner_lib.importance.parallel import Share

FORWARD_ONLY = ("wanda", "fluctuation", "activation")


@pytest.mark.parametrize("reads", [("r",), ("m",), ("v",), ("r", "m", "v")])
def test_moments_of_pieces_are_those_of_the_whole(reads):
    x = torch.randn(60, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    moments = Moments(reads)
    for piece in x.split([1, 20, 39]):
        moments.add(len(piece), dense_terms(piece, reads))
    expected = {"r": x.square().mean(0).sqrt(), "m": x.abs().mean(0), "v": x.var(0, correction=0)}
    found = moments.values(Share())
    assert set(found) == set(reads)
    for name in reads:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)


def test_a_variance_far_from_zero_does_not_cancel():
    x = 1e4 + torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    moments = Moments(("v",))
    for piece in x.split(100):
        moments.add(len(piece), dense_terms(piece, ("v",)))
    torch.testing.assert_close(
        moments.values(Share())["v"], x.double().var(0, correction=0), rtol=1e-3, atol=0
    )


def test_one_hot_terms_are_those_of_one_hot_rows():
    tokens, reads = torch.tensor([[0, 2, 2], [1, 2, 0]]), ("r", "m", "v")
    sparse = token_terms(tokens, 5, reads)
    dense = dense_terms(torch.nn.functional.one_hot(tokens, 5).double(), reads)
    for name, term in dense.items():
        torch.testing.assert_close(sparse[name], term, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["falcon_new", "opt", "gemma2", "gpt_bigcode", "starcoder2", "phi"])
def test_inputs_are_seen_whatever_computes_the_product(name):
    """Products written x @ W.T, embeddings that look up shifted positions, scaled embeddings, Conv1D."""
    model = tiny(name)
    dependencies, tokens = discover(model), tokens_of(3, 6) + 3
    scores = estimate_importance(model, dependencies, tokens, criterion="wanda")
    assert all(values.min() > 0 for values in scores.scores.values())


def test_products_with_the_transposed_weight_count_as_linear():
    model = tiny("falcon_new")
    tokens = tokens_of(3, 6) + 3
    name = "transformer.h.0.mlp.dense_4h_to_h.weight"
    inputs = []
    module = model.get_submodule(name.removesuffix(".weight"))
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    found = element_scores(model, name, tokens, criterion="wanda")[name]
    handle.remove()
    expected = module.weight.detach().abs() * inputs[0].square().mean(0).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", FORWARD_ONLY)
def test_micro_batches_change_nothing(criterion):
    model = tiny_gpt2()
    dependencies, tokens = discover(model), tokens_of(5, 7)
    whole = estimate_importance(model, dependencies, tokens, criterion=criterion, micro_batch_size=5)
    for size in (1, 2):
        parts = estimate_importance(model, dependencies, tokens, criterion=criterion, micro_batch_size=size)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-9, atol=0)


def test_activation_of_a_neuron_is_the_mean_input_of_what_reads_it():
    model, tokens = tiny_llama(), tokens_of(3, 6)
    dependencies = discover(model)
    families = ["layers.0.mlp_neuron", "layers.0.attention_head"]
    scores = estimate_importance(model, dependencies, tokens, criterion="activation", families=families)
    inputs = stored_inputs(model, tokens)
    ((_, neurons),) = inputs["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(scores[families[0]], torch.from_numpy(abs(neurons).mean(0)), rtol=1e-9, atol=0)
    ((_, mixed),) = inputs["model.layers.0.self_attn.o_proj.weight"]
    by_head = torch.from_numpy(abs(mixed).mean(0)).view(3, 8).mean(1)  # two query heads of four channels
    torch.testing.assert_close(scores[families[1]], by_head, rtol=1e-9, atol=0)


def test_a_matrix_whose_inputs_are_not_seen_is_refused():
    model = tiny_llama()
    dependencies = discover(model)
    projection = model.model.layers[1].mlp.down_proj
    projection.forward = lambda x: torch.einsum("...i,oi->...o", x, projection.weight)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj\.weight were not seen"):
        estimate_importance(model, dependencies, tokens_of(2, 5), criterion="wanda")
    assert_unchanged(model, before)


def test_nan_is_named_in_forward_passes_too():
    model = tiny_llama()
    dependencies = discover(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"sequence 0 is nan.*model\.layers\.1\.mlp\.up_proj\."):
        estimate_importance(model, dependencies, tokens_of(2, 5), criterion="fluctuation")


def test_nan_that_no_later_token_sees_is_named_too():
    model = tiny_llama()
    dependencies = discover(model)
    family = dependencies.select(kind="mlp_neuron", layers=1)
    tokens = tokens_of(2, 5)
    first = torch.tensor(0)  # the first token, in the last layer: attention no longer passes it on
    model.model.layers[1].mlp.up_proj.register_forward_hook(
        lambda module, args, out: out.index_fill(1, first, float("nan"))
    )
    with pytest.raises(FloatingPointError, match=r"sequence 0 is nan.*model\.layers\.1\.mlp\.up_proj\."):
        estimate_importance(model, dependencies, tokens, criterion="wanda", families=family)


@pytest.mark.parametrize(("kind", "wanted"), [("mlp_neuron", 1), ("hidden_channel", 6)])
def test_logits_of_every_token_are_made_only_for_who_reads_them(kind, wanted):
    model = tiny_llama()
    dependencies = discover(model)
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    families = dependencies.select(kind=kind)
    estimate_importance(model, dependencies, tokens_of(2, 6), criterion="activation", families=families)
    assert seen == [wanted]


def test_a_criterion_reads_what_its_arguments_name():
    own = Criterion("own", "Σ |g|·m", lambda g, m: g.abs() * m)
    assert own.needs_gradient and own.needs_inputs and not own.needs_second_moment
    model, tokens = tiny_llama(), tokens_of(3, 6)
    name = "model.layers.0.mlp.gate_proj.weight"
    _, g, _, uses = stored(model, tokens)[name]
    ((_, inputs),) = uses
    found = element_scores(model, [name], tokens, criterion=own)[name]
    expected = torch.from_numpy(abs(g) * abs(inputs).mean(0))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"reads weight, which stands for nothing.* may be W, g, h, r, m, v"):
        Criterion("wrong", "?", lambda weight: weight)
    with pytest.raises(ValueError, match="a channel score may be r, m, v"):
        Criterion("wrong", "?", lambda W: W, scope="channel")
    with pytest.raises(ValueError, match="unknown scope 'row'; valid are element, vector, channel, group"):
        Criterion("wrong", "?", lambda W: W, scope="row")


def test_every_criterion_has_an_equation_and_a_source():
    for name, criterion in CRITERIA.items():
        assert criterion.name == name and criterion.equation and "arXiv" in criterion.source


@pytest.mark.parametrize("criterion", ["l1", "taylor_first", "taylor_mixed", "wanda", "fluctuation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_elements_and_vectors_are_those_computed_by_hand(layout, criterion):
    model, tokens = LAYOUTS[layout](), tokens_of(3, 6)
    known = stored(model, tokens)
    matrices = [name for name, p in model.named_parameters() if p.ndim > 1]
    names = [name for name in matrices if any(part in name for part in (".0.", "emb", "wte"))]
    elements = element_scores(model, names, tokens, criterion=criterion)
    vectors = vector_scores(model, names, tokens, criterion=criterion)
    for name in names:
        expected = torch.from_numpy(element_by_hand(criterion, *known[name]))
        torch.testing.assert_close(elements[name], expected, rtol=1e-9, atol=1e-14)
        for dim in (0, 1):
            torch.testing.assert_close(vectors[name][dim], expected.sum(1 - dim), rtol=1e-9, atol=0)


def test_groups_are_reductions_of_vectors():
    model, tokens = tiny_llama(), tokens_of(3, 6)
    dependencies = discover(model)
    family = dependencies.family("layers.1.mlp_neuron")
    vectors = vector_scores(model, {piece.parameter for piece in family.slices}, tokens)
    expected = sum(vectors[piece.parameter][piece.dim][piece.index[:, 0]] for piece in family.slices)
    found = estimate_importance(model, dependencies, tokens, families=[family])[family.name]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_model_comes_back_as_it_was():
    model = odd_state(tiny_llama())
    before = snapshot(model)
    element_scores(model, "model.norm.weight", tokens_of(2, 5))
    vector_scores(model, "model.layers.0.mlp.up_proj.weight", tokens_of(2, 5), criterion="wanda")
    assert_unchanged(model, before)


def test_finer_granularities_say_what_is_wrong():
    model, name = tiny_llama(), "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"no parameter 'mlp\.up_proj'; it has \d+, such as model\."):
        element_scores(model, "mlp.up_proj", tokens_of(2, 5))
    with pytest.raises(ValueError, match="random draws one number per group"):
        vector_scores(model, name, tokens_of(2, 5), criterion="random")
    with pytest.raises(ValueError, match="activation scores channels, not elements; ask for vector_scores"):
        element_scores(model, name, tokens_of(2, 5), criterion="activation")


@pytest.mark.parametrize("criterion", FORWARD_ONLY)
def test_readers_of_one_tensor_keep_sums_of_their_own(criterion):
    """Query, key and value read the same; in float64 nothing is converted, and each must add to its own."""
    model, tokens = tiny_llama(), tokens_of(5, 7)
    names = [name for name, p in model.named_parameters() if "layers.1" in name and p.ndim == 2]
    whole = vector_scores(model, names, tokens, criterion=criterion, micro_batch_size=5)
    for size in (1, 2):
        parts = vector_scores(model, names, tokens, criterion=criterion, micro_batch_size=size)
        for name in names:
            for dim, values in whole[name].items():
                torch.testing.assert_close(parts[name][dim], values, rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["l2", "wanda", "taylor_first", "taylor_second"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_tied_matrix_has_one_score_by_both_names(criterion, size):
    model, tokens = tiny_llama(tie_word_embeddings=True), tokens_of(4, 7)
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    found = element_scores(model, both, tokens, criterion=criterion, micro_batch_size=size)
    alone = element_scores(model, both[1], tokens, criterion=criterion, micro_batch_size=size)[both[1]]
    for name in both:
        torch.testing.assert_close(found[name], alone, rtol=1e-9, atol=0)


def test_a_router_that_multiplies_in_float32_is_seen():
    """Its weight is cast in every call, so what is multiplied is another tensor."""
    model = tiny("deepseek_v3", torch.bfloat16)
    name = next(name for name, _ in model.named_parameters() if name.endswith("mlp.gate.weight"))
    half = vector_scores(model, name, tokens_of(3, 6) + 3, criterion="wanda")[name][1]
    exact = vector_scores(model.float(), name, tokens_of(3, 6) + 3, criterion="wanda")[name][1]
    assert (half / exact - 1).abs().median() < 0.1  # bfloat16 may send a token elsewhere
