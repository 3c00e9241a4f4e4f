"""A judge asked in both orders: known verdicts, one that only likes the first place, and the command behind a server."""

from __future__ import annotations

import json

import pytest
from chat_server import serving

from pipeline import judge as command
from pipeline.core.files import UserError, read_json, read_jsonl, write_json, write_jsonl
from pipeline.scoring.judge import Pair, judge, verdict


class Said:
    """A writer that decides by a function of (answer A, answer B)."""

    def __init__(self, decide):
        self.decide, self.asked = decide, []

    def write(self, prompts, seed=0):
        texts = [messages[0]["content"] for messages in prompts]
        self.asked += texts
        return [self.decide(*(text.split(f"[Answer {letter}]\n")[1].split(f"\n[End of answer {letter}]")[0] for letter in "AB")) for text in texts]


PAIRS = [Pair(str(n), "why?", "long answer" if n < 8 else "x", "short" if n < 8 else "a much longer one") for n in range(10)]


def longer(a, b):
    return "It says more. [[A]]" if len(a) > len(b) else "[[A]] no, [[B]]"


def test_a_judge_that_agrees_with_itself():
    writer = Said(longer)
    judged, lines = judge([*PAIRS, Pair("same", "why?", "so", "so ")], writer.write, "Which is longer?")
    assert (judged.rows, judged.wins, judged.losses, judged.ties, judged.same, judged.agreement, judged.first_place) == (11, 8, 2, 1, 1, 1.0, 0.5)
    assert judged.share == pytest.approx(8.5 / 11) and judged.low < judged.share < judged.high and judged.p == pytest.approx(0.109375)
    assert len(writer.asked) == 20 and writer.asked[0].startswith("Which is longer?") and lines[0] == {"id": "same", "value": 0.5, "verdicts": []}


def test_a_judge_that_likes_the_first_place_decides_nothing():
    judged, _ = judge(PAIRS, Said(lambda a, b: "[[A]]").write, "Which?")
    assert (judged.wins, judged.losses, judged.ties, judged.share, judged.agreement, judged.first_place, judged.p) == (0, 0, 10, 0.5, 0.0, 1.0, 1.0)


def test_rows_without_a_verdict_are_left_out_and_counted():
    judged, _ = judge(PAIRS, Said(lambda a, b: "[[C]]" if "x" in (a, b) else "no idea").write, "Which?")
    assert (judged.rows, judged.unread, judged.ties, judged.agreement) == (2, 8, 2, 1.0)
    with pytest.raises(UserError, match="said no verdict about any of 10 rows .its first words: 'hm'.; raise writer.max_new_tokens"):
        judge(PAIRS, Said(lambda a, b: "hm").write, "Which?")
    assert verdict("[[A]] or [[B]]") == "B" and verdict("A") is None


def test_the_command_behind_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "finished", lambda folder: type("Result", (), {"task": "t"}))
    rows = [{"id": f"r{n}", "prompt": f"question {n}", "answer": "right", "choices": None, "fields": {}} for n in range(4)]
    write_jsonl(tmp_path / "data" / "t" / "test.jsonl", rows)
    write_json(tmp_path / "data" / "t" / "manifest.json", {})
    for cell, text in (("lora-s0-n8", "good"), ("zero_shot-s0-n8", "bad")):
        write_json(tmp_path / "results" / "mine" / cell / "result.json", {})
        said = [{"id": row["id"], "split": "test", "prediction": text, "output": text} for row in rows]
        write_jsonl(tmp_path / "results" / "mine" / cell / "predictions.jsonl", said)
    words = [*(f"paths.{key}={tmp_path / key}" for key in ("data", "results", "evaluations", "work")), "experiment=mine",
             "judge.cells=[lora-s0-n8,zero_shot-s0-n8]", "judge.rows=3"]
    assert command.main(words) == 2 and "needs a judge; add writer=server" in capsys.readouterr().err
    with serving() as server:
        server.reply = lambda asked: "[[A]]" if asked.index("good") < asked.index("bad") else "[[B]]"
        words += ["writer=server", "writer.model=m", f"writer.base_url={server.url}", "writer.key_variable=null", "writer.input_price=1.0",
                  "writer.output_price=2.0", "writer.currency=EUR"]
        assert command.main(words) == 0
        out = capsys.readouterr().out
        assert "lora-s0-n8 wins 100.0%" in out and "agrees with itself on 100%" in out and "EUR" in out
        assert command.main(words) == 0 and len(server.asked) == 6, "what was judged once is kept"
    folder = tmp_path / "evaluations" / "mine" / "judge" / "lora-s0-n8-zero_shot-s0-n8"
    found = read_json(folder / "judge.json")
    assert (found["wins"], found["agreement"], found["judge"]["answers"]) == (3, 1.0, 6) and found["judge"]["price"] > 0
    assert [line["value"] for line in read_jsonl(folder / "judged.jsonl")] == [1.0] * 3 and "right" in json.dumps(server.asked[0])
