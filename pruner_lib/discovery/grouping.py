"""From labels to families: which indices share a class, what they are for, and what blocks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from .families import CoupledSlice, GroupFamily
from .sayable import Sayable
from .state import Dim, Trace

ROLES = (
    *("batched", "slot", "attended", "mixed"),  # of a product of two activations
    *("token", "place", "embedded", "added", "returned"),
    *("read", "written", "bent"),  # of a product with a parameter; bent by a nonlinearity or a gate
    "chosen",  # looked up by the indices that top-k returned
)


@dataclass(frozen=True, eq=False)
class Incidence:
    """Which leaf classes occur where: one row per (axis pattern, index, leaf)."""

    pattern: np.ndarray  # id of the distinct label array
    index: np.ndarray
    leaf: np.ndarray
    path: np.ndarray  # position in the term: 1 itself, 2p and 2p+1 the parts of p
    axes: list[list[tuple[str, int]]]  # per pattern, the (parameter, dimension) that carry it
    cyclic: np.ndarray


def incidences(trace: Trace, labels: Mapping[str, Sequence[Dim]]) -> Incidence:
    """Unfold every labelled parameter dimension into leaf classes; equal patterns only once."""
    axes: dict[bytes, list[tuple[str, int]]] = {}
    arrays: list[np.ndarray] = []
    for name, dims in labels.items():
        for dim, terms in enumerate(dims):
            if isinstance(terms, np.ndarray):
                roots = trace.store.find(terms)
                known = axes.setdefault(roots.tobytes(), [])
                if not known:
                    arrays.append(roots)
                known.append((name, dim))
    sizes = [len(a) for a in arrays]
    row, leaf, path, cyclic = trace.store.leaves(np.concatenate(arrays) if arrays else np.zeros(0, np.int32))
    pattern = np.repeat(np.arange(len(arrays)), sizes)
    index = np.concatenate([np.arange(n) for n in sizes]) if sizes else np.zeros(0, np.int64)
    return Incidence(pattern[row], index[row], leaf, path, list(axes.values()), cyclic)


def _mix(*columns: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row (splitmix64 over the columns)."""
    value = np.zeros(len(columns[0]), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            value = value ^ (column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


def _counted(found: Incidence) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows ``(leaf, pattern, path)``, sorted, and how often each occurs.

    The three are packed into one number to sort by, which is several times as fast as sorting by three.
    """
    paths = int(found.path.max(initial=1)).bit_length()
    patterns = int(found.pattern.max(initial=1)).bit_length()
    leaves = int(found.leaf.max(initial=1)).bit_length()
    assert leaves + patterns + paths < 64, "too many labels and matrices for one 64-bit key"
    key = np.sort((found.leaf.astype(np.int64) << (patterns + paths)) | (found.pattern << paths) | found.path)
    start = np.flatnonzero(np.concatenate([np.ones(min(len(key), 1), dtype=bool), key[1:] != key[:-1]]))
    count, key = np.diff(np.append(start, len(key))), key[start]
    pattern, path = (key >> paths) & ((1 << patterns) - 1), key & ((1 << paths) - 1)
    return key >> (patterns + paths), pattern, path, count


def signatures(found: Incidence, extra: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(leaves, signature)``: leaves with equal signatures repeat one coupling pattern.

    ``extra`` maps a leaf class to a number that must agree too (what blocks it, what it is for).
    """
    leaf, pattern, path, count = _counted(found)
    hashes = _mix(pattern, path, count)
    leaves, first = np.unique(leaf, return_index=True)
    with np.errstate(over="ignore"):
        total = np.add.reduceat(hashes, first) if len(first) else hashes
    return leaves, _mix(total, extra[leaves])


def role_flags(trace: Trace) -> dict[str, np.ndarray]:
    """Per role, which classes play it; a head that is a pair passes the role to its parts."""
    flags = {role: np.zeros(len(trace.store), dtype=bool) for role in ROLES}
    for event in trace.events:
        if event.role in flags:
            flags[event.role][trace.store.find(event.labels)] = True
    table = trace.store.pairs()
    for _ in range(4):
        experts = table[flags["chosen"][table[:, 0]]]
        flags["chosen"][experts[:, 1]] = flags["chosen"][experts[:, 2]] = True
        heads = table[flags["batched"][table[:, 0]]]
        flags["batched"][heads[:, 1]] = True
        flags["slot"][heads[:, 2]] = True
    # A router's scores choose what is looked up; channels that a matrix reads are neurons all the same.
    flags["chosen"] &= ~flags["read"]
    return flags


def block_reasons(trace: Trace, cyclic: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Per class the number of its reason (0: free), and the reasons; a pair passes it to its parts."""
    reasons = [
        "",
        "its labels contain themselves: an index pattern that has no finite description",
        "split in two ways that have no common refinement",
    ]
    code = np.zeros(len(trace.store), dtype=np.int64)
    numbers: dict[str, int] = {}
    rivals = [
        (roots[~chosen[roots]], why) for terms, why in trace.rivals for roots in [trace.store.find(terms)]
    ]
    for terms, reason in [*trace.blocks, *rivals]:
        number = numbers.setdefault(reason, len(numbers) + len(("", "", "")))
        roots = trace.store.find(terms)
        code[roots[code[roots] == 0]] = number
    reasons += list(numbers)
    code[cyclic] = 1
    for terms in trace.store.incompatible:
        code[trace.store.find(terms)] = 2
    table = trace.store.pairs()
    for _ in range(6):
        blocked = table[code[table[:, 0]] > 0]
        for part in (blocked[:, 1], blocked[:, 2]):
            free = code[part] == 0
            code[part[free]] = code[blocked[free, 0]]
    return code, reasons


def floor_of(trace: Trace) -> np.ndarray:
    """Per class, how many of its indices top-k takes at once; 0 where nothing is chosen."""
    floors = np.zeros(len(trace.store), dtype=np.int64)
    for terms, count in trace.floors:
        roots = trace.store.find(terms)
        floors[roots] = np.maximum(floors[roots], count)
    table = trace.store.pairs()
    np.maximum.at(floors, table[:, 2], floors[table[:, 0]])  # experts in equal parts: as many in each part
    return floors


def kind_of(leaf: int, flags: Mapping[str, np.ndarray]) -> str:
    """What a leaf class is, from what the operators did with it."""
    is_ = {role: bool(flag[leaf]) for role, flag in flags.items()}
    if is_["token"] or (is_["returned"] and not is_["added"] and not is_["embedded"]):
        return "vocabulary"
    if is_["place"]:
        return "position"
    if is_["chosen"]:
        return "expert"
    if is_["batched"]:
        return "attention_head"
    if is_["slot"]:
        return "query_head"
    if is_["attended"]:
        return "qk_channel"
    if is_["mixed"]:
        return "value_channel"
    if is_["embedded"]:
        return "hidden_channel"
    if is_["read"] and is_["written"] and (is_["bent"] or not is_["added"]):
        # Bent also where the activation adds a term of its own (GELU by its tanh formula).
        return "mlp_neuron" if is_["bent"] else "latent_channel"
    return "hidden_channel" if is_["added"] else "other"


def layer_list(model: nn.Module) -> tuple[str, int]:
    """Path and length of the list of decoder layers: the module list with the most parameters."""
    best, weight = ("", 0), -1
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            size = sum(p.numel() for p in module.parameters())
            if size > weight:
                best, weight = (name, len(module)), size
    return best


def layer_of(parameters: Iterable[str], path: str) -> int | None:
    """The one decoder layer that all parameters lie in, or None."""
    layers = set()
    for name in parameters:
        if not name.startswith(path + "."):
            return None
        layers.add(int(name[len(path) + 1 :].split(".")[0]))
    return layers.pop() if len(layers) == 1 else None


def slices_of(
    found: Incidence, chosen: np.ndarray, keys: np.ndarray, used: Mapping[str, int]
) -> tuple[CoupledSlice, ...]:
    """Coupled slices of a family: ``chosen`` rows of the incidence, ``keys`` the group of each row."""
    slices = []
    for pattern in np.unique(found.pattern[chosen]):
        rows = found.pattern[chosen] == pattern
        index, key = found.index[chosen][rows], keys[rows]
        order = np.lexsort((index, key))
        width = len(index) // len(np.unique(key))
        table = index[order].reshape(-1, width)
        slices += [CoupledSlice(name, dim, table) for name, dim in found.axes[pattern]]
    last = len(used)
    return tuple(sorted(slices, key=lambda s: (used.get(s.parameter, last), s.dim)))


@dataclass(frozen=True, eq=False)
class Grouping:
    """Families with, per leaf class, the family it decides (-1: none).

    ``group_of`` maps a family's position to its sorted classes and the group of each; for query heads a
    class is a pair (KV head, slot) as :func:`pair_keys` numbers it.
    """

    families: tuple[GroupFamily, ...]
    family_of: np.ndarray
    group_of: Mapping[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class _Reading:
    """What is known of every leaf class before families are made of them."""

    found: Incidence
    flags: Mapping[str, np.ndarray]
    code: np.ndarray  # number of the reason that blocks a class
    reasons: list[str]
    floors: np.ndarray  # groups that must stay
    used: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    learned: frozenset[str]
    layers: str  # path of the list of decoder layers


@dataclass(frozen=True, eq=False)
class _Made:
    """A family without its name; of each of its rows the leaf class, the key and the group."""

    family: GroupFamily
    leaf: np.ndarray
    named: np.ndarray
    group: np.ndarray


def build_families(trace: Trace, labels: Mapping[str, Sequence[Dim]], model: nn.Module) -> Grouping:
    """All families of a traced model, in the order in which the model uses them."""
    trace.store.close()
    found = incidences(trace, labels)
    flags = role_flags(trace)
    code, reasons = block_reasons(trace, found.cyclic, flags["chosen"])
    shapes = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    learned = frozenset(name for name, _ in model.named_parameters())
    layers, _ = layer_list(model)
    reading = _Reading(found, flags, code, reasons, floor_of(trace), trace.used, shapes, learned, layers)
    made = [_family(reading, rows) for rows in _alike(reading)]
    # A table that the code computes is used by nothing that could be cut.
    made = [m for m in made if any(piece.parameter in learned for piece in m.family.slices)]
    sayable = Sayable(trace, model, [m.family for m in made])
    families = [sayable.checked(m.family) for m in made]
    rank = sorted(range(len(made)), key=lambda k: _first_use(families[k], trace.used))
    family_of = np.full(len(trace.store), -1, dtype=np.int64)
    group_of: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for position, k in enumerate(rank):
        family_of[made[k].leaf] = position
        classes, first = np.unique(made[k].named, return_index=True)
        group_of[position] = classes, made[k].group[first]
    return Grouping(tuple(_named([families[k] for k in rank])), family_of, group_of)


def _alike(reading: _Reading) -> list[np.ndarray]:
    """Rows of the incidence, those together whose leaf classes repeat one coupling pattern."""
    found = reading.found
    extra = reading.code.copy()
    for k, flag in enumerate(reading.flags.values()):
        extra[flag] |= 1 << (32 + k)
    leaves, signature = signatures(found, extra)
    of_leaf = np.full(len(reading.code), -1, dtype=np.int64)
    of_leaf[leaves] = np.unique(signature, return_inverse=True)[1]
    of_row = of_leaf[found.leaf]
    order = np.argsort(of_row, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(of_row[order])) + 1) if len(order) else []


def _family(reading: _Reading, rows: np.ndarray) -> _Made:
    """The family of some rows: its kind, its groups, what blocks it."""
    found, code, leaf = reading.found, reading.code, int(reading.found.leaf[rows[0]])
    kind, blocked = kind_of(leaf, reading.flags), reading.reasons[code[leaf]] or None
    named, partition = found.leaf[rows].astype(np.int64), None
    if kind in ("query_head", "expert"):
        named, partition = _with_sibling(found, rows)
        if partition is None and kind == "query_head":
            blocked = blocked or "the same query slot is used outside its key-value head"
        elif partition is not None and code[partition].any():
            blocked = blocked or reading.reasons[code[partition][code[partition] > 0][0]]
    group, partition = _rank(found, rows, named, partition)
    slices = slices_of(found, rows, group, reading.used)
    slices = tuple(replace(piece, shape=reading.shapes[piece.parameter]) for piece in slices)
    size, floor = len(np.unique(group)), int(reading.floors[leaf])
    if partition is not None:
        floor *= len(np.unique(partition))
    if floor >= size and floor > 1:
        blocked = blocked or f"the router chooses {floor} of these {size} for every token"
    if not any(piece.parameter in reading.used for piece in slices):
        blocked = blocked or f"the call that was traced does not read {slices[0].parameter}"
    layer = layer_of({piece.parameter for piece in slices}, reading.layers)
    family = GroupFamily("", kind, layer, size, slices, blocked, (), partition, max(floor, 1))
    return _Made(family, found.leaf[rows], named, group)


def _first_use(family: GroupFamily, used: Mapping[str, int]) -> tuple[int, int, str]:
    layer = -1 if family.layer is None else family.layer
    return layer, min(used.get(s.parameter, len(used)) for s in family.slices), family.kind


def _with_sibling(found: Incidence, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Key each row by (KV head, query slot): query heads are independent inside each KV head."""
    rows = np.flatnonzero(np.isin(found.pattern, np.unique(found.pattern[chosen])))
    place = found.pattern * (int(found.index.max()) + 1) + found.index
    owner = siblings(place[rows], found.path[rows], found.leaf[rows], place[chosen], found.path[chosen])
    if (owner < 0).any():
        return found.leaf[chosen].astype(np.int64), None
    return pair_keys(owner, found.leaf[chosen]), owner


def pair_keys(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """One number per pair of classes."""
    return left.astype(np.int64) * (1 << 32) + right


def siblings(
    place: np.ndarray, path: np.ndarray, leaf: np.ndarray, asked_place: np.ndarray, asked_path: np.ndarray
) -> np.ndarray:
    """The leaf just left in the same term: kv of slot in ⟨⟨kv, slot⟩, c⟩ and in ⟨kv, ⟨slot, c⟩⟩; -1 where
    nothing is left of it, or a pair."""
    depth = 1 << 12
    ascended = asked_path // (asked_path & -asked_path)  # up while it is a left half
    address = place.astype(np.int64) * depth + path
    order = np.argsort(address)
    wanted = asked_place.astype(np.int64) * depth + (ascended ^ 1)
    at = np.searchsorted(address[order], wanted)
    at[at == len(order)] = 0
    return np.where(address[order][at] == wanted, leaf[order][at], -1).astype(np.int64)


def _rank(
    found: Incidence, chosen: np.ndarray, keys: np.ndarray, partition: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Number groups by the smallest index they hold in their first pattern."""
    first = found.pattern[chosen] == found.pattern[chosen].min()
    order = np.lexsort((found.index[chosen][first], keys[first]))
    unique, start = np.unique(keys[first][order], return_index=True)
    lowest = found.index[chosen][first][order][start]
    rank = np.empty(len(unique), dtype=np.int64)
    rank[np.argsort(lowest, kind="stable")] = np.arange(len(unique))
    numbers = rank[np.searchsorted(unique, keys)]
    if partition is None:
        return numbers, None
    owner = np.zeros(len(unique), dtype=np.int64)
    owner[numbers] = partition
    _, compact = np.unique(owner, return_inverse=True)
    return numbers, compact


def _named(families: Sequence[GroupFamily]) -> list[GroupFamily]:
    seen: dict[str, int] = {}
    named = []
    for family in families:
        base = family.kind if family.layer is None else f"layers.{family.layer}.{family.kind}"
        seen[base] = seen.get(base, 0) + 1
        name = base if seen[base] == 1 else f"{base}.{seen[base]}"
        named.append(GroupFamily(**{**vars(family), "name": name}))
    return named
