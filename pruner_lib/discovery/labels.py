"""Labels: terms that are either leaves or pairs, and the equations between them.

A *term* is an integer. A leaf term stands for one index of one dimension; a pair term ``⟨a, b⟩``
stands for one index of a dimension made by merging an a-dimension with a b-dimension. Equations
merge terms into classes, and congruence closure keeps two laws:

    ⟨a, b⟩ = ⟨a', b'⟩  ⇔  a = a' and b = b'            (injectivity and congruence)
    ⟨⟨a, s⟩, c⟩ = ⟨a, ⟨s, c⟩⟩                            (merging is associative)

Everything works on whole arrays of terms, because a 70B model has more than ten million of them.
Source of the technique: Nelson and Oppen, "Fast decision procedures based on congruence closure",
JACM 27 (1980), with the occurs check of Robinson's unification.
"""

from __future__ import annotations

import numpy as np

Terms = np.ndarray
"""int32 array of terms."""


def _runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort by ``keys``; return the order and a mask of positions equal to their predecessor."""
    order = np.lexsort(keys[::-1])
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for key in keys:
        ordered = key[order]
        same &= ordered[1:] == ordered[:-1]
    return order, same


def _are_rows(asked: tuple[np.ndarray, ...], known: tuple[np.ndarray, ...]) -> np.ndarray:
    """Which rows of three columns occur among the known rows."""
    first, second, third = (np.concatenate(both).astype(np.int64) for both in zip(asked, known, strict=True))
    _, pair = np.unique(first << 32 | second, return_inverse=True)
    key = pair.astype(np.int64) << 32 | third
    return np.isin(key[: len(asked[0])], key[len(asked[0]) :])


class LabelStore:
    """Union-find over terms, with pair structure and closure.

    Example:
        >>> store = LabelStore()
        >>> rows, heads, channels = store.fresh(6), store.fresh(2), store.fresh(3)
        >>> store.equate(rows, store.pair(heads, channels))
        >>> store.equate(heads[:1], heads[1:])          # tie the two heads …
        >>> store.close()
        >>> bool(store.find(rows)[0] == store.find(rows)[3])   # … and their rows are tied too
        True
    """

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int32)
        self._count = 0
        self._pairs: list[np.ndarray] = []  # each [n, 4]: term, left, right, size of the right side
        self.incompatible: list[Terms] = []  # terms split in ways that have no common refinement

    def __len__(self) -> int:
        return self._count

    def fresh(self, size: int) -> Terms:
        """``size`` new leaf terms."""
        start, self._count = self._count, self._count + size
        if self._count > len(self._parent):
            capacity = max(self._count, 2 * len(self._parent))
            grown = np.arange(capacity, dtype=np.int32)
            grown[:start] = self._parent[:start]
            self._parent = grown
        return np.arange(start, self._count, dtype=np.int32)

    def pair(self, left: Terms, right: Terms) -> Terms:
        """Terms ``⟨left[i], right[j]⟩`` in row-major order, ``[len(left) * len(right)]``."""
        size = len(right)
        return self._pair_up(
            np.repeat(left, size), np.tile(right, len(left)), np.full(len(left) * size, size)
        )

    def _pair_up(self, left: Terms, right: Terms, sizes: np.ndarray) -> Terms:
        terms = self.fresh(len(left))
        self._pairs.append(np.stack([terms, left, right, sizes.astype(np.int32)], axis=1).astype(np.int32))
        return terms

    def find(self, terms: Terms) -> Terms:
        """The representative of each term's class (the smallest term of the class)."""
        parent = self._parent
        roots = parent[terms]
        above = parent[roots]
        if (above == roots).all():
            return roots
        while not (above == roots).all():
            parent[roots] = parent[above]
            roots = parent[roots]
            above = parent[roots]
        parent[terms] = roots
        return roots

    def equate(self, left: Terms, right: Terms) -> bool:
        """State ``left[i] = right[i]`` for all i; True when this was news."""
        changed = False
        while True:
            x, y = self.find(left), self.find(right)
            differ = x != y
            if not differ.any():
                return changed
            changed = True
            left, right = x[differ], y[differ]
            # Hooking the larger root below the smaller keeps the forest acyclic; when one root is
            # hooked twice in this call the last write wins and the loop states the rest again.
            self._parent[np.maximum(left, right)] = np.minimum(left, right)

    # -- closure ---------------------------------------------------------------------------------

    def pairs(self) -> np.ndarray:
        """All pairs over representatives, ``[n, 4]``: term, left, right, size of the right dimension."""
        if not self._pairs:
            return np.zeros((0, 4), dtype=np.int32)
        if len(self._pairs) > 1:
            self._pairs = [np.concatenate(self._pairs)]
        table = self._pairs[0].copy()
        for column in range(3):
            table[:, column] = self.find(table[:, column])
        return table

    def close(self) -> None:
        """Close the equations under congruence, injectivity and associativity."""
        changed = True
        while changed:
            table = self._deduplicate(self.pairs())
            changed = self._congruence(table)
            changed |= self._injectivity(self.pairs())
            if not changed:
                changed = self._associativity(self._deduplicate(self.pairs()))

    def _deduplicate(self, table: np.ndarray) -> np.ndarray:
        order, same = _runs(table[:, 0], table[:, 1], table[:, 2], table[:, 3])
        table = table[order][np.concatenate([[True], ~same])] if len(table) else table
        self._pairs = [table]
        return table

    def _congruence(self, table: np.ndarray) -> bool:
        order, same = _runs(table[:, 1], table[:, 2], table[:, 3])
        terms = table[order, 0]
        return self.equate(terms[1:][same], terms[:-1][same])

    def _injectivity(self, table: np.ndarray) -> bool:
        order, same = _runs(table[:, 0], table[:, 3])
        left, right = table[order, 1], table[order, 2]
        changed = self.equate(left[1:][same], left[:-1][same])
        return self.equate(right[1:][same], right[:-1][same]) or changed

    def _associativity(self, table: np.ndarray) -> bool:
        """Refine ⟨a, b⟩ = ⟨a', b'⟩ with |b| = m·|b'| to b = ⟨s, b'⟩ and a' = ⟨a, s⟩."""
        order = np.lexsort((-table[:, 3], table[:, 0]))
        table = table[order]
        pick = np.flatnonzero(table[1:, 0] == table[:-1, 0])
        pick = pick[table[pick, 3] != table[pick + 1, 3]]
        if not len(pick):
            return False
        coarse, fine = table[pick], table[pick + 1]
        fits = coarse[:, 3] % fine[:, 3] == 0
        self.incompatible.append(coarse[~fits, 0])
        coarse, fine = coarse[fits], fine[fits]
        ratio = coarse[:, 3] // fine[:, 3]
        # One factor s per (b, b'): an existing ⟨s, b'⟩ of the class of b is found by injectivity later.
        before = self._count
        middle = self.fresh(len(coarse))
        inner = self._pair_up(middle, fine[:, 2], fine[:, 3])
        outer = self._pair_up(coarse[:, 1], middle, ratio)
        by_right = _are_rows((coarse[:, 2], fine[:, 2], fine[:, 3]), (table[:, 0], table[:, 2], table[:, 3]))
        by_left = _are_rows((fine[:, 1], coarse[:, 1], ratio), (table[:, 0], table[:, 1], table[:, 3]))
        news = ~(by_right & by_left)
        if not news.any():
            # Every refinement is already known: forget the terms just made.
            self._pairs = [table]
            self._parent[before : self._count] = np.arange(before, self._count, dtype=np.int32)
            self._count = before
            return False
        self.equate(inner, coarse[:, 2])
        self.equate(outer, fine[:, 1])
        return True

    # -- reading the result ----------------------------------------------------------------------

    def leaves(self, terms: Terms) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Unfold terms into the leaf classes they contain, after :meth:`close`.

        Returns:
            ``(row, leaf, path, cyclic)``: term ``row[i]`` of the argument contains the class ``leaf[i]``
            at tree position ``path[i]`` (1 is the term itself, 2·p and 2·p+1 the parts of p);
            ``cyclic`` lists classes that contain themselves (the occurs check), left folded.
        """
        table = self.pairs()
        order = np.lexsort((table[:, 3], table[:, 0]))
        table = table[order]
        heads, first = np.unique(table[:, 0], return_index=True)
        left, right = table[first, 1], table[first, 2]
        row = np.arange(len(terms), dtype=np.int64)
        current, path = self.find(terms), np.ones(len(terms), dtype=np.int64)
        done: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        cyclic: list[np.ndarray] = []
        for depth in range(12):
            at = np.searchsorted(heads, current)
            at[at == len(heads)] = 0
            is_pair = (heads[at] == current) if len(heads) else np.zeros(len(current), dtype=bool)
            if depth == 11 and is_pair.any():
                cyclic.append(np.unique(current[is_pair]))
                is_pair[:] = False
            done.append((row[~is_pair], current[~is_pair], path[~is_pair]))
            if not is_pair.any():
                break
            row, at, path = row[is_pair], at[is_pair], path[is_pair]
            current = np.concatenate([left[at], right[at]])
            row, path = np.concatenate([row, row]), np.concatenate([2 * path, 2 * path + 1])
        rows, leaves, paths = (np.concatenate(column) for column in zip(*done, strict=True))
        return rows, leaves, paths, np.concatenate(cyclic) if cyclic else np.zeros(0, dtype=np.int32)
