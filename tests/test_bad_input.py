"""Bad input to training, through the real entry: one sentence, exit code 2, nothing half-written.

What a base model, an artefact, a result file or a settings group refuses stands in the tests of those modules.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_task

from pipeline import train
from pipeline.cell import grid, identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import compose
from pipeline.core.files import read_jsonl
from pipeline.records.results import read

Refuse = Callable[..., str]


@pytest.fixture
def refuse(overrides, imports, tmp_path, capfd) -> Refuse:
    """Run pipeline.train with further overrides; the one sentence with which it ends, after a look for leavings."""

    def run(*more: str) -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        assert train.main([*overrides, *more]) == 2
        error = capfd.readouterr().err
        assert re.fullmatch(r"error: [^\n]+\n", error), error
        assert tree(tmp_path) == before, "nothing is left"
        return error

    return run


@pytest.fixture
def overrides(overrides: list[str]) -> list[str]:
    return [*overrides, "evaluate.test_rows=8", "evaluate.latency_rows=1", "train.validations=1"]


def tree(folder: Path) -> set[str]:
    """Files below a folder, those for resuming and caching and locks apart."""
    return {str(p) for p in folder.rglob("*") if p.is_file() and "work" not in p.parts and p.suffix != ".lock"}


@pytest.mark.parametrize(("group", "word", "near"), [
    ("technique", "lorra", "lora"), ("precision", "nf5", "nf4"), ("experiments", "quik", "quick"),
])
def test_an_unknown_option_of_a_group_lists_those_there_are(refuse, group, word, near):
    error = refuse(f"{group}={word}")
    assert f"unknown {group} {word!r}, did you mean {near!r}?; there are: " in error and near in error.partition("there are")[2]


@pytest.mark.parametrize(("override", "key", "near"), [
    ("sed=1", "sed", "seed"),
    ("train.lrr=1", "train.lrr", "lr"),
    ("method.config.rr=4", "method.config.rr", "r"),
    ("task.source.packge=x", "task.source.packge", "package"),
])
def test_a_misspelt_key_is_named_at_any_depth(refuse, override, key, near):
    error = refuse("technique=lora", override)
    assert f"unknown config key '{key}'" in error
    assert near == "r" or f"did you mean {near!r}?" in error


@pytest.mark.parametrize(("override", "sentence"), [
    ("+train.lrr=1", "unknown config key 'train.lrr', did you mean 'lr'?"),
    ("+method.mege=true", "config group 'method' is refused"),
    ("+method.config.rr=4", "config group 'method.config' is refused"),
    ("+sedd=1", "unknown config key 'sedd', did you mean 'seed'?"),
    ("+paths.result=x", "unknown config key 'paths.result', did you mean 'results'?"),
])
def test_a_misspelt_key_of_a_yaml_group_is_named(refuse, override, sentence):
    """A + override adds a key as a misspelt line of a YAML would."""
    assert sentence in refuse("technique=lora", override)


@pytest.mark.parametrize(("override", "sentence"), [
    ("train=5", "'train=5' is refused: train is a config group, which takes the name of one of its YAMLs"),
    ("technique=null", "'technique=null' is refused: technique is a config group"),
    ("method=[1]", "'method=[1]' is refused: method is a config group"),
    ("technique=[lora,full]", "technique is a config group, which takes the name of one"),
    ("hydra=5", "hydra is a config group"), ("experiments=null", "experiments is a config group"),
    ("=1", "the override '=1' has no key; write key=value"),
    ("seed=99999999999999999999", "config key 'seed' is 99999999999999999999; it must be at least 0"),
    ("paths=null", "config group 'paths' is None; it takes keys and values"), ("forecast=5", "config group 'forecast' is 5"),
    ("paths.results=null", "config key 'paths.results' is None; it takes the path of a folder"), ("paths.results=5", "'paths.results' is 5"),
    ("paths.results=''", "'paths.results' is ''"), ("experiment=[1]", "config key 'experiment' is [1], which cannot name a folder"),
    ("experiment=null", "config key 'experiment' is None"), ("model.name=null", "config key 'model.name' is None"),
    ("model.note=[1]", "config key 'model.note' is [1]; it takes str or null"), ("+start.a=1", "config key 'start' is {'a': 1}; it takes str or null"),
    ("model.note=\udcff", "holds half of a surrogate pair, which is no character"),
])
def test_an_override_that_means_nothing(refuse, override, sentence):
    assert sentence in refuse(*(["technique=lora"] if not override.startswith("technique") else []), override)


def test_a_yaml_with_a_key_twice(refuse, tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "own.yaml").write_text("name: own\nname: own\n")
    error = refuse("technique=lora", f"hydra.searchpath=[file://{tmp_path}]", "task=own")
    assert "the config does not compose" in error and "own.yaml" in error and "duplicate key name" in error


def test_a_chat_task_on_a_model_without_a_chat_template(refuse):
    assert "task.format is chat, but the model's tokenizer has no chat template; choose task.format=plain" in refuse("technique=lora", "+task.format=chat")


@pytest.mark.parametrize(("override", "sentence"), [
    ("task.source=5", "config key 'task.source' is 5; it takes dict"), ("task.prompt=null", "config key 'task.prompt' is None; it takes str"),
    ("synthetic.share=x", "config key 'synthetic.share' is 'x'; it takes float"),
])
def test_a_key_that_no_cell_reads_is_checked_where_the_result_would_say_it(refuse, override, sentence):
    assert sentence in refuse("technique=lora", override)


def test_a_transfer_set_that_is_not_there_is_told_even_where_it_is_not_scored(refuse):
    error = refuse("technique=lora", "task.transfer=[nothing]", "evaluate.transfer_rows=0")
    assert "task.transfer names 'nothing', but " in error and "transfer/nothing.jsonl does not exist; take it out, or run: python -m pipeline.prepare" in error


def test_a_misspelt_target(refuse):
    assert "config key 'method.type' is 'peft_adaptor', did you mean 'peft_adapter'?; there are: " in refuse("technique=lora", "method.type=peft_adaptor")


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_1(refuse, r):
    assert f"method.config.r is {r}; it must be a whole number of at least 1" in refuse("technique=lora", f"method.config.r={r}")


def test_a_batch_larger_than_the_data(refuse):
    assert "train.batch_size=32 is larger than train_rows=16; lower it or raise train_rows" in refuse(
        "technique=lora", "train_rows=16", "train.batch_size=32"
    )
    assert "train.batch_size=65 is larger than the 64 training rows; lower it" in refuse("technique=lora", "train.batch_size=65")


def test_more_rows_than_there_are(refuse):
    assert "train_rows=65, but " in refuse("technique=lora", "train_rows=65")


def test_more_demonstrations_than_rows(refuse):
    assert "method.k=8, but there are 4 training rows; lower k or raise train_rows" in refuse(
        "technique=few_shot", "method.k=8", "train_rows=4"
    )


def test_data_that_is_not_prepared(refuse, tmp_path):
    error = refuse("technique=lora", f"paths.data={tmp_path}/none")
    assert f"{tmp_path}/none/vader_movies is not prepared; run: python -m pipeline.prepare task=vader_movies" in error


def test_a_model_that_is_not_there(refuse, tmp_path):
    error = refuse("technique=lora", f"paths.models={tmp_path}/none")
    assert f"{tmp_path}/none/smollm2_135m is not there; run: python -m pipeline.base_model model=smollm2_135m" in error


def test_a_model_without_a_tokenizer(refuse, tiny, tmp_path):
    shutil.copytree(tiny / "models", tmp_path / "models", ignore=shutil.ignore_patterns("tokenizer*"))
    error = refuse("technique=lora", f"paths.models={tmp_path}/models")
    assert "smollm2_135m holds no tokenizer (tokenizer.json); put the model's tokenizer files beside its weights" in error


@pytest.mark.parametrize("technique", ["teacher", "step_by_step"])
def test_rationales_that_are_missing(refuse, tmp_path, technique):
    error = refuse(f"technique={technique}", f"paths.rationales={tmp_path}/none")
    assert "lexicon/rationales.jsonl does not exist; run: python -m pipeline.rationales task=vader_movies teacher=lexicon" in error


def test_a_technique_that_needs_a_teacher_and_has_none(refuse):
    assert "learns from a teacher, but teacher=none; choose teacher=lexicon, stored, local or server" in refuse("technique=step_by_step", "teacher=none")


def test_a_gpu_asked_for_and_absent(refuse):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "device=cuda, but torch finds no GPU here; set device=auto or device=cpu" in refuse("technique=lora", "device=cuda")


def test_a_soft_prompt_cannot_be_merged(refuse):
    assert "PROMPT_TUNING cannot be merged into the base; set method.merge=false" in refuse("technique=prompt_tuning", "method.merge=true")


def test_full_fine_tuning_of_a_quantised_base(refuse):
    assert "full fine-tuning cannot train nf4 weights; choose precision=auto, fp32 or bf16" in refuse("technique=full", "precision=nf4")


def test_target_modules_that_the_model_lacks(refuse):
    assert "this adapter does not fit the model: " in refuse("technique=lora", "method.config.target_modules=[c_attn]")


def long_data(folder: Path, split: str, rows: int) -> str:
    """A task with a few texts of 300 tokens and more in one split, beyond the tiny model's context of 256."""
    write_task(folder / "vader_movies")
    path = folder / "vader_movies" / f"{split}.jsonl"
    stored = read_jsonl(path)
    for row in stored[:rows]:
        row["prompt"] = "film plot " * 150 + row["prompt"]
    path.write_text("".join(json.dumps(r) + "\n" for r in stored))
    return f"paths.data={folder}"


@pytest.mark.parametrize("split", ["train", "validation", "test", "transfer/news"])
def test_texts_longer_than_the_models_context_are_counted_before_anything_is_trained(refuse, tmp_path, monkeypatch, split):
    monkeypatch.setattr("pipeline.training.stepping.Eager.step", lambda *_: pytest.fail("training began"))
    error = refuse("technique=lora", "train.steps=2", "evaluate.transfer_rows=null", long_data(tmp_path / "data", split, 3))
    what = {"train": "training"}.get(split, split)
    assert f"3 texts of the {what} rows are longer than 256 tokens (train.max_length" in error and "or set train.too_long=truncate" in error


@pytest.mark.parametrize(
    ("split", "technique"), [("train", "lora"), ("validation", "lora"), ("test", "lora"), ("transfer/news", "lora"), ("test", "zero_shot")]
)
def test_texts_that_are_cut_are_counted_in_the_notes(overrides, tmp_path, split, technique):
    cfg = compose(
        [
            *overrides,
            f"technique={technique}",
            "train.steps=4",
            "train.validations=3",
            "train.too_long=truncate",
            "evaluate.transfer_rows=null",
            long_data(tmp_path / "data", split, 3),
        ]
    )
    what = {"train": "training"}.get(split, split)
    cut = [note for note in cell_run.run(cfg).notes if "lost their start" in note]
    assert cut == [f"3 texts of the {what} rows longer than 256 tokens lost their start"]


@pytest.mark.parametrize("technique", ["lora", "teacher", "zero_shot"])
def test_results_that_cannot_be_written_are_told_before_training(refuse, tmp_path, monkeypatch, technique):
    monkeypatch.setattr("pipeline.training.stepping.Eager.step", lambda *_: pytest.fail("training began"))
    (tmp_path / "file").write_text("in the way")
    assert f"cannot write {tmp_path}/file" in refuse(f"technique={technique}", f"paths.results={tmp_path}/file")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_work_folder_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = refuse("technique=lora", f"paths.work={tmp_path}/file", "train.steps=2", "train.checkpoint_every_s=0")
    assert f"cannot write {tmp_path}/file/locks/" in error


def test_a_full_disk_while_saving_the_artefact(refuse, small_disk):
    error = refuse("technique=full", "train.steps=1", f"paths.results={small_disk}")
    assert f"cannot write {small_disk}/scratch/full-s0-nall/artefact: no space left on the disk; free space, then run again" in error


def test_a_full_disk_while_saving_a_checkpoint(refuse, small_disk):
    work = small_disk / "work"
    error = refuse("technique=full", "train.steps=2", f"paths.work={work}", "train.checkpoint_every_s=0")
    assert f"cannot write {work}/checkpoints/" in error and "no space left on the disk" in error
    left = [p for p in work.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert {p.relative_to(work).parts[0] for p in left} <= {"failed"}, "nothing but why the cell ended, for the report"


@pytest.mark.parametrize("file", ["predictions.jsonl", "result.json"])
def test_a_full_disk_at_a_small_file_leaves_no_result(overrides, imports, tmp_path, monkeypatch, capfd, file):
    """The artefact still fitted; what counts is that no result.json stands for an unfinished cell, and that a rerun mends it."""
    import errno

    from pipeline.core import files

    replace = files.os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    argv = [*overrides, "technique=lora", "train.steps=1"]
    monkeypatch.setattr(files.os, "replace", full)
    assert train.main(argv) == 2
    error = capfd.readouterr().err
    folder = identity.folder_of(compose(argv))
    assert re.fullmatch(rf"error: cannot write {folder}/{file}: No space left on device; free space[^\n]+\n", error), error
    assert not (folder / "result.json").exists() and not [p for p in folder.rglob("*") if p.name.startswith(".")]
    assert not grid.is_done(compose(argv))
    monkeypatch.undo()
    assert file != "result.json" or (train.main(argv) == 0 and grid.is_done(compose(argv)))


def test_a_refused_config_does_not_cost_the_finished_result(overrides, imports):
    argv = [*overrides, "technique=lora", "train.steps=1"]
    assert train.main(argv) == 0
    assert train.main([*argv, "train.batch_size=65"]) == 2
    assert read(identity.folder_of(compose(argv))).status == "ok" and grid.is_done(compose(argv))


def test_a_result_of_an_older_schema_is_named_where_a_cell_is_looked_up(overrides, tmp_path):
    from pipeline.core.files import UserError

    cfg = compose([*overrides, "technique=lora"])
    folder = identity.folder_of(cfg)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"schema": 0}')
    with pytest.raises(
        UserError, match=f"{folder}/result.json was written by schema 0, this version reads schemas 1 and 2; delete the cell's folder"
    ):
        grid.is_done(cfg)
