"""Folders that somebody else wrote, against every command that reads one: nothing runs, nothing is written elsewhere, no secret is told."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline import (
    advise,
    base_model,
    cells,
    compare,
    evaluate,
    export,
    forecast,
    peft_configs,
    plan,
    prepare,
    rationales,
    report,
    serve,
    sweep,
    synthesize,
    tracking,
    train,
    tune,
)
from pipeline.core.files import read_json, write_json
from pipeline.records import finished as finished_cells
from pipeline.teachers.writers import Cache

DEEP = "[" * 200_000
"""Nested deeper than any reader of JSON goes."""
counted: Counter[str] = Counter()
"""Command -> how often one met something hostile and did as it has to."""


def few(values: Iterable[Any], fast: int) -> list[Any]:
    """As parameters, of which so many are for the fast tests."""
    return [pytest.param(value, marks=[pytest.mark.slow] * (number >= fast)) for number, value in enumerate(values)]


def backfill(words: list[str]) -> int:
    return tracking.main(["backfill", *words])


MODULES = (
    advise, base_model, cells, compare, evaluate, export, forecast, peft_configs, plan, prepare, rationales, report, serve, sweep, synthesize, train, tune,
)
NAMES = {module.main: module.__name__ for module in MODULES} | {backfill: "pipeline.tracking backfill"}


# Results: commands that load a cell, and those that show results


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory, imports) -> tuple[list[str], Path]:
    root = tmp_path_factory.mktemp("foreign")
    words = [
        f"paths.data={tiny}/data", f"paths.models={tiny}/models", f"paths.rationales={tiny}/rationales", f"paths.results={root}/results",
        f"paths.work={root}/work", f"paths.evaluations={root}/evaluations", "task=vader_movies", "model=smollm2_135m", "tracking=none", "device=cpu",
        "train.progress=false", "evaluate.forgetting=false", "evaluate.transfer_rows=0", "evaluate.latency_rows=0", "evaluate.adapters=[]",
        "evaluate.test_rows=4", "model.note=null",
    ]
    assert train.main([*words, "technique=lora", "train_rows=16", "train.steps=1", "train.validations=0"]) == 0
    config = read_json(root / "results/scratch/lora-s0-n16/result.json")["config"]
    assert (config["method"]["type"], config["method"]["config"]["type"]) == ("peft_adapter", "LoraConfig") and "_target_" not in json.dumps(config)
    return words, root / "results/scratch/lora-s0-n16"


@pytest.fixture
def hostile(finished, tmp_path) -> tuple[list[str], Path]:
    words, cell = finished
    folder = tmp_path / "theirs/scratch/lora-s0-n16"
    shutil.copytree(cell, folder)
    return [*words, f"paths.results={tmp_path}/theirs", f"paths.evaluations={tmp_path}/evaluations"], folder


def alter(folder: Path, change: dict) -> None:
    def merged(a: dict, b: dict) -> dict:
        return a | {k: merged(a.get(k) or {}, v) if isinstance(v, dict) and "_target_" not in v else v for k, v in b.items()}

    write_json(folder / "result.json", merged(read_json(folder / "result.json"), change))


def commands(words: list[str], folder: Path, tmp_path: Path) -> dict[str, int]:
    requests = tmp_path / "requests.jsonl"
    counted.update(NAMES[module.main] for module in (evaluate, export, serve, train))  # their tests check what they return
    requests.write_text(json.dumps({"adapter": folder.name, "prompt": "Review: fine film\nSentiment:", "choices": ["negative", "positive"]}) + "\n")
    return {
        "evaluate": evaluate.main([*words, f"cell={folder}", "split=test"]),
        "export": export.main([*words, f"cell={folder}", f"to={tmp_path}/exported"]),
        "serve": serve.main([*words, f"requests={requests}", f"to={tmp_path}/answers.jsonl"]),
        "start": train.main([*words, "experiment=mine", "technique=lora", "train_rows=16", "train.steps=1", f"start={folder}"]),
    }


TARGETS = [
    {"_target_": "pathlib.Path.write_text", "self": {"_target_": "pathlib.Path", "_args_": ["MARK"]}, "data": "ran"},
    {"_target_": "pipeline.core.files.write_text", "path": "MARK", "text": "ran"},
    {"_target_": "joblib.load", "filename": "MARK.pkl"},
    {"_target_": "torch.load", "f": "MARK.pkl", "weights_only": False},
    {"_target_": "transformers.AutoConfig.from_pretrained", "pretrained_model_name_or_path": "MARK", "trust_remote_code": True},
]


@pytest.mark.parametrize(("target", "where"), [
    pytest.param(target, where, id=f"{where}-{target['_target_']}", marks=[pytest.mark.slow] * (number > 0))
    for where in ("target_modules", "method", "objective") for number, target in enumerate(TARGETS)
])
def test_a_result_of_somebody_else_runs_nothing(hostile, target, where, tmp_path, capfd):
    words, folder = hostile
    target = json.loads(json.dumps(target).replace("MARK", str(tmp_path / "mark")))
    alter(folder, {"config": {"method": {"config": {where: target}}} if where == "target_modules" else {where: target}})
    before = sorted(p for p in tmp_path.rglob("*"))
    codes = commands(words, folder, tmp_path)
    assert set(codes.values()) == {2}, codes
    assert sorted(p for p in tmp_path.rglob("*") if p.name != "requests.jsonl") == before
    assert capfd.readouterr().err.count("error: ") == 4


def test_a_secret_of_this_machine_is_not_read_into_a_message(hostile, tmp_path, capfd, monkeypatch):
    words, folder = hostile
    monkeypatch.setenv("SECRET", "hunter2")
    alter(folder, {"config": {"method": {"type": "${oc.env:SECRET}"}}})
    assert set(commands(words, folder, tmp_path).values()) == {2}
    assert "hunter2" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("field", "value"), [("experiment", "../../escaped"), ("cell", "../x"), ("experiment", "/escaped"), ("technique", ".."), ("task", "")])
def test_a_result_that_names_another_place_is_refused(hostile, tmp_path, field, value, capfd):
    words, folder = hostile
    alter(folder, {field: value})
    assert set(commands(words, folder, tmp_path).values()) == {2}
    assert f"{field} is {value!r}, which cannot name a folder" in capfd.readouterr().err
    assert not (tmp_path / "evaluations").exists() and not (tmp_path.parent / "escaped").exists()


@pytest.mark.parametrize("target", TARGETS[:1], ids=lambda t: t["_target_"])
def test_what_reads_results_for_people_runs_nothing_and_tells_no_secret(hostile, target, tmp_path, capfd, monkeypatch):
    """Report, advice and comparison of somebody else's results, their configs hostile where a class is named and where a text stands."""
    words, folder = hostile
    monkeypatch.setenv("SECRET", "hunter2")
    monkeypatch.chdir(tmp_path)
    target = json.loads(json.dumps(target).replace("MARK", str(tmp_path / "mark")))
    alter(folder, {"config": {"method": {"config": {"target_modules": target, "task_type": "${oc.env:SECRET}"}}, "currency": "${oc.env:SECRET}"}})
    shutil.move(folder.parent, folder.parent.parent / "quick")
    theirs = folder.parent.parent / "quick"
    raw = read_json(theirs / folder.name / "result.json")
    write_json(theirs / folder.name / "result.json", {**raw, "experiment": "quick"})
    before = set(tmp_path.rglob("*"))
    assert report.main(["experiments=quick", f"paths.results={theirs.parent}", f"paths.report={tmp_path}/report", "report.train_rows=[16]"]) == 0
    assert advise.main(["train_rows=16", f"results={theirs}"]) == 0
    assert compare.main([str(theirs), str(theirs)]) == 0
    counted.update(NAMES[module.main] for module in (report, advise, compare))
    shown = capfd.readouterr()
    assert not (tmp_path / "mark").exists() and "hunter2" not in shown.out + shown.err
    made = set(tmp_path.rglob("*")) - before
    assert all(p.is_relative_to(tmp_path / "report") for p in made) and not any(b"hunter2" in p.read_bytes() for p in made if p.is_file())


# Every other command that reads a folder


class _Forgetful(set):
    add = set.discard  # a file is named by every command, not only by the first of a process


class Guard:
    """What is around a hostile folder: files that must stay as they are, a mark that code would leave, a secret."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.root, self.capfd, self.mark = tmp_path, capfd, tmp_path / "mark"
        monkeypatch.setattr(finished_cells, "_named", _Forgetful())
        monkeypatch.setenv("SECRET", "hunter2")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(plan, "check_params", lambda *_: None)  # the tiny task is not the one that params.yaml names

    def refuses(self, main: Callable[[list[str]], int], words: list[str], says: str, own: str = "-", code: int = 2) -> None:
        """The command ends with this code and one sentence, runs nothing, tells no secret, and changes nothing outside of the folder `own`."""
        before = self.files(own)
        self.capfd.readouterr()
        assert main(words) == code
        said = self.capfd.readouterr()
        assert says in said.err and "Traceback" not in said.err and "hunter2" not in said.out + said.err
        assert said.err.count("error: ") == (code == 2), said.err
        assert self.files(own) == before and not self.mark.exists()
        counted[NAMES[main]] += 1

    def files(self, own: str) -> dict[Path, bytes | None]:
        skipped = {self.root / name for name in (own, "work", "mlflow.db", "mlartifacts")}
        kept = [p for p in self.root.rglob("*") if not p.name.endswith(".lock") and not skipped & {p, *p.parents}]
        return {p: p.read_bytes() if p.is_file() else None for p in kept}


@pytest.fixture
def guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Guard:
    return Guard(tmp_path, monkeypatch, capfd)


@pytest.fixture(scope="module")
def grid_cell(finished) -> tuple[list[str], Path]:
    """A cell of experiments=quick, as pipeline.cells leaves it."""
    words, cell = finished
    mine = [*words, "experiments=quick", "task=vader_movies", "technique=lora", "seed=0", "train_rows=16", "train.steps=1"]
    assert cells.main(mine) == 0
    return mine, cell.parent.parent / "quick/lora-s0-n16"


def theirs(grid_cell, tmp_path: Path) -> tuple[list[str], Path]:
    words, cell = grid_cell
    folder = tmp_path / "theirs/quick" / cell.name
    shutil.copytree(cell, folder)
    own = [f"paths.{name}={tmp_path}/{name}" for name in ("work", "plans", "sweeps", "evaluations", "tuning")]
    return [*words, f"paths.results={tmp_path}/theirs", *own], folder


RESULTS: dict[str, tuple[Any, str]] = {
    "_target_": ({"config": {"method": {"config": {"target_modules": {"_target_": "torch.load", "f": "MARK", "weights_only": False}}}}}, "lora-s0-n16"),
    "type": ({"config": {"method": {"type": "os.system"}}}, "os.system"),
    "secret": ({"config": {"method": {"type": "${oc.env:SECRET}"}}}, "${oc.env:SECRET}"),
    "experiment": ({"experiment": "../../x"}, "experiment is '../../x', which cannot name a folder"),
    "slash": ({"cell": "a/b"}, "cell is 'a/b', which cannot name a folder"),
    "html": ({"technique": "<script>"}, "technique is '<script>', which cannot name a folder"),
    "wrong kind": ({"scores": {"test": [1]}}, "scores.test is [1], not an object"),
    "unknown": ({"surprise": 1}, "unknown field 'surprise'"),
}
"""What stands in a result.json, and what the sentence about it says."""


@pytest.mark.parametrize("which", few(RESULTS, 1))
def test_results_of_somebody_else_stop_what_would_take_them_over(grid_cell, which, tmp_path, guard, mirroring):
    words, folder = theirs(grid_cell, tmp_path)
    change, says = RESULTS[which]
    alter(folder, json.loads(json.dumps(change).replace("MARK", str(guard.mark))))
    guard.refuses(cells.main, words, says)
    guard.refuses(plan.main, [*words, "adopt=true"], says)
    if which not in ("_target_", "type", "secret"):  # the mirror shows a config and makes nothing of it
        guard.refuses(backfill, mirroring(words), says)


@pytest.mark.parametrize("text", few([DEEP, "1" * 5000, "", "\0" * 300, '{"schema": NaN', "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")], 2))
def test_a_result_that_is_no_result_is_named_and_its_cell_run_again(grid_cell, text, tmp_path, guard):
    words, folder = theirs(grid_cell, tmp_path)
    (folder / "result.json").write_text(text)
    guard.refuses(plan.main, [*words, "adopt=true"], "1 cells have no result" if text != "1" * 5000 else "result.json")
    if text in (DEEP, ""):
        guard.refuses(cells.main, words, f"warning: {folder}/result.json is not JSON", "theirs", code=0)
        assert read_json(folder / "result.json")["status"] == "ok"


def test_a_folder_of_results_that_is_a_link_is_not_written_through(grid_cell, tmp_path, guard):
    words, folder = theirs(grid_cell, tmp_path)
    shutil.move(folder, tmp_path / "victim")
    folder.symlink_to(tmp_path / "victim")
    (tmp_path / "victim/result.json").unlink()
    guard.refuses(cells.main, words, f"{folder} is a symbolic link")
    guard.refuses(train.main, words, f"{folder} is a symbolic link")


def test_a_link_out_of_a_cell_is_not_sent_to_mlflow(grid_cell, tmp_path, guard, mirroring):
    words, folder = theirs(grid_cell, tmp_path)
    (tmp_path / "private").write_text("hunter2")
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.jsonl").symlink_to(tmp_path / "private")
    guard.refuses(backfill, mirroring(words), "predictions.jsonl is a symbolic link")
    assert not any("hunter2" in p.read_text(errors="replace") for p in tmp_path.rglob("mlartifacts/**/*") if p.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("text", "says"), [
    (DEEP, "is not JSON"), ("[]", "sweep.json"), ("{}", "sweep.json"), ('{"experiment": "../../x", "provenance": {"started": "2026-11-29"}}', "sweep.json"),
    ('{"experiment": "quick", "provenance": {"started": "${oc.env:SECRET}"}}', "sweep.json"),
])
def test_a_sweep_of_somebody_else_is_named_by_the_backfill(grid_cell, text, says, tmp_path, guard, mirroring):
    words, _ = theirs(grid_cell, tmp_path)
    folder = tmp_path / "sweeps/quick/lora"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(text)
    (folder / "trials.csv").write_text("number,status\n=HYPERLINK(1),ok\n")
    guard.refuses(backfill, mirroring(words), says)


def other_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE diary (day TEXT)")


@pytest.mark.parametrize("which", few(["other", "link", "text", "empty", "pickle"], 2))
@pytest.mark.parametrize("main", few([sweep.main, tune.main], 1))
def test_a_study_of_somebody_else_is_named_and_left_as_it_is(grid_cell, which, main, tmp_path, guard):
    words, _ = theirs(grid_cell, tmp_path)
    path = tmp_path / "sweeps/quick" / ("lora" if main is sweep.main else "lora-n16-tune") / "study.db"
    path.parent.mkdir(parents=True)
    if which == "link":
        other_database(tmp_path / "diary.db")
        path.symlink_to(tmp_path / "diary.db")
    elif which == "other":
        other_database(path)
    else:
        path.write_bytes({"text": b"no database " * 99, "empty": b"", "pickle": pickle.dumps(os.system)}[which])
    guard.refuses(main, words, f"{path} {'is a symbolic link' if which == 'link' else 'cannot be opened as an Optuna study'}")


@pytest.mark.parametrize("which", ["folder", "lock"])
def test_a_link_in_the_place_of_a_study_or_its_lock_is_not_written_through(grid_cell, which, tmp_path, guard):
    words, _ = theirs(grid_cell, tmp_path)
    folder = tmp_path / "sweeps/quick/lora"
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis.tex").write_text("years of work")
    (folder if which == "lock" else folder.parent).mkdir(parents=True)
    (folder / ".lock" if which == "lock" else folder).symlink_to(tmp_path / ("victim/thesis.tex" if which == "lock" else "victim"))
    guard.refuses(sweep.main, words, f"cannot write {folder}/.lock" if which == "lock" else f"{folder} is a symbolic link")


@pytest.mark.parametrize("held", [{"thesis.tex": "x"}, {"code.json": DEEP}, {"a.json": '{"config": 1}'}])
def test_a_folder_of_plans_of_somebody_else_is_left(grid_cell, held, tmp_path, guard):
    words, _ = theirs(grid_cell, tmp_path)
    folder = tmp_path / "plans/quick"
    folder.mkdir(parents=True)
    for name, text in held.items():
        (folder / name).write_text(text)
    guard.refuses(plan.main, words, f"{folder} is there and was not written by this command")


CONFIGS = {"deep": DEEP, "list": "[1]", "text": '{"model_type": "llama", "hidden_size": "${oc.env:SECRET}"}', "empty": ""}


@pytest.mark.parametrize("which", few(CONFIGS, 1))
def test_a_model_of_somebody_else(tiny, which, tmp_path, guard):
    """Forecast it, fetch it, train on it."""
    folder = tmp_path / "models/smollm2_135m"
    shutil.copytree(tiny / "models/smollm2_135m", folder)
    (folder / "config.json").write_text(CONFIGS[which])
    here = [f"paths.data={tiny}/data", f"paths.models={tmp_path}/models", "task=vader_movies", "tracking=none", "device=cpu"]
    guard.refuses(forecast.main, [*here, "technique=lora"], "config.json")
    guard.refuses(base_model.main, ["model=local", f"model.source.path={folder}", "model.name=copy", f"paths.models={tmp_path}/models"], str(folder))
    cell = [*here, "technique=zero_shot", "experiment=mine", f"paths.results={tmp_path}/results", f"paths.work={tmp_path}/work", "evaluate.forgetting=false"]
    guard.refuses(train.main, cell, str(folder))


def test_a_model_with_pickled_weights_alone(tiny, tmp_path, guard):
    folder = tmp_path / "models/smollm2_135m"
    shutil.copytree(tiny / "models/smollm2_135m", folder)
    (folder / "model.safetensors").unlink()

    class Runs:
        def __reduce__(self) -> Any:
            return Path.touch, (guard.mark,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
    guard.refuses(base_model.main, ["model=local", f"model.source.path={folder}", "model.name=copy", f"paths.models={tmp_path}/models"], "pickle weights only")
    here = [f"paths.data={tiny}/data", f"paths.models={tmp_path}/models", "task=vader_movies", "tracking=none", "device=cpu", "evaluate.forgetting=false"]
    guard.refuses(train.main, [*here, "technique=zero_shot", f"paths.results={tmp_path}/results", f"paths.work={tmp_path}/work"], "pickle")


def test_a_tokenizer_with_code(tiny, tmp_path, guard):
    folder = tmp_path / "model"
    shutil.copytree(tiny / "models/smollm2_135m", folder)
    (folder / "tok.py").write_text(f"open({str(guard.mark)!r}, 'w').close()\n")
    config = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": ["tok.Tok", None]}})
    guard.refuses(base_model.main, ["model=local", f"model.source.path={folder}", "model.name=copy", f"paths.models={tmp_path}/models"],
                  "comes with Python code of its own")


@pytest.mark.parametrize(("name", "text", "says"), [
    ("manifest.json", DEEP, "manifest.json is not JSON"), ("train.jsonl", DEEP + "\n", "train.jsonl line 1 is not JSON"),
    ("train.jsonl", '{"text": "a"}\n' * 64, "train.jsonl line 1"), ("train.jsonl", '{"id": 1, "prompt": [], "answer": {}}\n' * 64, "train.jsonl line 1"),
])
def test_a_prepared_task_of_somebody_else(tiny, name, text, says, tmp_path, guard):
    shutil.copytree(tiny / "data", tmp_path / "data")
    (tmp_path / "data/vader_movies" / name).write_text(text)
    here = [f"paths.{kind}={tmp_path}/{kind}" for kind in ("data", "rationales", "synthetic", "results", "work")]
    here += [f"paths.models={tiny}/models", "task=vader_movies", "device=cpu", "tracking=none", "train_rows=16", "evaluate.forgetting=false"]
    guard.refuses(train.main, [*here, "technique=zero_shot"], says)
    if name != "manifest.json":
        guard.refuses(rationales.main, [*here, "teacher=lexicon"], says)
        guard.refuses(synthesize.main, [*here, "synthetic=labels", "writer=local", "writer.temperature=1"], says)


@pytest.mark.parametrize("text", [DEEP, '{"rationale": "a"}', '{"id": 5, "rationale": [], "answer": 1, "correct": "yes"}'])
def test_what_a_teacher_of_somebody_else_wrote(overrides, tiny, text, tmp_path, guard):
    shutil.copytree(tiny / "rationales", tmp_path / "rationales")
    (tmp_path / "rationales/vader_movies/lexicon/rationales.jsonl").write_text(text + "\n")
    guard.refuses(train.main, [*overrides, f"paths.rationales={tmp_path}/rationales", "technique=step_by_step", "train_rows=16"], "rationales.jsonl line 1")


def test_a_folder_of_rationales_or_rows_of_somebody_else_is_left(tiny, tmp_path, guard):
    for folder in ("rationales/vader_movies/lexicon", "data/instruct"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "thesis.tex").write_text("x")
    guard.refuses(rationales.main, [f"paths.data={tiny}/data", f"paths.rationales={tmp_path}/rationales", "task=vader_movies", "teacher=lexicon"],
                  "was not written by this command")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    source = "task.source={type: files, files: %s}" % (tmp_path / "rows.jsonl")
    rows = ["task=instruct", source, "task.prompt='{text}'", "task.answer='{label}'", "+task.columns={}"]
    guard.refuses(prepare.main, [*rows, f"paths.data={tmp_path}/data"], "was not written by this command")


def test_a_cache_of_answers_of_somebody_else_is_told_and_asked_anew(tmp_path, capfd):
    path = tmp_path / "local-0.jsonl"
    lines = [{"key": "a", "text": 5, "seconds": 1}, {"key": "b", "text": "t", "seconds": "x"}, {"key": "c", "text": "t", "seconds": 1}]
    path.write_text("\n".join([DEEP, *map(json.dumps, lines), "\0\0"]))
    with Cache.open(path) as cache:
        assert [key in cache for key in "abc"] == [False, False, True]
    assert capfd.readouterr().err == f"warning: {path} has 4 damaged lines (the first: line 1); what they held is asked for again\n"


PEFT = {
    "deep": (DEEP, "is not JSON"), "target": ('{"peft_type": {"_target_": "os.system"}}', "peft_type"), "list": ("[]", "is not a JSON object"),
    "mapping": ('{"peft_type": "LORA", "auto_mapping": {"base_model_class": "X", "parent_library": "antigravity"}, "target_modules": {"a": 1}}', ""),
}


@pytest.mark.parametrize("which", few(PEFT, 2))
def test_configurations_of_peft_of_somebody_else(overrides, which, tmp_path, guard):
    text, says = PEFT[which]
    folder = tmp_path / "configs/lora/x"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    words = [*overrides, "experiments=quick", "task=vader_movies", "seed=0", "train_rows=16", f"paths.peft_results={tmp_path}/peft", "technique=peft_config"]
    for name in ("x", "<b>", "${oc.env:SECRET}"):
        folder = folder.rename(folder.parent / name)
        assert peft_configs.main([*words, f"technique.path={tmp_path}/configs"]) == 2
        said = guard.capfd.readouterr().err
        assert (says if name == "x" else f"passed over: the name of {folder}") in said and "Traceback" not in said and "hunter2" not in said
        assert not (tmp_path / "peft").exists() and not (tmp_path / "results").exists()
        counted[NAMES[peft_configs.main]] += 1


@pytest.mark.slow
def test_the_table(capsys, request):
    if request.config.getoption("markexpr"):
        pytest.skip("counts fast cases and slow ones: run this file without -m")
    with capsys.disabled():
        print("\n| command | hostile folders |\n| --- | --- |\n" + "\n".join(f"| `{name}` | {counted[name]} |" for name in sorted(NAMES.values())))
    assert all(counted[name] for name in NAMES.values())
