"""How the first process calls the others to the recovery: through the launcher's store.

A file cannot say it: what lies in the output folder may be of an earlier run.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_POLL_SECONDS = 0.5
_RUNS = itertools.count()  # the launcher's store outlives a run, so each has keys of its own
_WORD, _HEARD = "recover", "heard"


def open_store() -> Store:
    """The key-value store over which the processes of this start find each other.

    Raises:
        ValueError: the environment does not say where it is (``torchrun`` and ``accelerate launch`` do).
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"pruner_lib/{attempt}/{next(_RUNS)}", store)


def call(store: Store, others: int, recover: bool) -> None:
    """Tell the other processes whether there is anything to recover, and wait until all have heard it."""
    store.set(_WORD, str(recover))
    while store.add(_HEARD, 0) < others:
        time.sleep(_POLL_SECONDS)


def is_called(store: Store) -> bool:
    """Wait for the first process's word, however long its stages take, and return it."""
    while not store.check([_WORD]):
        time.sleep(_POLL_SECONDS)
    recover = store.get(_WORD) == b"True"
    store.add(_HEARD, 1)
    return recover
