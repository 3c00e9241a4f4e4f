"""InstructLab's qna.yaml files and trees of them: what is read, and what is told of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.core.files import UserError
from pipeline.teachers.synthetic.taxonomy import SeedExample, passages
from pipeline.teachers.synthetic.taxonomy import read as read_taxonomy

SKILL = {
    "version": 2, "created_by": "someone", "task_description": "Rhymes.",
    "seed_examples": [{"question": f"What rhymes with word {i}?", "answer": f"Bird {i}."} for i in range(5)],
}
KNOWLEDGE = {
    "version": 3, "created_by": "someone", "domain": "Astronomy", "document_outline": "Stars.",
    "seed_examples": [{"context": f"Star {i} is far.", "questions_and_answers": [{"question": f"Q{i}{j}?", "answer": f"A{i}{j}."} for j in range(3)]}
                      for i in range(5)],
    "document": {"repo": "https://example.org/stars.git", "commit": "abc", "patterns": ["*.md"]},
}


def qna(folder: Path, content: dict | str, place: str = "") -> Path:
    path = folder / place / "qna.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_tree_of_leaves_is_read(tmp_path):
    qna(tmp_path, SKILL, "compositional_skills/writing/rhymes")
    qna(tmp_path, KNOWLEDGE, "knowledge/science/stars")
    grounded = {**SKILL, "version": 1, "task_description": "", "seed_examples": [{"question": "q", "answer": "a", "context": "c"}]}
    qna(tmp_path, {k: v for k, v in grounded.items() if k != "version"}, "own/place")
    rhymes, stars, own = read_taxonomy(tmp_path)
    assert (rhymes.path, rhymes.kind, rhymes.description) == ("compositional_skills/writing/rhymes", "skill", "Rhymes.")
    assert rhymes.examples[0] == SeedExample("What rhymes with word 0?", "Bird 0.") and len(rhymes.examples) == 5
    assert (stars.path, stars.kind, stars.description) == ("knowledge/science/stars", "knowledge", "Astronomy: Stars.")
    assert stars.examples[4] == SeedExample("Q11?", "A11.", "Star 1 is far.") and len(stars.examples) == 15
    assert stars.documents == () and stars.documents_at == "https://example.org/stars.git at abc"
    assert (own.path, own.kind, own.examples) == ("own/place", "skill", (SeedExample("q", "a", "c"),))
    assert read_taxonomy(tmp_path / "knowledge/science/stars/qna.yaml") == [stars]


def test_documents_become_passages(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("one two\n\nthree four five six seven\n\neight")
    (tmp_path / "docs" / "b.txt").write_text("not matched")
    leaf, = read_taxonomy(qna(tmp_path, KNOWLEDGE), tmp_path / "docs", 4)
    assert leaf.documents == ("one two", "three four five six", "seven eight") and leaf.documents_at is None
    own = {**KNOWLEDGE, "document": {"folder": str(tmp_path / "docs"), "patterns": ["*.txt"]}}
    assert read_taxonomy(qna(tmp_path, own))[0].documents == ("not matched",)
    assert passages("", 3) == []


def without(content: dict, *keys: str) -> dict:
    return {k: v for k, v in content.items() if k not in keys}


def seeds(*examples) -> dict:
    return {**SKILL, "version": 1, "seed_examples": list(examples)}


@pytest.mark.parametrize(("content", "message"), [
    ("- a\n- b\n", "is a list at its top; write keys there"),
    ("a: [1\n", "is not YAML \\(line 2: .*fix it"),
    ({**SKILL, "version": 4}, "version: 4; set version to 1, 2 or 3"),
    (without(SKILL, "task_description"), "has no task_description; skill of version 2 needs it"),
    (without(SKILL, "created_by"), "has no created_by"),
    (without(KNOWLEDGE, "domain"), "has no domain; knowledge of version 3 needs it"),
    (without(KNOWLEDGE, "document_outline"), "has no document_outline"),
    ({**SKILL, "seed_example": []}, "unknown key 'seed_example', did you mean 'seed_examples'"),
    ({**SKILL, "seed_examples": SKILL["seed_examples"][:4]}, "has 4 seed_examples; version 2 needs 5 at least"),
    ({**SKILL, "seed_examples": {"question": "q"}}, "seed_examples that are no list"),
    (seeds({"question": "q"}), r"seed_examples\[0\] has answer: None; write a text there"),
    (seeds({"question": "q", "answer": True}), "has answer: True; write a text there, put it in quotes"),
    (seeds({"question": "q", "answer": "a", "contexts": "c"}), "unknown key 'contexts'; it takes context, question, answer"),
    (seeds("q"), r"seed_examples\[0\] is 'q'; write the keys"),
    (seeds({"question": "q", "answer": "a"}, {"question": "q ", "answer": "a"}), r"seed_examples\[1\] is there twice"),
    ({**KNOWLEDGE, "seed_examples": [{"context": "c", "questions_and_answers": [{"question": "q", "answer": "a"}]}] * 5},
     "has 1 questions_and_answers; version 3 needs a list of 3 at least"),
    ({**KNOWLEDGE, "document": {"repo": "r"}}, "has no document.patterns"),
    ({**KNOWLEDGE, "document": {"patterns": ["*.md"]}}, "neither document.repo nor document.folder"),
    ({**KNOWLEDGE, "document": {"folder": "/nothing", "patterns": ["*.md"]}}, "match no file in /nothing"),
])
def test_a_bad_leaf_is_named_with_the_key_and_the_mend(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_taxonomy(qna(tmp_path, content))


def test_a_taxonomy_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="does not exist; name a qna.yaml"):
        read_taxonomy(tmp_path / "gone")
    with pytest.raises(UserError, match="has no qna.yaml below it"):
        read_taxonomy(tmp_path)
