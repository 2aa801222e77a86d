"""Run notebooks 00-05 in order, export HTML, and say what happened: ``python -m pruner_lib.walkthrough``.

A run that stops half-way is taken up at the notebook that failed. A notebook counts as done only
when it, everything before it and the parameters are the same as when it ran.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruner_lib.assets import DEFAULT_MODEL, AssetError, workspace
from pruner_lib.assets.files import write_whole
from pruner_lib.assets.models import locate_model, resolve_device

_SEQUENCE = re.compile(r"0[0-5]_.*\.ipynb")
_STATE = "state.json"


class WalkthroughError(RuntimeError):
    """A notebook failed or none was found; the message says which and how to go on."""


@dataclass(frozen=True)
class Walkthrough:
    """What to run and where to put it.

    Attributes:
        notebooks: folder that holds ``00_….ipynb`` to ``05_….ipynb``.
        output: folder for executed notebooks, HTML and the state of the run.
        model_name: handed to every notebook, and the key of its workspace.
        device: handed to every notebook; None lets the library choose.
    """

    notebooks: Path
    output: Path
    model_name: str = DEFAULT_MODEL
    device: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """What each notebook's ``parameters`` cell is overridden with."""
        return {"model_name": self.model_name, "device": self.device}

    def steps(self) -> list[tuple[Path, str]]:
        """The notebooks in order, each with a fingerprint of itself and all that came before.

        Raises:
            WalkthroughError: the folder holds no such notebook.
        """
        found = sorted(path for path in self.notebooks.glob("*.ipynb") if _SEQUENCE.fullmatch(path.name))
        if not found:
            raise WalkthroughError(
                f"no notebook 00_….ipynb to 05_….ipynb in {self.notebooks}; "
                "run this from the project's folder or give --notebooks"
            )
        digest = hashlib.sha256(json.dumps(self.parameters, sort_keys=True).encode())
        steps = []
        for path in found:
            digest.update(_sources(path))
            steps.append((path, digest.hexdigest()))
        return steps


def _sources(notebook: Path) -> bytes:
    """What a notebook says, without its outputs: re-executing it changes nothing here."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = [[cell["cell_type"], "".join(cell["source"])] for cell in content["cells"]]
    return json.dumps([notebook.name, cells]).encode()


def run_walkthrough(walkthrough: Walkthrough, *, fresh: bool = False) -> dict[str, Any]:
    """Execute what is left to execute, and export every notebook as HTML.

    Args:
        walkthrough: what to run.
        fresh: start over even if an earlier run stopped half-way.

    Returns:
        The notebooks' ``summary.json``; empty when they left none.

    Raises:
        WalkthroughError: a notebook failed. Those before it are kept; the next call goes on there.
    """
    steps = walkthrough.steps()
    walkthrough.output.mkdir(parents=True, exist_ok=True)
    done = [] if fresh else _completed(walkthrough.output, steps)
    summary_file = workspace(walkthrough.model_name) / "summary.json"
    if not done:
        # An old summary must not be read as the result of this run.
        summary_file.unlink(missing_ok=True)
    for number, (notebook, fingerprint) in enumerate(steps, start=1):
        title = f"[{number}/{len(steps)}] {notebook.stem}"
        if fingerprint in done:
            print(f"{title}: done in the run before", flush=True)
            continue
        print(title, flush=True)
        _execute(walkthrough, notebook)
        done.append(fingerprint)
        _write_state(walkthrough.output, done, finished=number == len(steps))
    return json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}


def _completed(output: Path, steps: Sequence[tuple[Path, str]]) -> list[str]:
    """Fingerprints that need not run again; none after a run that reached its end."""
    file = output / _STATE
    if not file.is_file():
        return []
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        done, finished = set(state["done"]), state["finished"]
    except (ValueError, KeyError, TypeError):
        return []
    if finished:
        return []
    kept = []
    for notebook, fingerprint in steps:
        if fingerprint not in done or not (output / notebook.name).is_file():
            break
        kept.append(fingerprint)
    return kept


def _write_state(output: Path, done: Sequence[str], *, finished: bool) -> None:
    write_whole(output / _STATE, json.dumps({"done": list(done), "finished": finished}) + "\n")


def _execute(walkthrough: Walkthrough, notebook: Path) -> None:
    """Run one notebook with papermill, where it lies, and write its HTML."""
    import papermill

    executed = walkthrough.output / notebook.name
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters=walkthrough.parameters,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar={"desc": notebook.stem, "unit": "cell"},
            # Every kernel warns that it talks unencrypted to this same machine; errors still show.
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
    except papermill.exceptions.PapermillExecutionError as error:
        raise WalkthroughError(
            f"{notebook.name} failed in cell [{error.exec_count}] with {error.ename}: {error.evalue}\n"
            f"The executed part is {executed}. Run the same command again to go on at this notebook."
        ) from error
    _export_html(executed)


def _export_html(executed: Path) -> None:
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(executed))
    write_whole(executed.with_suffix(".html"), page)


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """Five lines on size and quality, from what the notebooks measured.

    Args:
        summary: the keys ``dense_params``, ``pruned_params``, ``dense_macs``, ``pruned_macs``,
            ``dense_perplexity``, ``pruned_perplexity``, ``recovered_perplexity``,
            ``random_perplexity``, ``l2_perplexity``, ``pruned_model``; a missing one reads "not measured".

    Returns:
        The lines, without line breaks.
    """

    def value(key: str) -> str:
        return f"{summary[key]:.1f}" if summary.get(key) is not None else "not measured"

    return [
        f"parameters            {_change(summary, 'params', 1e6, 'M')}",
        f"multiply-accumulates  {_change(summary, 'macs', 1e9, 'G')}",
        f"perplexity            dense {value('dense_perplexity')}, "
        f"pruned by Taylor {value('pruned_perplexity')}, "
        f"after LoRA {value('recovered_perplexity')}",
        f"for comparison        random {value('random_perplexity')}, "
        f"L2 {value('l2_perplexity')} (no training)",
        f"pruned model          {summary.get('pruned_model') or 'not saved'}",
    ]


def _change(summary: Mapping[str, Any], what: str, unit: float, letter: str) -> str:
    dense, pruned = summary.get(f"dense_{what}"), summary.get(f"pruned_{what}")
    if not dense or pruned is None:
        return "not measured"
    return (
        f"{dense / unit:.2f} {letter} -> {pruned / unit:.2f} {letter} ({(pruned / dense - 1) * 100:+.1f} %)"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pruner_lib.walkthrough", description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1 … (default: CUDA if there is one)")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"), help="folder of the notebooks")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/walkthrough"), help="folder for the results"
    )
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when every notebook ran, 1 when one failed, 130 when interrupted."""
    options = _parse(arguments)
    model = options.model or DEFAULT_MODEL
    try:
        if options.device:
            resolve_device(options.device)
        place = locate_model(model)
        # The notebooks run in their own folder, where a relative path would lead elsewhere.
        if isinstance(place, Path) and model != DEFAULT_MODEL:
            model = str(place.resolve())
        output = options.output.resolve() / workspace(model).name
        walkthrough = Walkthrough(options.notebooks.resolve(), output, model, options.device or None)
        summary = run_walkthrough(walkthrough, fresh=options.fresh)
    except (AssetError, WalkthroughError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on at this notebook", file=sys.stderr)
        return 130
    print(f"\nexecuted notebooks    {output}/*.ipynb\nas web pages          {output}/*.html")
    print("\n".join(summary_lines(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
