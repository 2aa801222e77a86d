"""Checks of the exercises in notebook 01."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from pruner_lib.course.checking import passed, require_equal
from pruner_lib.course.toys import tiny_llama, tiny_model
from pruner_lib.discovery import DependencyMap, discover

Edges = Sequence[tuple[str, str]]

FAN: Edges = (
    ("x", "a"), ("y", "a"), ("a", "b"), ("b", "c"), ("b", "d"), ("c", "out"), ("d", "out"),
)  # fmt: skip
GATED: Edges = (
    *((f"x{i}", f"{kind}{j}") for i in range(2) for kind in ("gate", "up") for j in range(2)),
    *((f"{kind}{j}", f"h{j}") for kind in ("gate", "up") for j in range(2)),
    *((f"h{j}", f"y{i}") for i in range(2) for j in range(2)),
)


def _closure(
    edges: Edges,
    start: str,
    *,
    rules: Iterable[int] = (1, 2),
    steps: int | None = None,
    swapped: bool = False,
) -> set[str]:
    """The paper's two rules followed from one neuron; the options are ways to get it wrong."""
    entering = {node: sum(b == node for _, b in edges) for edge in edges for node in edge}
    leaving = {node: sum(a == node for a, _ in edges) for edge in edges for node in edge}
    if swapped:
        entering, leaving = leaving, entering
    group, new = {start}, {start}
    while new and steps != 0:
        forward = {b for a, b in edges if 1 in rules and a in new and entering[b] == 1}
        backward = {a for a, b in edges if 2 in rules and b in new and leaving[a] == 1}
        new = (forward | backward) - group
        group |= new
        steps = None if steps is None else steps - 1
    return group


def _whole_neighbourhoods(edges: Edges, start: str) -> set[str]:
    """A wrong reading of the rules: a neuron falls once all of its inputs, or all of its readers, have."""
    group: set[str] = set()
    new = {start}
    while new:
        group |= new
        nodes = {node for edge in edges for node in edge} - group
        inputs = {node: {a for a, b in edges if b == node} for node in nodes}
        readers = {node: {b for a, b in edges if a == node} for node in nodes}
        new = {n for n in nodes if any(side[n] and side[n] <= group for side in (inputs, readers))}
    return group


def check_dependent_group(dependent_group: Callable[[Edges, str], set[str]]) -> None:
    """Exercise 1.1, on a fan and on a gated MLP of two neurons."""
    for name, edges, start in (("FAN", FAN, "a"), ("FAN", FAN, "d"), ("GATED", GATED, "h1")):
        require_equal(
            dependent_group(list(edges), start),
            _closure(edges, start),
            asked=f"dependent_group({name}, {start!r})",
            mistakes={
                "Only the first rule was followed: who is read by nobody else goes too.": _closure(
                    edges, start, rules=(1,)
                ),
                "Only the second rule was followed: who reads nobody else goes too.": _closure(
                    edges, start, rules=(2,)
                ),
                "That is one step. Go on from the neurons just reached, until nothing new is.": _closure(
                    edges, start, steps=1
                ),
                "`out` stays: it has two inputs, and the rules count neighbours in the whole graph, "
                "not those that are left.": _whole_neighbourhoods(edges, start),
                "The degrees are swapped: a reader goes when it has no other input.": _closure(
                    edges, start, swapped=True
                ),
            },
            hint=f"The edges are {list(edges)}; the group holds the start as well.",
        )
    passed("1.1", "two rules, followed to the end, are the paper's whole algorithm.")


def check_head_rows(head_rows: Callable[[int, int, int, int], tuple[Sequence[int], Sequence[int]]]) -> None:
    """Exercise 1.2, against discovery on a Llama with six query heads on three KV heads."""
    dependencies = discover(tiny_llama(heads=6, kv_heads=3))
    for kv_head, heads, kv_heads in ((0, 6, 3), (1, 6, 3), (2, 6, 3)):
        truth = {name: _rows(dependencies, name, kv_head) for name in ("q_proj", "k_proj")}
        strided = [row for h in range(kv_head, heads, kv_heads) for row in range(8 * h, 8 * h + 8)]
        asked = f"head_rows({kv_head}, {heads}, {kv_heads}, 8)"
        found = head_rows(kv_head, heads, kv_heads, 8)
        pair = tuple(found) if isinstance(found, list | tuple) and len(found) == 2 else (None, None)
        require_equal(
            list(pair[0]) if pair[0] is not None else None,
            truth["q_proj"],
            asked=f"{asked}, rows of q_proj",
            mistakes={
                "Query heads of one KV head are neighbours; these are not (LLM-Pruner's mistake).": strided,
                "That is one query head; a KV head takes all its query heads along.": range(
                    8 * kv_head, 8 * kv_head + 8
                ),
            },
            hint="Each KV head serves num_heads // num_kv_heads query heads, one after the other.",
        )
        require_equal(
            list(pair[1]),
            truth["k_proj"],
            asked=f"{asked}, rows of k_proj",
            mistakes={"k_proj has one head where q_proj has several.": truth["q_proj"]},
            hint="k_proj holds head_dim rows for each KV head.",
        )
    passed("1.2", "discovery finds the same rows, without being told of heads.")


def _rows(dependencies: DependencyMap, parameter: str, group: int, layer: int = 0) -> list[int]:
    (family,) = dependencies.select(kind="attention_head", layers=layer)
    (piece,) = [piece for piece in family.slices if f"{parameter}.weight" in piece.parameter]
    return sorted(piece.of([group]).tolist())


def check_fused_rows(fused_rows: Callable[[int, int, int, bool], Sequence[int]]) -> None:
    """Exercise 1.3, against discovery on a small GPT-2 and a small GPT-NeoX."""
    gpt2 = discover(tiny_model("gpt2", n_embd=24, n_layer=1, n_head=3, vocab_size=32, n_positions=16))
    sizes = {"hidden_size": 24, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3}
    neox = discover(tiny_model("gpt_neox", vocab_size=32, max_position_embeddings=16, **sizes))
    truth = {
        False: [_rows(gpt2, "c_attn", head) for head in range(3)],
        True: [_rows(neox, "query_key_value", head) for head in range(3)],
    }
    for per_head in (False, True):
        for head in (1, 2):
            found = fused_rows(head, 3, 8, per_head)
            require_equal(
                sorted(found) if found is not None else None,
                truth[per_head][head],
                asked=f"fused_rows({head}, 3, 8, {per_head})",
                mistakes={
                    "That is the other layout.": truth[not per_head][head],
                    "Those are the queries alone; the head's keys and values are fused in as well.": range(
                        8 * head, 8 * head + 8
                    ),
                },
                hint="View the rows as [3, heads, head_dim] or as [heads, 3, head_dim], and fix the head.",
            )
    passed("1.3", "GPT-2 and GPT-NeoX, and nobody had to name either.")
