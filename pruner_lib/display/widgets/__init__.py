"""Widgets: labelled controls that call functions of the library and show what these return.

Every widget is a box with its controls as attributes, so that a test or a cell can set them:
``explorer.index.value = 7``. What it shows is in ``text`` and ``picture``.
"""

from pruner_lib.display.widgets.bench import generation_bench
from pruner_lib.display.widgets.criteria import criteria_explorer
from pruner_lib.display.widgets.dashboard import evaluation_dashboard
from pruner_lib.display.widgets.groups import group_explorer
from pruner_lib.display.widgets.planner import plan_explorer

__all__ = [
    "criteria_explorer",
    "evaluation_dashboard",
    "generation_bench",
    "group_explorer",
    "plan_explorer",
]
