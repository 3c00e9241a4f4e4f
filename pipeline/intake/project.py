"""The one file that a user of `alignscope try` edits, experiments/<name>.yaml: the task, the model, the techniques, the budget. A Hydra experiment.

Library. Everything else follows from it: the prepared rows, the cells, DVC's stages (`stages`), the report.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.compose import CONF, ROOT, experiments
from pipeline.core.files import UserError, check_name, closest, read_object, write_text
from pipeline.data import shapes
from pipeline.intake.look import Look

ENCODERS = ("bert", "roberta", "deberta", "deberta-v2", "distilbert", "electra", "xlm-roberta", "albert", "modernbert", "mpnet", "t5", "bart", "pegasus", "mt5")
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of classes end that write text."""
SHORT_TEXT = 60
"""Characters of an answer, in the middle, up to which token F1 says more than ROUGE-L."""
MOST_TEST, TEST_SHARE = 2000, 0.3
MOST_VALIDATION, VALIDATION_SHARE = 400, 0.1
PIECES = re.compile(r"[a-zA-Z]{1,4}|\S")
"""What a tokenizer makes at most one token of, nearly always: four letters of a word, a digit, a sign, a letter of another script."""
LEAST_NEW, MOST_NEW, MOST_NUMBER = 16, 200, 512
"""Tokens of a generated answer."""
LEAST_STOP = 3
"""Letters of the words that a prompt begins with, for them to say that a next question begins."""
GENERATION_TOKENS = 8192
"""Tokens in a batch of texts that are written on a CPU, where a step for few rows takes as long as for many."""
MADE = "# Made by `alignscope try` from experiments/{name}.yaml; edit that.\n"


@dataclass(frozen=True)
class ModelChoice:
    """Which base model. config: a file of conf/model/; source: of one of the user's own, as model.source has it."""

    name: str
    config: str
    source: dict[str, str] = dataclasses.field(default_factory=dict)


def model_choice(word: str) -> ModelChoice:
    """What --model names: a file of conf/model/, a folder of a model, or a repository of the hub.

    Raises:
        UserError: none of these; a folder of an encoder, an adapter or a GGUF file alone; the message names the way out.
    """
    names = [p.stem for p in CONF.glob("model/*.yaml") if p.stem not in ("hub", "local")]
    if word in names:
        return ModelChoice(word, word)
    path = Path(word)
    if path.exists():
        check_folder(path)
        return ModelChoice(_name(path.resolve().name), "local", {"path": word})
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word) and not word.startswith((".", "/")):
        return ModelChoice(_name(word.partition("/")[2]), "hub", {"repository": word})
    raise UserError(f"--model {word} is no model{closest(word, names)}: there is no such folder, and conf/model/ has {', '.join(names)}; "
                    "name a folder with config.json and safetensors weights, or a repository of the hub, as in Qwen/Qwen3-0.6B")


def _name(text: str) -> str:
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_").lower() or "own"


def _check_gguf(path: Path) -> None:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is no GGUF file, whatever it is called (it does not begin with GGUF); it may be damaged, or a pointer to a file that git "
                            "or a browser did not get: fetch it again")


def check_folder(folder: Path) -> None:
    """Raise UserError where a path is no causal language model with its weights."""
    if folder.is_file():
        if folder.suffix == ".gguf":
            _check_gguf(folder)
            return
        raise UserError(f"{folder} is a file; name the folder of a model, with config.json and safetensors weights")
    if (folder / "adapter_config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path") or "its base model"
        raise UserError(f"{folder} holds an adapter and no model; name {base}, which it was trained on, as the model")
    if not (folder / "config.json").exists():
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        fix = f"name the file: --model {gguf}" if gguf else "name a folder with config.json, safetensors weights and a tokenizer"
        raise UserError(f"{folder} is no model folder (no config.json); {fix}")
    config = read_object(folder / "config.json")
    kind, made = str(config.get("model_type")), [str(a) for a in config.get("architectures") or []]
    writes = not made or any(a.endswith(WRITERS) for a in made)
    if config.get("is_encoder_decoder"):
        raise UserError(f"{folder} is an encoder-decoder ({kind}), whose time and memory this command cannot plan; run it as an experiment of your own "
                        "(model=local, docs/models.md), or choose a causal language model, such as smollm2_135m or Qwen/Qwen3-0.6B")
    if kind in ENCODERS or not writes:
        raise UserError(f"{folder} is a {made[0] if made else kind}, which does not write text from left to right; choose a causal language model, such as "
                        "smollm2_135m or Qwen/Qwen3-0.6B")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no safetensors weights; save the model with save_pretrained, or get the whole repository")


def task_keys(seen: Look, chat: bool) -> dict[str, Any]:
    """What conf/task/table.yaml leaves open. chat: whether the model has a template for what was written as a chat."""
    keys: dict[str, Any] = {"name": seen.name, "source": _source(seen)}
    keys |= {"messages": seen.shape, "prompt": "", "answer": None} if seen.shape in shapes.TURNS else {"prompt": seen.prompt, "answer": f"{{{seen.label}}}"}
    keys["scoring"], metric = "choice" if seen.kind in ("choice", "pair") else "generate", "accuracy"
    if seen.kind == "choice":
        keys["choices"] = sorted(seen.labels)
    elif seen.kind == "pair":
        keys["choices"] = "choices"
    else:
        lengths = sorted(len(str(row[seen.label])) for row in seen.rows)
        metric = "numeric" if seen.kind == "number" else "token_f1" if lengths[len(lengths) // 2] <= SHORT_TEXT else "rouge_l"
        keys["max_new_tokens"] = min(MOST_NUMBER if seen.kind == "number" else MOST_NEW, max(LEAST_NEW, 1 + _most_tokens(seen)))  # 1: the end
        keys |= {"stop": stop} if (stop := _stop(seen)) else {}
    keys["metric"] = seen.metric or metric
    if seen.shape and (chat or seen.shape in shapes.TURNS):
        keys["format"] = "chat" if chat else "transcript"
    count = len(seen.rows)
    keys["split"] = {"seed": 0, "validation": min(MOST_VALIDATION, max(4, int(VALIDATION_SHARE * count))), "test": min(MOST_TEST, int(TEST_SHARE * count))}
    return keys


@functools.lru_cache(maxsize=2)
def _tokens_of(texts: tuple[str, ...]) -> int:
    return max((len(PIECES.findall(text)) for text in texts), default=0)


def _most_tokens(seen: Look) -> int:
    """Of the longest answer, guessed from its letters so that nearly all tokenizers need fewer."""
    return _tokens_of(tuple(str(row[seen.label]) for row in seen.rows))


def _stop(seen: Look) -> str | None:
    """The words with which a prompt begins, after which a model that goes on to a next question need not be heard; None: none, or answers have them."""
    words = seen.prompt.partition("{")[0].strip() if seen.shape not in shapes.TURNS else ""
    stop = f"\n{words}"
    return stop if len(words) >= LEAST_STOP and not any(stop in str(row[seen.label]) for row in seen.rows) else None


def _source(seen: Look) -> dict[str, Any]:
    if seen.hub:
        return {"type": "hub", "id": seen.path, "splits": {"train": "train"}}
    cleaning: dict[str, Any] = {"label": seen.label} if seen.normalise or seen.missing_rows else {}
    cleaning |= {"normalise": True} if seen.normalise else {}
    cleaning |= {"missing": seen.missing} if seen.missing_rows else {}
    return {"type": "table", "path": seen.path, **cleaning}


ABOUT = {
    "name": "the folder below data/", "source": "where the rows are; normalise and missing say what becomes of odd labels",
    "prompt": "what the model reads; {column} is a column", "answer": "what it is to say",
    "scoring": "choice: the likeliest of the choices; generate: it writes, and that is compared", "choices": "the answers to choose from",
    "messages": "the column of a row's turns; the last assistant turn is the answer",
    "metric": "what ranks the techniques: accuracy, macro_f1, exact_match, numeric, token_f1, rouge_l, or a function of yours (module:function)",
    "max_new_tokens": "most tokens of an answer that it writes", "stop": "words that end an answer: with them a model goes on to a next question",
    "format": "plain; chat: in the model's own chat template; transcript: turns as lines of text",
    "split": "rows held back to choose by and to test on, drawn with the seed",
}


def text_of(seen: Look, model: ModelChoice, command: str, techniques: Sequence[str], rows: int, test_rows: int, epochs: float, hours: float, card: str | None,
            chat: bool, encoding: str | None = None, separator: str | None = None, max_length: int = 512) -> str:
    """The file: a comment on every line that one might change. encoding, separator: as they were asked for."""
    task = task_keys(seen, chat)
    together = f"batch_tokens: {GENERATION_TOKENS}, " if task["scoring"] == "generate" else ""
    task["source"] |= {key: value for key, value in (("encoding", encoding), ("separator", separator)) if value}
    lines = [
        "# @package _global_",
        f"{_head(command)}: the one file to edit. After a change: alignscope try {seen.name}",
        "defaults:",
        "  - override /task: table # its keys stand below",
        f"  - override /model: {model.config} # a file of conf/model/; hub or local: one of your own, below",
        "  - override /teacher: none",
        "",
        f"experiment: {seen.name} # the folder below results/ and report/",
        "task:",
        *(f"  {_flow(key, value)} # {ABOUT[key]}" for key, value in task.items()),
    ]
    if model.source:
        lines += ["model:", f"  {_flow('name', model.name)} # the folder below models/", f"  {_flow('source', model.source)}"]
    lines += [
        "grid:",
        f"  {_flow('techniques', list(techniques))} # in this order; conf/technique/ has them all",
        "  seeds: [0] # more seeds tell what the draw of rows and weights changes: [0, 1, 2]",
        f"  train_rows: [{rows}] # labelled rows to train on; several sizes make a learning curve",
        f"train: {{epochs: {epochs:g}, validations: 0, batch_size: 8, micro_batch_tokens: 256, max_length: {max_length}, too_long: truncate}} "
        "# micro_batch_tokens: more on a GPU",
        f"evaluate: {{{together}test_rows: {test_rows}, transfer_rows: 0, forgetting: false, latency_rows: 4, adapters: []}} # more test rows make surer",
        "preflight: false # true: check gradients, tokens and engine of every technique first",
        f"budget: {{hours: {hours:g}, card: {card or 'null'}}} # what the plan is held to; card: GiB of another machine's GPU, as in 24",
        "",
    ]
    return "\n".join(lines)


def _head(command: str) -> str:
    return f"# What `{command}` understood and planned"


def is_of(path: Path, command: str) -> bool:
    """Whether a file is there and this command wrote it; edited since or not."""
    return path.exists() and path.read_text(encoding="utf-8").partition("\n")[2].startswith(f"{_head(command)}:")


def _flow(key: str, value: Any) -> str:
    """key: value on one line, quoted as YAML wants it."""
    quoted = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, default_style='"' if isinstance(value, str) else None)
    return f"{key}: {quoted.removesuffix(chr(10)).removesuffix(chr(10) + '...')}"


def file_of(name: str) -> Path:
    return experiments() / f"{check_name(name, 'the name of a project')}.yaml"


def write(name: str, text: str) -> Path | None:
    """Write the file. Returns where another one that stood there is kept now. Raises UserError where another experiment has the name."""
    path = file_of(name)
    if (path.parent / name / "params.yaml").exists() and not is_made(path.parent / name / "params.yaml"):
        raise UserError(f"experiments/{name}/ is an experiment of the repository; give this one another name with --name")
    before = None
    if path.exists() and path.read_text(encoding="utf-8") != text:
        names = (path.with_suffix(f".yaml.bak{number or ''}") for number in itertools.count())
        before = next(one for one in names if not one.exists())
        path.replace(before)
    write_text(path, text)
    return before


def is_made(path: Path) -> bool:
    """Whether `alignscope try` made a file of an experiment's folder."""
    return path.read_text(encoding="utf-8").startswith(MADE.partition("{")[0])


def stages(name: str, known: dict[str, Any], reads: str | None, model_reads: str | None) -> None:
    """Write what DVC runs for the project, experiments/<name>/{params,dvc}.yaml: quick's stages, and those of its own task and model. What somebody
    wrote there by hand stays as it is.

    Args:
        known: as grid.grid has it. reads: the file or folder of rows; None: a hub's. model_reads: the folder of a local model; None: none.
    """
    folder = experiments() / name
    if any(path.exists() and not is_made(path) for path in (folder / "dvc.yaml", folder / "params.yaml")):
        return
    held = yaml.safe_load((ROOT / "experiments" / "quick" / "dvc.yaml").read_text(encoding="utf-8"))
    grid = {**known["grid"], "techniques": list(known["grid"]["techniques"]), "after": [], "synthetic": []}
    own: dict[str, Any] = {
        "prepare": {"wdir": "../..", "cmd": f"python -m pipeline.prepare experiments={name}", "deps": [*([reads] if reads else []), "plans/code/prepare.json"],
                    "params": _decided_by(name, "task", known["task"]), "outs": [f"data/{known['task']}"]},
        "rationales": {"wdir": "../..", "cmd": f"python -m pipeline.rationales experiments={name}", "deps": [f"data/{known['task']}"],
                       "outs": [f"rationales/{known['task']}/{known['teacher']}"]},
        "base_model": {"wdir": "../..", "cmd": f"python -m pipeline.base_model experiments={name}", "params": _decided_by(name, "model", known["model"]),
                       "deps": [*([model_reads] if model_reads else []), "plans/code/base_model.json"], "outs": [f"models/{known['model']}"]},
    }
    elsewhere = _made_elsewhere(folder)
    own = {stage: keys for stage, keys in own.items() if not elsewhere & set(keys["outs"])}  # DVC takes an output from one stage alone
    for stage in ("train_synthetic", "train_after"):
        held["stages"].pop(stage, None)
    write_text(folder / "dvc.yaml", MADE.format(name=name) + yaml.safe_dump({"stages": own | held["stages"]}, sort_keys=False, width=150))
    write_text(folder / "params.yaml", MADE.format(name=name) + yaml.safe_dump({**known, "grid": grid}, sort_keys=False, width=150))


def _decided_by(name: str, group: str, option: str) -> list[dict[str, Any]]:
    """DVC's params of a task or model: its file below conf/, where it has one, and what the experiment's file says of it."""
    held = yaml.safe_load(file_of(name).read_text(encoding="utf-8"))
    own: list[dict[str, Any]] = [{f"experiments/{name}.yaml": [group]}] if group in held else []
    return own + ([{f"conf/{group}/{option}.yaml": None}] if (CONF / group / f"{option}.yaml").exists() else [])


def _made_elsewhere(folder: Path) -> set[str]:
    """What the stages of all other experiments write, those that they share among them."""
    outs: set[str] = set()
    for path in experiments().glob("*/dvc.yaml"):
        stages = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("stages") or {} if path.parent != folder else {}
        for stage in stages.values():
            cases = stage.get("foreach", [{}])
            named = cases.items() if isinstance(cases, dict) else [(case, case) for case in cases]
            for out in (stage.get("do") or stage).get("outs") or []:
                outs |= {_filled(out, key, case) for key, case in named}
    return outs


def _filled(template: str, key: Any, case: Any) -> str:
    """A path of a DVC stage for one of its cases."""
    values = {"key": key, "item": case} | ({f"item.{name}": value for name, value in case.items()} if isinstance(case, dict) else {})
    return re.sub(r"\$\{([\w.]+)\}", lambda found: str(values.get(found[1], found[0])), template)


CHANGED = {"seeds": r"^(  seeds: )\[[^\]]*\]", "train_rows": r"^(  train_rows: )\[[^\]]*\]", "test_rows": r"(\btest_rows: )\d+", "hours": r"(\bhours: )[\d.]+"}
"""Number that `alignscope more` changes -> where it stands in the file."""


def change(name: str, values: dict[str, Any]) -> None:
    """Put numbers into the file, all else as its user wrote it; None changes nothing. Raises UserError: no such file, a number that is not there."""
    path = file_of(name)
    if not path.exists():
        names = [p.stem for p in experiments().glob("*.yaml")]
        raise UserError(f"experiments/{name}.yaml does not exist{closest(name, names)}; `alignscope try FILE` writes one")
    text = path.read_text(encoding="utf-8")
    for key, value in values.items():
        if value is None:
            continue
        if value == [] or not isinstance(value, list) and value <= 0 or isinstance(value, list) and min(value) < 0:
            raise UserError(f"{key} {value} is no number above 0")
        text, count = re.subn(CHANGED[key], rf"\g<1>{value}", text, count=1, flags=re.MULTILINE)
        if not count:
            raise UserError(f"{path} has no {key} where `alignscope try` writes it; edit the file by hand")
    write_text(path, text)
