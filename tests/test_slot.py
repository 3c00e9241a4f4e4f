"""benchmarks.slot: which jobs an experiment has and in which order, and that a slot runs them all once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import slot
from pipeline.cell import grid
from pipeline.cell.composing import compose_cell
from pipeline.core.compose import by_key, compose
from pipeline.core.files import UserError
from pipeline.records import results

EXPERIMENT = """# @package _global_
experiment: mine
train: {batch_size: 8, validations: 1, epochs: 1}
tune: {trials: 2, rows: 16, only: [train.lr]}
grid:
  techniques: [zero_shot, full+tuned]
  variants:
    - {technique: lora+tuned, variant: r1, words: [method.config.r=1, method.config.lora_alpha=2]}
  seeds: [0, 1]
  train_rows: [16, 32]
"""


@pytest.fixture
def words(tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hydra's words of a slot of the experiment `mine`."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(EXPERIMENT)
    monkeypatch.setenv("ALIGNSCOPE_ROOT", str(tmp_path))
    slot._composed.cache_clear()
    slot.CELLS.clear()
    slot.AHEAD.clear()
    return [*(w for w in overrides if not w.startswith(("evaluate.latency", "evaluate.adapters"))), f"paths.tuning={tmp_path}/tuning"]


def jobs(words: list[str], *groups: slot.Group) -> list[slot.Job]:
    return slot.jobs(groups or [slot.Group(["mine"])], words)


def test_tuning_comes_first_then_the_fewest_rows_and_packs_are_one_job(words):
    names = [job.name for job in jobs(words)]
    assert names == [
        "mine.full.tune.16", "mine.lora+r1.tune.16",
        *(name for n in (16, 32) for name in (f"mine.zero_shot.n{n}.s0", f"mine.full.n{n}.s0", f"mine.full.n{n}.s1", f"mine.lora+r1.n{n}")),
    ]
    (packed, *_) = jobs(words, slot.Group(["mine"], ["lora+r1"], [1]))[1:]
    assert [by_key(cell)["train_rows"] for cell in packed.cells] == ["32", "32"] and by_key(packed.words)["train_rows"] == "16", "tuned at tune.rows"
    assert not packed.ready and not packed.done, "not tuned yet"
    assert {by_key(cell)["seed"] for job in jobs(words) for cell in job.cells} == {"0", "1"}
    with pytest.raises(UserError, match="experiment mine has 2 numbers of training rows, so no sizes=2; they count from 0"):
        jobs(words, slot.Group(["mine"], sizes=[0, 2]))
    with pytest.raises(UserError, match="sizes=x are no places in a grid's train_rows"):
        slot.run(["plan", "experiments=mine", "sizes=x"])
    with pytest.raises(UserError, match="has none of the techniques dora; it has zero_shot, full, lora"):
        jobs(words, slot.Group(["mine"], ["dora"]))


def test_what_is_composed_at_once_is_what_each_would_be(words):
    every = jobs(words)
    assert len(slot.AHEAD) == 6 and all(slot.AHEAD[own] == compose(own) for own in slot.AHEAD), "three techniques, as they are and as they are tuned"
    ready = [job for job in every if job.cells and job.ready]
    slot._cells_of(*(job.cells for job in ready))
    assert ready
    for job in ready:
        for cfg, own in zip(job.configs(), job.cells, strict=True):
            alone = compose_cell(own)
            alone.pack = len(job.cells) > 1
            assert cfg == alone


def test_two_experiments_take_turns_by_technique(words, tmp_path):
    (tmp_path / "experiments" / "other.yaml").write_text(EXPERIMENT.replace("mine", "other"))
    names = [job.name for job in jobs(words, slot.Group(["mine", "other"], [], [0]))]
    assert names[:4] == ["mine.full.tune.16", "other.full.tune.16", "mine.lora+r1.tune.16", "other.lora+r1.tune.16"]
    assert names[4:8] == ["mine.zero_shot.n16.s0", "other.zero_shot.n16.s0", "mine.full.n16.s0", "mine.full.n16.s1"], "no seed changes the base's answers"


def test_a_group_comes_after_the_one_before_and_repeats_nothing_of_it(words):
    every = jobs(words, slot.Group(["mine"], ["full"], [0]), slot.Group(["mine"], ["full", "zero_shot"]))
    assert [job.name for job in every] == ["mine.full.tune.16", "mine.full.n16.s0", "mine.full.n16.s1",
                                           "mine.zero_shot.n16.s0", "mine.zero_shot.n32.s0", "mine.full.n32.s0", "mine.full.n32.s1"]


def test_a_bad_command_is_one_sentence(capsys):
    assert slot.main(["fill"]) == 2 and slot.main(["run", "sizes=0"]) == 2 and slot.main(["run", "experiments=quick", "size=0"]) == 2
    said = capsys.readouterr().err
    assert "takes run or plan first, not 'fill'" in said and "name the experiments" in said and "does not take 'size=0'" in said


@pytest.mark.slow
def test_a_slot_does_all_that_is_missing_once_and_ends_when_its_time_is_up(words, tmp_path, imports, capfd):
    def run(*own: str) -> tuple[int, str]:
        code = slot.main(["run", "experiments=mine", *own, "--", *words])
        return code, capfd.readouterr().out

    code, said = run("limit_s=0")
    assert code == 1 and "mine: 0 of 2 tunings are done\nmine: 0 of 10 cells are done" in said
    code, said = run("processes=2")
    assert code == 0 and "mine: 2 of 2 tunings are done\nmine: 10 of 10 cells are done" in said, said
    folder = tmp_path / "results" / "mine"
    assert sorted(p.parent.name for p in folder.glob("*/result.json"))[0] == "full+tuned-s0-n16" and not list(folder.glob("*/artefact"))
    packed = results.read(folder / "lora+r1-tuned-s1-n32")
    assert packed.packed and packed.slots == 2 and packed.neighbours is not None and not packed.neighbours.turns, "its times are not its own"
    assert packed.tuning is not None and packed.tuning.file.endswith("lora+r1-n16.yaml")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    code, said = run()
    assert code == 0 and "jobs are not done" not in said and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert slot.main(["plan", "experiments=mine", "techniques=full", "/", "experiments=mine", "--", *words]) == 0
    assert "mine: 10 of 10 cells are done" in capfd.readouterr().out
    (folder / "full+tuned-s0-n16" / "result.json").unlink()
    code, said = run("techniques=full")
    assert code == 0 and "1 of 5 jobs are not done" in said
    assert not grid.to_run(grid.compose_cells([cell for job in jobs(words) for cell in job.cells]))
