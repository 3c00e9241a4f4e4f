"""Synthetic rows: what of them a cell takes, the stage that writes them, bad input; a tiny model from end to end."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
from chat_server import serving
from conftest import BAD, GOOD
from test_taxonomy import KNOWLEDGE, SKILL, qna

from pipeline import synthesize
from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.cell.identity import fingerprint
from pipeline.core.compose import compose
from pipeline.core.files import UserError, read_json, read_jsonl, sha256, write_json, write_jsonl
from pipeline.core.names import TABLE
from pipeline.data import recipe
from pipeline.records.finished import name as cell_name
from pipeline.records.results import Result, Synthetic
from pipeline.records.results import read as read_result
from pipeline.reporting.rows import make_rows
from pipeline.teachers.synthetic import rows as synthetic
from pipeline.teachers.synthetic import sets
from pipeline.teachers.synthetic.rows import count, draw

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def questions(index: int, seed: int) -> str:
    rng = random.Random(f"{seed}/{index}")
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(6)) + "?"


# mixing


def made_rows(answers: str, **more) -> list[dict]:
    return [{"id": f"r{i}", "answer": a, "choices": ["a", "b"], "leaf": "x", "set": "0", "seeds": ["train-0"], **more} for i, a in enumerate(answers)]


def test_the_share_is_of_the_training_rows():
    assert [count(n, s) for n, s in ((64, 0.5), (64, 0.2), (30, 0.75), (64, 0.0))] == [64, 16, 90, 0]


def test_rows_are_drawn_with_the_seed_answers_in_turn():
    rows = made_rows("aaaaaaaabb")
    actual = draw(rows, 4, 0)
    assert Counter(r["answer"] for r in actual) == {"a": 2, "b": 2} and draw(rows, 7, 0)[:4] == actual
    assert len({tuple(r["id"] for r in draw(rows, 4, seed)) for seed in range(6)}) > 1
    assert sorted(r["id"] for r in draw(rows, 10, 3)) == sorted(r["id"] for r in rows)


@pytest.fixture
def made(tiny, tmp_path, overrides):
    """Overrides of a cell with the synthetic rows below tmp_path, and the folder to write them in."""
    folder = tmp_path / "synthetic" / "vader_movies" / "labels"
    every = [*overrides, f"paths.synthetic={tmp_path}/synthetic", "experiments=quick", "task=vader_movies", "technique=lora+labels", "train_rows=8"]
    return every, folder


def write_set(folder: Path, tiny: Path, rows: list[dict], **more) -> None:
    write_jsonl(folder / "rows.jsonl", rows)
    about = {"sets": {"0": {"rows": len(rows), "seconds": 2.5, "examples_beside": 0}}, "teacher": "local:x",
             "data_sha256": sha256(tiny / "data" / "vader_movies" / "manifest.json")}
    write_json(folder / "manifest.json", about | more)


def test_what_a_cell_takes_and_what_it_refuses(made, tiny):
    overrides, folder = made
    cfg, labelled = compose(overrides), [{"id": f"train-{i}"} for i in range(8)]
    assert synthetic.extra(compose([*overrides, "synthetic.share=0"]), labelled) == synthetic.extra(compose(overrides[:-2]), labelled) == ([], None)

    def refused(message: str, rows: list[dict] = labelled, *more: str) -> None:
        with pytest.raises(UserError, match=message):
            synthetic.extra(compose([*overrides, *more]), rows)

    refused("rows.jsonl does not exist; run: python -m pipeline.synthesize task=vader_movies synthetic=labels")
    write_set(folder, tiny, made_rows("abababab"))
    actual, output = synthetic.extra(cfg, labelled)
    assert len(actual) == 8 and output == Synthetic("labels", 8, 0.5, "local:x", 2.5)
    refused("share=0.6 of 8 labelled rows asks for 12 synthetic ones, but .* has 8; .* set synthetic.share=0.5 at most", labelled, "synthetic.share=0.6")
    refused("written from labelled rows that this cell does not have \\(first: train-0\\); .* train_rows=3", labelled[1:4])
    refused("has no rows for seed 1, only for 0; .*row_seeds=\\[…,1\\]", labelled, "seed=1")
    write_set(folder, tiny, made_rows("ab"), data_sha256="other")
    refused("was written for other data")
    write_set(folder, tiny, made_rows("abababab", set="all", seeds=[]), sets={"all": {"rows": 8, "seconds": None, "examples_beside": 5}})
    actual, output = synthetic.extra(compose([*overrides, "seed=4"]), labelled)
    assert len(actual) == 8 and output.examples == 5 and output.seconds is None, "a taxonomy's rows are there for every seed"


def test_a_cell_knows_what_decides_it(made, tiny):
    overrides, folder = made
    plainly = [o for o in overrides if not o.startswith("technique=")]
    without_rows = compose([*plainly, "technique=lora"])
    assert "synthetic" not in identity.decides(without_rows) and cell_name(without_rows) == "lora-s0-n8" and synthetic.reads(without_rows) == []
    cfg = compose(overrides)
    assert cell_name(cfg) == "lora+labels-s0-n8" and identity.decides(cfg)["synthetic"] == {"name": "labels", "share": 0.5}
    assert synthetic.reads(cfg) == [folder / "rows.jsonl"] and compose([*plainly, "technique=lora+taxonomy"]).variant == "taxonomy"
    write_set(folder, tiny, made_rows("ab"))
    before = fingerprint(cfg)
    assert fingerprint(compose([*overrides, "synthetic.words.system=x"])) == before != fingerprint(compose([*overrides, "synthetic.share=0.1"]))
    write_set(folder, tiny, made_rows("ba"))
    assert fingerprint(cfg) != before


@pytest.mark.parametrize(("override", "message"), [
    ("synthetic.share=1", "share' is 1"), ("synthetic.share=-0.1", "from 0 to below 1"), ("synthetic.rows=0", "rows' is 0; it must be at least 1"),
    ("synthetic.near=0", "near' is 0"), ("synthetic.longest=1", "longest=1 is below"), ("synthetic.attempts=0.5", "attempts' is 0.5"),
    ("synthetic.row_seeds=[a]", "row_seeds\\[0\\]' is 'a'; it takes int"), ("+synthetic.shar=1", "unknown config key 'synthetic.shar', did you mean 'share'"),
])
def test_settings_are_checked(override, message):
    with pytest.raises(UserError, match=message):
        synthetic.read(compose(["synthetic=labels", override]))


def test_the_report_counts_synthetic_rows_and_teacher_s_seconds():
    from pipeline.records.finished import Cell
    from pipeline.records.results import Teacher

    base = {"experiment": "e", "cell": "c", "technique": "lora", "family": "f", "method": "lora", "objective": "labels", "precision": "fp32", "task": "t",
            "model": "m", "seed": 0, "train_rows": 64, "status": "ok", "kind": "trained", "validation_rows": 12}
    mixed = Result(**base, synthetic=Synthetic("labels", 64, 0.5, "local:x", 3.0, 5), teacher=Teacher("lexicon", 64, 0.5, 1.0))
    rows = {r.name: r for r in make_rows([Cell(mixed, Path(), "lora+labels", "64"), Cell(Result(**base), Path(), "lora", "64")])}
    assert (rows["lora+labels"].synthetic_rows, rows["lora+labels"].teacher_s) == (64, 4.0)
    assert (rows["lora"].synthetic_rows, rows["lora"].teacher_s) == (None, None)


# the stage


@pytest.fixture(autouse=True)
def stub_in_the_table(monkeypatch) -> None:
    monkeypatch.setitem(TABLE["writer"], "stub", "test_synthetic.Stub")


class Stub:
    """What conf/writer/ could name: the tiny task's sentences, the asked-for label's word in them."""

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.spent = type("Spent", (), {"seconds": 0.0})()

    def check(self) -> None:
        pass

    def about(self) -> dict:
        return {"kind": "stub", "model": "x", "seconds": self.spent.seconds}

    def write(self, prompts, *, seed=0):
        self.spent.seconds += 1
        actual = []
        for i, prompt in enumerate(prompts):
            rng = random.Random(f"{seed}/{i}")
            words = rng.choices(WORDS, k=5)
            actual.append(" ".join([*words, rng.choice(GOOD if prompt[-1]["content"].endswith("positive") else BAD)]))
        return actual


@pytest.fixture
def stage(tiny, tmp_path):
    return [f"paths.data={tiny}/data", f"paths.synthetic={tmp_path}/synthetic", f"paths.work={tmp_path}/work", "task=vader_movies", "synthetic=labels",
            "+writer.type=stub", "synthetic.rows=10", "synthetic.seed_rows=3", "train_rows=16"]


def test_the_stage_writes_rows_of_every_seed_from_its_own_labelled_rows(stage, tmp_path, tiny, capsys):
    assert synthesize.main([*stage, "synthetic.row_seeds=[0,3]"]) == 0
    folder = tmp_path / "synthetic" / "vader_movies" / "labels"
    rows, about = read_jsonl(folder / "rows.jsonl"), read_json(folder / "manifest.json")
    assert Counter((r["set"], r["answer"]) for r in rows) == {(s, a): 5 for s in "03" for a in ("negative", "positive")}
    assert set(rows[0]) == {"id", "prompt", "answer", "choices", "fields", "source", "set", "leaf", "teacher", "seeds"}
    assert rows[0]["prompt"] == f"Review: {rows[0]['fields']['text']}\nSentiment:" and rows[0]["choices"] == ["negative", "positive"]
    assert (rows[0]["source"], rows[0]["leaf"], rows[0]["teacher"]) == ("synthetic", "task/vader_movies", "stub:x")
    assert len({r["id"] for r in rows}) == 20
    train = read_jsonl(tiny / "data" / "vader_movies" / "train.jsonl")
    for seed in (0, 3):
        mine = list(train)
        random.Random(seed).shuffle(mine)
        shown = {s for r in rows if r["set"] == str(seed) for s in r["seeds"]}
        assert shown <= {r["id"] for r in mine[:16]} and len(shown) <= 6
    assert about["rows"] == 20 and about["teacher"] == "stub:x" and about["rows_sha256"] == sha256(folder / "rows.jsonl")
    assert {tag: (one["rows"], one["labels"], one["examples_beside"]) for tag, one in about["sets"].items()} == dict.fromkeys(
        "03", (10, {"negative": 5, "positive": 5}, 0))
    assert about["seconds"] == sum(one["seconds"] for one in about["sets"].values()) and "10 rows of" in capsys.readouterr().out
    before = sha256(folder / "rows.jsonl")
    assert synthesize.main([*stage, "synthetic.row_seeds=[0,3]"]) == 0 and sha256(folder / "rows.jsonl") == before


@pytest.mark.slow
def test_behind_a_server_an_interrupted_stage_goes_on_and_a_finished_one_asks_for_nothing(stage, tmp_path, capsys):
    folder = tmp_path / "synthetic" / "vader_movies" / "labels"
    with serving() as server:
        mine = [o for o in stage if "writer" not in o] + ["writer=server", f"writer.base_url={server.url}", "writer.model=m", "writer.key_variable=null",
                                                          "writer.temperature=1.0", "writer.concurrency=1"]
        server.reply = lambda text: questions(len(server.asked), 0)
        server.behave = lambda number, handler: number == 5 and handler.send(400, {"error": {"message": "no"}})
        assert synthesize.main(mine) == 2 and not folder.exists() and len(server.asked) == 5
        assert synthesize.main(mine) == 0
        paid, before = len(server.paid), sha256(folder / "rows.jsonl")
        assert paid == len(set(map(repr, (a["messages"] + [a.get("seed")] for a in server.asked)))), "no text was asked for twice"
        assert synthesize.main(mine) == 0 and len(server.paid) == paid and sha256(folder / "rows.jsonl") == before
    assert len(read_jsonl(folder / "rows.jsonl")) == 10 and read_json(folder / "manifest.json")["teacher"] == "server:m"


def test_a_taxonomy_fills_a_task_of_instructions(tiny, tmp_path, monkeypatch):
    data = tmp_path / "data" / "instruct"
    row = {"id": "train-1", "prompt": "Say it.", "answer": "It.", "choices": None, "fields": {"instruction": "Say it.", "input": "", "output": "It."}}
    for split in ("train", "validation", "test"):
        write_jsonl(data / f"{split}.jsonl", [{**row, "id": f"{split}-1"}])
    write_json(data / "manifest.json", {})
    qna(tmp_path / "tree", SKILL, "compositional_skills/writing/rhymes")
    qna(tmp_path / "tree", KNOWLEDGE, "knowledge/stars")
    stage = [f"paths.data={tmp_path}/data", f"paths.synthetic={tmp_path}/synthetic", "task=instruct", "synthetic=taxonomy", f"synthetic.seeds={tmp_path}/tree",
             "+writer.type=stub", "synthetic.rows=6", "synthetic.shortest=1", "synthetic.longest=9"]
    monkeypatch.setattr(Stub, "write", lambda self, prompts, *, seed=0: [questions(i, seed) for i, _ in enumerate(prompts)])
    assert synthesize.main(stage) == 2, "which column a question fills is not clear"
    assert synthesize.main([*stage, "synthetic.question_column=instruction", "synthetic.context_column=input"]) == 0
    rows, about = (read(tmp_path / "synthetic" / "instruct" / "taxonomy" / name) for read, name in ((read_jsonl, "rows.jsonl"), (read_json, "manifest.json")))
    assert Counter(r["leaf"] for r in rows) == {"compositional_skills/writing/rhymes": 3, "knowledge/stars": 3}
    assert {r["set"] for r in rows} == {"all"} and all(r["choices"] is None and r["seeds"] == [] for r in rows)
    assert all(r["prompt"] == r["fields"]["instruction"] for r in rows if r["leaf"].startswith("comp"))
    one = about["sets"]["all"]
    assert one["examples_beside"] == 20 and one["documents_not_read"] == ["https://example.org/stars.git at abc"] and about["seeds_sha256"]


@pytest.mark.parametrize(("overrides", "message"), [
    (["synthetic=taxonomy"], "'synthetic.seeds' is missing"),
    (["+writer.temperature=0"], "writer.temperature=0 writes the same text every time"),
    (["train_rows=1"], "none of the 1 labelled rows of seed 0 has the answer"),
    (["paths.data=nowhere"], "is not prepared; run: python -m pipeline.prepare task=vader_movies"),
    (["synthetic.question_column=body"], "question_column=body is no column of task.prompt; it has text"),
    (["synthetic.seeds=gone.yaml"], "gone.yaml does not exist"),
    (["synthetic.longest=3"], "no row of .* came through the filters .*dropped: length 40"),
])
def test_the_stage_refuses_by_name(stage, overrides, message, capsys):
    assert synthesize.main([*stage, *overrides]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_it_needs_a_set_and_a_writer(stage, capsys):
    for overrides, message in (([*stage[:4], "synthetic=none"], "synthetic=none has nothing to write"), (stage[:5], "need a writer; add writer=local")):
        assert synthesize.main(overrides) == 2 and message in capsys.readouterr().err


def test_a_task_whose_rows_bring_their_own_choices_is_refused():
    cfg = compose(["task=cqa", "synthetic=labels"])
    with pytest.raises(UserError, match="rows of task cqa have their own choices"):
        sets.form_of(recipe.read(cfg), synthetic.read(cfg))
    cfg = compose(["task=esnli", "synthetic=labels"])
    with pytest.raises(UserError, match="columns premise, hypothesis; say which of them a question fills"):
        sets.form_of(recipe.read(cfg), synthetic.read(cfg))
    cfg = compose(["task=esnli", "synthetic=labels", "synthetic.context_column=premise"])
    assert sets.form_of(recipe.read(cfg), synthetic.read(cfg)).question == "hypothesis"


@pytest.mark.slow
def test_from_a_writer_on_this_machine_to_a_cell(made, tiny, tmp_path, imports):
    """The tiny model's random words are written, mixed and trained on; labelled rows are counted alone."""
    overrides, folder = made
    write = [o for o in overrides if not o.startswith(("experiments", "technique"))]
    local = ["synthetic=labels", "writer=local", "writer.temperature=1.0", "writer.max_new_tokens=12", "synthetic.rows=8", "synthetic.attempts=8",
             "synthetic.seed_rows=2", "synthetic.shortest=1", "synthetic.longest=20"]
    assert synthesize.main([*write, *local]) == 0
    rows, about = read_jsonl(folder / "rows.jsonl"), read_json(folder / "manifest.json")
    assert len(rows) >= 4 and about["sets"]["0"]["seconds"] > 0 and about["teacher"] == "local:smollm2_135m"
    before = sha256(folder / "rows.jsonl")
    assert synthesize.main([*write, *local]) == 0 and sha256(folder / "rows.jsonl") == before
    assert read_json(folder / "manifest.json")["seconds"] == about["seconds"], "what was kept has cost what it cost"
    share = "synthetic.share=0.33"
    cell_run.run(compose([*overrides, share, "train.batch_size=4", "train.epochs=1"]), folder=tmp_path / "cell")
    result = read_result(tmp_path / "cell")
    assert result.train_rows == 8 and result.validation_rows == 1 and result.synthetic.rows == 4 and result.work.steps == 3
    assert result.synthetic.seconds == about["sets"]["0"]["seconds"]
    plain = cell_run.run(compose([*[o for o in overrides if not o.startswith("technique")], "technique=zero_shot", "synthetic=labels"]), folder=None)
    assert plain.synthetic is None and plain.train_rows == 8
