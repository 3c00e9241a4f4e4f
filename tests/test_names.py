"""The fixed table of classes: nothing else can be named, whoever wrote the config; and names that become paths."""

from __future__ import annotations

import ast
import json
import shutil

import pytest
import yaml

from pipeline import base_model, cells, prepare, train
from pipeline.core.compose import CONF, ROOT, compose, literal, plain
from pipeline.core.files import UserError, read_json, write_json
from pipeline.core.names import TABLE, build, find, name_of, named
from pipeline.methods.base import Method
from pipeline.objectives.base import Objective


def test_every_type_in_conf_is_in_the_table():
    for path in CONF.rglob("*.yaml"):
        held = yaml.safe_load(path.read_text())
        kind = path.parent.name
        groups = {kind: held} | {f"{kind}.source": held.get("source")} if kind in ("task", "model") else {kind: held}
        for key, values in groups.items():
            if key in TABLE and isinstance(values, dict) and "type" in values:
                assert callable(find(values["type"], key)), path
        assert "_target_" not in path.read_text(), path


@pytest.mark.parametrize(("kind", "base"), [("method", Method), ("objective", Objective)])
def test_the_table_names_every_class_once(kind, base):
    made = {name: find(name, kind) for name in TABLE[kind]}
    classes = {c for c in made.values() if isinstance(c, type)}
    assert all(issubclass(c, base) for c in classes)
    parents = {parent for c in classes for parent in c.__mro__}
    written = {
        node.name for path in (ROOT / f"pipeline/{kind}s").glob("*.py") for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") in {p.__name__ for p in parents if issubclass(p, base)} for b in node.bases)
    }
    abstract = {"SideNetwork", "SoftPrompt", "Preference", "Likelihoods", "Taught"}
    assert written - abstract == {c.__name__ for c in classes}


def test_a_dotted_path_of_before_the_table_means_its_class():
    old = {"_target_": "pipeline.methods.peft_adapter.PeftAdapter", "config": {"_target_": "peft.LoraConfig", "r": 2}}
    assert named({"method": old})["method"] == {"type": "peft_adapter", "config": {"type": "LoraConfig", "r": 2}}
    assert build(old, "method").config.r == 2
    moved = {"peft_adapter.AdaLora": "ada_lora", "peft_adapter.PTuning": "p_tuning", "peft_adapter.from_file": "from_file", "none.Teacher": "teacher"}
    assert {path: name_of({"_target_": f"pipeline.methods.{path}"}, "method") for path in moved} == moved


@pytest.mark.parametrize("path", ["os.system", "builtins.exec", "pipeline.core.files.write_text", "pipeline.methods.none.os", "peft.LoraConfig", "", "x"])
def test_another_path_is_refused(path):
    with pytest.raises(UserError, match=r"which names no method of this project; write type: with one of untouched"):
        name_of({"_target_": path}, "method")


@pytest.mark.parametrize("value", [
    {"_target_": "torch.load", "f": "x"}, {"a": {"_target_": "os.system"}}, [{"_partial_": True}], {"_args_": []},
])
def test_a_field_is_data(value):
    with pytest.raises(UserError, match="is plain data"):
        build({"type": "peft_adapter", "config": {"type": "LoraConfig", "target_modules": value}}, "method")


@pytest.mark.parametrize("name", ["PeftModel", "AutoPeftModel", "get_peft_model", "PeftModelConfig", "NoSuchConfig"])
def test_a_name_of_peft_that_is_no_configuration_is_refused(name):
    with pytest.raises(UserError, match="is no configuration of PEFT"):
        build({"type": name}, "peft")


@pytest.mark.parametrize("value", ["false", "true", 0, 1, "perhaps", None])
def test_a_boolean_is_true_or_false(value):
    with pytest.raises(UserError, match="it takes true or false"):
        build({"type": "peft_adapter", "merge": value, "config": {"type": "LoraConfig"}}, "method")


def test_what_looks_like_an_interpolation_in_somebody_else_s_config_stays_text(monkeypatch):
    from omegaconf import OmegaConf

    monkeypatch.setenv("SECRET", "hunter2")
    for text in ("${oc.env:SECRET}", r"\${oc.env:SECRET}", r"\\${oc.env:SECRET}", "a ${x} b", "$${oc.env:SECRET}", "${", "\\"):
        assert OmegaConf.create(literal({"a": [{"b": text}]})).a[0].b == text


# Names that become paths


@pytest.mark.parametrize("value", ["", ".", "..", "../victim", "a/b", "/absolute", "a\\b", "a b", "a\n", "null", "[1]", "5"])
@pytest.mark.parametrize("key", ["model.name", "task.name", "experiment", "technique.name"])
def test_a_name_cannot_lead_out_of_its_folder(key, value):
    with pytest.raises(UserError, match="which cannot name a folder|does not compose"):
        compose([f"{key}={value}" if value != "a\n" else f'{key}="a\n"'])


def test_a_variant_cannot_either():
    for value in ("../../v", "a/b", "..", "''"):
        with pytest.raises(UserError, match="config key 'variant' is .* which cannot name a folder"):
            compose([f"variant={value}"])


@pytest.mark.parametrize("value", ["''", "null", "5"])
def test_a_path_is_a_text(value):
    with pytest.raises(UserError, match=r"config key 'paths\.results' is .*; it takes the path of a folder"):
        compose([f"paths.results={value}"])


def test_a_model_s_folder_replaces_a_model_s_folder_alone(tiny, tmp_path, capfd):
    words = ["model=local", f"model.source.path={tiny}/models/smollm2_135m", f"paths.models={tmp_path}/models", f"paths.work={tmp_path}/work"]
    victim = tmp_path / "models/mine"
    victim.mkdir(parents=True)
    (victim / "thesis.tex").write_text("years of work")
    (victim / "manifest.json").write_text('{"task": "another stage\'s"}')
    for name in ("", ".", "..", "../victim", str(tmp_path / "victim"), "mine"):
        assert base_model.main([*words, f"model.name={name}"]) == 2
    assert (victim / "thesis.tex").read_text() == "years of work" and sorted(p.name for p in victim.iterdir()) == ["manifest.json", "thesis.tex"]
    assert "was not written by this command" in capfd.readouterr().err
    assert base_model.main([*words, "model.name=other"]) == 0 == base_model.main([*words, "model.name=other"])


def test_a_task_s_folder_replaces_a_task_s_folder_alone(tmp_path, capfd):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    words = ["task=instruct", "task.source={type: files, files: %s}" % (tmp_path / "rows.jsonl"), "task.prompt='{text}'", "task.answer='{label}'",
             "+task.columns={}", f"paths.data={tmp_path}/data"]
    victim = tmp_path / "data/instruct"
    victim.mkdir(parents=True)
    (victim / "notes.txt").write_text("kept")
    assert prepare.main(words) == 2
    assert "choose another name, or move that folder away" in capfd.readouterr().err and (victim / "notes.txt").read_text() == "kept"
    (victim / "notes.txt").unlink()
    assert prepare.main(words) == 0 == prepare.main(words), "an empty folder, and a task's own"


def test_an_experiment_s_results_are_written_with_its_settings_alone():
    with pytest.raises(UserError, match=r"experiment=quick would write into the results of experiments/quick\.yaml .* say experiments=quick"):
        compose(["experiment=quick", "technique=lora"])
    assert compose(["experiments=quick"]).experiment == "quick"


@pytest.mark.parametrize("key", ["model.trust_remote_code", "model.allow_pickle"])
@pytest.mark.parametrize("value", ["'false'", "no", "perhaps", "0", "null"])
def test_trust_is_a_boolean(key, value, tiny, tmp_path, capfd, overrides):
    words = ["model=local", f"model.source.path={tiny}/models/smollm2_135m", "model.name=m", f"paths.models={tmp_path}/models", f"{key}={value}"]
    assert base_model.main(words) == 2
    assert f"config key '{key}' is " in capfd.readouterr().err and not (tmp_path / "models").exists()
    assert train.main([*overrides, "technique=zero_shot", f"{key}={value}"]) == 2


def test_code_beside_a_model_runs_only_where_this_run_s_config_says_so(tiny, tmp_path, overrides, capfd, imports):
    models = tmp_path / "models"
    shutil.copytree(tiny / "models", models)
    folder = models / "smollm2_135m"
    (folder / "modeling_x.py").write_text(
        f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n\nclass XConfig(LlamaConfig):\n    model_type = 'x'\n\n\n"
        "class X(LlamaForCausalLM):\n    config_class = XConfig\n"
    )
    config = read_json(folder / "config.json")
    auto = {"AutoConfig": "modeling_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    write_json(folder / "config.json", {**config, "model_type": "x", "auto_map": auto})
    write_json(folder / "manifest.json", {**read_json(folder / "manifest.json"), "trust_remote_code": True})
    words = [*overrides, f"paths.models={models}", "technique=zero_shot", "evaluate.test_rows=2", "evaluate.latency_rows=0"]
    assert train.main(words) == 2
    assert "comes with Python code of its own; read that code, then set model.trust_remote_code=true" in capfd.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert train.main([*words, "model.trust_remote_code=true"]) == 0 and (tmp_path / "mark").exists()


def test_cells_of_a_grid_cannot_be_named_elsewhere(capsys):
    assert cells.main(["experiments=quick", "variant=../../v"]) == 2
    assert "config key 'variant' is '../../v', which cannot name a folder" in capsys.readouterr().err


def test_plain_refuses_a_path_of_another_project():
    for words in (["+objective._target_=os.system"], ["~objective.type", "+objective._target_=os.system"]):
        with pytest.raises(UserError, match=r"config key 'objective\._target_' is 'os\.system', which names no objective of this project"):
            plain(compose(words))
