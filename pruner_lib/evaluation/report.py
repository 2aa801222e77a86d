"""Size and quality of several models in one table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pruner_lib.evaluation.cost import Cost, count_cost
from pruner_lib.evaluation.perplexity import Perplexity, perplexity
from pruner_lib.evaluation.running import EvaluationError, check_models
from pruner_lib.evaluation.tables import html_table, markdown_table, text_table
from pruner_lib.importance.storage import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SCHEMA = 1


@dataclass(frozen=True)
class EvaluationRow:
    """One model.

    Attributes:
        model: its name.
        cost: what it costs.
        perplexities: data set to perplexity; empty if no text was given.
    """

    model: str
    cost: Cost
    perplexities: Mapping[str, Perplexity] = field(default_factory=dict)

    @property
    def perplexity(self) -> Perplexity | None:
        """On the first data set."""
        return next(iter(self.perplexities.values()), None)


@dataclass(frozen=True)
class EvaluationReport:
    """Rows in the order the models were given; ratios are to the first.

    ``report["pruned"].cost.params`` reads one number, ``report.ratio("pruned", "macs")`` compares.
    """

    rows: tuple[EvaluationRow, ...]

    def __getitem__(self, model: str) -> EvaluationRow:
        for row in self.rows:
            if row.model == model:
                return row
        raise EvaluationError(f"no model {model!r} in this report; it has {', '.join(self.models)}")

    @property
    def models(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(row.model for row in self.rows)

    @property
    def sources(self) -> tuple[str, ...]:
        """Data sets of the perplexities."""
        return tuple(dict.fromkeys(source for row in self.rows for source in row.perplexities))

    def ratio(self, model: str, what: str = "params") -> float:
        """A number of one model / the first model's.

        Args:
            model: a name in the report.
            what: ``params``, ``macs``, ``weight_bytes`` or a data set of the perplexities; ``perplexity``
                is the first one.

        Raises:
            EvaluationError: an unknown model or number.
        """
        return self._number(self[model], what) / self._number(self.rows[0], what)

    def _number(self, row: EvaluationRow, what: str) -> float:
        if what in ("params", "macs", "weight_bytes"):
            return float(getattr(row.cost, what))
        source = self.sources[0] if what == "perplexity" and self.sources else what
        if source not in row.perplexities:
            known = ["params", "macs", "weight_bytes", *self.sources]
            raise EvaluationError(f"{row.model} has no number {what!r}; known are {', '.join(known)}")
        return float(row.perplexities[source])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["model", "parameters", "ratio", "MACs", "ratio", "weights"]
        header += [cell for source in self.sources for cell in (f"perplexity, {source}", "ratio")]
        return header, [self._cells(row) for row in self.rows]

    def _cells(self, row: EvaluationRow) -> list[str]:
        cost = row.cost
        cells = [row.model, _scaled(cost.params), f"{self.ratio(row.model):.3f}", _scaled(cost.macs)]
        cells += [f"{self.ratio(row.model, 'macs'):.3f}", f"{cost.weight_bytes / 2**20:,.1f} MiB"]
        for source in self.sources:
            both = source in row.perplexities and source in self.rows[0].perplexities
            cells.append(f"{row.perplexities[source]:.2f}" if source in row.perplexities else "–")
            cells.append(f"{self.ratio(row.model, source):.3f}" if both else "–")
        return cells

    @property
    def conditions(self) -> str:
        """How the numbers were taken; a difference between the models' conditions is listed."""
        lines = [f"MACs at {c.batch_size} × {c.seq_len} tokens" for c in (row.cost for row in self.rows)]
        lines += [p.conditions for row in self.rows for p in row.perplexities.values()]
        return "; ".join(dict.fromkeys(lines))

    def __str__(self) -> str:
        return f"{text_table(*self._table())}\n({self.conditions})"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(*self._table(), self.conditions)

    def to_markdown(self) -> str:
        """A GitHub table with the conditions below it."""
        return f"{markdown_table(*self._table())}\n\n{self.conditions}\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON; an older file is replaced whole or not at all."""
        content = {"schema": _SCHEMA, "kind": "EvaluationReport", "rows": [asdict(row) for row in self.rows]}
        return write_whole(Path(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EvaluationReport:
        """Read what :meth:`save` wrote.

        Raises:
            EvaluationError: not such a file.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["kind"] != "EvaluationReport" or content["schema"] != _SCHEMA:
                raise ValueError(f"kind {content['kind']!r}, schema {content['schema']!r}")
            return cls(tuple(_row_from(row) for row in content["rows"]))
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(
                f"{path} is not an evaluation report of schema {_SCHEMA} ({type(error).__name__}: {error}); "
                "write one with EvaluationReport.save"
            ) from error


def evaluate(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    text: str | Tensor | Mapping[str, str | Tensor] | None = None,
    seq_len: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 8,
    bos: bool = False,
    cost_at: tuple[int, int] = (1, 64),
) -> EvaluationReport:
    """Cost and perplexity of any number of models, each on the same tokens.

    Args:
        models: by name; the first is what ratios are taken to.
        tokenizer: shared by all; may be None without text or with token ids.
        text: a text, token ids, or ``{"wikitext2 test": text, …}`` for several; None for cost alone.
        seq_len: window of the perplexity, in tokens.
        max_tokens: tokens of each text to read; None for all.
        batch_size: windows run at once.
        bos: as in :func:`perplexity`.
        cost_at: batch size and sequence length at which multiply-accumulates are counted.

    Raises:
        EvaluationError: no models, or what :func:`perplexity` and :func:`count_cost` refuse; names the
            model.
    """
    checked = check_models(models)
    texts = {} if text is None else dict(text) if isinstance(text, Mapping) else {"text": text}
    rows = []
    for name, model in checked.items():
        try:
            cost = count_cost(model, batch_size=cost_at[0], seq_len=cost_at[1])
            found = {
                source: perplexity(
                    model, tokenizer, part, seq_len=seq_len, max_tokens=max_tokens, batch_size=batch_size,
                    bos=bos, source=source,
                )
                for source, part in texts.items()
            }  # fmt: skip
        except EvaluationError as error:
            raise EvaluationError(f"model {name!r}: {error}") from error
        rows.append(EvaluationRow(name, cost, found))
    return EvaluationReport(tuple(rows))


def _row_from(content: Mapping[str, Any]) -> EvaluationRow:
    found = {source: Perplexity(**value) for source, value in content["perplexities"].items()}
    return EvaluationRow(content["model"], Cost(**content["cost"]), found)


def _scaled(count: int) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:,.2f} {letter}"
    return str(count)
