"""Two result sets of one experiment compared: versions, hardware, data and settings, and what moved by more than seed noise.

    python -m pipeline.compare results/quick elsewhere/results/quick
    python -m pipeline.compare A B format=markdown out=drift.md          also format=json
    python -m pipeline.compare A B fail=true                             exit code 1 if a technique or a cell moved
    python -m pipeline.compare A B tolerance=0.2                         report times, energy and memory from 20% on

Exit codes: 0 done, 1 something moved and fail=true, 2 bad input. docs/statistics.md says how the test behaves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import UserError, write_text
from pipeline.reporting.compare import FORMATS, compare, headline

DEFAULTS = {"format": "text", "out": "", "fail": "false", "tolerance": ""}


def parse(words: Sequence[str]) -> tuple[Path, Path, dict[str, str]]:
    """(A, B, the keys). Raises UserError naming what is not known or not there."""
    folders = [w for w in words if "=" not in w]
    keys = DEFAULTS | key_values([w for w in words if "=" in w], DEFAULTS, "pipeline.compare")
    if len(folders) != 2:
        raise UserError(f"pipeline.compare takes two folders of results, not {len(folders)}: python -m pipeline.compare results/quick elsewhere/results/quick")
    missing = next((name for name in folders if not Path(name).is_dir()), None)
    if missing:
        raise UserError(f"{missing} is no folder; name two that hold results, such as results/quick")
    if keys["format"] not in FORMATS:
        raise UserError(f"format={keys['format']} is not known; choose {', '.join(FORMATS)}")
    if keys["fail"] not in ("true", "false"):
        raise UserError(f"fail={keys['fail']} is neither true nor false")
    if keys["tolerance"]:
        try:
            if not 0 <= float(keys["tolerance"]) < float("inf"):
                raise ValueError
        except ValueError:
            raise UserError(f"tolerance={keys['tolerance']} is no number from 0 on; 0.1 reports changes above 10%") from None
    return Path(folders[0]), Path(folders[1]), keys


def run(words: Sequence[str]) -> int:
    """Compare and print (or write)."""
    a, b, keys = parse(words)
    comparison = compare(a, b, float(keys["tolerance"]) if keys["tolerance"] else None)
    text = FORMATS[keys["format"]](comparison)
    if keys["out"]:
        write_text(Path(keys["out"]), text)
        print(f"{keys['out']}: {headline(comparison)}")
    else:
        print(text, end="")
    return int(keys["fail"] == "true" and comparison.moved)


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
