"""A teacher's synthetic rows for a prepared task, in synthetic/<task>/<name>/: rows.jsonl and manifest.json.

    python -m pipeline.synthesize task=vader_movies synthetic=labels writer=local writer.temperature=0.9 train_rows=64
    python -m pipeline.synthesize task=instruct synthetic=taxonomy synthetic.seeds=my/taxonomy writer=server writer.temperature=0.9

From labelled training rows (synthetic.seeds=task: those that a cell of this seed and train_rows has, no others), or from InstructLab's qna.yaml
files. Rows near to a validation, test or transfer row are dropped and counted. The writer keeps its texts: an interrupted run resumes, and the
same command writes the same rows. See docs/synthetic.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pipeline.core.commands import entry
from pipeline.core.compose import build
from pipeline.core.files import UserError, atomic_folder, sha256, write_json, write_jsonl
from pipeline.data import recipe as tasks
from pipeline.data.rows import check_prepared, read_rows
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.teachers.synthetic.sets import Rows, check, form_of, held_out_rows, in_words, manifest_of, sets_of, whole, write_set
from pipeline.teachers.synthetic.writing import near_texts
from pipeline.teachers.writers import Writer


def run(cfg: DictConfig, overrides: list[str]) -> int:
    """Write the synthetic rows of a composed config and report their counts."""
    wanted = synthetic.read(cfg)
    check(cfg, wanted)
    data = Path(cfg.paths.data) / cfg.task.name
    check_prepared(data, cfg.task.name)
    recipe = tasks.read(cfg)
    form = form_of(recipe, wanted)
    writer: Writer = build(cfg.writer, "writer")
    writer.check()
    if writer.temperature == 0:
        raise UserError("writer.temperature=0 writes the same text every time; set writer.temperature=0.9")
    train = read_rows(data / "train.jsonl")
    held_out = near_texts((form.text(row) for row in held_out_rows(data, recipe)), wanted.near)
    rows: Rows = []
    sets: dict[str, Any] = {}
    for tag, leaves in sets_of(cfg, wanted, form).items():
        before = writer.spent.seconds
        known = near_texts([form.text(row) for row in train] + [whole(e) for leaf in leaves for e in leaf.examples], wanted.near)
        new, report = write_set(wanted, form, leaves, writer, (held_out, known), tag)
        rows += new
        beside = sum(e.row is None for leaf in leaves for e in leaf.examples)
        sets[tag] = report | {"seconds": round(writer.spent.seconds - before, 3), "examples_beside": beside}
    about = manifest_of(cfg, wanted, data, sets, writer.about())
    folder = synthetic.folder_of(cfg)
    with atomic_folder(folder, "manifest.json", "rows_sha256") as beside_it:
        write_jsonl(beside_it / "rows.jsonl", rows)
        write_json(beside_it / "manifest.json", about | {"rows_sha256": sha256(beside_it / "rows.jsonl")})
    for tag, report in sets.items():
        print(f"{folder / 'rows.jsonl'}, {'seed ' * (tag != 'all')}{tag}: {in_words(report)}")
    if not rows:
        raise UserError(f"no row of {folder} came through the filters ({in_words(next(iter(sets.values())))}); try a larger writer.model")
    return 0


main = entry(run)

if __name__ == "__main__":
    sys.exit(main())
