"""Write a folder that answers by itself: weights, prompt.json, a short predict.py, a model card.

    alignscope deploy reviews lora --to out/reviews
    python -m pipeline.deploy reviews zero_shot --to out/reviews
    python out/reviews/predict.py text='A lovely film'

Needs nothing of alignscope to run: transformers alone (PEFT for an adapter that cannot be merged). The untouched base and few-shot can be deployed, too.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="its name, as in experiments/<name>.yaml")
    parser.add_argument("technique", help="as the table names it")
    parser.add_argument("--to", required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the cell (default: 0)")
    parser.add_argument("--rows", type=int, help="training rows of the cell (default: the most)")


def run(args: argparse.Namespace) -> int:
    """Write the folder and say how it is used."""
    from pathlib import Path

    from pipeline.intake import deploying, mistakes

    target = Path(args.to)
    cell = mistakes.find(args.experiment, args.technique, args.seed, args.rows)
    deploying.check_target(target)
    size = deploying.deploy(cell, mistakes.config(args.experiment), target)
    columns = deploying.read_object(target / "prompt.json")["columns"]
    print(f"{target}: {size / 2**20:,.0f} MiB of {cell.result.cell}")
    print(f"use it: python {target / 'predict.py'} " + " ".join(f"{column}='…'" for column in columns))
    return 0


main = argument_entry("deploy", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
