"""ImportanceScores as data, and the ground truth by ablation."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pruner_lib.discovery import discover
from pruner_lib.discovery.families import UnknownFamilyError
from pruner_lib.importance import ImportanceScores, measure_importance
from pruner_lib.importance.calibration import mean_loss
from pruner_lib.importance.scores import spearman


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=30, hidden_size=12, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).double()
    return model, discover(model), torch.randint(0, 30, (3, 8), generator=torch.Generator().manual_seed(1))


def scores_of(**families):
    return ImportanceScores.from_dict({name: torch.tensor(values) for name, values in families.items()})


def test_spearman_by_hand():
    ordered = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(ordered, ordered.exp()) == pytest.approx(1)
    assert spearman(ordered, -ordered) == pytest.approx(-1)
    # ranks 0 1 2 3 and 0 2 1 3: 1 - 6·(0+1+1+0) / (4·15) = 0.8
    assert spearman(ordered, torch.tensor([1.0, 3.0, 2.0, 4.0])) == pytest.approx(0.8)
    # ties: ranks 0.5 0.5 2 3 against 0 1 2 3 give 4.5 / sqrt(4.5 · 5)
    assert spearman(ordered, torch.tensor([1.0, 1.0, 2.0, 3.0])) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_rank_correlation_of_families():
    first = scores_of(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0], c=[5.0, 5.0, 5.0], only_here=[1.0])
    found = first.rank_correlation(scores_of(a=[1.0, 5.0, 9.0], b=[3.0, 2.0, 1.0], c=[1.0, 2.0, 3.0]))
    assert set(found.per_family) == {"a", "b", "c"}
    assert found["a"] == pytest.approx(1) and found["b"] == pytest.approx(-1)
    assert found["c"] != found["c"]
    assert float(found) == found.mean == pytest.approx(0)


def test_rank_correlation_needs_the_same_families():
    with pytest.raises(ValueError, match="no family in common"):
        scores_of(a=[1.0]).rank_correlation(scores_of(b=[1.0]))
    with pytest.raises(ValueError, match="a has 2 groups here and 3 there"):
        scores_of(a=[1.0, 2.0]).rank_correlation(scores_of(a=[1.0, 2.0, 3.0]))


def test_save_and_load_keep_every_bit(tmp_path):
    values = {"a": torch.rand(7, dtype=torch.float64) / 3, "b": torch.rand(4) * 1e-20}
    scores = ImportanceScores.from_dict(
        values, criterion="taylor_first", reduction="sum", source="books", seed=3, num_samples=10, seq_len=64
    )
    again = ImportanceScores.load(scores.save(tmp_path / "scores.json"))
    for name, tensor in values.items():
        assert torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype
    for note in ("criterion", "reduction", "source", "seed", "num_samples", "seq_len"):
        assert getattr(again, note) == getattr(scores, note)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = scores_of(a=[1.0]).save(tmp_path / "scores.json")
    old = path.read_text()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pruner_lib.assets.files.os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        scores_of(a=[2.0]).save(path)
    assert path.read_text() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other", "version": 1, "scores": {}}', "\x00"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="holds no importance scores"):
        ImportanceScores.load(path)


def test_another_version_is_refused(tmp_path):
    path = scores_of(a=[1.0]).save(tmp_path / "scores.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="version 1"):
        ImportanceScores.load(path)


def test_scores_are_checked_and_copied():
    given = torch.tensor([1.0, 2.0])
    scores = ImportanceScores.from_dict({"a": given, "whole numbers": [3, 4]})
    given[0] = 9
    assert scores["a"].tolist() == [1, 2] and scores["whole numbers"].dtype == torch.float64
    assert list(scores) == ["a", "whole numbers"] and len(scores) == 2 and "a" in scores and "b" not in scores
    with pytest.raises(ValueError, match=r"shape \[size\]; got \[2, 2\]"):
        ImportanceScores.from_dict({"a": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="score of group 1 is nan"):
        scores_of(a=[1.0, float("nan")])
    with pytest.raises(UnknownFamilyError, match="no scores for family 'b'"):
        scores["b"]


def test_prints_families_and_origin():
    values = {"layers.0.mlp_neuron": [0.5, 0.25]}
    text = repr(ImportanceScores.from_dict(values, criterion="l1", num_samples=4))
    assert "1 families, criterion='l1', num_samples=4" in text
    assert "layers.0.mlp_neuron" in text and "2.500e-01" in text


@pytest.mark.parametrize("family", ["layers.0.mlp_neuron", "layers.1.attention_head", "hidden_channel"])
def test_measured_importance_is_the_oracles_loss_change(llama, family):
    model, dependencies, tokens = llama
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    truth = measure_importance(model, dependencies, tokens, family, source="random ids")
    dense = mean_loss(model, [tokens])
    expected = [
        mean_loss(dependencies.zero(model, {family: [group]}), [tokens]) - dense
        for group in range(dependencies.family(family).size)
    ]
    torch.testing.assert_close(truth[family], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (truth.criterion, truth.source) == ("loss_change", "random ids")
    assert (truth.num_samples, truth.seq_len) == (3, 8)
    assert truth[family].abs().max() > 1e-8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_measuring_in_micro_batches_changes_nothing(llama):
    model, dependencies, tokens = llama
    whole = measure_importance(model, dependencies, tokens, "layers.0.attention_head")
    parts = measure_importance(model, dependencies, tokens, "layers.0.attention_head", micro_batch_size=2)
    name = "layers.0.attention_head"
    torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-12)


def layered(criterion="taylor_first"):
    values = {f"layers.{n}.mlp_neuron": torch.arange(1.0, 9.0) * (n + 1) for n in range(3)}
    return ImportanceScores.from_dict(values, criterion=criterion)


def test_every_view_is_drawn():
    scores = layered()
    heat, curve, histogram = (scores.plot(view) for view in ("heat map", "sorted", "histogram"))
    assert heat.axes[0].images[0].get_array().shape == (3, 8)
    assert curve.axes[0].get_title() == "layers.2.mlp_neuron" and len(curve.axes[0].lines[0].get_xdata()) == 8
    assert sum(bar.get_height() for bar in histogram.axes[0].patches) == 24
    assert scores.plot("sorted", family="layers.0.mlp_neuron").axes[0].get_title() == "layers.0.mlp_neuron"
    with pytest.raises(ValueError, match="unknown view 'pie'; valid are heat map, sorted, histogram"):
        scores.plot("pie")
    with pytest.raises(ValueError, match="no scores to draw"):
        ImportanceScores.from_dict({}).plot()


def test_the_histogram_says_what_it_leaves_out():
    from pruner_lib.display import describe_score_histogram, plot_score_histogram

    assert describe_score_histogram(layered()) == (
        "mlp_neuron by taylor_first: 50 % of 24 groups score below the mean of their layer."
    )
    changes = ImportanceScores.from_dict({"layers.0.mlp_neuron": [-1.0, 0.0, 2.0]}, criterion="loss_change")
    assert "2 groups with a score of zero or below are left out" in describe_score_histogram(changes)
    assert sum(bar.get_height() for bar in plot_score_histogram(changes).axes[0].patches) == 1
    with pytest.raises(ValueError, match="no scores of kind 'expert'; there are mlp_neuron"):
        plot_score_histogram(changes, kind="expert")


def test_drawing_gives_the_same_overlap_as_grading():
    from pruner_lib.display import lowest_overlap
    from pruner_lib.importance import grade

    first, second = scores_of(a=[1.0, 2.0, 3.0, 4.0]), scores_of(a=[2.0, 1.0, 4.0, 3.0])
    assert lowest_overlap(first, second, "a", 0.5) == grade(first, second, ratio=0.5).overlap["a"] == 1
    assert lowest_overlap(first, second, "a", 0.25) == 0
