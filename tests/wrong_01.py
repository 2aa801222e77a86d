"""Wrong answers to the exercises of notebook 01."""

from pruner_lib.course.checks_01 import _closure, _whole_neighbourhoods


def strided_queries(kv_head, num_heads, num_kv_heads, head_dim):
    heads = range(kv_head, num_heads, num_kv_heads)
    rows = [row for head in heads for row in range(head * head_dim, (head + 1) * head_dim)]
    return rows, range(kv_head * head_dim, (kv_head + 1) * head_dim)


def keys_as_wide_as_queries(kv_head, num_heads, num_kv_heads, head_dim):
    width = num_heads // num_kv_heads * head_dim
    return range(kv_head * width, (kv_head + 1) * width), range(kv_head * width, (kv_head + 1) * width)


def one_query_head(kv_head, num_heads, num_kv_heads, head_dim):
    return [range(kv_head * head_dim, (kv_head + 1) * head_dim)] * 2


def other_layout(head, num_heads, head_dim, per_head):
    rows = range(3 * num_heads * head_dim)
    if per_head:
        return [row for row in rows if row // head_dim % num_heads == head]
    return [row for row in rows if row // (3 * head_dim) == head]


WRONG = {
    "1.1": {
        "Only the first rule": lambda edges, start: _closure(edges, start, rules=(1,)),
        "Only the second rule": lambda edges, start: _closure(edges, start, rules=(2,)),
        "That is one step": lambda edges, start: _closure(edges, start, steps=1),
        "degrees are swapped": lambda edges, start: _closure(edges, start, swapped=True),
        "`out` stays": _whole_neighbourhoods,
        "holds the start as well": lambda edges, start: _closure(edges, start) - {start},
    },
    "1.2": {
        "LLM-Pruner's mistake": strided_queries,
        "one head where q_proj has several": keys_as_wide_as_queries,
        "one query head": one_query_head,
        "None.*return": lambda *arguments: None,
    },
    "1.3": {
        "the other layout": other_layout,
        "queries alone": lambda head, heads, dim, per_head: range(head * dim, (head + 1) * dim),
        "fix the head": lambda head, heads, dim, per_head: range(3 * dim),
    },
}
