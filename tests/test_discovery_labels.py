"""Labels: union, congruence, associativity, the occurs check."""

from __future__ import annotations

import numpy as np

from pruner_lib.discovery.labels import LabelStore


def classes(store: LabelStore, terms: np.ndarray) -> list[int]:
    _, numbers = np.unique(store.find(terms), return_inverse=True)
    return numbers.tolist()


def test_equal_parts_make_equal_pairs():
    store = LabelStore()
    heads, channels, rows = store.fresh(3), store.fresh(2), store.fresh(6)
    store.equate(rows, store.pair(heads, channels))
    other = store.pair(heads, channels)
    store.close()
    assert store.find(other).tolist() == store.find(rows).tolist()


def test_equal_pairs_have_equal_parts():
    store = LabelStore()
    a, b, c, d = store.fresh(3), store.fresh(2), store.fresh(3), store.fresh(2)
    store.equate(store.pair(a, b), store.pair(c, d))
    store.close()
    assert store.find(a).tolist() == store.find(c).tolist()
    assert store.find(b).tolist() == store.find(d).tolist()
    assert len(set(store.find(a).tolist())) == 3


def test_merging_is_associative():
    store = LabelStore()
    kv, slot, channel, rows = (store.fresh(n) for n in (2, 3, 4, 24))
    store.equate(rows, store.pair(store.pair(kv, slot), channel))
    kv2, slot2, channel2 = (store.fresh(n) for n in (2, 3, 4))
    store.equate(rows, store.pair(kv2, store.pair(slot2, channel2)))
    store.close()
    for left, right in ((kv, kv2), (slot, slot2), (channel, channel2)):
        assert store.find(left).tolist() == store.find(right).tolist()


def test_a_finer_split_refines_a_coarser_one():
    store = LabelStore()
    rows, outer, inner = store.fresh(12), store.fresh(3), store.fresh(4)
    store.equate(rows, store.pair(outer, inner))
    outer2, inner2 = store.fresh(6), store.fresh(2)
    store.equate(rows, store.pair(outer2, inner2))
    store.close()
    row, leaf, _, cyclic = store.leaves(rows)
    assert len(cyclic) == 0
    # every row of 12 = 3·2·2 holds three leaves
    assert np.bincount(row).tolist() == [3] * 12
    assert len(set(leaf.tolist())) == 3 + 2 + 2


def test_incompatible_splits_are_reported():
    store = LabelStore()
    rows = store.fresh(6)
    store.equate(rows, store.pair(store.fresh(2), store.fresh(3)))
    store.equate(rows, store.pair(store.fresh(3), store.fresh(2)))
    store.close()
    assert set(np.concatenate(store.incompatible).tolist()) == set(store.find(rows).tolist())


def test_a_label_that_contains_itself_is_found():
    store = LabelStore()
    rows, right = store.fresh(4), store.fresh(2)
    store.equate(rows[:2], store.fresh(2))
    pairs = store.pair(rows[:2], right)
    store.equate(pairs[:1], rows[:1])
    store.close()
    cyclic = store.leaves(rows)[3]
    assert store.find(rows[:1])[0] in cyclic


def test_a_long_chain_of_equations_is_one_class():
    store = LabelStore()
    terms = store.fresh(5000)
    store.equate(terms[1:], terms[:-1])
    assert set(store.find(terms).tolist()) == {0}


def test_equate_says_whether_it_was_news():
    store = LabelStore()
    a, b = store.fresh(4), store.fresh(4)
    assert store.equate(a, b) is True
    assert store.equate(b, a) is False
