"""The README.md of a checkpoint: what it is, how small, how good, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from transformers import PreTrainedModel

from pruner_lib.checkpoint.record import NEEDS_LIBRARY

if TYPE_CHECKING:
    from pruner_lib.pruning.plan import PruningPlan


@runtime_checkable
class QualityReport(Protocol):
    """What an evaluation report offers: itself as a Markdown table and as a file."""

    def to_markdown(self) -> str: ...

    def save(self, path: Path) -> Path: ...


Quality = Mapping[str, object] | QualityReport


def model_card(
    model: PreTrainedModel,
    provenance: Mapping[str, Any],
    plan: PruningPlan | None = None,
    quality: Quality | None = None,
    *,
    elsewhere: str = "",
) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        model: the pruned model.
        provenance: what :func:`provenance_of` returned.
        plan: says what was removed.
        quality: an evaluation report, or numbers by name.
        elsewhere: a Markdown table of the programs that open the model.
    """
    base = provenance["base_model"]
    sections = [
        _front_matter(provenance),
        f"# {_title(base)}, pruned to {_short(provenance['parameters'])} parameters\n\n"
        + _summary(base, provenance, plan),
        "## Size\n\n" + _size(model, provenance),
        "" if plan is None else f"## What was removed\n\n```text\n{plan.summary()}\n```",
        "## Quality\n\n" + _quality(quality),
        "## Load it\n\n" + _loading(provenance),
        elsewhere and "## What else opens it\n\n" + elsewhere.rstrip(),
        "## How it was made\n\n" + _making(provenance),
        "## Licence and limits\n\n" + _terms(base, provenance["license"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(provenance: Mapping[str, Any]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if provenance["license"]:
        lines.append(f"license: {json.dumps(str(provenance['license']).lower())}")
    if provenance["base_model"] and str(provenance["base_model"]).count("/") == 1:  # a hub id
        lines.append(f"base_model: {json.dumps(provenance['base_model'])}")
    lines += ["tags:", "- pruned", "- structural-pruning", "- pruner-lab"]
    return "\n".join(["---", *lines, "---"])


def _title(base: str | None) -> str:
    return str(base).rsplit("/", 1)[-1] if base else "A language model"


def _summary(base: str | None, provenance: Mapping[str, Any], plan: PruningPlan | None) -> str:
    of = f"`{base}`" if base else "a language model"
    share = "" if plan is None else f" {100 * plan.num_params_removed / plan.params_before:.1f} %"
    return (
        f"This is {of} with{share or ' part'} of its parameters removed by structural pruning: whole heads, "
        "neurons, channels or layers are gone, so it is an ordinary, smaller model with nothing masked or "
        "sparse."
    )


def _size(model: PreTrainedModel, provenance: Mapping[str, Any]) -> str:
    dense, kept = provenance["dense_parameters"], provenance["parameters"]
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    bytes_kept = sum(p.numel() * p.element_size() for p in model.parameters())
    weights = f"weights in {' and '.join(kinds)}"
    if dense is None:
        return f"{kept:,} parameters; {weights} take {bytes_kept / 2**20:,.1f} MiB."
    mib, ratio = bytes_kept / 2**20, kept / dense
    return "\n".join(
        [
            "| | dense | this model | ratio |",
            "|---|---:|---:|---:|",
            f"| parameters | {dense:,} | {kept:,} | {ratio:.3f} |",
            f"| {weights} | {mib / ratio:,.1f} MiB | {mib:,.1f} MiB | {ratio:.3f} |",
        ]
    )


def _quality(quality: Quality | None) -> str:
    if quality is None:
        return (
            "Not measured when the model was saved. Take a pruned model for worse than the dense one until "
            "you have compared perplexity and tasks on text of your own."
        )
    if isinstance(quality, QualityReport):
        return quality.to_markdown().rstrip()
    return "\n".join(["| measure | value |", "|---|---:|", *(f"| {k} | {v} |" for k, v in quality.items())])


def _loading(provenance: Mapping[str, Any]) -> str:
    needs = provenance["opens_with"] == NEEDS_LIBRARY
    lines = ["```python"]
    if needs:
        lines.append("import pruner_lib  # the layers differ in width: pip install pruner-lab")
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "Without the first line, loading raises an error; it never loads a wrong model."
        if needs
        else "Nothing but transformers is needed.",
    ]
    return "\n".join(lines)


def _making(provenance: Mapping[str, Any]) -> str:
    rows = [("library", f"pruner-lab {provenance['library_version']}")]
    found = provenance["importance"]
    if found is not None:
        rows.append(("criterion", found["criterion"] or "not recorded"))
        rows.append(("reduction over a group", found["reduction"] or "none"))
        calibration = found["calibration"]
        if calibration["num_samples"]:
            source = calibration["source"] or "text not recorded"
            rows.append(
                ("calibration", f"{source}, {calibration['num_samples']} × {calibration['seq_len']} tokens")
            )
        if found["seed"] is not None:
            rows.append(("seed", str(found["seed"])))
    for name, value in provenance["provenance"].items():
        if name not in ("base_model", "license"):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            rows.append((name.replace("_", " "), text))
    cells = (f"| {_cell(name)} | {_cell(text)} |" for name, text in rows)
    return "\n".join(["| | |", "|---|---|", *cells]) + (
        "\n\n`pruning_plan.json`, where present, lists every group that was removed; `provenance.json` holds "
        "all of this and a checksum of each file."
    )


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _terms(base: str | None, licence: str | None) -> str:
    of = f"`{base}`" if base else "the base model"
    first = (
        f"The weights derive from {of}, whose licence, {licence}, applies to them."
        if licence
        else f"The weights derive from {of}; its licence applies to them and was not recorded here. Look it "
        "up before you share them."
    )
    return f"{first} What the base model gets wrong, this one gets wrong too, and pruning loses more."


def _short(count: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return str(count)
