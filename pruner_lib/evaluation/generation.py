"""What models write, side by side, with numbers for how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruner_lib.evaluation.running import (
    EvaluationError,
    check_models,
    check_vocabulary,
    context_length,
    evaluating,
    input_device,
    require_weights,
)
from pruner_lib.evaluation.tables import html_table, markdown_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Different n-grams / all n-grams of a token sequence; 1 when it is shorter than n.

    >>> distinct_n([5, 6, 5, 6], 2)  # (5, 6), (6, 5), (5, 6)
    0.6666666666666666

    Source: distinct-n of Li et al. 2016, arXiv 1510.03055.
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sequence: 1 − distinct-n.

    Near 0 for ordinary prose, near 1 for a loop. Source: seq-rep-4 of Welleck et al. 2020, arXiv 1908.04319.
    """
    return 1.0 - distinct_n(tokens, n)


@dataclass(frozen=True)
class Generation:
    """One continuation.

    Attributes:
        model: name of the model.
        prompt: what it was given.
        text: what it wrote after it.
        num_tokens: tokens it wrote, the end token included.
        repetition: share of 4-grams that occurred before.
        distinct_1: different tokens / tokens.
        distinct_2: different pairs / pairs.
    """

    model: str
    prompt: str
    text: str
    num_tokens: int
    repetition: float
    distinct_1: float
    distinct_2: float


@dataclass(frozen=True)
class GenerationTable:
    """Continuations of the same prompts by several models.

    Attributes:
        rows: prompt by prompt, and within a prompt model by model.
        conditions: how they were made.
    """

    rows: tuple[Generation, ...]
    conditions: str

    @property
    def models(self) -> tuple[str, ...]:
        """Names in the order given."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts in the order given."""
        return tuple(dict.fromkeys(row.prompt for row in self.rows))

    def text(self, model: str, prompt: str) -> str:
        """What one model wrote after one prompt."""
        for row in self.rows:
            if row.model == model and row.prompt == prompt:
                return row.text
        raise EvaluationError(
            f"no generation of {model!r} for {prompt!r}; the models are {', '.join(self.models)}, "
            f"the prompts {list(self.prompts)}"
        )

    def statistics(self) -> dict[str, dict[str, float]]:
        """Per model the means over its prompts of repetition, distinct_1, distinct_2 and num_tokens."""
        keys = ("repetition", "distinct_1", "distinct_2", "num_tokens")
        found = {}
        for name in self.models:
            rows = [row for row in self.rows if row.model == name]
            found[name] = {key: sum(float(getattr(row, key)) for row in rows) / len(rows) for key in keys}
        return found

    def to_markdown(self) -> str:
        """One row per prompt, one column per model; below them the statistics, and the conditions."""
        footer = [[f"*{label}*", *cells] for label, *cells in self._statistics_cells()]
        table = markdown_table(["prompt", *self.models], [*self._cells(), *footer])
        return f"{table}\n\n{self.conditions}"

    @classmethod
    def join(cls, tables: Sequence[GenerationTable]) -> GenerationTable:
        """Tables of different models on the same prompts as one.

        Raises:
            EvaluationError: no table, other prompts or other conditions, or a model in two of them.
        """
        if not tables:
            raise EvaluationError("no table of generations was given")
        first = tables[0]
        names = [name for table in tables for name in table.models]
        for table in tables[1:]:
            if (table.prompts, table.conditions) != (first.prompts, first.conditions):
                raise EvaluationError(
                    f"generations of {', '.join(table.models)} were made otherwise ({table.conditions}, "
                    f"prompts {list(table.prompts)}) than those of {', '.join(first.models)} "
                    f"({first.conditions}, prompts {list(first.prompts)})"
                )
        if len(set(names)) < len(names):
            raise EvaluationError(f"a model has two tables of generations: {', '.join(names)}")
        rows = [row for table in tables for row in table.rows]
        ordered = [row for prompt in first.prompts for row in rows if row.prompt == prompt]
        return cls(tuple(ordered), first.conditions)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> GenerationTable:
        """The inverse of ``dataclasses.asdict``."""
        return cls(tuple(Generation(**row) for row in content["rows"]), content["conditions"])

    def __str__(self) -> str:
        width = max(len(name) for name in self.models)
        lines = []
        for prompt in self.prompts:
            lines.append(f"> {prompt}")
            lines += [
                f"  {row.model:<{width}} | {' '.join(row.text.split())}"
                for row in self.rows
                if row.prompt == prompt
            ]
        for name, numbers in self.statistics().items():
            lines.append(
                f"{name:<{width}}   repetition {numbers['repetition']:.2f}, distinct-1 "
                f"{numbers['distinct_1']:.2f}, "
                f"distinct-2 {numbers['distinct_2']:.2f}"
            )
        return "\n".join([*lines, f"({self.conditions})"])

    def _repr_html_(self) -> str:
        rows = [*self._cells(), *self._statistics_cells()]
        return html_table(["prompt", *self.models], rows, self.conditions, prose=True)

    def _statistics_cells(self) -> list[list[str]]:
        numbers = self.statistics()
        labels = {"repetition": "repetition", "distinct-1": "distinct_1", "distinct-2": "distinct_2"}
        return [
            [label, *(f"{numbers[name][key]:.2f}" for name in self.models)] for label, key in labels.items()
        ]

    def _cells(self) -> list[list[str]]:
        return [[prompt, *(self.text(name, prompt) for name in self.models)] for prompt in self.prompts]


OnText = Callable[[str, str, str], Any]


class _Watch:
    """Shows a continuation while it grows, as a stopping criterion of transformers; ends it when told to.

    Args:
        tokenizer: turns tokens into text; what is not yet a whole character is held back.
        start: tokens of the prompt.
        tell: given the text so far, returns whether to stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, tell: Callable[[str], Any]) -> None:
        self._tokenizer, self._start, self._tell = tokenizer, start, tell
        self.stopped = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        text = str(self._tokenizer.decode(input_ids[0, self._start :], skip_special_tokens=True))
        self.stopped = bool(self._tell(text.rstrip("\ufffd")))
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)


def generate(
    models: Mapping[str, nn.Module],
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 40,
    seed: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_text: OnText | None = None,
) -> GenerationTable:
    """Let every model continue every prompt, under the same conditions.

    Greedy by default; with ``do_sample`` each continuation draws from the same seed, whatever came
    before it. Prompts run one at a time, so nothing is padded. Of the models' own generation settings
    the end tokens alone are used: no penalties, beams or filters. No global random state is changed.

    Args:
        models: by name; all must share the tokenizer.
        tokenizer: its special tokens (BOS) are added as it would.
        prompts: one or several; doubles are dropped.
        max_new_tokens: at most this many tokens each.
        seed: of sampling.
        do_sample: draw tokens instead of taking the likeliest.
        temperature: divides the logits when sampling.
        top_p: sample from the smallest set of tokens with this total probability.
        on_text: called after each token with the model's name, the prompt and the text so far; once it
            returns true, that continuation and all that would follow end there, and what is written is kept.

    Raises:
        EvaluationError: no models, no or empty prompts, a prompt longer than the context.
    """
    from transformers import GenerationConfig

    checked = check_models(models)
    listed = list(dict.fromkeys([prompts] if isinstance(prompts, str) else prompts))
    if not listed or not all(isinstance(prompt, str) and prompt for prompt in listed):
        raise EvaluationError(f"give at least one prompt, and none that is empty; got {listed!r}")
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    if do_sample:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    rows: list[Generation] = []
    stopped = False
    for prompt in listed:
        for name, model in checked.items():
            ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            config = GenerationConfig(
                eos_token_id=tokenizer.eos_token_id if ends is None else ends,
                pad_token_id=tokenizer.eos_token_id
                if tokenizer.pad_token_id is None
                else tokenizer.pad_token_id,
                **settings,
            )
            if stopped:
                rows.append(_row(name, prompt, [], tokenizer))
                continue
            tell = None if on_text is None else partial(on_text, name, prompt)
            tokens, stopped = _continue(model, tokenizer, prompt, config, seed, tell)
            rows.append(_row(name, prompt, tokens, tokenizer))
    how = f"sampled, temperature {temperature:g}, top-p {top_p:g}, seed {seed}" if do_sample else "greedy"
    return GenerationTable(tuple(rows), f"{how}, at most {max_new_tokens} new tokens")


def _continue(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    config: Any,
    seed: int,
    tell: Callable[[str], Any] | None,
) -> tuple[list[int], bool]:
    """New tokens of one model for one prompt, and whether ``tell`` ended them."""
    require_weights(model, "generation")
    inputs = tokenizer(prompt, return_tensors="pt")["input_ids"].to(input_device(model))
    if inputs.numel() == 0:
        raise EvaluationError(f"prompt {prompt[:40]!r} has no tokens; give one that has")
    check_vocabulary(model, int(inputs.min()), int(inputs.max()), f"prompt {prompt[:40]!r}")
    longest = context_length(model)
    if longest is not None and inputs.shape[1] + config.max_new_tokens > longest:
        raise EvaluationError(
            f"prompt {prompt[:40]!r} has {inputs.shape[1]} tokens; with {config.max_new_tokens} new ones "
            "that is "
            f"beyond the model's context of {longest}; shorten it or lower max_new_tokens"
        )
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    watch = _Watch(tokenizer, inputs.shape[1], tell) if tell is not None else None
    # Greedy needs no random numbers, and then a bench that writes in a thread leaves those of others alone.
    forked = torch.random.fork_rng(devices=devices) if config.do_sample else nullcontext()
    with forked, evaluating(model), _without_own_settings(model):
        if config.do_sample:
            torch.manual_seed(seed)
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=config,
            stopping_criteria=None if watch is None else [watch],
        )
    tokens: list[int] = out[0, inputs.shape[1] :].tolist()
    return tokens, watch is not None and watch.stopped


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Take the model's own generation settings away, with which transformers fills what is not given."""
    from transformers import GenerationConfig

    # An adapter's wrapper reads those of the model inside it.
    before = {m: vars(m)["generation_config"] for m in model.modules() if "generation_config" in vars(m)}
    try:
        for module in before:
            module.generation_config = GenerationConfig()
        yield
    finally:
        for module, own in before.items():
            module.generation_config = own


def _row(name: str, prompt: str, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> Generation:
    return Generation(
        model=name,
        prompt=prompt,
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        num_tokens=len(tokens),
        repetition=repetition(tokens),
        distinct_1=distinct_n(tokens, 1),
        distinct_2=distinct_n(tokens, 2),
    )
