"""What fits a model, a card and a time, and what to try first: from the published evidence and a forecast, without any result of your own.

    alignscope fit --model Qwen/Qwen3-8B --card 16GB --hours 2 --rows 500
    python -m pipeline.fit --model /models/mine --rows 2000 --length 512

Every part says whether it is measured, forecast or a guess. `alignscope advise` answers from your own results.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry, check_above_zero


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a repository of the hub, a folder, a config.json, or a name of conf/model/")
    parser.add_argument("--card", help="GiB of the GPU, as in 16GB, or with its name, as in A100:40GB (default: this machine)")
    parser.add_argument("--hours", type=float, help="that one technique may take (default: no limit)")
    parser.add_argument("--rows", type=int, default=500, help="labelled rows to train on (default: 500)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: 128)")
    parser.add_argument("--techniques", help="which, with commas between them (default: nine usual ones)")
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the answer: 0, or 1 where nothing fits."""
    from pipeline.intake import fitting
    from pipeline.intake.flow import make_console
    from pipeline.intake.running import grid

    check_above_zero(args, "rows", "length", "hours")
    techniques = [t.strip() for t in args.techniques.split(",") if t.strip()] if args.techniques else None
    answer = fitting.fit(args.model, args.card, args.rows, args.hours, args.length, techniques)
    if args.json:
        print(fitting.as_json(answer))
    else:
        console = make_console()
        console.print("\n".join(fitting.lines(answer)), highlight=False, markup=False, soft_wrap=True)
        console.print()
        console.print(grid(["technique", "memory", "time", "measured elsewhere", ""], fitting.rows_of(answer)))
        console.print("\n" + "\n".join(fitting.basis(answer)), highlight=False, markup=False, soft_wrap=True)
    return 0 if answer.take else 1


main = argument_entry("fit", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
