"""Go on with an experiment of `alignscope try`, with more seeds, rows or time: finished cells are kept, and the verdict is said anew.

    alignscope more reviews --seeds 3
    python -m pipeline.more reviews --rows 500 --test-rows 500 --hours 1

Changes the numbers in experiments/<name>.yaml, as an editor would, and runs what is missing. Other test rows mean that all cells run anew.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry, check_above_zero


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="its name, as in experiments/<name>.yaml")
    parser.add_argument("--seeds", type=int, help="how many seeds: 0, 1, 2, … (default: as the file says)")
    parser.add_argument("--rows", type=int, help="labelled rows to train on (default: as the file says)")
    parser.add_argument("--test-rows", type=int, help="rows to test on (default: as the file says)")
    parser.add_argument("--hours", type=float, help="that all may take (default: as the file says)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, nothing else")


def run(args: argparse.Namespace) -> int:
    """Change the file, run, answer."""
    from pipeline.intake import flow, project

    check_above_zero(args, "seeds", "rows", "test-rows", "hours")
    project.change(args.experiment, {"seeds": args.seeds and list(range(args.seeds)), "train_rows": args.rows and [args.rows], "test_rows": args.test_rows,
                                     "hours": args.hours})
    return flow.go(args.experiment, args)


main = argument_entry("more", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
