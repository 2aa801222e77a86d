"""``python -m pruner_lib CONFIG``: discover, score, plan, prune, recover and evaluate without a notebook."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pruner_lib.assets import AssetError
from pruner_lib.discovery import DiscoveryError
from pruner_lib.pipeline import EXAMPLE, read_config, run_pipeline


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 when every stage ran, 1 when one failed, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m pruner_lib", description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="TOML or JSON file, one table per stage")
    parser.add_argument("--output", type=Path, default=None, help="another output folder than the file says")
    parser.add_argument("--fresh", action="store_true", help="run every stage again")
    parser.add_argument(
        "--example", action="store_true", help="print a configuration with every table and stop"
    )
    options = parser.parse_args(arguments)
    if options.example:
        print(EXAMPLE, end="")
        return 0
    if options.config is None:
        parser.error("a configuration file is needed; --example prints one")
    try:
        folder = run_pipeline(read_config(options.config, output=options.output), fresh=options.fresh)
    except (AssetError, DiscoveryError, ValueError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on at this stage", file=sys.stderr)
        return 130
    print(f"everything is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
