"""The dense model writes its own recovery data: ``python -m pruner_lib.recovery.self_generated``.

It answers the seed prompts shipped with the library, several times each and each time differently.
What it repeats, breaks off or garbles is dropped. No corpus and no network are needed, and the text
is of the very distribution that the pruned model is to get back.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pruner_lib.assets import DEFAULT_MODEL, load_model, workspace
from pruner_lib.assets.errors import AssetError
from pruner_lib.assets.files import write_whole
from pruner_lib.importance.calibration import untouched
from pruner_lib.recovery.checkpoints import model_digest
from pruner_lib.recovery.data import instruction_prompt
from pruner_lib.recovery.errors import RecoveryError
from pruner_lib.recovery.sources import load_seed_prompts
from pruner_lib.recovery.training import own_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FEWEST_CHARACTERS = 12
_REPEATED = 0.25  # share of 4-grams of words that occurred before, above which an answer is a loop
_ALIKE = 0.5  # Jaccard similarity of word triples, above which two answers to one prompt are the same
_ROUNDS = 3  # times the batches that would do if nothing were dropped, after which it gives up


@dataclass(frozen=True)
class SelfGeneration:
    """How the answers are drawn.

    Raises:
        RecoveryError: a value out of range.
    """

    num_examples: int = 500  # answers to keep
    seed: int = 0  # of the order of the prompts and of every draw
    max_new_tokens: int = 200  # longer answers end at their last whole sentence
    batch_size: int = 32  # prompts answered at once
    temperature: float = 0.8  # of the softmax that tokens are drawn from
    top_p: float = 0.95  # only the likeliest tokens that together have this probability

    def __post_init__(self) -> None:
        for name in ("num_examples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecoveryError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise RecoveryError(
                "temperature must be above 0, top_p in (0, 1] and seed 0 or more; got "
                f"{self.temperature}, {self.top_p} and {self.seed}"
            )


def generate_instructions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike[str],
    *,
    settings: SelfGeneration | None = None,
    prompts: Sequence[str] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Let a model answer prompts until enough answers are good, and keep them as JSONL.

    Prompts are taken in a shuffled order, round after round, and answered in the tokenizer's chat
    template (in Alpaca's format where it has none). Dropped are answers that are short, repeat
    themselves, hold characters that no tokenizer should write, have no whole sentence within the
    limit, or say what an earlier one said. The same seed gives the same file on the same machine;
    an interrupted run goes on where it stopped.

    Args:
        model: the dense model; left as it is.
        tokenizer: its own.
        path: the file, written whole at the end. If it is there already, and made the same way, it is read.
        settings: see :class:`SelfGeneration`.
        prompts: other prompts than those of ``data/seed_prompts.jsonl``.
        progress: whether to show a bar on standard error.

    Returns:
        Dicts ``instruction``, ``input`` (empty) and ``output``: what ``recover`` takes, best with
        ``template="chat"``.

    Raises:
        RecoveryError: no prompts; fewer good answers than asked for after three times the work.
    """
    settings = settings or SelfGeneration()
    asked = [row["prompt"] for row in load_seed_prompts()] if prompts is None else list(prompts)
    if not asked:
        raise RecoveryError("there are no prompts; give some, or None for those shipped with the library")
    path = Path(path)
    made = {**asdict(settings), "prompts": asked, "model": model_digest(model)}
    if (known := _read_finished(path, made)) is not None:
        return known
    rows: list[dict[str, Any]] = []
    sieve = _Sieve()
    batches = _answered(model, tokenizer, asked, settings, _Part(path, made))
    bar = _bar(settings.num_examples, progress)
    for number, answers in enumerate(batches, start=1):
        for prompt, text, finished in answers:
            if len(rows) < settings.num_examples and (kept := sieve.keep(prompt, text, finished)):
                rows.append({"instruction": prompt, "input": "", "output": kept})
                bar.update()
        if len(rows) == settings.num_examples:
            break
        if number * settings.batch_size >= _ROUNDS * settings.num_examples + settings.batch_size:
            bar.close()
            raise RecoveryError(
                f"only {len(rows)} of {settings.num_examples} answers were good after {number} batches "
                f"({_listed(sieve.dropped)}); lower num_examples or temperature, raise max_new_tokens, or "
                "give more prompts"
            )
    bar.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {**made, "dropped": dict(sieve.dropped)}
    # The note vouches for the rows beside it: an older one goes first, the new one comes last.
    _note(path).unlink(missing_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(_note(path), json.dumps(note, ensure_ascii=False, indent=1) + "\n")
    _Part(path, made).remove()
    return rows


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="self-generate", unit="answer", file=sys.stderr, disable=not progress)


def _listed(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in dropped.most_common()) or "none dropped"


def _note(path: Path) -> Path:
    return path.with_name(f"{path.stem}.how.json")


def _read_finished(path: Path, made: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a file made in exactly this way, or None."""
    if not path.is_file() or not _note(path).is_file():
        return None
    note = json.loads(_note(path).read_text(encoding="utf-8"))
    if any(note.get(key) != value for key, value in made.items()):
        return None
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would also cut at U+2028 in an answer
    return [json.loads(line) for line in lines if line.strip()]


class _Part:
    """Raw answers of an unfinished run, one line per batch, behind a line that says how it is made."""

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        self._path = path.with_name(f".{path.name}.part")
        self._head = json.dumps(made, sort_keys=True)

    def read(self) -> list[list[tuple[str, str, bool]]]:
        """Whole batches of a run made in this way; a half-written last line is left out."""
        if not self._path.is_file():
            return []
        head, *lines = self._path.read_text(encoding="utf-8").split("\n")
        if head != self._head:
            return []
        return [[(p, t, bool(f)) for p, t, f in json.loads(line)] for line in lines[:-1]]

    def begin(self, batches: Sequence[Any]) -> None:
        """Write what is known, so that whole lines follow."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, "".join(f"{line}\n" for line in [self._head, *map(json.dumps, batches)]))

    def add(self, batch: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch) + "\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _answered(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    settings: SelfGeneration,
    part: _Part,
) -> Iterator[list[tuple[str, str, bool]]]:
    """Batches of (prompt, answer, whether it was finished) without end."""
    known = part.read()
    part.begin(known)
    order = _endless(prompts, settings.seed)
    for number in count():
        batch = [next(order) for _ in range(settings.batch_size)]
        if number < len(known):
            yield known[number]
            continue
        with own_random_state(settings.seed * 1_000_003 + number), untouched(model):
            answers = _answer(model, tokenizer, batch, settings)
        part.add(answers)
        yield answers


def _endless(prompts: Sequence[str], seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    while True:
        order = list(prompts)
        generator.shuffle(order)
        yield from order


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: SelfGeneration
) -> list[tuple[str, str, bool]]:
    asked = [_encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, asked))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in asked])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in asked])
    device = next(model.parameters()).device
    written = model.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), do_sample=True, pad_token_id=pad,
        temperature=settings.temperature, top_p=settings.top_p, top_k=0,
        max_new_tokens=settings.max_new_tokens,
    )[:, longest:]  # fmt: skip
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answers = []
    for prompt, row in zip(prompts, written.tolist(), strict=True):
        finished = any(token in stops for token in row)
        text: Any = tokenizer.decode(row, skip_special_tokens=True)
        answers.append((prompt, text.strip(), finished))
    return answers


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": prompt}]
        text: Any = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(instruction_prompt({"instruction": prompt}))["input_ids"])


class _Sieve:
    """Lets good and new answers through, and counts why the others were not."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._by_prompt: dict[str, list[set[tuple[str, ...]]]] = {}

    def keep(self, prompt: str, text: str, finished: bool) -> str | None:
        """The answer, perhaps shortened to its last whole sentence; None if it is dropped."""
        if not finished:
            text = _whole_sentences(text)
        reason = _fault(text) if text else "unfinished"
        words = re.findall(r"\w+", text.lower())
        triples = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        if reason is None and self._is_known(prompt, " ".join(words), triples):
            reason = "said before"
        if reason is not None:
            self.dropped[reason] += 1
            return None
        self._seen.add(" ".join(words))
        self._by_prompt.setdefault(prompt, []).append(triples)
        return text

    def _is_known(self, prompt: str, words: str, triples: set[tuple[str, ...]]) -> bool:
        alike = (
            len(triples & other) / max(1, len(triples | other)) for other in self._by_prompt.get(prompt, ())
        )
        return words in self._seen or any(share > _ALIKE for share in alike)


def _whole_sentences(text: str) -> str:
    ends = [match.end() for match in re.finditer(r"[.!?][\"')]?(?=\s)", text)]
    return text[: ends[-1]] if ends else ""


def _fault(text: str) -> str | None:
    if len(text) < _FEWEST_CHARACTERS:
        return "short"
    if any(not (c.isprintable() or c in "\n\t") or c == "\ufffd" for c in text):
        return "garbled"
    words = text.lower().split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if grams and 1 - len(set(grams)) / len(grams) > _REPEATED:
        return "repeats itself"
    return None


def self_generated_data(
    model_name: str,
    settings: SelfGeneration,
    *,
    device: str | None = None,
    dtype: str = "bfloat16",
    path: Path | None = None,
) -> list[dict[str, Any]]:
    """The answers of a model by its name: read from the cache, or written first.

    Args:
        model_name: as for ``load_model``.
        settings: see :class:`SelfGeneration`.
        device: as for ``load_model``.
        dtype: of the weights; half as many bytes make tokens nearly twice as fast.
        path: another file than :func:`default_path`.
    """
    model, tokenizer = load_model(model_name, device=device, dtype=dtype)
    return generate_instructions(
        model, tokenizer, path or default_path(model_name, settings), settings=settings
    )


def default_path(model_name: str, settings: SelfGeneration) -> Path:
    """Where the command keeps the answers of a model: in its workspace below the cache."""
    return workspace(model_name) / f"self_generated-{settings.num_examples}-seed{settings.seed}.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when the file is there."""
    defaults = SelfGeneration()
    parser = argparse.ArgumentParser(prog="python -m pruner_lib.recovery.self_generated", description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="name, hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda … (default: CUDA if there is one)")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="JSONL file (default: in the cache)")
    for name, value in asdict(defaults).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"(default: {value})"
        )
    options = parser.parse_args(arguments)
    try:
        settings = SelfGeneration(**{name: getattr(options, name) for name in asdict(defaults)})
        path = options.output or default_path(options.model, settings)
        rows = self_generated_data(
            options.model, settings, device=options.device, dtype=options.dtype, path=path
        )
    except (AssetError, RecoveryError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    words = sum(len(row["output"].split()) for row in rows)
    print(f"{len(rows)} answers, {words:,} words: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
