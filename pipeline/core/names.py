"""The classes that a config or a result can name: a fixed table, so that reading one cannot import or call anything else.

Library. `type: lora_plus` in conf/method/<name>.yaml, in a result.json or in a plan names a row of the table below; the other keys are
the class's fields, as plain data. A new method, objective, teacher or source is a row here (tests/test_names.py holds the table and the classes
together). Rows of kind peft are the classes of PEFT whose names end with Config.
"""

from __future__ import annotations

import importlib
import typing
from typing import Any

from pipeline.core.files import UserError, closest
from pipeline.core.imports import import_peft
from pipeline.core.schema import checked

TABLE: dict[str, dict[str, str]] = {
    "method": {
        "untouched": "pipeline.methods.none.Untouched",
        "few_shot": "pipeline.methods.none.FewShot",
        "teacher": "pipeline.methods.none.TeacherAnswers",
        "prompt_choice": "pipeline.methods.prompt_choice.PromptChoice",
        "retrieval": "pipeline.methods.retrieval.Retrieval",
        "full": "pipeline.methods.full.Full",
        "selective": "pipeline.methods.selective.Selective",
        "peft_adapter": "pipeline.methods.peft_adapter.PeftAdapter",
        "lora_plus": "pipeline.methods.peft_lora.LoraPlus",
        "loft_q": "pipeline.methods.peft_lora.LoftQ",
        "lora_fa": "pipeline.methods.peft_lora.LoraFa",
        "riemannian_lora": "pipeline.methods.peft_lora.RiemannianLora",
        "poly": "pipeline.methods.peft_lora.Poly",
        "shadow": "pipeline.methods.peft_shadow.Shadow",
        "alora": "pipeline.methods.peft_tokens.ALora",
        "trainable_tokens": "pipeline.methods.peft_tokens.TrainableTokens",
        "cpt": "pipeline.methods.peft_tokens.Cpt",
        "ada_lora": "pipeline.methods.peft_adalora.AdaLora",
        "prefix_tuning": "pipeline.methods.peft_prompts.PrefixTuning",
        "multitask_prompt": "pipeline.methods.peft_prompts.MultitaskPrompt",
        "p_tuning": "pipeline.methods.peft_prompts.PTuning",
        "from_file": "pipeline.methods.peft_from_file.from_file",
        "ipt": "pipeline.methods.soft_prompts.Ipt",
        "warp": "pipeline.methods.soft_prompts.Warp",
        "bottleneck": "pipeline.methods.bottleneck.Bottleneck",
        "compacter": "pipeline.methods.bottleneck.Compacter",
        "ada_mix": "pipeline.methods.bottleneck.AdaMix",
        "ladder": "pipeline.methods.side_network.Ladder",
        "attention_fusion": "pipeline.methods.side_network.AttentionFusion",
        "pruning": "pipeline.methods.pruning.Pruning",
        "low_rank": "pipeline.methods.low_rank.LowRank",
        "quantised": "pipeline.methods.quantised.Quantised",
    },
    "objective": {
        "labels": "pipeline.objectives.labels.Labels",
        "step_by_step": "pipeline.objectives.step_by_step.StepByStep",
        "step_by_step_unlabelled": "pipeline.objectives.step_by_step.StepByStepUnlabelled",
        "task_distillation": "pipeline.objectives.task_distillation.TaskDistillation",
        "rationale_first": "pipeline.objectives.rationale_first.RationaleFirst",
        "consistency": "pipeline.objectives.consistency.Consistency",
        "logit_distillation": "pipeline.objectives.logit_distillation.LogitDistillation",
        "on_policy_distillation": "pipeline.objectives.logit_distillation.OnPolicyDistillation",
        "dpo": "pipeline.objectives.preferences.Dpo",
        "orpo": "pipeline.objectives.preferences.Orpo",
        "kto": "pipeline.objectives.preferences.Kto",
        "reward_model": "pipeline.objectives.preferences.RewardModel",
        "grpo": "pipeline.objectives.grpo.Grpo",
        "best_of_n": "pipeline.objectives.best_of_n.BestOfN",
    },
    "teacher": {
        "none": "pipeline.teachers.base.Teacher",
        "lexicon": "pipeline.teachers.lexicon.Lexicon",
        "stored": "pipeline.teachers.stored.Stored",
        "prompted": "pipeline.teachers.prompted.Prompted",
    },
    "demonstrations": {"demonstrations": "pipeline.teachers.demonstrations.Demonstrations"},
    "writer": {"local": "pipeline.teachers.local_writer.LocalWriter", "server": "pipeline.teachers.server_writer.ServerWriter"},
    "task.source": {"files": "pipeline.data.sources.Files", "table": "pipeline.data.tables.Table", "hub": "pipeline.data.sources.Hub",
                    "registry": "pipeline.data.sources.Registry"},
    "model.source": {"local": "pipeline.models.sources.Local", "hub": "pipeline.models.sources.Hub", "registry": "pipeline.models.sources.Registry"},
}
INSIDE = {"method.config": "peft", "teacher.writer": "writer", "teacher.demonstrations": "demonstrations"}
"""Config key -> kind, of a class inside another one's fields."""
FORMER = {"method": {"Teacher": "teacher"}}
"""By kind, names that classes had in the dotted paths of before the table."""
HYDRA = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def build(values: Any, kind: str, key: str | None = None) -> Any:
    """The object that a config group names.

    Args:
        values: the group as plain data: its class's fields, and `type`.
        kind: a row of the table. key: the group's config key, if it is another word.

    Raises:
        UserError: no such class, a field that it does not take, a value that it refuses.
    """
    key = key or kind
    if not isinstance(values, dict):
        raise UserError(f"config group '{key}' is {values!r}; it takes a type and its fields")
    fields = {name: _value(value, f"{key}.{name}") for name, value in values.items() if name not in ("type", "_target_")}
    made = find(name_of(values, kind, key), kind, key)
    _check_fields(made, {name: value for name, value in fields.items() if kind != "peft" or _has_peft_type(name, value)}, key)
    if kind == "peft" and "peft_type" in fields:
        raise UserError(f"{key}.type says which adapter it is; leave out peft_type")
    try:
        return made(**fields)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OSError) as error:
        raise UserError(f"config group '{key}' is refused: {' '.join(str(error).split())}; fix conf/{key.partition('.')[0]}/ or the override") from error


def find(name: str, kind: str, key: str | None = None) -> Any:
    """The class of a name. Raises UserError for one that the table does not have."""
    key = key or kind
    if kind == "peft":
        return _peft(name, key)
    table = TABLE[kind]
    if name not in table:
        raise UserError(f"config key '{key}.type' is {name!r}{closest(name, table)}; there are: {', '.join(table)}")
    module, _, attribute = table[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def class_of(values: dict[str, Any], kind: str) -> Any:
    """The class of what a group makes (of a function: what it is annotated to return); its class attributes say what it does."""
    made = find(name_of(values, kind), kind)
    return made if isinstance(made, type) else typing.get_type_hints(made)["return"]


def name_of(values: dict[str, Any], kind: str, key: str | None = None) -> str:
    """The name in a group; a dotted `_target_` of this project or of PEFT, as configs and results had before there was a table, by its class.

    Raises:
        UserError: neither is there, or the path leads elsewhere.
    """
    key = key or kind
    path = values.get("_target_")
    if path is None:
        if isinstance(values.get("type"), str):
            return str(values["type"])
        raise UserError(f"config key '{key}.type' is missing; there are: {', '.join(TABLE.get(kind, ()))}")
    root, _, name = str(path).partition(".")[0], *str(path).rpartition(".")[1:]
    if kind == "peft" and root == "peft":
        return name
    known = {dotted.rpartition(".")[2]: word for word, dotted in TABLE.get(kind, {}).items()} | FORMER.get(kind, {})
    if root != "pipeline" or name not in known:
        raise UserError(f"config key '{key}._target_' is {path!r}, which names no {kind} of this project; write type: with one of {', '.join(known.values())}")
    return known[name]


def named(values: dict[str, Any]) -> dict[str, Any]:
    """A composed config with names in the place of dotted paths, all else as it is.

    Raises:
        UserError: a path that the table does not have.
    """
    config = dict(values)
    for key in ("method", "objective", "teacher", "writer", "task", "model"):
        if isinstance(config.get(key), dict):
            config[key] = _named(config[key], key)
    return config


def _named(values: dict[str, Any], key: str) -> dict[str, Any]:
    kind = INSIDE.get(key, key)
    fields = {name: _named(value, f"{key}.{name}") if f"{key}.{name}" in (*INSIDE, *TABLE) and isinstance(value, dict) else value
            for name, value in values.items() if name != "_target_"}
    return {"type": name_of(values, kind, key), **fields} if "_target_" in values else fields


def _value(value: Any, key: str) -> Any:
    """A field's value: plain data, or the object of a class where the table has one inside."""
    if key in INSIDE and (key == "method.config" or isinstance(value, dict) and ("type" in value or "_target_" in value)):
        return build(value, INSIDE[key], key)
    _check_plain(value, key)
    return value


def _check_plain(value: Any, key: str) -> None:
    for name, part in value.items() if isinstance(value, dict) else ():
        if name in HYDRA:
            raise UserError(f"config key '{key}.{name}' is not taken here: {key} is plain data")
        _check_plain(part, f"{key}.{name}")
    for part in value if isinstance(value, (list, tuple)) else ():
        _check_plain(part, key)


def _peft(name: str, key: str) -> Any:
    import_peft()
    import peft

    config = getattr(peft, name, None) if name.endswith("Config") else None
    if not isinstance(config, type) or not issubclass(config, peft.PeftConfig):
        options = [word for word in dir(peft) if word.endswith("Config")]
        raise UserError(f"config key '{key}.type' is {name!r}, which is no configuration of PEFT{closest(name, options)}")
    return config


def _has_peft_type(name: str, value: Any) -> bool:
    """Whether PEFT's hint for a field says all that it takes: it also makes objects of mappings, and reads numbers out of pissa_niter_16."""
    return not isinstance(value, dict) and name != "init_lora_weights"


def _check_fields(made: Any, fields: dict[str, Any], key: str) -> None:
    """Raise UserError for a value that is not of its field's type; a name that is no field is left to the class."""
    hints = typing.get_type_hints(made, include_extras=True)
    for name, value in fields.items():
        if name in hints:
            checked(value, hints[name], f"{key}.{name}")
