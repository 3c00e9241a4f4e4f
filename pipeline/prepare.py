"""Raw source to data/<task>/: train, validation and test rows, transfer sets, and a manifest.

    python -m pipeline.prepare task=vader_movies

pipeline/data/recipe.py says what a task's YAML holds. Of a text that stands in a set several times the first row stays. The others are left out and
counted: as duplicates, or as contradicting where they have another answer (more than a tenth of a set is an error, but for generated answers). A text
that stands in two splits is an error, or dropped and counted (task.leakage). References to generate are scored as a model's answers would be: below
100% is an error that shows three rows, and so are answers longer than task.max_new_tokens. The same source and config give the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.compose import build, plain
from pipeline.core.files import atomic_folder, write_json, write_jsonl
from pipeline.data import recipe as tasks
from pipeline.data.sources import Loaded
from pipeline.data.splits import assemble, balance, case_variants, file_of, in_words, manifest_of, stored, warnings
from pipeline.scoring import references


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Prepare the task of a composed config and say what came of it."""
    recipe = tasks.read(cfg)
    loaded: Loaded = build(cfg.task.source, "task.source").read(Path(cfg.paths.work))
    sets, dropped = assemble(recipe, loaded)
    notes = references.check(sets, recipe, _cut(recipe, Path(cfg.paths.models) / cfg.model.name))
    folder = Path(cfg.paths.data) / recipe.name
    with atomic_folder(folder, "manifest.json", "task", "left_out") as beside:
        for name, rows in sets.items():
            write_jsonl(beside / file_of(name), stored(recipe, rows))
        write_json(beside / "manifest.json", manifest_of(recipe, plain(cfg)["task"], loaded, sets, dropped, beside))
    for name, rows in sets.items():
        print(f"{folder / file_of(name)}: {len(rows):,} rows{in_words(balance(rows))}")
    print("left out:", "; ".join(f"{reason} {sum(counts.values())}" for reason, counts in dropped.items()))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if variants := case_variants(sets):
        print(f"warning: {len(variants)} answers are spelt in ways that differ in case alone (first: {', '.join(variants[0])}); training tells them apart, "
              "scoring does not; make them one in the source", file=sys.stderr)
    for warning in warnings(recipe, sets):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


def _cut(recipe: tasks.Recipe, model: Path) -> references.Cut:
    """How answers are cut at task.max_new_tokens: by the model's tokenizer where the model is there, else by counting words."""
    if not (model / "tokenizer.json").exists():
        return references.by_words(recipe)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return references.by_tokens(recipe, lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids), tokenizer.decode)


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
