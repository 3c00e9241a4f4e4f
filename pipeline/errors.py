"""What a technique answers wrong on the test rows: the confusion matrix, and wrong rows beside the right answer.

    alignscope errors reviews lora
    python -m pipeline.errors reviews lora --limit 50

Reads results/<experiment>/<cell>/predictions.jsonl and the prepared rows.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="its name, as in experiments/<name>.yaml")
    parser.add_argument("technique", help="as the table names it")
    parser.add_argument("--seed", type=int, default=0, help="of the cell (default: 0)")
    parser.add_argument("--rows", type=int, help="training rows of the cell (default: the most)")
    parser.add_argument("--limit", type=int, default=10, help="wrong rows to show (default: 10)")
    parser.add_argument("--json", action="store_true", help="print all wrong rows as JSON, nothing else")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from pipeline.intake import mistakes
    from pipeline.intake.flow import make_console
    from pipeline.intake.running import grid

    cfg = mistakes.config(args.experiment)
    found = mistakes.mistakes(mistakes.find(args.experiment, args.technique, args.seed, args.rows), Path(cfg.paths.data) / cfg.task.name)
    if args.json:
        print(mistakes.as_json(found))
        return 0
    console = make_console()
    console.print(f"{found.cell}: {len(found.wrong)} of {found.rows} test rows answered wrong", highlight=False)
    if found.confusion:
        console.print()
        console.print(grid(*mistakes.confusion(found)))
    for line in mistakes.lines(found.wrong[: args.limit]):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if len(found.wrong) > args.limit:
        console.print(f"and {len(found.wrong) - args.limit} more (--limit {len(found.wrong)}, or --json)", highlight=False)
    return 0


main = argument_entry("errors", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
