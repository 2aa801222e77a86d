"""Instruction files that hold odd characters, and self-generated ones whose writing was interrupted."""

import json

import pytest
from test_recovery_sources import ASKED, HOW, wide_tokenizer, writer

from pruner_lib.recovery import self_generated
from pruner_lib.recovery.self_generated import SelfGeneration, generate_instructions
from pruner_lib.recovery.sources import load_instructions

SEPARATORS = "one\u2028two\u2029three\x85four"


def test_lines_end_at_the_newline_alone(tmp_path):
    rows = [{"instruction": "Say it.", "output": SEPARATORS}] * 2
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for number, ending in enumerate(("\n", "\r\n", "\n\n")):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(ending.join([*lines, ""]).encode())
        assert load_instructions(path) == rows


def make(path, model, tokenizer, settings):
    return generate_instructions(model, tokenizer, path, settings=settings, prompts=ASKED, progress=False)


def test_answers_with_odd_line_ends_are_read_back(tmp_path):
    path, parts = tmp_path / "a.jsonl", (writer(), wide_tokenizer())
    rows = make(path, *parts, HOW)
    odd = [{**row, "output": row["output"] + SEPARATORS} for row in rows]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in odd), encoding="utf-8")
    assert make(path, *parts, HOW) == odd


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_run_killed_between_its_two_files_returns_nobody_elses_rows(tmp_path, monkeypatch, killed_at):
    path, parts = tmp_path / "a.jsonl", (writer(), wide_tokenizer())
    other = SelfGeneration(**{**vars(HOW), "seed": 1})
    old = make(path, *parts, HOW)
    expected = make(tmp_path / "b.jsonl", *parts, other)
    real, ends = self_generated.write_whole, []

    def dying(target, text):
        if target.parent == tmp_path and target.name in ("a.jsonl", "a.how.json"):
            ends.append(target)
            if len(ends) == killed_at:
                raise KeyboardInterrupt
        return real(target, text)

    with monkeypatch.context() as patch:
        patch.setattr(self_generated, "write_whole", dying)
        with pytest.raises(KeyboardInterrupt):
            make(path, *parts, other)
    assert old != expected
    assert make(path, *parts, other) == expected
    assert make(path, *parts, HOW) == old
