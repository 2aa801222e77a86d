"""All stages from one configuration file, without a notebook: ``python -m pruner_lib CONFIG``.

This package stands outside the pipeline: it calls every stage's public names and no stage imports it.
"""

from pruner_lib.pipeline.config import EXAMPLE, PipelineConfig, PipelineError, read_config
from pruner_lib.pipeline.running import STAGES, run_pipeline

__all__ = ["EXAMPLE", "STAGES", "PipelineConfig", "PipelineError", "read_config", "run_pipeline"]
