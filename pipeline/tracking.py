"""Put finished cells and sweeps into MLflow, a mirror of the result files: one run a cell, one nested run a trial.

    python -m pipeline.tracking backfill                     mirror every result and sweep on disk
    python -m pipeline.tracking backfill experiments=quick   those of one experiment

Training never depends on it: `log_cell` warns in one sentence if the database or server cannot be written, and backfill
makes up for it. tracking=none turns it off, and nothing of MLflow is imported then.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pipeline.core.commands import entry
from pipeline.core.compose import by_key
from pipeline.records.mlflow import backfill

USAGE = "usage: python -m pipeline.tracking backfill [experiments=<name>] [tracking.uri=...]"


def main(argv: Sequence[str] | None = None) -> int:
    """The entry: the word backfill, then Hydra overrides. Returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] != "backfill" or any(w.startswith("-") for w in words):
        print(USAGE, file=sys.stderr)
        return 2
    return entry(lambda cfg, overrides: backfill(cfg, everything=not {"experiments", "experiment"} & {*by_key(overrides)}))(words[1:])


if __name__ == "__main__":
    sys.exit(main())
