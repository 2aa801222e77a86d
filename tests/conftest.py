"""Shared by all tests: no hub, and the real model loaded once."""

from __future__ import annotations

import os

# Read by the hub's client when it is first imported: no test may depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def default_model():
    """The default model and tokenizer on the CPU in float32; tests must not change them."""
    from pruner_lib.assets import load_model

    return load_model(device="cpu", dtype="float32")
