"""From a file of rows to an answer, on files of six kinds with the tiny model; what is seen in a file; bad input in one sentence each."""

from __future__ import annotations

import gzip
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows

from pipeline import cells, fit, prepare, report, try_file
from pipeline.core.files import UserError
from pipeline.data import tables
from pipeline.intake import answering, look, project, running

ROWS = [{"text": r["fields"]["text"], "label": r["answer"]} for r in make_rows(90, 7, "row")]
FEW = ["--rows", "16", "--test-rows", "16", "--techniques", "zero_shot,lora", "--yes"]


def csv_text(rows: list[dict[str, Any]] = ROWS, separator: str = ",") -> str:
    return "\n".join([separator.join(rows[0]), *(separator.join(str(v) for v in row.values()) for row in rows)]) + "\n"


def chats(key: str, role: str, text: str, user: str, assistant: str) -> list[dict[str, Any]]:
    return [{key: [{role: user, text: f"Review: {r['text']}"}, {role: assistant, text: r["label"]}]} for r in ROWS]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def excel(path: Path, rows: list[dict[str, Any]]) -> None:
    """A workbook of one sheet, written as the format has it."""
    import zipfile
    from xml.sax.saxutils import escape

    cells = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
    body = "".join("<row>" + "".join(f'<c t="inlineStr"><is><t>{escape(c)}</t></is></c>' for c in line) + "</row>" for line in cells)
    main, rels = "http://schemas.openxmlformats.org/spreadsheetml/2006/main", "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    with zipfile.ZipFile(path, "w") as book:
        kinds = "".join(f'<Override PartName="/xl/{n}.xml" ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.{t}+xml"/>'
                        for n, t in (("workbook", "sheet.main"), ("worksheets/sheet1", "worksheet")))
        rels_kind = '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        book.writestr("[Content_Types].xml", f'<Types xmlns="{package}/content-types">{rels_kind}{kinds}</Types>')
        relation = f'<Relationship Id="rId1" Type="{rels}/{{}}" Target="{{}}"/>'
        for name, kind, target in (("_rels/.rels", "officeDocument", "xl/workbook.xml"), ("xl/_rels/workbook.xml.rels", "worksheet", "worksheets/sheet1.xml")):
            book.writestr(name, f'<Relationships xmlns="{package}/relationships">{relation.format(kind, target)}</Relationships>')
        book.writestr("xl/workbook.xml", f'<workbook xmlns="{main}" xmlns:r="{rels}"><sheets><sheet name="A" sheetId="1" r:id="rId1"/></sheets></workbook>')
        book.writestr("xl/worksheets/sheet1.xml", f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>')


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


MATHS = [{"question": f"the film of {n} and {n + 1}", "answer": f"It is {n} + {n + 1} = {2 * n + 1}\n#### {2 * n + 1}"} for n in range(90)]
PAIRS = [{"prompt": f"Review: {r['text']}", "chosen": r["label"], "rejected": "negative" if r["label"] == "positive" else "positive"} for r in ROWS]
ALPACA = [{"instruction": "The words", "input": r["text"], "output": r["label"]} for r in ROWS]
FILES: dict[str, Callable[[Path], object]] = {
    "semicolons.csv": lambda p: write(p, csv_text(separator=";")),
    "book.xlsx": lambda p: excel(p, ROWS),
    "chat.jsonl": lambda p: write(p, jsonl(chats("messages", "role", "content", "user", "assistant"))),
    "maths.jsonl.gz": lambda p: write(p, gzip.compress(jsonl(MATHS))),
    "pairs.json": lambda p: write(p, json.dumps(PAIRS)),
    "table.parquet": lambda p: parquet(p, ROWS),
}
"""Six files of different kinds, by their names."""
LIKE_ANOTHER = ("book.xlsx", "table.parquet")
"""Tables, which go the way of semicolons.csv once they are read."""


def untracked(name: str) -> None:
    """Keep MLflow out of an experiment's runs, which a user may do in the same place."""
    path = project.file_of(name)
    path.write_text(path.read_text().replace("  - override /teacher: none", "  - override /teacher: none\n  - override /tracking: none"))


def tried(path: str, *words: str, capsys: Any) -> tuple[int, str]:
    assert try_file.main([path, *FEW, "--plan", *words]) == 0, capsys.readouterr().err
    name = look.name_of(path)
    untracked(name)
    capsys.readouterr()
    code = try_file.main([name])
    return code, capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in LIKE_ANOTHER else n for n in FILES])
def test_a_file_of_any_kind_leads_to_an_answer(place, imports, capsys, name):
    FILES[name](place / name)
    code, out = tried(name, "--techniques", "zero_shot", capsys=capsys)
    assert code == 0 and "zero_shot" in out and "test rows" in out and f"errors {look.name_of(name)}" in out, out
    assert (place / "report" / look.name_of(name) / "index.html").exists()
    assert [p.parent.name for p in (place / "results").rglob("result.json")] == ["zero_shot-s0-n16"]


@pytest.mark.slow
def test_a_failed_technique_says_why_in_the_table_and_the_others_go_on(place, imports, capsys):
    write(place / "reviews.csv", csv_text())
    code, out = tried("reviews.csv", "--techniques", "zero_shot,bitfit,lora", capsys=capsys)
    line = next(line for line in out.splitlines() if line.startswith("bitfit"))
    assert code == 0 and "failed: " in line and "add_biases" in line
    assert any(line.startswith("lora  ") for line in out.splitlines())
    assert cells.main(["experiments=reviews"]) == 2
    closing = capsys.readouterr().out
    assert "1 of 3 cells have no result: bitfit-s0-n16 (technique=bitfit" in closing and "python -m pipeline.report experiments=reviews" in closing
    assert report.main(["experiments=reviews"]) == 0
    assert any("not run: bitfit-s0-n16 (technique=bitfit" in line and "add_biases" in line for line in capsys.readouterr().out.splitlines())
    assert "add_biases" in (place / "report/reviews/index.html").read_text()
    assert cells.main(["experiments=reviews", "technique=bitfit", "method.add_biases=true"]) == 0 and not list((place / ".work/failed").rglob("*.json"))


@pytest.mark.slow
def test_what_comes_next_stands_below_its_command_where_a_line_would_not_fit():
    steps = [("alignscope more reviews --seeds 3", "more seeds"), ("alignscope rank reviews", "which rank of LoRA")]
    assert answering.listed(steps, 80)[1] == "        alignscope rank reviews            which rank of LoRA"
    assert answering.listed(steps, 60) == ["next    alignscope more reviews --seeds 3", "            more seeds", "        alignscope rank reviews",
                                           "            which rank of LoRA"]


def test_the_growing_table_is_drawn_by_no_thread_that_cells_would_be_forked_beside(tmp_path):
    from rich.console import Console

    drawn, before = io.StringIO(), threading.active_count()
    with running.Watch([], {}, tmp_path / "log", Console(force_terminal=True, file=drawn, width=80)) as watch:
        assert threading.active_count() == before
        for _ in range(20):
            watch.runs(None)
        assert drawn.getvalue().count("technique") <= 2, "several times a second it is told, a few times it draws"


def test_an_answer_as_json_is_json_alone(place, imports, capsys):
    write(place / "reviews.csv", csv_text())
    assert tried("reviews.csv", "--techniques", "zero_shot", capsys=capsys)[0] == 0
    assert try_file.main(["reviews", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert held["cells"][0]["technique"] == "zero_shot" and held["experiment"] == "reviews" and held["next"]


# what is seen in a file


@pytest.mark.parametrize(("name", "content", "form"), [
    ("a.csv", csv_text(), "CSV, separated by commas, utf-8"),
    ("a.csv", csv_text(separator="\t"), "CSV, separated by tabs, utf-8"),
    ("a.txt", csv_text(separator="|"), "CSV, separated by bars, utf-8"),
    ("a.csv", csv_text().encode("utf-16"), "CSV, separated by commas, utf-16"),
    ("a.csv", b"\xef\xbb\xbf" + csv_text().encode(), "CSV, separated by commas, utf-8"),
    ("a.csv", gzip.compress(csv_text().encode()), "CSV, separated by commas, utf-8, in gzip"),
    ("a.json", json.dumps(ROWS), "JSON, utf-8"),
    ("a.json", json.dumps({"version": 1, "data": ROWS}), "JSON, utf-8"),
    ("a.jsonl", jsonl(ROWS), "JSON Lines, utf-8"),
])
def test_the_format_is_told_by_the_content(tmp_path, name, content, form):
    rows, told = tables.read(write(tmp_path / name, content))
    assert rows == ROWS and told.words == form


def test_letters_of_an_old_encoding_are_read(tmp_path):
    rows = [{"text": f"Ein schöner Film über Grüße, größer als die Straße {n}", "label": "gut" if n % 2 else "schlecht"} for n in range(60)]
    path = write(tmp_path / "a.csv", csv_text(rows, ";").encode("cp1252"))
    assert tables.read(path)[0] == rows


def test_quotes_hold_separators_and_lines_together(tmp_path):
    path = write(tmp_path / "a.csv", 'text;label\n"one; two\nthree";a\n"say ""no""";b\n')
    assert tables.read(path)[0] == [{"text": "one; two\nthree", "label": "a"}, {"text": 'say "no"', "label": "b"}]


@pytest.mark.parametrize(("rows", "shape", "text", "label", "kind"), [
    (ROWS, None, ("text",), "label", "choice"),
    ([{"id": n, "stars": 1 + n % 5, "review_body": r["text"]} for n, r in enumerate(ROWS)], None, ("review_body",), "stars", "choice"),
    ([{"a": r["text"] + " and more words", "b": r["label"]} for r in ROWS], None, ("a",), "b", "choice"),
    (MATHS, None, ("question",), "answer", "number"),
    ([{"q": f"How much is {n}?", "answer": 17 * n} for n in range(80)], None, ("q",), "answer", "number"),
    ([{"question": f"What of {r['text']} {n}?", "answer": f"It is {n} {r['text']}"} for n, r in enumerate(ROWS)], None, ("question",), "answer", "text"),
    (ALPACA, "alpaca", ("instruction", "input"), "output", "choice"),
    ([{"prompt": r["text"], "completion": r["label"]} for r in ROWS], "completion", ("prompt",), "completion", "choice"),
    (PAIRS, "preference", ("prompt",), "answer", "pair"),
    ([{"prompt": f"p{i // 2}", "completion": f"text {i}", "label": i % 2 == 0} for i in range(40)], "judged", ("prompt",), "answer", "pair"),
    (chats("messages", "role", "content", "user", "assistant"), "messages", ("prompt",), "answer", "choice"),
    (chats("conversations", "from", "value", "human", "gpt"), "conversations", ("prompt",), "answer", "choice"),
])
def test_text_and_answer_are_found(tmp_path, rows, shape, text, label, kind):
    seen = look.look(str(write(tmp_path / "a.jsonl", jsonl(rows))))
    assert (seen.shape, seen.text, seen.label, seen.kind) == (shape, text, label, kind)


def test_an_answer_without_its_number_is_named_by_its_row(tmp_path):
    rows = [dict(row) for row in MATHS]
    rows[4]["answer"] = "It is many\n#### 1e+06 or so"
    path = str(write(tmp_path / "a.jsonl", jsonl(rows)))
    seen = look.look(path)
    assert seen.kind == "number"
    with pytest.raises(UserError, match=r"end in a number after ####, but for 1 \(row 5; the first ends '.*or so'\); fix or remove"):
        look.check(seen)


def test_what_a_task_that_is_written_takes_follows_from_its_answers(tmp_path):
    keys = project.task_keys(look.look(str(write(tmp_path / "a.jsonl", jsonl(MATHS)))), False)
    assert keys["stop"] == "\nQuestion:" and 16 <= keys["max_new_tokens"] <= 30 and keys["metric"] == "numeric"
    asks = [{**row, "answer": f"Think.\nQuestion: {row['question']}?\n{row['answer']}"} for row in MATHS]
    assert "stop" not in project.task_keys(look.look(str(write(tmp_path / "b.jsonl", jsonl(asks)))), False), "answers that hold it would be cut"


def test_many_labels_are_counted(tmp_path):
    labels = [f"intent_{n}" for n in range(77)]
    rows = [{"text": f"a message of number {n} and more", "category": labels[n % 77]} for n in range(385)]
    seen = look.look(str(write(tmp_path / "a.csv", csv_text(rows))))
    look.check(seen)
    assert seen.labels == dict.fromkeys(labels, 5)
    assert "77 labels" in "\n".join(look.lines(seen))


def test_what_is_wrong_with_rows_is_shown(tmp_path):
    rows = [*ROWS, *ROWS[:3], {"text": ROWS[0]["text"], "label": "negative" if ROWS[0]["label"] == "positive" else "positive"}]
    seen = look.look(str(write(tmp_path / "a.csv", csv_text(rows))))
    said = "\n".join(look.lines(seen))
    assert len(seen.contradicting) == 1 and seen.duplicates >= 4
    assert f"{seen.duplicates} texts stand there again" in said and "1 of these with another answer" in said


def messy(tmp_path: Path) -> str:
    rows = [dict(r) for r in ROWS]
    for n, word in enumerate(["POSITIVE", "Positive ", "", "N/A"]):
        rows[n]["label"] = word
    return str(write(tmp_path / "messy.csv", csv_text(rows)))


def test_labels_are_made_one_and_missing_ones_left_out(place, capsys):
    path = Path(messy(place)).name
    assert try_file.main([path, *FEW, "--plan"]) == 2
    assert "2 rows without a value in 'label' (row 3, 4, written 'N/A')" in capsys.readouterr().err
    assert try_file.main([path, *FEW, "--plan", "--missing", "drop"]) == 2
    assert "spells 1 labels in several ways" in capsys.readouterr().err and not (place / "experiments/messy.yaml").exists()
    assert try_file.main([path, *FEW, "--plan", "--missing", "drop", "--normalise"]) == 0 and prepare.main(["experiments=messy"]) == 0
    answers = {json.loads(line)["answer"] for line in (place / "data/messy/train.jsonl").read_text().splitlines()}
    assert answers == {"positive", "negative"}


def test_a_label_that_is_called_none_is_kept_where_that_is_said(place, capsys):
    rows = [{**row, "label": ("none", row["label"], "")[n % 3]} for n, row in enumerate(ROWS)]
    write(place / "stance.csv", csv_text(rows))
    assert try_file.main(["stance.csv", *FEW, "--plan"]) == 2 and "where 'none' is an answer: --missing keep" in capsys.readouterr().err
    assert try_file.main(["stance.csv", *FEW, "--plan", "--missing", "keep"]) == 0 and "30 rows without an answer are left out" in capsys.readouterr().out
    assert prepare.main(["experiments=stance"]) == 0
    prepared = [json.loads(line) for split in ("train", "validation", "test") for line in (place / f"data/stance/{split}.jsonl").read_text().splitlines()]
    assert {row["answer"] for row in prepared} == {"none", "positive", "negative"} and len(prepared) <= 60


# bad input, one sentence each


def bad(tmp_path: Path, content: bytes | str, name: str = "a.csv") -> str:
    return str(write(tmp_path / name, content))


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "no such file": (lambda p: [write(p / "reviews.csv", csv_text()), str(p / "review.csv")][1], "there is no file .*did you mean 'reviews.csv'"),
    "a folder": (lambda p: [write(p / "a.csv", csv_text()), str(p)][1], r"is a folder; name one file in it, for example .*a\.csv"),
    "a picture": (lambda p: bad(p, b"\x89PNG\r\n\x1a\n" + bytes(50), "a.png"), r"a picture \(PNG\), no table; save the rows as CSV"),
    "a web page": (lambda p: bad(p, "<!DOCTYPE html><html><body>hi</body></html>"), "is a web page or XML, no table"),
    "nothing": (lambda p: bad(p, b""), "is empty; choose a file with rows"),
    "binary": (lambda p: bad(p, bytes(range(256)) * 9), "holds binary data, no table"),
    "damaged gzip": (lambda p: bad(p, gzip.compress(csv_text().encode())[:60], "a.csv.gz"), "is a damaged gzip file"),
    "an archive": (lambda p: bad(p, b"PK\x03\x04" + bytes(40), "a.zip"), "is an archive and no Excel file"),
    "a broken line": (lambda p: bad(p, jsonl(ROWS) + b"{not json}\n", "a.jsonl"), "line 91 is not JSON"),
    "a ragged line": (lambda p: bad(p, csv_text() + "one,two,three\n"), r"line 92 has 3 cells for 2 columns \(text, label\); mend or remove that line"),
    "two columns of a name": (lambda p: bad(p, "text,text\na,b\n"), "has two columns that are called 'text'; rename one"),
    "no answer": (lambda p: bad(p, "text\n" + "".join(f"a long text of number {n}\n" for n in range(50))), "has no column that could be an answer"),
    "one class": (lambda p: bad(p, csv_text([{**r, "label": "positive"} for r in ROWS])), "every row of .* has the answer 'positive' in 'label'"),
    "ten rows": (lambda p: bad(p, csv_text(ROWS[:10])), "has 10 rows with an answer, and comparing needs 30 at least"),
    "1,000 classes": (lambda p: bad(p, csv_text([{"text": f"some text of {n}", "category": f"class {n % 1000}"} for n in range(2000)])),
                      "'category' of .* has 1,000 different answers in 2,000 rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(place, capsys, name):
    make, said = BAD[name]
    path = make(place)
    assert try_file.main([path, "--yes"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(UserError, match=said):
        raise UserError(error)
    assert not list((place / "experiments").iterdir()), "nothing is half written"


@pytest.mark.parametrize(("words", "said"), [
    (["--text", "txet"], "has no column 'txet', did you mean 'text'"), (["--label", "lable"], "has no column 'lable', did you mean 'label'"),
    (["--prompt", "{body}:"], "--prompt names the column 'body'"), (["--prompt", "hi"], "names no column"),
    (["--prompt", "{text} {label}"], "which holds the answer"),
    (["--rows", "0"], "--rows 0 is no number above 0"), (["--hours", "-1"], "--hours -1 is no number above 0"),
    (["--techniques", "lorra"], "there is no technique 'lorra', did you mean 'lora'"), (["--rows", "5000"], "leaves 54 to train on"),
    (["--card", "big"], "--card big is no size of memory"), (["--modle", "x"], "there is no option --modle, did you mean '--model'"),
    (["--model", "nowhere"], "--model nowhere is no model"), (["--card", "0.2GB"], "no technique fits: zero_shot needs"),
])
def test_a_wrong_argument_is_one_sentence(place, capsys, words, said):
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", "--yes", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list((place / "experiments").iterdir())


MODELS = {
    "an encoder": ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "model.safetensors", "is a BertForMaskedLM, which does not write"),
    "an adapter": (None, "adapter_config.json", "holds an adapter and no model; name org/base"),
    "a GGUF file in a folder": (None, "a.gguf", "is no model folder (no config.json); name the file: --model"),
    "a file that is no GGUF": (None, "b.gguf", "b.gguf is no GGUF file"),
    "no weights": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "notes.txt", "has no safetensors weights"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_is_one_sentence(place, capsys, name):
    config, file, said = MODELS[name]
    (place / "m").mkdir()
    write(place / "m" / file, json.dumps({"base_model_name_or_path": "org/base"}))
    if config:
        write(place / "m/config.json", json.dumps(config))
    write(place / "reviews.csv", csv_text())
    assert try_file.main(["reviews.csv", "--yes", "--model", "m/b.gguf" if file == "b.gguf" else "m"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list((place / "experiments").iterdir())


# fit


def test_fit_answers_without_any_result(place, capsys):
    assert fit.main(["--model", "Qwen/Qwen3-8B", "--card", "16GB", "--hours", "2", "--rows", "500"]) == 0
    out = capsys.readouterr().out
    assert "Try qlora first" in out and all(word in out for word in ("measured", "forecast", "a guess"))
    assert fit.main(["--model", "Qwen/Qwen3-8B", "--card", "16GB", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    fits = {one["technique"]: one["fits"] for one in held["techniques"]}
    assert fits["qlora"] and fits["full"] is False and fits["lora"] is False


@pytest.mark.parametrize(("words", "said"), [
    (["--model", "Qwen/Qwen9-8B"], "the shape of Qwen/Qwen9-8B is not among those that ship with alignscope, did you mean 'Qwen/Qwen3-8B'"),
    (["--model", "Qwen/Qwen3-8B", "--rows", "0"], "--rows 0 is no number above 0"), (["--model", "mine"], "--model mine is no model"),
])
def test_fit_refuses_in_one_sentence(place, capsys, monkeypatch, words, said):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_: str) -> None:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    assert fit.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_answers_are_kept_when_scoring_is_interrupted(tmp_path):
    """Every row is answered once over both runs, and the order is that of the rows."""
    from types import SimpleNamespace

    from pipeline.cell.evaluation import KEPT, Answers

    rows, asked = [{"id": str(n)} for n in range(3 * KEPT)], []

    class Scorer(SimpleNamespace):
        def predict(self, part: list[dict]) -> list[dict]:
            if len(asked) == 2 * KEPT and self.interrupted:
                raise KeyboardInterrupt
            asked.extend(row["id"] for row in part)
            return [{"id": row["id"], "prediction": f"p{row['id']}"} for row in part]

    cpu = SimpleNamespace(type="cpu")
    with pytest.raises(KeyboardInterrupt):
        Answers(Scorer(device=cpu, interrupted=True), tmp_path / "a.answers").predict("test", rows)  # type: ignore[arg-type]
    with open(tmp_path / "a.answers", "a") as file:
        file.write('{"split": "test", "id": "5')  # cut off by a kill
    again = Answers(Scorer(device=cpu, interrupted=False), tmp_path / "a.answers")  # type: ignore[arg-type]
    assert [one["prediction"] for one in again.predict("test", rows)] == [f"p{row['id']}" for row in rows]
    assert sorted(asked, key=int) == [row["id"] for row in rows] and again.fresh == KEPT
