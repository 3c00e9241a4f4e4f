"""A folder that answers by itself: weights, prompt.json, a short predict.py, a model card. Library of `python -m pipeline.deploy`."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.core.commands import call
from pipeline.core.files import UserError, atomic_folder, folder_bytes, read_jsonl, read_object, write_json, write_text
from pipeline.data.conversations import USER_TURN
from pipeline.models import architecture
from pipeline.records.finished import Cell, cell_config
from pipeline.records.results import Result
from pipeline.scoring.answers import headline
from pipeline.serving.artefact import Artefact
from pipeline.serving.export import refusal

PREDICT = '''"""Answers one row with plain transformers: python predict.py {example}"""
import json, re, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

here = Path(__file__).parent
ask = json.loads((here / "prompt.json").read_text(encoding="utf-8"))
tokenizer, model = AutoTokenizer.from_pretrained(here / "model"), AutoModelForCausalLM.from_pretrained(here / "model"){adapter}
row = dict(word.split("=", 1) for word in sys.argv[1:])
text = ask["before"] + re.sub(r"{{(.+?)}}", lambda found: row.get(found[1]) or sys.exit("use: python predict.py {example}"), ask["prompt"])
system = row.get("system", ask["system"])
turns = [{{"role": "system", "content": system}}] * bool(system) + [{{"role": "user", "content": text}}]
if ask["format"] == "chat":
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
elif ask["format"] == "transcript":
    text = "\\n".join([*(f"{{turn['role'].capitalize()}}: {{turn['content']}}" for turn in turns), "Assistant:"])
prompt = tokenizer(text, return_tensors="pt", add_special_tokens=ask["format"] != "chat")["input_ids"]

@torch.no_grad()
def score(choice):
    answer = tokenizer(ask["separator"] + choice, return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = model(torch.cat([prompt, answer], 1)).logits[0, -answer.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, answer[0, :, None]).sum().item()

if ask["choices"]:
    print(max(ask["choices"], key=score))
else:
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=ask["max_new_tokens"], do_sample=False)
    said = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).split(ask["stop"])[0].strip()
    found = re.findall(ask["answer_pattern"], said) if ask["answer_pattern"] else said.splitlines()[:1] if ask["first_line"] else [said]
    print(found[-1] if found else "")
'''
END_OF_TEXT = "\0"
"""Words that no answer holds, for a task without any that stop one."""
ADAPTER = '\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(model, here / "adapter")'


def deploy(cell: Cell, cfg: DictConfig, target: Path) -> int:
    """Write the folder; returns its bytes. Raises UserError: a technique whose answers no such folder can give, a folder that is something else."""
    result = cell.result
    config = cell_config(result, cfg)
    served = Artefact.at(result.cell, cell.folder / "artefact", config)
    if architecture.of_folder(Path(config.paths.models) / config.model.name) is architecture.ENCODER_DECODER:
        raise UserError(f"{result.technique} on {config.model.name} cannot be deployed: predict.py is for a decoder alone, and this base is "
                        f"{architecture.ENCODER_DECODER.name}; python -m pipeline.export writes its weights, pipeline.serve answers with it")
    reason = refusal(served)
    as_adapter = bool(reason and served.method.peft)
    in_prompt = bool(reason) and not as_adapter
    if in_prompt and result.technique not in ("few_shot",) and result.kind != "base":
        raise UserError(f"{result.technique} cannot be deployed: {reason}; `alignscope serve` answers with it")
    with atomic_folder(target, "prompt.json", "cell") as beside:
        if reason is None:
            weights = beside / "model"
            with contextlib.redirect_stdout(io.StringIO()):  # it names a folder that has another name in the end
                call("export", OmegaConf.merge(cfg, {"cell": str(cell.folder), "to": str(weights)}), [])  # type: ignore[arg-type]
        else:
            beside.mkdir(exist_ok=True)
            shutil.copytree(Path(config.paths.models) / config.model.name, beside / "model", ignore=shutil.ignore_patterns("manifest.json"))
        if as_adapter:
            shutil.copytree(cell.folder / "artefact", beside / "adapter", ignore=shutil.ignore_patterns("artefact.json"))
        asked = prompt_of(result, served, in_prompt, usual_system(Path(config.paths.data) / config.task.name))
        write_json(beside / "prompt.json", {**asked, "cell": f"{result.experiment}/{result.cell}"})
        example = " ".join(f"{column}='…'" for column in asked["columns"])
        write_text(beside / "predict.py", PREDICT.format(example=example.replace('"', "'"), adapter=ADAPTER if as_adapter else ""))
        write_text(beside / "README.md", card(result, example))
    return folder_bytes(target)


def usual_system(data: Path) -> str | None:
    """The system turn of most of a task's prepared test rows; None: most have none, or the rows are not here."""
    if not (data / "test.jsonl").exists():
        return None
    said = Counter(turns[0]["content"] if turns[0]["role"] == "system" else None for row in read_jsonl(data / "test.jsonl") if (turns := row.get("messages")))
    return said.most_common(1)[0][0] if said else None


def prompt_of(result: Result, served: Artefact, in_prompt: bool, system: str | None) -> dict[str, Any]:
    """How the model is asked: before (demonstrations), the prompt's template, what stands before an answer, the choices; of conversations the user's turn
    and the system's, which is that of most test rows unless another one is given."""
    from pipeline.data.recipe import columns_of

    task = result.config["task"]
    turns = bool(task.get("messages"))
    form = "chat" if turns and task.get("format") != "transcript" else task.get("format", "plain")
    template = "{user}" if turns else task["prompt"]
    before = ""
    if in_prompt and served.method.own_prompt:
        state = served.method.load(None, served.folder)[1]
        before = served.method.prompt("", state)
    choices = task.get("choices")
    return {
        "before": before, "prompt": served.objective.prompt(template), "columns": columns_of(template, "task.prompt"),
        "separator": "" if form == "chat" else task.get("separator", " "), "format": form, "system": system if turns else task.get("system"),
        "choices": list(choices) if isinstance(choices, (list, tuple)) else None, "max_new_tokens": task.get("max_new_tokens", 32),
        "answer_pattern": task.get("answer_pattern"), "stop": task.get("stop") or (USER_TURN if form == "transcript" else END_OF_TEXT),
        "first_line": result.metric == "accuracy",
    }


def card(result: Result, example: str) -> str:
    """The model card: what it is, how well it did, what it took."""
    test, phases = result.test, result.phases
    assert test is not None
    value = headline(test, result.metric)
    bounds = test.interval(result.metric)
    shown = f" (95% interval {100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})" if bounds else ""
    settings = ", ".join(f"{key} {value}" for key, value in result.hyperparameters.items()) or "none"
    licence = (result.config.get("model") or {}).get("licence") or "that of the base model"
    data_licence = result.config["task"].get("licence", "not stated")
    return "\n".join([
        f"# {result.experiment}: {result.technique} on {result.model}", "",
        f"Made by alignscope from the cell `{result.experiment}/{result.cell}`. Licence: {licence}; the data's: {data_licence}.", "",
        "| | |", "| --- | --- |", f"| test {result.metric} | {100 * value:.1f}%{shown} on {test.rows} rows |",
        f"| labelled rows | {result.labelled_rows:,} |", f"| training | {phases.train_s:.0f} s |" if phases else "| training | — |",
        f"| settings | {settings} |", f"| base | {result.model} |", "",
        "## Use", "", "```", f"python predict.py {example}", "```", "",
        "`prompt.json` says how the model is asked; `model/` loads with `AutoModelForCausalLM.from_pretrained`. It was measured on rows like those it was made "
        "from, and on nothing else.", "",
    ])


def check_target(target: Path) -> None:
    """Raise UserError where the folder holds something else than an earlier deployment."""
    if target.exists() and any(target.iterdir()) and "columns" not in (read_object(target / "prompt.json") if (target / "prompt.json").exists() else {}):
        raise UserError(f"{target} is not empty and no earlier deployment; choose another folder with --to")
