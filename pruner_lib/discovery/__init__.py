"""Discovery: which parameter slices must be removed together, found from the operators alone."""

from .dependency_map import DependencyMap, discover
from .explanation import Explanation
from .families import KINDS, CoupledSlice, GroupFamily, Removal, UnknownFamilyError
from .tracing import DiscoveryError

__all__ = [
    "KINDS",
    "CoupledSlice",
    "DependencyMap",
    "DiscoveryError",
    "Explanation",
    "GroupFamily",
    "Removal",
    "UnknownFamilyError",
    "discover",
]
