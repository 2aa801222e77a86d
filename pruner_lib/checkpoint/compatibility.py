"""Which programs can open a model, and in words why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from pruner_lib.checkpoint.checks import check_saveable
from pruner_lib.checkpoint.errors import CheckpointError
from pruner_lib.checkpoint.gguf_layout import Layout, describe
from pruner_lib.checkpoint.twin import needs_library, twin_config
from pruner_lib.pruning.layer_config import sublayers_of

# Architectures whose vLLM code reads head_dim from the configuration instead of dividing the width.
_VLLM = ("llama", "mistral", "qwen3", "gemma")


@dataclass(frozen=True)
class Answer:
    """One program's answer.

    Attributes:
        program: what would open the model.
        verdict: yes, no, partly or untested.
        why: the reason, or how to do it.
    """

    program: str
    verdict: str
    why: str

    @property
    def opens(self) -> bool:
        """True where the program runs the whole model."""
        return self.verdict in ("yes", "partly")


@dataclass(frozen=True)
class Compatibility:
    """What can open a model. Prints as a table.

    >>> compatibility(pruned)["llama.cpp"].opens
    True

    Attributes:
        answers: one per program.
    """

    answers: tuple[Answer, ...]

    def __getitem__(self, program: str) -> Answer:
        for answer in self.answers:
            if answer.program == program:
                return answer
        raise KeyError(f"{program!r}; known are {', '.join(answer.program for answer in self.answers)}")

    def __str__(self) -> str:
        width = max(len(answer.program) for answer in self.answers)
        return "\n".join(
            f"{answer.program:<{width}}  {answer.verdict:<8}  {answer.why}" for answer in self.answers
        )

    __repr__ = __str__

    def to_markdown(self) -> str:
        """The table for a model card."""
        rows = (f"| {a.program} | {a.verdict} | {a.why.replace('|', ' ')} |" for a in self.answers)
        return "\n".join(["| | opens it | |", "|---|---|---|", *rows]) + "\n"


def compatibility(model: PreTrainedModel) -> Compatibility:
    """Ask what can open a model once it is saved; nothing is written.

    transformers' answers are tried (the configuration is built, without weights), llama.cpp's follow
    from rules that were tested in it, vLLM's from its code alone.

    Args:
        model: a causal language model; the meta device is fine.
    """
    plain, library = _transformers(model)
    layout = _tried(lambda: describe(model))
    llama = (
        Answer("llama.cpp", "no", layout)
        if isinstance(layout, str)
        else Answer("llama.cpp", "yes", f"export_gguf writes its {layout.architecture} architecture")
    )
    rows = _row_lengths(model) if isinstance(layout, str) else _rows_of(layout)
    blocks = answers_by_rows(rows, llama.opens)
    return Compatibility((plain, library, llama, *blocks, _vllm(model, plain)))


def answers_by_rows(rows: dict[str, set[int]], opens: bool) -> tuple[Answer, Answer]:
    """llama.cpp's quantised types, which hang on the lengths of the matrix rows.

    Args:
        rows: what a row runs over to the lengths that occur.
        opens: whether llama.cpp runs the model at all.
    """
    return (
        _quantised("llama.cpp q4_0, q5_0, q8_0", 32, rows, opens),
        _quantised("llama.cpp k-quants", 256, rows, opens),
    )


def _tried(attempt: Callable[[], Any]) -> Any:
    """What the attempt gives, or why it fails, as text."""
    try:
        return attempt()
    except CheckpointError as error:
        return str(error)


def _transformers(model: PreTrainedModel) -> tuple[Answer, Answer]:
    problem = _tried(lambda: check_saveable(model, weights=False))
    plain, library = "transformers", "transformers with pruner_lib"
    if problem is not None:
        return Answer(plain, "no", problem), Answer(library, "no", problem)
    unknown = _unknown_to_auto(model)
    if unknown is not None:
        return Answer(plain, "no", unknown), Answer(library, "no", unknown)
    if not needs_library(model.config):
        twin = twin_config(model.config)
        how = f"saved as {twin.model_type}, which computes the same" if twin else "as any model"
        return Answer(plain, "yes", how), Answer(library, "yes", how)
    why = (
        "some layers are without attention or MLP, and transformers' own code builds both in every layer"
        if sublayers_of(model.config)
        else "the layers differ in width, and transformers' own code builds one width for all of them"
        if model.config.is_heterogeneous
        else f"{type(model.config).__name__} refuses these sizes, although the model runs with them"
    )
    return Answer(plain, "no", f"{why}; it raises"), Answer(library, "yes", "after `import pruner_lib`")


def _unknown_to_auto(model: PreTrainedModel) -> str | None:
    return auto_problem(model.config.model_type, [type(model).__name__])


def auto_problem(model_type: Any, architectures: Any = None) -> str | None:
    """Why AutoModelForCausalLM cannot open a model of this type, or None where it can.

    Args:
        model_type: as config.json says it.
        architectures: names of its classes, for the message.
    """
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if known and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    name = architectures[0] if isinstance(architectures, list) and architectures else "its class"
    return (
        f"model_type {model_type!r} is not registered with AutoModelForCausalLM, so from_pretrained cannot "
        f"know that {name} opens it; call AutoConfig.register and AutoModelForCausalLM.register first, or "
        f"use from_pretrained of {name} itself"
    )


def _rows_of(layout: Layout) -> dict[str, set[int]]:
    """What a matrix row may be long, by what it runs over."""
    return {
        "residual channels": {layout.hidden},
        "heads × head size": {layer.heads * layout.head_dim for layer in layout.layers} - {0},
        "MLP neurons": {layer.neurons for layer in layout.layers} - {0},
    }


def _row_lengths(model: PreTrainedModel) -> dict[str, set[int]]:
    return {"columns of weights": {p.shape[-1] for p in model.parameters() if p.ndim == 2}}


def _quantised(program: str, block: int, rows: dict[str, set[int]], opens: bool) -> Answer:
    wrong = {what: sorted(n for n in lengths if n % block) for what, lengths in rows.items()}
    found = ", ".join(f"{what} {_listed(lengths)}" for what, lengths in wrong.items() if lengths)
    if not opens:
        return Answer(program, "no", "see llama.cpp")
    if not found:
        return Answer(program, "yes", f"every row is a multiple of {block}")
    return Answer(
        program,
        "partly",
        f"matrices whose rows are no multiple of {block} stay larger ({found}); plan with round_to",
    )


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:3])) + (" …" if len(numbers) > 3 else "")


def _vllm(model: PreTrainedModel, plain: Answer) -> Answer:
    kind = (twin_config(model.config) or model.config).model_type
    if (unknown := _unknown_to_auto(model)) is not None:
        return Answer("vLLM", "no", unknown)
    if not plain.opens:
        why = "it reads config.json as plain transformers does, with one width for all layers"
        return Answer("vLLM", "no", why)
    if kind in _VLLM:
        return Answer(
            "vLLM", "yes", f"by the code of its {kind}, not run here; the head counts set how many GPUs"
        )
    why = f"its code for {kind} may divide the width by the heads instead of reading head_dim"
    return Answer("vLLM", "untested", why)
