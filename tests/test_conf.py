"""Every YAML under conf/ composes with every experiment, and what it composes can be built."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from pipeline.core import commands, settings
from pipeline.core import compose as compose_module
from pipeline.core.compose import CONF, ROOT, build, compose, plain
from pipeline.core.files import UserError
from pipeline.core.peft_files import DEFAULTS
from pipeline.data import recipe
from pipeline.records import mlflow as tracking
from pipeline.search import study
from pipeline.search.space import at

FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in ROOT.glob("experiments/*.yaml") if p.with_suffix("").joinpath("params.yaml").exists())
"""Those that DVC knows; tests/test_plan.py composes the grids of the others, which differ from these in the same keys."""
BUILT = ("method", "objective", "teacher", "task.source", "model.source")


PEFT = ["technique=peft_config", "technique.path=tests/data/peft/lora/rank4/adapter_config.json"]
"""What a user gives with conf/technique/peft_config.yaml: a file that composing reads."""


def composed(*overrides: str) -> DictConfig:
    """The config, with a word in each place that a user must fill."""
    cfg = compose(overrides)
    missing = [key for key in OmegaConf.missing_keys(cfg) if not key.startswith("hydra.")]
    return compose([*overrides, *(f"{key}=word" for key in missing)]) if missing else cfg


def override(file: Path) -> list[str]:
    if file.stem == "peft_config":
        return PEFT
    return [] if file.name == "config.yaml" else [f"{file.parent.as_posix()}={file.stem}"]


def test_there_are_files():
    assert len(FILES) > 40 and {"quick", "standard"} <= set(EXPERIMENTS)
    assert not list(CONF.rglob("*.yml")), "Hydra reads .yaml alone"


PARTS = ("method", "objective", "search")
"""Groups whose files the techniques compose: by themselves they are slow tests, as is every experiment but quick."""


def in_other_tests(file: Path) -> bool:
    """Whether it is composed elsewhere, too: a part of a technique, or one of PEFT's further tuners (test_tuners.py)."""
    return file.parent.name in PARTS or (file.parent.name == "technique" and "experiments/tuners" in (CONF / file).read_text())


@pytest.mark.parametrize("experiment", [e if e == "quick" else pytest.param(e, marks=pytest.mark.slow) for e in EXPERIMENTS])
@pytest.mark.parametrize("file", [pytest.param(f, marks=pytest.mark.slow) if in_other_tests(f) else f for f in FILES], ids=str)
def test_every_file_composes_with_every_experiment_and_can_be_built(file, experiment):
    cfg = composed(f"experiments={experiment}", *override(file))
    assert cfg.experiment == experiment
    settings.read(cfg)
    recipe.read(cfg)
    settings.build(tracking.Tracking, plain(cfg)["tracking"], "tracking")
    if {"r", "lora_alpha"} <= set(cfg.method.get("config", {})):  # else conf/sweep/ has no rank to search
        study.read(at(cfg, {"train.lr": cfg.train.lr or 1e-3}))  # whatever lies under models/ here
    assert set(cfg.model) == {field.name for field in dataclasses.fields(settings.Model)}
    for group in BUILT:
        assert build(OmegaConf.select(cfg, group), group) is not None


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_says_what_it_is_and_is_named_as_it_calls_itself(file):
    text = (CONF / file).read_text()
    if file.parent.name not in ("precision",):
        assert text.startswith("#"), "a config opens with a line that says what it is"
    values = yaml.safe_load(text)
    if file.parent.name == "technique":
        assert values["technique"]["name"] == file.stem
    if file.parent.name in ("task", "model", "teacher", "precision"):
        assert values["name"] == file.stem


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_is_named_as_its_file(experiment):
    assert compose([f"experiments={experiment}"]).experiment == experiment


def test_experiments_lie_outside_conf_and_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose(["experiments=quick"]).experiment == "quick"
    with pytest.raises(UserError, match="unknown experiments 'quik', did you mean 'quick'"):
        compose(["experiments=quik"])


AS_HYDRA = [
    [], ["technique=dora", "experiments=quick", "seed=3", "train.lr=1e-3"], ["teacher=lexicon", "~search", "+train.label_smoothing=0.1", "++train.lr=2"],
    ["method={type: none}"], ["task=trec", "task.leakage=drop", "paths.data=a/b", "technique=lora+tuned"], ["writer=local", "train_rows=[1,2]"],
    ["~writer"], ["technique=lorra"], ["train.epoch=2"], ["seed=1,2"], ["technique=lora,full"],
    ["+technique=lora"], ["~train.lr=7"], ["~nothing"], ["task@here=trec"], ["train.lr={a: 1}"],
    ["train.lr=${seed}"], ["a b=1"],
]
"""Overrides of every kind; the second half does not compose."""


@pytest.mark.parametrize("words", AS_HYDRA, ids=" ".join)
def test_composed_by_parts_is_what_hydra_composes(words):
    """From a cold cache and a warm one: the same config, flags included, or the same sentence."""
    def said(composing: Callable[[list[str]], DictConfig]) -> object:
        try:
            cfg = composing(compose_module.spelled_out(words))
        except (*compose_module.WRONG_CONFIG, UserError, ValueError) as error:
            return type(error), compose_module.explain(error)
        return OmegaConf.to_container(cfg), OmegaConf.is_struct(cfg), OmegaConf.is_readonly(cfg)

    whole = said(compose_module._by_hydra)
    for _ in range(2):
        assert said(compose_module._by_parts) == whole


@pytest.mark.parametrize("words", [[], AS_HYDRA[1], AS_HYDRA[4]], ids=" ".join)
def test_a_command_line_without_flags_is_composed_once_as_hydra_composes_it_twice(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    taken: list[object] = []

    def run(cfg: DictConfig, overrides: list[str]) -> int:
        root = logging.getLogger()
        taken.append((OmegaConf.to_container(cfg), OmegaConf.is_struct(cfg), OmegaConf.is_readonly(cfg), overrides, root.level, len(root.handlers)))
        return 3

    for composing in (commands._by_hydra, lambda run: commands._composed_once(run, words)):
        monkeypatch.setattr(sys, "argv", ["train", *words])
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        assert composing(run) == 3
    assert taken[0] == taken[1]


def test_a_yaml_that_changes_is_composed_anew_and_a_config_that_is_changed_spoils_no_other(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNSCOPE_ROOT", str(tmp_path))
    own = tmp_path / "experiments/own.yaml"
    own.parent.mkdir()
    for seed in (3, 14):
        own.write_text(f"# @package _global_\nexperiment: own\nseed: {seed}\n")
        for _ in range(2):
            cfg = compose(["experiments=own"])
            assert cfg.seed == seed
            cfg.seed, cfg.train.lr = 99, 99


def test_the_documents_name_every_technique_and_no_other():
    text = (ROOT / "docs" / "techniques.md").read_text()
    rows = {name for line in text.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    there = {f.stem for f in FILES if f.parent.name == "technique"}
    assert there - rows == {"peft_config"} and "## Any adapter of PEFT" in text
    teachers = {f.stem for f in FILES if f.parent.name == "teacher"} - {"none"}
    assert teachers <= rows and rows - there - teachers <= {*DEFAULTS, "loraplus_lr_ratio"}, "the table of training_params.json"


def test_a_technique_says_its_family_and_where_its_rate_comes_from():
    for file in FILES:
        if file.parent.name == "technique":
            text = (CONF / file).read_text()
            assert yaml.safe_load(text)["technique"]["family"]
            said = ("Untuned", "Fitted on", "Default found", "Held-back accuracy", "# unused")
            assert any(words in text for words in said) or file.stem == "peft_config", file
