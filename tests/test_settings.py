"""The settings groups are strict: every key and value that is wrong is named in full, before anything is loaded."""

from __future__ import annotations

import math
import typing

import pytest
from omegaconf import DictConfig, OmegaConf

from pipeline.core.compose import compose, plain
from pipeline.core.files import UserError
from pipeline.core.schema import checked
from pipeline.core.settings import Evaluate, Precision, Settings, Task, Train, build, read

TRAIN = {"lr": 0.1, "epochs": 1, "batch_size": 4, "micro_batch_tokens": 64}


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose(["technique=lora"])


def changed(cfg: DictConfig, override: str) -> DictConfig:
    """The config with one value changed or added, as an override would (composing each anew takes a third of a second)."""
    key, _, value = override.partition("=")
    cfg = cfg.copy()
    OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"v={value}"]).v, force_add=True)
    return cfg


def test_the_default_cell_reads_with_the_yamls_values():
    settings = read(compose(["technique=qlora"]))
    assert isinstance(settings, Settings)
    assert (settings.technique.name, settings.precision.name, settings.train.optimizer) == ("qlora", "nf4", "paged_adamw")
    assert settings.task.transfer == ("products", "news", "tweets")
    assert isinstance(settings.train.epochs, float)


@pytest.mark.parametrize(("override", "sentence"), [
    ("train.lrr=0.1", r"unknown config key 'train\.lrr', did you mean 'lr'\?; train takes lr, epochs"),
    ("evaluate.test_row=3", r"unknown config key 'evaluate\.test_row', did you mean 'test_rows'\?"),
    ("precision.double_quantization=true", r"unknown config key 'precision\.double_quantization', did you mean 'double_quantisation'\?"),
    ("technique.kind=x", r"unknown config key 'technique\.kind'; technique takes name, family"),
    ("train.packing=auto", r"config key 'train\.packing' is called 'train\.padding_free' now; write that instead$"),
])
def test_an_added_key_that_no_setting_knows(composed, override, sentence):
    with pytest.raises(UserError, match=sentence):
        read(changed(composed, override))


def test_an_override_by_a_key_s_old_name_is_refused():
    with pytest.raises(UserError, match=r"^config key 'train\.packing' is called 'train\.padding_free' now; write that instead$"):
        compose(["technique=lora", "train.packing=always"])


@pytest.mark.parametrize(("override", "sentence"), [
    ("train.lr=0", r"'train\.lr' is 0\.0; it must be above 0"),
    ("train.lr=-1e-3", r"'train\.lr' is -0\.001; it must be above 0"),
    ("train.lr=.nan", r"'train\.lr' is nan; it takes a finite number"),
    ("train.lr=.inf", r"'train\.lr' is inf; it takes a finite number"),
    ("train.epochs=.inf", r"'train\.epochs' is inf; it takes a finite number"),
    ("train.max_grad_norm=.nan", r"'train\.max_grad_norm' is nan; it takes a finite number"),
    ("train.max_grad_norm=-.inf", r"'train\.max_grad_norm' is -inf; it takes a finite number"),
    ("evaluate.validation_share=.nan", r"'evaluate\.validation_share' is nan; it takes a finite number"),
    ("memory_limit_gb=.inf", r"'memory_limit_gb' is inf; it takes a finite number"),
    (f"train.weight_decay={10**400}", r"'train\.weight_decay' is 10{400}; it takes a finite number"),
    ("train.lr=fast", r"'train\.lr' is 'fast'; it takes float"),
    ("train.batch_size=0", r"'train\.batch_size' is 0; it must be at least 1"),
    ("train.batch_size=2.5", r"'train\.batch_size' is 2\.5; it takes int"),
    ("train.batch_size=true", r"'train\.batch_size' is True; it takes int"),
    ("train.micro_batch_tokens=0", r"'train\.micro_batch_tokens' is 0"),
    ("train.epochs=-1", r"'train\.epochs' is -1"),
    ("train.steps=-1", r"'train\.steps' is -1"),
    ("train.steps=some", r"'train\.steps' is 'some'; it takes int or null"),
    ("train.validations=-1", r"'train\.validations' is -1"),
    ("train.max_length=1", r"'train\.max_length' is 1"),
    ("train.optimizer=adam", r"'train\.optimizer' is 'adam'; choose one of adamw, paged_adamw"),
    ("train.schedule=cosinus", r"'train\.schedule' is 'cosinus'; choose one of cosine, linear, constant"),
    ("train.too_long=cut", r"'train\.too_long' is 'cut'; choose one of error, truncate"),
    ("train.progress=1", r"'train\.progress' is 1; it takes true or false"),
    ("train.warmup_share=1.5", r"'train\.warmup_share' is 1\.5"),
    ("train.max_grad_norm=0", r"'train\.max_grad_norm' is 0"),
    ("train.weight_decay=-1", r"'train\.weight_decay' is -1"),
    ("train.checkpoint_every_s=-1", r"'train\.checkpoint_every_s' is -1"),
    ("evaluate.batch_tokens=0", r"'evaluate\.batch_tokens' is 0"),
    ("evaluate.test_rows=0", r"'evaluate\.test_rows' is 0; it must be at least 1"),
    ("evaluate.transfer_rows=-1", r"'evaluate\.transfer_rows' is -1"),
    ("evaluate.validation_share=0", r"'evaluate\.validation_share' is 0.*above 0, at most 0\.2 \(validation rows are labelled data\)"),
    ("evaluate.validation_share=0.3", r"'evaluate\.validation_share' is 0\.3.*at most 0\.2"),
    ("evaluate.adapters=[1,0]", r"'evaluate\.adapters\[1\]' is 0; it must be at least 1"),
    ("evaluate.adapters=[a]", r"'evaluate\.adapters\[0\]' is 'a'; it takes int"),
    ("evaluate.adapters=4", r"'evaluate\.adapters' is 4; it takes a list"),
    ("evaluate.latency_rows=-1", r"'evaluate\.latency_rows' is -1"),
    ("evaluate.probe_pairs=0", r"'evaluate\.probe_pairs' is 0"),
    ("evaluate.probe_texts=0", r"'evaluate\.probe_texts' is 0"),
    ("precision.name=fp16", r"'precision\.name' is 'fp16'; choose one of auto, fp32, bf16, int8, nf4"),
    ("precision.compute=fp64", r"'precision\.compute' is 'fp64'"),
    ("task.scoring=rank", r"'task\.scoring' is 'rank'; choose one of choice, generate"),
    ("task.metric=f1", r"'task\.metric' is 'f1'; choose one of accuracy, macro_f1, exact_match, numeric, token_f1, rouge_l, or"),
    ("task.format=html", r"'task\.format' is 'html'; choose one of plain, chat"),
    ("task.max_new_tokens=0", r"'task\.max_new_tokens' is 0"),
    ("device=tpu", r"'device' is 'tpu'; choose one of auto, cpu, cuda"),
    ("seed=-1", r"'seed' is -1; it must be at least 0, at most 9223372036854775807"),
    ("seed=99999999999999999999", r"'seed' is 99999999999999999999; it must be at least 0, at most 9223372036854775807"),
    ("model.init_seed=-1", r"'model\.init_seed' is -1; it must be at least 0"),
    ("train_rows=0", r"'train_rows' is 0; it must be at least 1"),
    ("train_rows=many", r"'train_rows' is 'many'; it takes int or null"),
    ("seed=first", r"'seed' is 'first'; it takes int"),
    ("seed=1.5", r"'seed' is 1\.5; it takes int"),
    ("memory_limit_gb=-1", r"'memory_limit_gb' is -1"),
    ("memory_limit_gb=all", r"'memory_limit_gb' is 'all'; it takes float or null"),
])
def test_a_value_out_of_range_or_of_another_type_is_named(composed, override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        read(changed(composed, override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["lr", "batch_size"])
def test_a_missing_key_is_named(key):
    values = {k: v for k, v in TRAIN.items() if k != key}
    with pytest.raises(UserError, match=rf"config key 'train\.{key}' is missing; set it"):
        build(Train, values, "train")


@pytest.mark.parametrize("value", ["null", ".inf"])
def test_no_limit_on_the_gradients_norm_is_null_in_a_config_and_infinite_in_the_loop(composed, value):
    cfg = changed(composed, f"train.max_grad_norm={value}")
    assert plain(cfg)["train"]["max_grad_norm"] is None and read(cfg).train.max_grad_norm == math.inf


def test_whole_numbers_pass_for_floats_and_lists_for_tuples():
    assert build(Train, dict(TRAIN), "train").epochs == 1.0
    assert build(Task, {"name": "t", "scoring": "choice", "transfer": ["a", "b"]}, "task").transfer == ("a", "b")
    assert build(Evaluate, {"batch_tokens": 8, "test_rows": None}, "evaluate").test_rows is None


@pytest.mark.parametrize(("metric", "scoring"), [("macro_f1", "generate"), ("rouge_l", "choice")])
def test_a_metric_that_the_scoring_cannot_give_is_refused(metric, scoring):
    with pytest.raises(UserError, match=rf"task\.metric={metric} needs task\.scoring=.*, not {scoring}; change one"):
        build(Task, {"name": "t", "scoring": scoring, "metric": metric}, "task")


def test_an_answer_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(UserError, match=r"'task\.answer_pattern' is '\(a', no regular expression \(.*\); fix it"):
        build(Task, {"name": "t", "scoring": "generate", "answer_pattern": "(a"}, "task")


def test_quantised_precision_keeps_double_quantisation_on_by_default():
    assert build(Precision, {"name": "nf4"}, "precision").double_quantisation


def test_keys_of_a_task_that_only_prepare_reads_are_passed_over(composed):
    assert not hasattr(read(composed).task, "source")


@pytest.mark.parametrize(("override", "sentence"), [
    ("memory_limit_gb=0", r"'memory_limit_gb' is 0\.0; it must be above 0"),
    ("start={a: 1}", r"'start' is \{'a': 1\}; it takes str or null"),
    ("start=5", "'start' is 5; it takes str or null"),
    ("start=''", "'start' is ''; write what it is, or null"),
    ("tracking.enabled=perhaps", "'tracking.enabled' is 'perhaps'; it takes true or false"),
    ("forecast.gpu_memory_gb=.nan", "'forecast.gpu_memory_gb' is nan; it takes a finite number"),
    ("forecast.length=0", "'forecast.length' is 0; it must be at least 1"),
    ("forecast.calibrate=1", "'forecast.calibrate' is 1; it takes true or false"),
    ("report.target=x", "'report.target' is 'x'; it takes float or null"),
    ("report.seeds=[]", r"'report.seeds' is \[\]; write what it is, or null"),
    ("tune.trials=0", "'tune.trials' is 0; it must be at least 1"),
    ("tune.executor=x", "'tune.executor' is 'x'; choose one of auto, packed, sequential"),
    ("split=[test]", "'split' is ..test..; it takes str"),
    ("task.transfer=[../news]", "'task.transfer' is '../news', which cannot name a folder"),
    (f"train.steps={10**20}", f"'train.steps' is {10**20}; it must be at least 0, at most"),
])
def test_a_value_outside_the_groups_of_a_cell_is_checked_for_every_command(composed, override, sentence):
    with pytest.raises(UserError, match=sentence):
        read(changed(composed, override))


@pytest.mark.parametrize(("value", "hint", "sentence"), [
    ("a\0b", str, "which holds a NUL character; take it out"),
    ("\udcff", str | None, "which holds half of a surrogate pair, which is no character"),
    ({"train": 5}, str | dict[str, str], r"'k\.train' is 5; it takes str"),
    ([1], list[str], r"'k\[0\]' is 1; it takes str"),
    ([1, 2, 3], tuple[int, int], r"is \[1, 2, 3\]; it takes 2 values"),
    (float("nan"), typing.Any, "it takes a finite number"),
    ("many", typing.Optional[typing.Union[int, str]], None),  # noqa: UP007, UP045 (as libraries write it)
    ([[0, 1]], list[tuple[int, int]] | None, None),
])
def test_a_value_is_held_against_its_type_at_every_depth(value, hint, sentence):
    if sentence is None:
        assert checked(value, hint, "k") is not None
        return
    with pytest.raises(UserError, match=sentence):
        checked(value, hint, "k")


@pytest.mark.parametrize("override", ["sweep.confirm=.inf", "teacher.batch_size=.nan", "report.seeds=[.inf]", "x.y=-.inf"])
def test_a_number_that_no_file_can_hold_is_refused_wherever_it_stands(composed, override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"config key '{key}(\.0)?' is (-?inf|nan); it takes a finite number"):
        plain(changed(composed, override))
