"""Every widget in JupyterLab, on a tiny model, operated as a person would: clicked, dragged, typed into."""

from __future__ import annotations

import re

import nbformat
import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser

START = """
import torch, pruner_lib as pl
from pruner_lib import display as draw
from IPython.display import display
from recovery_models import QUICK, counting, tiny_llama
from harness_data import byte_tokenizer
model = tiny_llama(vocab_size=257, num_hidden_layers=4)
dependencies = pl.discover(model)
batches = torch.randint(257, (4, 12), generator=torch.Generator().manual_seed(0))
"""
WIDGETS = {
    "explorer": "explorer = draw.group_explorer(dependencies)\ndisplay(explorer)",
    "planner": (
        "scores = pl.estimate_importance(model, dependencies, batches)\n"
        "planner = draw.plan_explorer(model, dependencies, scores)\ndisplay(planner)"
    ),
    "criteria": """
names = ("l2", "taylor_first")
scores = {n: pl.estimate_importance(model, dependencies, batches, criterion=n, source="noise") for n in names}
truth = pl.measure_importance(model, dependencies, batches, "layers.1.mlp_neuron", progress=False)
def estimate(criterion, reduction, text):
    return pl.estimate_importance(model, dependencies, batches, criterion=criterion, reduction=reduction)
lab = draw.criteria_explorer(scores, truth=truth, estimate=estimate, choices=[("wanda", "max", "more noise")])
display(lab)""",
    "bench": """
models = {"dense": model, "pruned": tiny_llama(1, vocab_size=257), "recovered": tiny_llama(2, vocab_size=257)}
bench = draw.generation_bench(models, byte_tokenizer(), prompt="ab")
display(bench)""",
    "dashboard": """
models = {"dense": model, "small": tiny_llama(1, vocab_size=257)}
report = pl.evaluate(models, None, text={"noise": batches.flatten().repeat(8)}, seq_len=16)
board = draw.evaluation_dashboard(report)
display(board)""",
}
MONITOR = """
monitor = draw.recovery_monitor(every=0.5)
display(monitor)
settings = pl.RecoverySettings(**{**QUICK, "max_steps": 100000})
data = counting()"""
TRAIN = """
result = await monitor.run(
    pl.recover, model, None, data, settings=settings, held_out=counting(rows=2), progress=False)
print("ended early:", len(result.history) < 100000)"""


# Collects every length that an answer has on its way.
WATCH = """panel => {
  window.grown = new Set();
  const answers = () => panel.querySelectorAll('.pruner-lab-answer');
  const look = () => answers().forEach(answer => window.grown.add(answer.innerText.length));
  new MutationObserver(look).observe(panel, {subtree: true, childList: true, characterData: true});
}"""


def written(lab, name, *cells):
    """A new notebook of these cells, in the folder of a lab."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab.folder / name)
    return name


@pytest.fixture(scope="module")
def shown(lab, open_notebook):
    """A notebook with all widgets, run once: one kernel serves all tests of this file but one."""
    with open_notebook(lab, written(lab, "widgets.ipynb", START, *WIDGETS.values())) as opened:
        opened.run_all()
        assert opened.errors() == []
        yield opened


def slide(panel, label, keys):
    """Move a slider by its keys, as a person without a mouse would."""
    handle = panel.get_by_label(label, exact=True).or_(
        panel.locator(f".widget-hslider:has(.widget-label:text-is('{label}')) .noUi-handle")
    )
    handle.first.focus()
    for key in keys:
        handle.first.press(key)


def drag(panel, label, share):
    """Drag a slider's handle to a share of its length."""
    row = panel.locator(f".widget-hslider:has(.widget-label:text-is('{label}'))")
    handle, line = row.locator(".noUi-handle").first, row.locator(".noUi-base")
    handle.scroll_into_view_if_needed()
    start, box = handle.bounding_box(), line.bounding_box()
    page = panel.page
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], start["y"] + start["height"] / 2, steps=8)
    page.mouse.up()


def test_explorer(shown):
    panel = shown.widget("groups")
    status = panel.get_by_role("status")
    expect(status).to_contain_text("layers.0.mlp_neuron, group 0 of 24")
    panel.get_by_role("button", name="2", exact=True).click()
    expect(status).to_contain_text("layers.2.mlp_neuron, group 0 of 24")
    drag(panel, "Group", 0.5)
    expect(status).to_contain_text(re.compile(r"group 1[0-4] of 24"))
    # A click on the drawing: the last column of down_proj is the last neuron.
    shown.settled(panel)
    drawn = panel.locator("figure:has-text('down_proj') svg")
    box = drawn.bounding_box()
    drawn.click(position={"x": box["width"] - 1, "y": box["height"] / 2})
    expect(status).to_contain_text("layers.2.mlp_neuron, group 23 of 24")
    expect(panel.locator("figure:has-text('gate_proj')")).to_contain_text("row 23")
    shown.settled(panel)
    lit = panel.locator("figure:has-text('down_proj') rect.lit").bounding_box()
    assert lit["x"] > box["x"] + 0.8 * box["width"], "the lit column is where it was clicked"
    panel.get_by_label("Say which operators tie them").check()
    expect(status).to_contain_text("mm (model.layers.2.mlp.down_proj)")
    shown.picture("neuron", panel)
    panel.get_by_role("button", name="attention_head").click()
    expect(status).to_contain_text("layers.2.attention_head")
    expect(panel.locator("figure")).to_have_count(4)
    shown.picture("head", panel)
    panel.get_by_role("button", name="hidden_channel").click()
    expect(panel.get_by_role("button", name="2", exact=True)).to_have_count(0)
    shown.picture("residual", panel)


def test_planner(shown):
    panel = shown.widget("planner")
    status = panel.get_by_role("status")
    before = status.text_content()
    kept = panel.locator("rect.kept")
    expect(kept).to_have_count(4)
    shown.settled(panel)
    height = kept.first.bounding_box()["height"]
    drag(panel, "Ratio removed", 0.8)
    expect(status).not_to_have_text(before)
    expect(status).to_contain_text("remain")
    shown.settled(panel)
    assert kept.first.bounding_box()["height"] < height, "the bars follow the slider"
    shown.picture("ratio", panel)
    panel.get_by_role("button", name="parameters", exact=True).click()
    panel.get_by_role("button", name="global").click()
    panel.get_by_label("attention_head").uncheck()
    drag(panel, "Share that stays", 0.9)
    expect(panel.locator("table").last).to_contain_text("✘ no")
    shown.picture("global", panel)
    panel.get_by_label("mlp_neuron").uncheck()
    panel.get_by_label("hidden_channel").uncheck()
    expect(status).to_contain_text("Not possible: no kinds given")
    expect(kept).to_have_count(0)
    panel.get_by_label("mlp_neuron").check()
    expect(kept).to_have_count(4)
    panel.get_by_label("Multiples of").select_option("8")
    slide(panel, "Share that stays", ["End"])
    # 95 % of 16,048 parameters; 8 neurons of 48 parameters each go at a time.
    expect(status).to_contain_text("14,896 of 16,048 remain")


def test_criteria(shown):
    panel = shown.widget("criteria")
    status = panel.get_by_role("status")
    expect(status).to_contain_text("layers.1.mlp_neuron: Spearman")
    expect(status).to_contain_text("rank correlation with ablation")
    picture = panel.locator("img").get_attribute("src")
    panel.get_by_label("Criterion").nth(1).select_option("wanda")
    expect(status).to_contain_text("wanda × max × more noise")
    expect(panel.locator("img")).not_to_have_attribute("src", picture)
    panel.get_by_label("Family").select_option("layers.3.mlp_neuron")
    expect(status).to_contain_text("layers.3.mlp_neuron")
    expect(status).to_contain_text("not ablated")
    panel.get_by_label("Family").select_option("layers.1.mlp_neuron")
    shown.settled(panel)
    drag(panel, "Share removed", 0.5)
    expect(status).to_contain_text(re.compile(r"lowest (4|5)\d %"))
    shown.picture("graded", panel)


def test_bench(shown):
    panel = shown.widget("bench")
    status = panel.get_by_role("status")
    expect(status).to_contain_text("Press Generate")
    panel.evaluate(WATCH)
    panel.get_by_role("button", name="Generate").click()
    expect(status).to_contain_text("Done: greedy, at most 30 new tokens")
    answers = panel.locator(".pruner-lab-answer")
    expect(answers).to_have_count(3)
    before = answers.all_inner_texts()
    assert all(len(text) > len("ab") for text in before)
    assert shown.page.evaluate("() => window.grown.size") > 10, "the answers grew before one's eyes"
    prompt = panel.get_by_label("Prompt")
    prompt.fill("Once")
    prompt.press("Enter")
    expect(status).to_contain_text("Done")
    expect(answers.first).to_contain_text("Once")
    shown.picture("answers", panel)


def test_dashboard(shown):
    panel = shown.widget("dashboard")
    status = panel.get_by_role("status")
    expect(status).to_contain_text("parameters (million)")
    picture = panel.locator("img").get_attribute("src")
    panel.get_by_label("Size").select_option("multiply-accumulates (G)")
    expect(status).to_contain_text("multiply-accumulates (G)")
    expect(panel.locator("img")).not_to_have_attribute("src", picture)
    panel.get_by_role("button", name="ratio to the first").click()
    expect(status).to_contain_text("Ratios to dense")
    expect(status.locator("tbody tr").first).to_contain_text("1.000")
    shown.picture("ratios", panel)
    panel.get_by_label("dense").uncheck()
    expect(status.locator("tbody tr")).to_have_count(1)


def test_recovery_monitor(lab, open_notebook):
    """A kernel of its own: its cell runs until the button is pressed."""
    with open_notebook(lab, written(lab, "recovery.ipynb", START, MONITOR, TRAIN)) as opened:
        opened.start_all()
        panel = opened.widget("recovery")
        expect(panel).to_contain_text(re.compile(r"Step \d+: loss"))
        picture = panel.locator("img").get_attribute("src")
        expect(panel.locator("img")).not_to_have_attribute("src", picture)
        panel.get_by_role("button", name="Stop after this step").click()
        expect(opened.page.get_by_text("ended early: True")).to_be_visible()
        expect(panel).to_contain_text("stopped")
        expect(panel.get_by_role("button", name="Stop after this step")).to_be_disabled()
        assert opened.errors() == []
        opened.picture("stopped", panel)


def test_a_widget_whose_kernel_was_restarted_shows_that_it_is_dead(lab, open_notebook):
    """Nothing breaks silently: the panel is marked as cut off, and running its cells again brings it back."""
    cells = START, WIDGETS["explorer"]
    with open_notebook(lab, written(lab, "restarted.ipynb", *cells)) as opened:
        opened.run_all()
        opened.restart()
        expect(opened.page.locator(".jupyter-widgets-disconnected").first).to_be_visible()
        opened.picture("disconnected")
        opened.run_all()
        assert opened.errors() == []
        panel = opened.widget("groups")
        panel.get_by_role("button", name="2", exact=True).click()
        expect(panel.get_by_role("status")).to_contain_text("layers.2.mlp_neuron")
