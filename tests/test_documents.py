"""README and docs/: every command names a module, its keys compose, every YAML is one that runs; README's own task runs as it stands."""

from __future__ import annotations

import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import evidence
from pipeline import __main__ as console
from pipeline import prepare
from pipeline.core import arguments
from pipeline.core.compose import CONF, ROOT, compose
from pipeline.core.files import UserError, read_jsonl

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
COMMAND = re.compile(r"python -m (?P<module>(?:pipeline|benchmarks)(?:\.\w+)+)(?P<words>[^`|#\n]*)")
PLACES = {"task": "vader_movies", "teacher": "lexicon", "model": "smollm2_135m", "technique": "lora", "synthetic": "labels", "split": "test"}
"""What a reader puts where a document has … or <a name>."""
OWN_WORDS = {
    "advise": ("train_rows", "gpu_memory_gb", "hours", "metric_floor", "task", "model", "results"), "compare": None, "tracking": ("backfill",), "plan": None,
}
"""Commands that compose no config: the keys that they take; None: paths."""
MINE = ("task", "experiments")
"""Groups whose option mine is what README has the reader write."""


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """(module, words) of every command, placeholders filled in."""
    found = []
    for match in COMMAND.finditer(text.replace("\\\n", " ")):
        line = re.split(r" {2,}|, |;| →|\)| \(", match["words"].replace(" …", ""))[0].rstrip(".,: ")
        words = shlex.split(re.sub(r"=<[^>]*>", "=…", line))
        found.append((match["module"], tuple(_filled(word) for word in words)))
    return found


def _filled(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"{key}={PLACES.get(key, 'mine')}" if equals and value == "…" else word


EVERY = sorted({one for page in PAGES for one in commands(page.read_text(encoding="utf-8"))})


def test_the_commands_of_the_documents_are_found():
    assert len(EVERY) > 50 and ("pipeline.tune", ("experiments=quick",)) in EVERY
    assert ("pipeline.advise", ("train_rows=500", "gpu_memory_gb=16", "hours=2")) in EVERY


def test_every_module_that_is_named_is_one():
    for name in {module for module, _ in EVERY}:
        assert (ROOT / f"{name.replace('.', '/')}.py").exists(), f"python -m {name}"


@functools.cache
def composes(words: tuple[str, ...]) -> str:
    """Empty, or why these overrides do not compose."""
    try:
        compose(words)
    except UserError as error:
        return str(error)
    return ""


COMPOSED = sorted({words for module, words in EVERY if module.startswith("pipeline.") and module.partition(".")[2] not in OWN_WORDS and words})


@pytest.mark.parametrize("words", [words for words in COMPOSED if not set(words) & {f"{group}=mine" for group in MINE}], ids=" ".join)
def test_every_command_of_the_documents_composes(words):
    """Every key that a document has a reader type exists, and every group has the option."""
    known = [w for w in words if not w.startswith(("experiments=mine", "experiments=reviews"))]
    assert not composes(tuple(known)), composes(tuple(known))


def test_commands_without_a_config_take_the_words_that_documents_give_them():
    for module, words in EVERY:
        keys = OWN_WORDS.get(module.partition(".")[2]) if module.startswith("pipeline.") else None
        if keys is not None:
            assert {word.split("=")[0] for word in words} <= set(keys), f"{module} {words}"
            assert not hasattr(importlib.import_module(module), "KEYS") or tuple(importlib.import_module(module).KEYS) == keys


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


YAMLS = [(page, text) for page in PAGES for language, text in blocks(page) if language == "yaml"]


def test_every_yaml_of_the_documents_is_one_of_ours():
    """A technique's composes; a task's, an experiment's and its grid's have the keys that theirs have."""
    assert len(YAMLS) >= 4
    for page, text in YAMLS:
        values = yaml.safe_load(text)
        for key, option in (overridden(values) if isinstance(values, dict) else ()):
            assert option == "mine" or (CONF / key / f"{option}.yaml").exists(), f"{page.name}: {key}: {option}"
        if "grid" in values:
            assert values["grid"].keys() <= yaml.safe_load((ROOT / "experiments/quick/params.yaml").read_text())["grid"].keys(), page.name
            assert all((CONF / "technique" / f"{name}.yaml").exists() for name in values["grid"]["techniques"])


def overridden(values: dict[str, Any]) -> list[tuple[str, str]]:
    """(group, option) of a defaults list."""
    pairs = [next(iter(one.items())) for one in values.get("defaults", ()) if isinstance(one, dict)]
    return [(str(key).rpartition("/")[2].removeprefix("override "), str(option)) for key, option in pairs]


def readme(first_key: str) -> str:
    """The YAML of docs/experiments.md that begins with this key."""
    return next(text for page, text in YAMLS if page.name == "experiments.md" and yaml.safe_load(text).keys() & {first_key})


def own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """README's files as a reader would have them; the overrides with which they are found."""
    for name, text in (("task/mine.yaml", readme("source")), ("experiments/mine.yaml", readme("evaluate"))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "reviews").mkdir()
    lines = [f'"a review, number {i}, of a film",{("good", "bad", "so so?")[i % 3]}' for i in range(330)]
    (folder / "reviews/reviews.csv").write_text("\n".join(["body,label", *lines]) + "\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    return [f"hydra.searchpath=[file://{folder}]", f"paths.data={folder}/data"]


def test_the_task_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    words = own_files(tmp_path, monkeypatch)
    assert prepare.main([*words, "task=mine"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    train = read_jsonl(tmp_path / "data/mine/train.jsonl")
    assert len(train) == 180 and train[0]["choices"] == ["bad", "good", "so so?"] and "so so?)" in said
    assert train[0]["prompt"].startswith("Review: a review, number ")
    cfg = compose([*words, "experiments=mine", "technique=lora", "train_rows=160"])
    assert (cfg.task.name, cfg.experiment, cfg.teacher.name) == ("mine", "mine", "none")


@pytest.mark.parametrize("word", ["task.leakage=drop", "task.source.encoding=utf-8", "task.metric=macro_f1", "task.format=chat", "task.max_new_tokens=5"])
def test_what_messages_tell_to_set_can_be_set(word):
    """Keys with a default stand in no composed config: the hint "set task.leakage=drop" was refused when typed."""
    cfg = compose(["task=trec", word])
    key, value = word.split("=")
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    assert str(node) == value


# the console script


TYPED = re.compile(r"alignscope (?P<command>[a-z_]+)(?P<words>(?: (?:--?[\w-]+|[\w./:=\[\]{}'\"-]+))*)")


def typed() -> list[tuple[str, str, list[str]]]:
    """(where, command, words) of every `alignscope …` in the documents; tests/test_hints.py has what the program prints."""
    found = []
    for page in PAGES:
        code = "\n".join([*(text for _, text in blocks(page)), *re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))])
        found += [(page.name, match["command"], shlex.split(match["words"])) for line in code.splitlines() for match in TYPED.finditer(line.split("#")[0])]
    return found


def test_what_is_typed_after_alignscope_is_taken(capsys):
    """Every command that documents have a user type is one, and takes these words."""
    known = arguments.commands()
    every = typed()
    assert len(every) > 20 and {"try", "fit", "errors", "deploy", "more", "rank", "ui"} <= {command for _, command, _ in every}
    for where, command, words in every:
        assert command in known, f"{where}: alignscope {command}"
        main = importlib.import_module(f"pipeline.{known[command]}").main
        if hasattr(main, "parser"):
            wanted = words if words or command not in ("more", "errors", "deploy") else None
            if wanted is not None and "--help" not in words:
                main.parser().parse_args(words)
        elif words and "--help" not in words and arguments.takes_overrides(known[command]):
            assert not composes(tuple(w for w in words if not w.endswith("=reviews"))), f"{where}: alignscope {command} {words}"


@pytest.mark.parametrize("command", sorted(arguments.commands()))
def test_every_command_has_help_in_plain_words(command, capsys):
    """Without Hydra's dump, with an example; --cfg keeps that."""
    assert console.main([command, "--help"]) == 0
    said = capsys.readouterr().out
    assert "Powered by Hydra" not in said and "== Config" not in said
    assert "alignscope" in said or "python -m pipeline." in said


def test_help_loads_nothing_heavy_and_comes_at_once():
    code = ("import sys; from pipeline.__main__ import main; main(['train', '--help']); main(['try', '--help']); main([]); "
            "sys.exit(bool(set(sys.modules) & {'torch', 'hydra', 'pandas', 'transformers', 'rich'}))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize(("words", "said"), [
    (["trian"], "there is no command 'trian', did you mean 'train'?"), (["--completion", "bsh"], "no completion for 'bsh', did you mean 'bash'"),
    (["fit"], "the following arguments are required: --model"), (["errors", "quick"], "the following arguments are required: technique"),
    (["deploy", "nowhere", "lora", "--to", "x"], "unknown experiments 'nowhere'"), (["more", "nowhere"], "experiments/nowhere.yaml does not exist"),
])
def test_a_wrong_word_is_one_sentence(words, said, capsys):
    assert console.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("words", [("pipeline", "--help"), ("pipeline", "train", "--help"), ("benchmarks.race", "--help")])
def test_whoever_reads_may_leave(words):
    reader, writer = os.pipe()
    os.close(reader)  # as head has done
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error():
    @arguments.to_a_reader
    def main(argv: Any = None) -> int:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        main()


def test_the_shell_completes_commands_and_options(capsys):
    assert console.main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    typed = 'COMP_WORDS=(alignscope try --te); COMP_CWORD=2; _shtab_alignscope alignscope --te try; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"--text", "--techniques", "--test-rows"}, done.stderr


def test_the_evidence_that_ships_is_what_the_pages_say():
    assert evidence.main(["check=true"]) == 0
