"""The runner, on toy notebooks that take no model."""

from __future__ import annotations

import json

import nbformat
import pytest

from pruner_lib import walkthrough as runner
from pruner_lib.walkthrough import Walkthrough, WalkthroughError, main, run_walkthrough, summary_lines

MEASURED = {
    "dense_params": 134_515_008, "pruned_params": 107_600_000, "dense_macs": 9e9, "pruned_macs": 7.2e9,
    "dense_perplexity": 50.0, "pruned_perplexity": 90.0, "recovered_perplexity": 60.0,
    "random_perplexity": 200.0, "l2_perplexity": 900.0, "pruned_model": "/somewhere/pruned",
}  # fmt: skip


def write_notebook(path, *cells):
    first = nbformat.v4.new_code_cell("model_name = 'none'\ndevice = None", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[first, *(nbformat.v4.new_code_cell(cell) for cell in cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Notebooks 00-02 that count their runs in log.txt; 01 fails until fixed.txt exists."""
    monkeypatch.setenv("PRUNER_LIB_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "notebooks"
    folder.mkdir()
    log = "open('log.txt', 'a').write('{} ' + model_name + '\\n');"
    leave = (
        "from pruner_lib.assets import workspace\n"
        f"(workspace(model_name) / 'summary.json').write_text({json.dumps(MEASURED)!r})"
    )
    write_notebook(folder / "00_first.ipynb", log.format("00"))
    write_notebook(
        folder / "01_second.ipynb",
        log.format("01"),
        "import os\nassert os.path.exists('fixed.txt'), 'not fixed'",
    )
    write_notebook(folder / "02_third.ipynb", log.format("02"), leave)
    write_notebook(folder / "06_beyond.ipynb", "raise RuntimeError('not part of the walkthrough')")
    return Walkthrough(folder, tmp_path / "out", "owner/model", "cpu")


def ran(place) -> list[str]:
    file = place.notebooks / "log.txt"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def test_steps_are_00_to_05_in_order_with_distinct_fingerprints(place):
    names = [path.name for path, _ in place.steps()]
    assert names == ["00_first.ipynb", "01_second.ipynb", "02_third.ipynb"]
    assert len({fingerprint for _, fingerprint in place.steps()}) == 3


def test_fingerprint_ignores_outputs_and_follows_sources_before_it(place):
    before = dict(place.steps())
    file = place.notebooks / "01_second.ipynb"
    notebook = nbformat.read(file, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="executed")]
    nbformat.write(notebook, file)
    assert dict(place.steps()) == before
    notebook.cells[1].source += "\n# changed"
    nbformat.write(notebook, file)
    same = [path.name for path, fingerprint in place.steps() if before[path] == fingerprint]
    assert same == ["00_first.ipynb"]


def test_no_notebooks_says_where_it_looked(tmp_path):
    with pytest.raises(WalkthroughError, match="--notebooks"):
        Walkthrough(tmp_path, tmp_path / "out").steps()


@pytest.mark.slow
def test_failed_run_resumes_at_the_failed_notebook_and_ends_with_the_summary(place, capsys):
    with pytest.raises(WalkthroughError, match=r"01_second.ipynb failed .*AssertionError: not fixed"):
        run_walkthrough(place)
    assert ran(place) == ["00", "01"]
    (place.notebooks / "fixed.txt").touch()
    assert run_walkthrough(place) == MEASURED
    assert ran(place) == ["00", "01", "01", "02"]
    assert "00_first: done in the run before" in capsys.readouterr().out
    executed = nbformat.read(place.output / "02_third.ipynb", as_version=4)
    assert "owner/model" in executed.cells[1].source
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert "<html" in (place.output / "02_third.html").read_text()


def test_what_counts_as_done(place, monkeypatch):
    executed = []

    def execute(walkthrough, notebook):
        executed.append(notebook.name[:2])
        (walkthrough.output / notebook.name).touch()

    monkeypatch.setattr(runner, "_execute", execute)
    run_walkthrough(place)
    run_walkthrough(place)
    assert executed == ["00", "01", "02"] * 2, "a finished run starts over"
    steps = place.steps()
    runner._write_state(place.output, [fingerprint for _, fingerprint in steps[:2]], finished=False)
    executed.clear()
    run_walkthrough(place)
    assert executed == ["02"]
    runner._write_state(place.output, [fingerprint for _, fingerprint in steps[:2]], finished=False)
    (place.output / "00_first.ipynb").unlink()
    executed.clear()
    run_walkthrough(place)
    assert executed == ["00", "01", "02"], "without its output a notebook is not done, nor what follows"
    for text in ("", "{}", "[]", '{"done": 3, "finished": false}'):
        (place.output / "state.json").write_text(text)
        executed.clear()
        run_walkthrough(place)
        assert executed == ["00", "01", "02"], f"unreadable state {text!r}"


def test_fresh_starts_over_and_other_parameters_do_too(place, monkeypatch):
    executed = []
    monkeypatch.setattr(runner, "_execute", lambda walkthrough, notebook: executed.append(notebook.name[:2]))
    place.output.mkdir()
    for notebook, _ in place.steps():
        (place.output / notebook.name).touch()
    runner._write_state(place.output, [fingerprint for _, fingerprint in place.steps()[:1]], finished=False)
    run_walkthrough(place, fresh=True)
    assert executed == ["00", "01", "02"]
    runner._write_state(place.output, [fingerprint for _, fingerprint in place.steps()[:1]], finished=False)
    executed.clear()
    run_walkthrough(Walkthrough(place.notebooks, place.output, "owner/model", None))
    assert executed == ["00", "01", "02"]


def test_stale_summary_is_not_reported(place, monkeypatch):
    from pruner_lib.assets import workspace

    (workspace("owner/model") / "summary.json").write_text(json.dumps(MEASURED))
    monkeypatch.setattr(runner, "_execute", lambda *_: None)
    assert run_walkthrough(place) == {}


def test_summary_is_five_lines_with_sizes_and_qualities():
    lines = summary_lines(MEASURED)
    assert len(lines) == 5
    assert "134.52 M -> 107.60 M (-20.0 %)" in lines[0]
    assert "9.00 G -> 7.20 G (-20.0 %)" in lines[1]
    assert "dense 50.0, pruned by Taylor 90.0, after LoRA 60.0" in lines[2]
    assert "random 200.0, L2 900.0" in lines[3]
    assert lines[4].endswith("/somewhere/pruned")


def test_summary_says_what_was_not_measured():
    lines = summary_lines({"dense_params": 5})
    assert len(lines) == 5 and "not measured" in lines[0] and "not saved" in lines[4]


def test_command_line_prints_where_everything_is(place, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runner, "run_walkthrough", lambda walkthrough, *, fresh: MEASURED)
    options = [
        "--model",
        "owner/model",
        "--notebooks",
        str(place.notebooks),
        "--output",
        str(tmp_path / "runs"),
    ]
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "runs" / "owner--model" / "*.html") in printed
    assert "/somewhere/pruned" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "SmolLM"], "no model is called"),
        (["--model", "owner/m", "--device", "gpu"], "unknown to torch"),
    ],
)
def test_command_line_refuses_bad_names_before_running(place, capsys, options, message):
    assert main([*options, "--notebooks", str(place.notebooks)]) == 1
    assert message in capsys.readouterr().err
    assert ran(place) == []


def test_interruption_is_reported_with_its_own_status(place, monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_walkthrough", interrupt)
    arguments = [
        "--model",
        "owner/m",
        "--notebooks",
        str(place.notebooks),
        "--output",
        str(tmp_path / "runs"),
    ]
    assert main(arguments) == 130
    assert "goes on" in capsys.readouterr().err
