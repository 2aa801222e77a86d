"""The recovery monitor as a person uses it: watch, then press stop; and the speed comparison."""

import asyncio
import os
from pathlib import Path

import pytest
from jupyter_client.manager import start_new_kernel
from recovery_models import QUICK, counting, tiny_llama

from pruner_lib import display
from pruner_lib.recovery import RecoverySettings, recover
from pruner_lib.recovery.benchmark import SpeedComparison, compare_speed


def test_the_monitor_follows_a_run_and_its_button_stops_it():
    """Pressed during step 3, training ends after it and the best state comes back."""
    monitor = display.recovery_monitor(every=0)
    pictures = []

    def on_step(record):
        if record["step"] == 3:
            monitor.stop.click()
        answer = monitor(record)
        pictures.append(monitor.picture.value)
        return answer

    result = recover(
        tiny_llama(), None, counting(), settings=RecoverySettings(**QUICK, evaluate_every=1),
        held_out=counting(rows=2), on_step=on_step, progress=False,
    )  # fmt: skip
    assert len(result.history) == 3
    assert monitor.records == list(result.history)
    assert monitor.stop.disabled and monitor.stopped
    assert "stopped" in monitor.text.value and "held-out perplexity" in monitor.text.value
    assert len(set(pictures)) == 3, "the figure changed at every step"
    assert all(picture.startswith("<img alt=") for picture in pictures)
    assert [step for step, _ in result.held_out] == [0, 1, 2, 3]


CELL = """
from recovery_models import QUICK, counting, tiny_llama
from pruner_lib.recovery import RecoverySettings, recover
settings = RecoverySettings(**{**QUICK, "max_steps": 100000})
result = await monitor.run(recover, tiny_llama(), None, counting(), settings=settings, progress=False)
print("ended", len(result.history) == len(monitor.records) < 100000)
"""


@pytest.mark.slow
def test_a_click_stops_training_while_its_cell_is_running():
    """A real kernel: the cell trains, the click arrives as a front end would send it."""
    manager, client = start_new_kernel(kernel_name="python3", env=kernel_environment())
    try:
        _, button = outputs(
            client,
            "from pruner_lib.display import recovery_monitor\n"
            "monitor = recovery_monitor(every=0.2)\nprint(monitor.stop.model_id)",
        )
        running = client.execute(CELL)
        wait_for(client, lambda m: "Step" in str(m["content"].get("data", {}).get("state", {}).get("value")))
        click = {"comm_id": button.strip(), "data": {"method": "custom", "content": {"event": "click"}}}
        client.shell_channel.send(client.session.msg("comm_msg", click))
        said = wait_for(
            client,
            lambda m: m["msg_type"] in ("stream", "error") and m["parent_header"].get("msg_id") == running,
        )
        assert said["content"].get("text") == "ended True\n", said["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def kernel_environment():
    here = Path(__file__).resolve().parent
    return {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "JUPYTER_PREFER_ENV_PATH": "1"}


def wait_for(client, wanted):
    while True:
        message = client.get_iopub_msg(timeout=300)
        if wanted(message):
            return message


def outputs(client, code):
    sent, text = client.execute(code), ""
    while True:
        message = client.get_iopub_msg(timeout=300)
        if message["parent_header"].get("msg_id") != sent:
            continue
        text += message["content"].get("text", "") if message["msg_type"] == "stream" else ""
        if message["content"].get("execution_state") == "idle":
            return sent, text


def test_the_monitor_draws_no_more_often_than_asked():
    now = [0.0]
    monitor = display.recovery_monitor(every=10.0, clock=lambda: now[0])
    drawn = []
    for step in range(1, 7):
        now[0] += 4.0
        before = monitor.picture.value
        assert monitor({"step": step, "loss": 3.0 / step}) is False
        drawn.append(monitor.picture.value != before)
    assert drawn == [True, False, False, True, False, False]
    monitor({"step": 7, "loss": 0.1, "held_out_perplexity": 9.5})
    assert "9.50" in monitor.text.value, "a look at the held-out text is always drawn"
    monitor({"step": 1, "loss": 3.0})
    assert len(monitor.records) == 1, "a new run begins anew"


def test_the_last_steps_are_shown_when_the_run_is_over():
    """Pressed after the last step was reported, the button stops nothing, and the text says how it ended."""
    monitor = display.recovery_monitor(every=1000.0)

    def training(*, on_step):
        on_step({"step": 1, "loss": 3.0})
        on_step({"step": 2, "loss": 2.0})
        monitor.stop.click()

    asyncio.run(monitor.run(training))
    assert "Step 2: loss 2.000, stopped" in monitor.text.value


def test_controls_are_labelled():
    monitor = display.recovery_monitor()
    assert monitor.stop.description == "Stop after this step"
    assert monitor.stop.tooltip
    assert monitor.text.value == "Waiting for the first step."


def test_the_figure_says_in_words_what_it_shows():
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "held_out_perplexity": 7.0}]
    assert display.describe_recovery(records) == (
        "Over 2 steps the training loss fell; held-out perplexity was lowest at step 2."
    )
    assert display.describe_recovery([]) == "No step is done yet."
    assert "no held-out text" in display.describe_recovery(records[:1])
    figure = display.plot_recovery(records)
    assert [axes.get_title() for axes in figure.axes] == ["training", "held-out text"]
    assert [len(axes.lines[0].get_xdata()) for axes in figure.axes] == [2, 1]


def test_engine_and_bare_loop_do_the_same_work():
    """So the comparison of their speeds is fair: the losses of every step agree."""
    chosen = RecoverySettings(**{**QUICK, "max_steps": 4})
    found = compare_speed(tiny_llama(), counting(), settings=chosen, repeats=2)
    assert found.engine_losses == pytest.approx(found.bare_losses, rel=1e-4)
    assert len(found.engine) == len(found.bare) == 2
    assert min(found.engine + found.bare) > 0


def test_the_ratio_is_the_median_of_pairs():
    found = SpeedComparison((90.0, 100.0, 110.0), (100.0, 100.0, 100.0), (), ())
    assert found.ratio == 1.0
    assert "1.000 × a bare PEFT loop (from 0.900 to 1.100 in 3 repeats" in str(found)
