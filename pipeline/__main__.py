"""All commands under one name: `alignscope <command> …`, which is `python -m pipeline.<command> …`.

    alignscope                              what there is
    alignscope try reviews.csv              from a file of rows to an answer
    alignscope train --help                 a command's own help
    alignscope --completion bash            completion for the shell: eval "$(alignscope --completion bash)"
    python -m pipeline.__main__             the same as alignscope, or python -m pipeline
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pipeline.core import arguments
from pipeline.core.files import closest


@arguments.to_a_reader
def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = arguments.commands()
    if not words or words[0] in ("-h", "--help", "help"):
        print(arguments.overview())
        return 0
    if words[0] == "--version":
        print(f"alignscope {importlib.import_module('pipeline').__version__}")
        return 0
    if words[0] == "--completion":
        return arguments.completion(words[1:])
    if words[0] not in known:
        print(f"error: there is no command {words[0]!r}{closest(words[0], known)}; alignscope --help lists them", file=sys.stderr)
        return 2
    module = known[words[0]]
    if {"-h", "--help"} & set(words[1:]) and not arguments.takes_options(module):  # without importing the command
        print(arguments.overrides_help(module) if arguments.takes_overrides(module) else arguments.docstring(module))
        return 0
    if argv is None:  # Hydra reads them there
        sys.argv = [f"alignscope {words[0]}", *words[1:]]
    entry = importlib.import_module(f"pipeline.{module}").main
    return entry() if argv is None else entry(words[1:])


if __name__ == "__main__":
    sys.exit(main())
