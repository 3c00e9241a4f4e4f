"""What follows an answer: a folder that answers as the cell did, wrong rows, more seeds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_try_file import chats, csv_text, jsonl, tried, write

from pipeline import deploy, errors, more
from pipeline.intake import project


@pytest.mark.slow
def test_what_follows_an_answer(place, imports, capsys, monkeypatch):
    write(place / "reviews.csv", csv_text())
    code, out = tried("reviews.csv", capsys=capsys)
    assert code == 0 and any(word in out for word in ("Take", "Do not train", "Undecided")) and "rank reviews" in out
    deployed_answers_as_measured("lora", place, capsys, monkeypatch)
    assert errors.main(["reviews", "zero_shot"]) == 0
    assert "test rows answered wrong" in capsys.readouterr().out
    assert errors.main(["reviews", "lora", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    predicted = [json.loads(line) for line in (place / "results/reviews/lora-s0-n16/predictions.jsonl").read_text().splitlines()]
    wrong = [p for p in predicted if p["split"] == "test" and not p["correct"]]
    assert held["rows"] == 16 and [w["id"] for w in held["wrong"]] == [p["id"] for p in wrong]
    assert sum(pair["rows"] for pair in held["confusion"]) == 16
    assert more.main(["reviews", "--seeds", "2", "--json"]) == 0
    assert {c["cell"] for c in json.loads(capsys.readouterr().out)["cells"]} >= {"lora-s0-n16", "lora-s1-n16"}
    assert "seeds: [0, 1] #" in project.file_of("reviews").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["zero_shot", "few_shot", "prompt_tuning"])
def test_a_deployed_folder_answers_as_the_cell_did(place, imports, capsys, technique, monkeypatch):
    """predict.py, run as it is, gives what predictions.jsonl has: merged weights, the base, demonstrations, an adapter beside its base."""
    write(place / "reviews.csv", csv_text())
    assert tried("reviews.csv", "--techniques", technique, capsys=capsys)[0] == 0
    deployed_answers_as_measured(technique, place, capsys, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.role }} : {{ m.content }} . {% endfor %}{% if add_generation_prompt %}The{% endif %}"])
@pytest.mark.parametrize("technique", ["zero_shot", "few_shot"])
def test_a_deployed_folder_answers_conversations_as_the_cell_did(place, imports, capsys, technique, template, monkeypatch):
    if template:
        path = place / "models/smollm2_135m/tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    system = {"role": "system", "content": "The words are"}
    said = [{"messages": [system, *one["messages"]]} for one in chats("messages", "role", "content", "user", "assistant")]
    write(place / "reviews.jsonl", jsonl(said))
    assert tried("reviews.jsonl", "--techniques", technique, capsys=capsys)[0] == 0
    deployed_answers_as_measured(technique, place, capsys, monkeypatch, word="user", asked=lambda row: row["messages"][-1]["content"])
    assert json.loads((place / "out/prompt.json").read_text())["system"] == "The words are"


def deployed_answers_as_measured(technique: str, place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, word: str = "text",
                                 asked: Callable[[dict[str, Any]], str] = lambda row: row["fields"]["text"]) -> None:
    capsys.readouterr()
    assert deploy.main(["reviews", technique, "--to", "out"]) == 0, capsys.readouterr().err
    assert ".partial" not in capsys.readouterr().out, "a folder that is gone"
    said = {p["id"]: p["prediction"] for line in (place / f"results/reviews/{technique}-s0-n16/predictions.jsonl").read_text().splitlines()
            if (p := json.loads(line))["split"] == "test"}
    rows = [json.loads(line) for line in (place / "data/reviews/test.jsonl").read_text().splitlines()][:4]
    script = (place / "out/predict.py").read_text()
    assert len(script.splitlines()) < 40
    monkeypatch.setattr("sys.argv", ["predict.py"])
    with pytest.raises(SystemExit, match=f"use: python predict.py {word}='…'"):
        exec(compile(script, "predict.py", "exec"), {"__file__": str(place / "out/predict.py"), "__name__": "__main__"})
    for row in rows:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["predict.py", f"{word}={asked(row)}"])
        exec(compile(script, "predict.py", "exec"), {"__file__": str(place / "out/predict.py"), "__name__": "__main__"})
        assert capsys.readouterr().out.strip() == said[row["id"]]
    assert f"{technique} on smollm2_135m" in (place / "out/README.md").read_text()
