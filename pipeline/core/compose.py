"""Composing a cell's config with Hydra, and building what it names."""

from __future__ import annotations

import functools
import math
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.core import names, peft_files
from pipeline.core.files import UserError, check_name, closest
from pipeline.core.schema import unwritable

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "conf"

os.environ.setdefault("ALIGNSCOPE_ROOT", str(ROOT))


def experiments() -> Path:
    """The folder of experiments, which is one of Hydra's groups: beside the code, or where ALIGNSCOPE_ROOT says."""
    return Path(os.environ["ALIGNSCOPE_ROOT"]) / "experiments"


OmegaConf.register_new_resolver("peft_file", peft_files.value)


def compose(overrides: Sequence[str] = (), hydra_config: bool = False) -> DictConfig:
    """The config that these overrides compose, interpolations left in place.

    Raises:
        UserError: an unknown group option, a misspelt key, a broken YAML.
    """
    try:
        words = spelled_out(overrides)
        about_hydra = hydra_config or any(map(names_hydra, words))
        cfg = _by_hydra(words, hydra_config) if about_hydra else _by_parts(words)
        check_places(cfg, overrides)
        return cfg
    except WRONG_CONFIG as error:
        raise UserError(explain(error)) from error


def names_hydra(word: str) -> bool:
    """Whether an override is one of Hydra's own settings."""
    return word.lstrip("+~").startswith(("hydra.", "hydra/"))


def _by_hydra(words: Sequence[str], hydra_config: bool = False) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=list(words), return_hydra_config=hydra_config)


def _by_parts(words: Sequence[str]) -> DictConfig:
    """What `_by_hydra` gives, in a sixth of the time where the same options were composed before: the YAMLs that the options name are composed once a
    process, until one of them changes, and the values that other words set are set on a copy, as Hydra does it after it has composed the options."""
    parsed = _parser().parse_overrides(list(words))
    ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=False)
    options = [one for one in parsed if one.key_or_group in GROUPS and not isinstance(one.value(), dict)]
    cfg: DictConfig = pickle.loads(_options(tuple(str(one.input_line) for one in options), _stamps()))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if one not in options], cfg)
    return cfg


@functools.lru_cache(maxsize=256)
def _options(words: tuple[str, ...], stamps: object) -> bytes:
    """Pickled, of which a copy is made in a fifth of the time that deepcopy takes."""
    return pickle.dumps(_by_hydra(words), pickle.HIGHEST_PROTOCOL)


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _stamps() -> tuple[str, tuple[tuple[str, int, int], ...]]:
    """What the cached configs depend on: where experiments lie, and every YAML's size and time of change."""
    folders = [experiments(), CONF, *(CONF / group for group in sorted(GROUPS - {"experiments", "hydra"}))]
    files = (entry for folder in folders if folder.is_dir() for entry in os.scandir(folder) if entry.name.endswith(".yaml"))
    return str(experiments()), tuple((entry.path, stat.st_size, stat.st_mtime_ns) for entry in files for stat in [entry.stat()])


WRONG_CONFIG = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What Hydra raises for overrides and YAMLs that do not compose."""
GROUPS = {"experiments", "hydra", *(path.name for path in CONF.iterdir() if path.is_dir())}


@functools.lru_cache(maxsize=4096)
def check_override(word: str) -> None:
    """Raise UserError for an override that Hydra would take without a sentence: one of no key, or a group's that names no single option."""
    if unwritable(word):
        raise UserError(f"the override {word!r} holds {unwritable(word)}; take it out")
    key, equals, _ = word.partition("=")
    if equals and not key.strip("+~"):
        raise UserError(f"the override {word!r} has no key; write key=value")
    if equals and key.lstrip("+") in GROUPS:
        value = _parser().parse_override(word).value()
        if not isinstance(value, (str, dict)):
            raise UserError(f"the override {word!r} is refused: {key.lstrip('+')} is a config group, which takes the name of one of its YAMLs")


MAPPINGS = (GROUPS - {"writer"}) | {"paths", "forecast", "report", "tune", "judge", "race", "ray", "slurm"}
"""Keys of a config whose values have keys of their own."""
NAMES = ("task.name", "model.name", "teacher.name", "synthetic.name", "technique.name", "experiment", "variant")
"""Config keys whose values become parts of paths."""


def check_places(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError where a group of the config is none, or a name or a path could lead to a folder that is not this run's."""
    for key in MAPPINGS & cfg.keys():
        if not isinstance(cfg[key], DictConfig):
            raise UserError(f"config group '{key}' is {cfg[key]!r}; it takes keys and values, as {CONF.name}/ has them")
    for key in NAMES:
        value = OmegaConf.select(cfg, key)
        if key != "variant" or value is not None:
            check_name(value, f"config key '{key}'")
    for name, value in cfg.paths.items():
        if not isinstance(value, str) or not value or unwritable(value):
            raise UserError(f"config key 'paths.{name}' is {value!r}; it takes the path of a folder")
    overridden = dict(word.split("=", 1) for word in overrides if "=" in word)
    own_name = overridden.get("experiment")
    if own_name in {path.stem for path in experiments().glob("*.yaml")} and own_name != overridden.get("experiments"):
        raise UserError(
            f"experiment={own_name} would write into the results of experiments/{own_name}.yaml with other settings than its own; "
            f"say experiments={own_name} to compose it, or choose another name"
        )


def plain(node: DictConfig) -> dict[str, Any]:
    """A config as resolved dicts and lists, without Hydra's node. No limit on the gradients' norm is null, since JSON has no inf.

    Raises:
        UserError: an interpolation that leads nowhere, a number that is not finite, a dotted path that names no class of the table.
    """
    values = _resolved(node)
    values.pop("hydra", None)
    train = values.get("train")
    if isinstance(train, dict) and train.get("max_grad_norm") == math.inf:
        train["max_grad_norm"] = None
    _check_finite(values, "")
    return names.named(values)


def _check_finite(value: Any, key: str) -> None:
    """Raise UserError for a number that no JSON file can hold, wherever it stands: results and manifests say the whole config."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config key '{key.lstrip('.')}' is {value}; it takes a finite number")
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_finite(part, f"{key}.{name}")


def literal(value: Any) -> Any:
    """Plain data to make a config of, in which a text that looks like an interpolation stays that text.

    For what others wrote (a result.json): ${oc.env:…} in it must not read this machine's environment.
    """
    if isinstance(value, dict):
        return {key: literal(part) for key, part in value.items()}
    if isinstance(value, list):
        return [literal(part) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


RENAMED = {"train.packing": "train.padding_free"}
"""Config keys that earlier versions wrote, and what they are called now."""


def renamed_key(key: str) -> str:
    """The sentence that refuses a key of RENAMED."""
    return f"config key {key!r} is called {RENAMED[key]!r} now; write that instead"


def with_todays_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A stored config (of a result.json) with the keys of RENAMED under their names of today."""
    for old, new in RENAMED.items():
        group, _, key = old.rpartition(".")
        values = config.get(group) if isinstance(config, dict) else None
        if isinstance(values, dict) and key in values:
            config = {**config, group: {new.rpartition(".")[2] if k == key else k: v for k, v in values.items()}}
    return config


def build(node: DictConfig, kind: str) -> Any:
    """The object that a group of a composed config names (pipeline/core/names.py). Raises UserError for an unknown or refused value, naming the group."""
    return names.build(_resolved(node), kind)


def _resolved(node: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error


def explain(error: BaseException) -> str:
    """One sentence for an error of Hydra or OmegaConf."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:  # raised by a resolver
        return str(cause)
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark or error.context_mark):
        return (f"the config does not compose: {mark.name} is no YAML from line {mark.line + 1} on ({error.problem or error.context}); mend it: "
                "a text that holds : # ? { or [ stands in quotes")
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if missing:
        return f"config key {missing[1]!r} is missing; set it"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = [o for o in error.options or [] if o != "dvc"]
        return f"unknown {group} {option!r}{closest(option, options)}; there are: {', '.join(options)}"
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    key = getattr(cause, "full_key", None)
    if key and "not in struct" in str(cause):
        if key in RENAMED:
            return renamed_key(key)
        parent = getattr(cause, "parent_node", None)
        siblings = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        return f"unknown config key {key!r}{closest(key.rpartition('.')[2], siblings)}; fix the override, or prefix + to add a key"
    reason = " ".join(str(error).split()) or " ".join(str(error.__cause__).split())
    return f"the config does not compose: {reason}"


DEFAULTED = re.compile(
    r"task\.((split|columns|answer)\.\w+|source\.(encoding|header|folder|splits|revision|label|normalise|missing|separator|path)|columns|choices|split|leakage|"
    r"licence|metric|tolerance|format|messages|system|tools|separator|length_normalised|max_new_tokens|answer_pattern|transfer)=")
"""Overrides of a task's keys that its YAML may leave out: they are set as if they stood there, without a + before them."""
MARK = "tuned"
SUFFIX = f"+{MARK}"


def spelled_out(words: Sequence[str]) -> list[str]:
    """Overrides with technique=<name>+tuned as two, and technique=<name>+<set> likewise: with the synthetic rows of that set."""
    overrides: list[str] = []
    for word in words:
        check_override(word)
        technique, *marks = word.split("+") if word.startswith("technique=") else [word]
        technique = f"++{technique}" if DEFAULTED.match(technique) else technique
        overrides += [technique, *("tuned=true" if mark == MARK else f"synthetic={mark}" for mark in marks)]
    return overrides


def by_key(words: Sequence[str]) -> dict[str, str]:
    """The overrides key=value as a dict; a + before the key is left out."""
    return {key.lstrip("+"): value for key, equals, value in (word.partition("=") for word in words) if equals}


def without(words: Sequence[str], *keys: str) -> list[str]:
    """The overrides that set none of the keys."""
    return [word for word in words if word.partition("=")[0].lstrip("+") not in keys]
