"""How long rows of 5 and of 77 choices take to answer on this machine's CPU: labels and messages like BANKING77's, generated here from a seed.

    python -m benchmarks.choices model=models/smollm2_135m rows=8 repeats=2

Three ways: the search (engine/branches.py, what a cell does), every choice of a row in one tree, and every choice a sequence of its own, each for the base
and for a soft prompt of 20 vectors. Times are CPU seconds of one thread; the last way is timed once, of the others the fastest of the repeats counts. Writes
benchmarks/results/choices.json, which docs/data.md quotes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed_files import FOLDER
from pipeline.core.commands import key_values, words_entry
from pipeline.core.files import read_json, write_json
from pipeline.data.choices import Contest
from pipeline.measure.clock import cpu_s
from pipeline.measure.machine import hardware

DEFAULTS = {"model": "models/smollm2_135m", "rows": "8", "repeats": "2", "out": str(FOLDER / "choices.json")}
BATCH_TOKENS = 4096
SUBJECTS = ["card", "virtual card", "transfer", "top up", "cash withdrawal", "exchange rate", "direct debit", "refund", "pin", "identity", "account"]
TROUBLES = ["payment fee charged", "not working", "pending", "limit reached", "about to expire", "not recognised", "declined"]


def labels() -> list[str]:
    """77 labels, many beginning alike."""
    return [f"{subject} {trouble}".replace(" ", "_") for subject in SUBJECTS for trouble in TROUBLES]


def texts(rows: int) -> list[tuple[str, str]]:
    """(message, label) by row."""
    rng, listed = random.Random(0), labels()
    opens = ["Hi, I think my", "Why is the", "Can you tell me if a", "There is something wrong with the", "Please help me with this"]
    ends = ["since yesterday?", "and what should I do now?", "on my statement.", "again, it is urgent.", "?"]
    found = []
    for _ in range(rows):
        label = rng.choice(listed)
        found.append((f"Message: {rng.choice(opens)} {label.replace('_', ' ')} {rng.choice(ends)}\nIntent:", label))
    return found


def run(words: Sequence[str]) -> int:
    """Time every way, print and write."""
    import torch

    from pipeline.core.settings import Precision, build
    from pipeline.models.base import load_model, load_tokenizer

    chosen = DEFAULTS | key_values(words, DEFAULTS, "benchmarks.choices")
    torch.set_num_threads(1)
    folder, device = Path(chosen["model"]), torch.device("cpu")
    base, tokenizer = load_model(folder, build(Precision, {"name": "fp32"}, "precision"), device), load_tokenizer(folder)
    entries = []
    for kind, model in (("base", base), ("soft prompt", _prompted(base))):
        seconds: dict[str, dict[int, float]] = {}
        answers: dict[str, dict[int, list[int]]] = {}
        for count in (5, 77):
            items, contest = _rows(tokenizer, int(chosen["rows"]), count)
            for way, work in _ways(model, items, contest).items():
                times = []
                for _ in range(int(chosen["repeats"]) if way != "sequences" else 1):
                    begin = cpu_s()
                    values = work()
                    times.append(cpu_s() - begin)
                seconds.setdefault(way, {})[count] = min(times)
                answers.setdefault(way, {})[count] = [max(range(count), key=row.__getitem__) for row in values]
        assert all(one == answers["search"] for one in answers.values()), "every way gives the same answers"
        for way, by_count in seconds.items():
            entries.append({"id": f"{kind}, {way}", "few_s": by_count[5], "many_s": by_count[77], "ratio": by_count[77] / by_count[5]})
            print(f"{entries[-1]['id']}: 5 choices {by_count[5]:.2f} s, 77 choices {by_count[77]:.2f} s, {by_count[77] / by_count[5]:.1f}x")
    about = {"id": "settings", "rows": int(chosen["rows"]), "repeats": int(chosen["repeats"]), "threads": torch.get_num_threads(), **hardware("cpu")}
    write_json(chosen["out"], [about, *entries])
    return 0


def _prompted(base: Any) -> Any:
    import copy

    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB")).eval()


def _rows(tokenizer: Any, rows: int, count: int) -> tuple[list[tuple[list[int], list[list[int]]]], Contest]:
    """Items with the right label and others, and what is wanted of them."""
    items, needed = [], []
    for text, label in texts(rows):
        listed = [label, *(one for one in labels() if one != label)][:count]
        random.Random(text).shuffle(listed)
        items.append((tokenizer(text)["input_ids"], [tokenizer(f" {one}", add_special_tokens=False)["input_ids"] for one in sorted(listed)]))
        needed.append(sorted(listed).index(label))
    return items, Contest([[1] * count] * rows, needed)


def _ways(model: Any, items: Any, contest: Contest) -> dict[str, Callable[[], list[list[float]]]]:
    import torch

    from pipeline.scoring.scorer import WHOLE, choice_log_likelihoods

    fixed = model, items, BATCH_TOKENS, 0, torch.device("cpu"), torch.float32
    return {
        "search": lambda: choice_log_likelihoods(*fixed, contest=contest),
        "tree": lambda: choice_log_likelihoods(*fixed),
        "sequences": lambda: choice_log_likelihoods(*fixed, owners=WHOLE),
    }


def table(path: Path) -> str:
    """The result file as a Markdown table."""
    lines = ["| model, way | 5 choices, s | 77 choices, s | 77 against 5 |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['id']} | {row['few_s']:.2f} | {row['many_s']:.2f} | {row['ratio']:.1f}x |" for row in read_json(path)[1:]]
    return "\n".join(lines)


main = words_entry(run)

if __name__ == "__main__":
    sys.exit(main())
