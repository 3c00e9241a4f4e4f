"""pack=true on the CPU: three seeds trained at once become three cells like those trained alone, and say that they were packed."""

from __future__ import annotations

import pytest

from pipeline.cell import grid, identity, inputs
from pipeline.cell import packing as cells_packed
from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl
from pipeline.records.results import read

SHORT = ["technique=lora", "precision=fp32", "experiment=tried", "train_rows=32", "train.batch_size=8", "train.epochs=2", "train.lr=0.02"]


@pytest.fixture
def words(overrides: list[str], imports: None) -> list[str]:
    return [*overrides, *SHORT]


def seeds(words, *more):
    return [compose([*words, *more, f"seed={seed}"]) for seed in range(3)]


def test_seeds_packed_are_the_cells_that_they_are_alone(words, tmp_path, capfd):
    packed, alone = seeds(words, "pack=true"), seeds(words, f"paths.results={tmp_path}/alone")
    assert grid.run_cells(packed) == 0 and grid.run_cells(alone[:1]) == 0
    assert "lora-s2-n32: trained with 3 at once, 8 steps" in capfd.readouterr().out
    for cfg in packed:
        result = read(identity.folder_of(cfg))
        assert result.packed and result.slots == 3 and any("trained packed, 3 cells" in note for note in result.notes)
        assert result.memory.peak_bytes is None and result.work.tokens_per_s is None and result.phases.train_s > 0 and result.inference.peak_bytes
        assert sum(v for k, v in vars(result.phases).items() if k != "wall_s") == pytest.approx(result.phases.wall_s, abs=0.01)
        assert not identity.packed_of(cfg).exists(), "what waited is gone once the result is on disk"
    mine, solo = (identity.folder_of(group[0]) for group in (packed, alone))
    assert not read(solo).packed and [h["loss"] for h in read(mine).history] == pytest.approx([h["loss"] for h in read(solo).history], rel=1e-4)
    answers = [[row["prediction"] for row in read_jsonl(folder / "predictions.jsonl")] for folder in (mine, solo)]
    assert sum(a == b for a, b in zip(*answers, strict=True)) >= 0.995 * len(answers[0])
    assert read(mine).size == read(solo).size
    assert grid.run_cells(packed) == 0 and "3 of 3 cells are done" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_run_goes_on_with_what_was_trained(words, monkeypatch, capfd):
    packed = seeds(words, "pack=true")
    shared = inputs.preload(packed)
    cells_packed.train(packed[:2], shared)
    assert [identity.packed_of(cfg).exists() for cfg in packed] == [True, True, False]
    capfd.readouterr()
    assert grid.run_cells(packed) == 0
    assert "at once" not in capfd.readouterr().out.replace("cells at once", "")
    assert [read(identity.folder_of(cfg)).packed for cfg in packed] == [True, True, False]


@pytest.mark.parametrize("held", [b"", bytes(5000), b"PK\x03\x04"], ids=["empty", "zeros", "cut off"])
def test_a_damaged_training_of_a_pack_is_set_aside_and_its_cell_trains_alone(words, held, capfd):
    cfg = seeds(words, "pack=true", "train.epochs=1")[0]
    path = identity.packed_of(cfg)
    path.parent.mkdir(parents=True)
    path.write_bytes(held)
    assert grid.run_cells([cfg]) == 0
    assert f"warning: {path} is damaged (" in capfd.readouterr().err and [p.name for p in path.parent.iterdir()] == [f"{path.name}.damaged"]
    assert not read(identity.folder_of(cfg)).packed


def test_what_cannot_be_packed_trains_alone_and_says_why(words, capfd):
    both = seeds(words, "pack=true", "method.config.use_dora=true", "train.epochs=1")[:2]
    assert grid.run_cells(both) == 0
    assert "one after another, because LoRA with use_dora has a hand-written step for one run alone: lora-s0-n32, lora-s1-n32" in capfd.readouterr().out
    assert not any(read(identity.folder_of(cfg)).packed for cfg in both)


@pytest.mark.slow
def test_out_of_memory_leaves_them_to_train_alone(words, monkeypatch, capfd):
    from pipeline.cell import packing

    opened = packing.Packing.open

    def small(self, slots, *more, **options):
        if slots > 1:
            raise RuntimeError("CUDA out of memory")
        return opened(self, slots, *more, **options)

    monkeypatch.setattr(packing.Packing, "open", small)
    packed = seeds(words, "pack=true", "train.epochs=1")
    assert grid.run_cells(packed) == 0
    assert "3 at once ran out of memory" in capfd.readouterr().out
    assert not any(read(identity.folder_of(cfg)).packed for cfg in packed)
