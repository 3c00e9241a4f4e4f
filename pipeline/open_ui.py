"""The pages of an experiment: its report, and MLflow's, which compare runs.

    alignscope ui reviews
    python -m pipeline.open_ui reviews --port 5001

Prints the report's path and where MLflow shows the runs, and serves MLflow on this machine until Ctrl-C. Follow that address: without what follows the
port, MLflow's pages open on traces of applications, which only the browser remembers to have been left (the switch "Model training", at the top left).
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry

ONE_WORKER = ("--workers", "1")
"""Of several, those that a busy machine keeps from answering within seconds are ended and begun again, for ever."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", nargs="?", help="its name, as in experiments/<name>.yaml (default: all)")
    parser.add_argument("--port", type=int, default=5000, help="of this machine (default: 5000)")


def run(args: argparse.Namespace) -> int:
    """Print where the pages are, and serve."""
    import subprocess
    from pathlib import Path

    from pipeline.core.compose import compose
    from pipeline.core.files import UserError
    from pipeline.records.mlflow import page_of

    cfg = compose([f"experiments={args.experiment}"] if args.experiment else [])
    page = Path(cfg.paths.report) / cfg.experiment / "index.html"
    if args.experiment:
        print(f"report: {page}" if page.exists() else f"no report yet; run: alignscope try {args.experiment}")
    store = str(cfg.tracking.get("uri") or "")
    if not store or store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists():
        raise UserError(f"there is nothing in MLflow yet ({store or 'tracking=none'}); run a cell first, or: python -m pipeline.tracking backfill")
    print(f"MLflow: http://127.0.0.1:{args.port}/{page_of(cfg, args.experiment)} (Ctrl-C ends it)", flush=True)
    serve = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(args.port), *ONE_WORKER]
    return subprocess.run(serve).returncode


main = argument_entry("ui", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
