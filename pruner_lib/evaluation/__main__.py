"""``python -m pruner_lib.evaluation FOLDER [FOLDER …]``: one report of any number of checkpoints.

The folders may hold pruned models of this library or ordinary ones; a hub id or the name of the default
model does as well. The first is what the others are compared to. Without further options WikiText-2 and the
paper's seven zero-shot tasks are sampled, and the report says how many tokens and items;
``--max-tokens 0 --limit 0`` takes all of them. The report is saved after each model, as ``report.json``,
``report.md`` and the figure ``frontier.png``.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pruner_lib.assets import DEFAULT_MODEL, AssetError, load_model, load_text
from pruner_lib.assets.models import resolve_device
from pruner_lib.checkpoint import CheckpointError, load_pruned
from pruner_lib.checkpoint.saving import PLAN_FILE, PROVENANCE_FILE
from pruner_lib.evaluation.latency import measure_latency
from pruner_lib.evaluation.measuring import evaluate
from pruner_lib.evaluation.report import EvaluationReport
from pruner_lib.evaluation.running import EvaluationError
from pruner_lib.evaluation.tasks import DATA_SOURCES, PAPER_TASKS, resolve_data
from pruner_lib.evaluation.zero_shot import ZeroShotOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FAILURES = (EvaluationError, AssetError, CheckpointError, FloatingPointError, ValueError, OSError)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pruner_lib.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="+", help=f"checkpoint folders, hub ids or {DEFAULT_MODEL}")
    add("--output", type=Path, default=Path("runs/evaluation"), help="folder of the report (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1 … (default: CUDA if there is one)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: a pruned checkpoint's own; else bfloat16 on CUDA, float32 on the CPU)",
    )
    add("--text", nargs="*", default=["wikitext2"], help="of the perplexity; none if empty (%(default)s)")
    add("--split", default="test", help="of the text (%(default)s)")
    add("--seq-len", nargs="+", type=int, default=[128, 1024], help="windows in tokens (%(default)s)")
    add("--max-tokens", type=int, default=65_536, help="of each text, 0 for all (%(default)s)")
    add("--tasks", nargs="*", default=list(PAPER_TASKS), help="zero-shot tasks; none if empty (the paper's)")
    add("--limit", type=int, default=200, help="items drawn from each task, 0 for all (%(default)s)")
    add("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    add("--first", action="store_true", help="take the first items, as the harness's --limit does")
    add("--data", choices=DATA_SOURCES, default="auto", help="where the items come from (%(default)s)")
    add("--compute", choices=("bfloat16", "float16"), help="compute the tasks under autocast")
    add("--latency", action="store_true", help="time the models; loads all of them at once")
    add("--batch-sizes", nargs="+", type=int, default=[1], help="of the latency (%(default)s)")
    add("--prompt-lengths", nargs="+", type=int, default=[64], help="of the latency (%(default)s)")
    add("--prompts", nargs="*", default=[], help="prompts to continue")
    return parser.parse_args(arguments)


def _names(places: Sequence[str]) -> dict[str, str]:
    """A short name for each place: its last part, with the one before it where two are alike."""
    paths = [Path(place).resolve() if Path(place).is_dir() else Path(place) for place in places]
    last = [path.name for path in paths]
    names = [
        name if last.count(name) == 1 else "/".join(path.parts[-2:])
        for name, path in zip(last, paths, strict=True)
    ]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, start=1)]
    return dict(zip(names, places, strict=True))


def _open(place: str, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its tokenizer; pruned checkpoints are checked file by file first."""
    folder = Path(place).expanduser()
    if not any((folder / name).is_file() for name in (PLAN_FILE, PROVENANCE_FILE)):
        return load_model(place, device=options.device, dtype=options.dtype)
    from transformers import AutoTokenizer

    model = load_pruned(folder).to(resolve_device(options.device))  # type: ignore[arg-type]
    if options.dtype:
        model = model.to(getattr(torch, options.dtype))
    try:
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{folder} holds no tokenizer; save one there (tokenizer.save_pretrained, or save_pruned with "
            f"tokenizer=…): {str(error).splitlines()[0]}"
        ) from error


def _texts(options: argparse.Namespace) -> dict[str, str]:
    return {
        f"{Path(source).stem if Path(source).is_file() else source} {options.split}": load_text(
            source, options.split
        )
        for source in options.text
    }


def _measure(
    name: str, place: str, texts: Mapping[str, str], options: argparse.Namespace
) -> tuple[EvaluationReport, Any]:
    """The report of one model, and its vocabulary."""
    model, tokenizer = _open(place, options)
    tasks = {
        "tasks": options.tasks, "limit": options.limit or None, "data": options.data,
        "seed": None if options.first else options.seed, "options": ZeroShotOptions(dtype=options.compute),
    }  # fmt: skip
    report = evaluate(
        {name: model},
        tokenizer,
        text=texts or None,
        seq_len=tuple(options.seq_len),
        max_tokens=options.max_tokens or None,
        progress=True,
        zero_shot=tasks if options.tasks else None,
        memory={} if model.device.type in ("cpu", "cuda") else None,
        generation={"prompts": options.prompts} if options.prompts else None,
    )
    return report, tokenizer.get_vocab()


def _warn_of_other_tokenizer(name: str, first: str, same: bool) -> None:
    if not same:
        warnings.warn(
            f"{name} and {first} have different tokenizers: perplexities per token, times per token and "
            "repetition do not compare; accuracies do",
            stacklevel=2,
        )


def _save(report: EvaluationReport, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    report.save(output / "report.json")
    report.save(output / "report.md")


def _draw(report: EvaluationReport, output: Path) -> str | None:
    """Write the figure where there is a quality to draw; returns what it shows."""
    quality = "perplexity" if report.sources else "average" if report.tasks else None
    if quality is None:
        return None
    try:
        from pruner_lib.display import describe_tradeoff
    except ImportError:
        return "no figure: it needs matplotlib (pip install 'pruner-lab[notebooks]')"
    report.plot(quality=quality).savefig(output / "frontier.png", dpi=120)
    return describe_tradeoff(report, quality=quality)


def _measure_all(options: argparse.Namespace) -> tuple[EvaluationReport | None, bool]:
    """The report of all models that could be measured, saved after each, and whether that is all of them."""
    places = _names(options.models)
    texts = _texts(options)
    options.data = resolve_data(options.data, options.tasks)  # once, so that all answer the same items
    reports: list[EvaluationReport] = []
    vocabularies: list[Any] = []
    for number, (name, place) in enumerate(places.items(), start=1):
        print(f"[{number}/{len(places)}] {name}", flush=True)
        try:
            found, vocabulary = _measure(name, place, texts, options)
        except _FAILURES as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            continue
        reports.append(found)
        vocabularies.append(vocabulary)
        _warn_of_other_tokenizer(name, reports[0].models[0], vocabulary == vocabularies[0])
        _save(EvaluationReport.join(reports), options.output)
        gc.collect()
    return EvaluationReport.join(reports) if reports else None, len(reports) == len(places)


def _add_latency(report: EvaluationReport, options: argparse.Namespace) -> EvaluationReport:
    """The report with times of all its models, loaded together."""
    places = _names(options.models)
    models = {name: _open(places[name], options)[0] for name in report.models}
    return report.add(
        latency=measure_latency(
            models, batch_sizes=options.batch_sizes, prompt_lengths=options.prompt_lengths
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when every model was measured, 1 when one failed (the others are in the report)."""
    options = _parse(arguments)
    try:
        report, complete = _measure_all(options)
        if report is not None and options.latency:
            report = _add_latency(report, options)
            _save(report, options.output)
    except _FAILURES as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if report is None:
        return 1
    print(f"\n{report}\n")
    print("\n".join(filter(None, [_draw(report, options.output), f"saved in {options.output}"])))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
