"""Which rank of LoRA: a search on validation rows, the best confirmed once on test rows.

    alignscope rank reviews
    python -m pipeline.rank quick --technique qlora

The same as python -m pipeline.sweep experiments=<name> technique=<technique>, which takes more settings.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", help="its name, as in experiments/<name>.yaml")
    parser.add_argument("--technique", default="lora", help="with a rank: lora, qlora, dora, … (default: lora)")


def run(args: argparse.Namespace) -> int:
    from pipeline.core.commands import call
    from pipeline.core.compose import compose

    words = [f"experiments={args.experiment}", f"technique={args.technique}"]
    return call("sweep", compose(words), words)


main = argument_entry("rank", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
