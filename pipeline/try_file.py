"""From a file of rows to an answer: which way of aligning a model is worth it on your data, or none?

    alignscope try reviews.csv                                          look, plan, run, answer; Enter accepts what was understood
    alignscope try chats.jsonl --model Qwen/Qwen3-0.6B --hours 2 --card 24GB    a plan for another machine's card
    alignscope try reviews                                              go on with experiments/reviews.yaml, as it was written or edited
    python -m pipeline.try_file reviews.csv --yes                       the same command

Reads CSV (any separator and encoding), JSON, JSON Lines, Excel and Parquet, also in gzip, and data sets of the hub; chats, Alpaca and preference pairs are
told by their keys. Writes one file, experiments/<name>.yaml, which holds the task, the model, the techniques and the budget: edit it and run
`alignscope try <name>` again. Finished cells are kept; Ctrl-C keeps everything.
"""

from __future__ import annotations

import argparse
import sys

from pipeline.core.arguments import argument_entry, check_above_zero

MODEL = "smollm2_135m"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a file of rows, a data set of the hub (owner/name), or the name of an experiment that was made before")
    parser.add_argument("--text", help="the columns that hold the text, with commas between them (default: guessed)")
    parser.add_argument("--label", help="the column that holds the answer (default: guessed)")
    parser.add_argument("--prompt", help='what the model reads, for example "Review: {text}\\nSentiment:" (default: made of the columns\' names)')
    parser.add_argument("--normalise", action="store_true", help="make labels one that differ in case and spaces alone")
    parser.add_argument("--missing", choices=("error", "drop", "keep"), default="error",
                        help="rows whose answer is empty, or none, N/A and the like: an error, left out, or such words kept as answers (default: error)")
    parser.add_argument("--metric", help="what ranks the techniques: accuracy, macro_f1, exact_match, numeric, token_f1, rouge_l, or a function of yours, "
                        "module:function or folder/file.py:function (default: by the kind of answer)")
    parser.add_argument("--encoding", help="of a text file (default: told by its content)")
    parser.add_argument("--separator", help="between the columns of a CSV (default: told by its content)")
    parser.add_argument("--model", default=MODEL, help=f"a name of conf/model/, a folder, or a repository of the hub (default: {MODEL})")
    parser.add_argument("--techniques", help="which to compare, with commas between them (default: chosen by what is asked for; docs/techniques.md lists all)")
    parser.add_argument("--rows", type=int, help="labelled rows to train on (default: as many as the time allows)")
    parser.add_argument("--test-rows", type=int, help="rows to test on (default: as many as the time allows)")
    parser.add_argument("--hours", type=float, help="that all may take (default: 0.25 on a CPU, 0.5 on a GPU)")
    parser.add_argument("--card", help="plan for another machine's GPU of so many GiB, as in 24GB; nothing is run (default: this machine)")
    parser.add_argument("--name", help="of the experiment (default: the file's)")
    parser.add_argument("--yes", "-y", action="store_true", help="accept what was understood and planned without asking")
    parser.add_argument("--plan", action="store_true", help="stop after the plan")
    parser.add_argument("--json", action="store_true", help="print the answer (with --plan or --card: the plan) as JSON, nothing else")


def run(args: argparse.Namespace) -> int:
    """Look, plan, run, answer."""
    from pipeline.intake import flow

    check_above_zero(args, "rows", "test-rows", "hours")
    usual = vars(main.parser().parse_args([args.data]))
    return flow.run(args, [name for name, value in vars(args).items() if value != usual[name]])


main = argument_entry("try", __doc__, add, run)

if __name__ == "__main__":
    sys.exit(main())
