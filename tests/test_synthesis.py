"""Rows from seed examples: near duplicates, what the filter drops, and what a writer that says what it is told is asked for."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from pipeline.core.compose import CONF
from pipeline.core.files import UserError
from pipeline.core.settings import Task
from pipeline.data.near import Near, own_nearness, rouge_l
from pipeline.teachers.synthetic.rows import Synthesis
from pipeline.teachers.synthetic.taxonomy import Leaf, SeedExample
from pipeline.teachers.synthetic.writing import Filter, Writing, branches, check_words, near_texts

# duplicates


def test_near_finds_what_scoring_every_pair_finds():
    assert rouge_l("a b c d", "A, b; x d!") == pytest.approx(0.75) and rouge_l("да нет", "Да, нет") == 1
    rng = random.Random(0)
    texts = [" ".join(rng.choices(list("abcdef"), k=rng.randint(2, 8))) for _ in range(80)]
    stored, asked = near_texts(texts[:40], 0.7), texts[40:]
    expected = [any(rouge_l(one, text) >= 0.7 for one in texts[:40]) for text in asked]
    assert [stored.near(text) for text in asked] == expected and 0 < sum(expected) < 40
    assert stored.holds(texts[0].upper() + "!") and not stored.holds("z") and not Near(0.7).near("z")


# the filter

LIKE = ["A fine film.", "A poor plot, all in all."]


def filtering(task=None, held=(), labelled=(), template="Review: {text}\nSentiment:", **settings) -> Filter:
    return Filter(Synthesis("s", **settings), task or Task("t", "choice"), template, near_texts(held, 0.7), near_texts(labelled, 0.7))


@pytest.mark.parametrize(("raw", "found"), [
    ('1. "The cast is fine."\n2. "More."', "The cast is fine."),
    ("Review: The cast is fine.\nSentiment: positive", "The cast is fine."),
    ("\n- “The cast is fine.”", "The cast is fine."),
    ("", "format"),
    ("The cast is fine. Sentiment: positive.", "format"),
    ("As an AI, I cannot watch films.", "format"),
    ("[Start of Question] The cast is fine.", "format"),
    ("The cast is fine and the", "unfinished"),
    ("Too short.", "length"),
    ("This one has many more words than twice those of the longest example there is.", "length"),
])
def test_the_form_of_a_text(raw, found):
    one = filtering()
    said = one.question(raw, LIKE)
    assert (said or next(iter(one.dropped))) == found


def test_only_new_texts_pass():
    one = filtering(held=["the plot of the film was quite a mess"], labelled=["a cast that is lovely to see"])
    like = ["a b c d e f g h"]
    for raw, reason in [("The plot of a film was quite a mess", "leaked"), ("A cast that is lovely, to see!", "duplicate"),
                        ("a cast that was lovely to see", "near_duplicate"), ("quite another story of the score", None),
                        ("Quite another story of the score.", "duplicate"), ("quite another story with the score", "near_duplicate")]:
        before = Counter(one.dropped)
        assert (one.question(raw, like) is None) == (reason is not None), raw
        assert one.dropped - before == (Counter({reason: 1}) if reason else Counter()), raw
    assert one.question("is this right here", like, "a first text of its own") and one.question("is this right here", like, "quite different words before it")


def test_answers_and_ratings():
    one = filtering(Task("t", "generate", answer_pattern=r"-?\d+"), template="{q}")
    assert one.answer("It is 3 and 4, so 7.", ["3"]) == "7" and one.answer("none", ["3"]) is None
    free = filtering(Task("t", "generate"), template="{q}")
    assert free.answer('"Bird."\nmore', ["Word."]) == "Bird." and free.answer("so " * 30, ["Word."]) is None and free.answer(" ", ["a\nb"]) is None
    assert free.answer("one\ntwo", ["a\nb"]) == "one\ntwo"
    assert [free.rated(said) for said in ("3", "Score: 2", "1", "fine", "")] == [True, True, False, False, False]
    assert free.dropped == {"answer": 2, "judge": 3}


# writing


class Said:
    """A writer that makes its text of the request; it keeps what it was asked."""

    temperature = 1.0

    def __init__(self, say) -> None:
        self.say, self.prompts, self.rounds = say, [], []

    def write(self, prompts, *, seed=0):
        self.prompts += prompts
        self.rounds.append((seed, len(prompts)))
        return [self.say(p, i, seed) for i, p in enumerate(prompts)]


def words_of_conf() -> dict:
    return yaml.safe_load((CONF / "synthetic/labels.yaml").read_text())["synthetic"]["words"]


def random_text(prompt, index: int, seed: int) -> str:
    rng = random.Random(f"{seed}/{index}")
    return " ".join("".join(rng.choices("abcdefgh", k=5)) for _ in range(6)) + "."


def writing(say, rows=12, task=None, template="Review: {text}\nSentiment:", **settings) -> Writing:
    settings = {"rows": rows, "words": words_of_conf(), "seeds": "task", **settings}
    return Writing(Said(say), Synthesis("s", **settings), filtering(task, template=template, **settings), "0")


LABELLED = Leaf("task/t", "skill", "They are reviews.", tuple(
    SeedExample(f"this is example {name} number {i}.", name, row=f"{name}-{i}") for name in ("negative", "positive") for i in range(4)))


def test_with_fixed_choices_a_text_is_written_for_every_answer():
    one = writing(random_text)
    done = one.run(branches([LABELLED], ["negative", "positive"]))
    assert Counter(d.answer for d in done) == {"negative": 6, "positive": 6} and one.asked == 12 and one.writer.rounds == [(0, 12)]
    assert all(set(d.shown) <= {f"{d.answer}-{i}" for i in range(4)} and len(d.shown) == 3 for d in done)
    prompt = one.writer.prompts[0]
    assert [m["role"] for m in prompt] == ["system", *["user", "assistant"] * 3, "user"] and "They are reviews." in prompt[0]["content"]
    assert prompt[1]["content"] == prompt[-1]["content"] == "Write an example with the label: negative"
    assert prompt[2]["content"].startswith("this is example negative")
    assert one.report() == {"rows": 12, "asked": 12, "dropped": {}, "near_raised": {"task/t": 0.833}}
    again = writing(random_text)
    assert [d.question for d in again.run(branches([LABELLED], ["negative", "positive"]))] == [d.question for d in done], "the same texts, the same rows"


def test_what_falls_through_is_asked_for_again_until_the_attempts_are_spent():
    one = writing(lambda p, i, seed: random_text(p, i, seed) if i % 2 else "Nothing")
    assert len(one.run(branches([LABELLED], ["negative", "positive"]))) == 12
    assert one.asked > 12 and one.filter.dropped["unfinished"] >= 6 and len(one.writer.rounds) > 1
    never = writing(lambda p, i, seed: "the very same text it is.", attempts=2.5)
    assert len(never.run(branches([LABELLED], ["negative", "positive"]))) == 1
    assert never.asked == 30 and never.filter.dropped == {"duplicate": 29}


def test_free_answers_are_asked_for_and_rated():
    leaf = Leaf("skills/rhymes", "skill", "Rhymes.", tuple(SeedExample(f"What rhymes with word {i}?", f"Bird {i}.") for i in range(5)))
    seen = []

    def say(prompt, index, seed):
        last = prompt[-1]["content"]
        seen.append(last)
        if last.startswith("Rate"):
            return "1" if "number 1" in last else "2"
        return f"Bird number {index}." if "?" in last else f"{random_text(prompt, index, seed)[:-1]}?"

    one = writing(say, rows=4, task=Task("t", "generate"), template="{q}", judge=True, attempts=1)
    done = one.run(branches([leaf], None))
    assert [(d.answer, d.branch.answer) for d in done] == [(f"Bird number {i}.", None) for i in (0, 2, 3)] and one.report()["dropped"] == {"judge": 1}
    question, reply = one.writer.prompts[0], one.writer.prompts[4]
    assert question[0]["content"].count("Rhymes.") == 1 and question[1]["content"] == "Write an example of a question." and "?" in question[2]["content"]
    assert [m["role"] for m in reply] == [*["user", "assistant"] * 3, "user"] and reply[-1]["content"] == done[0].question and "Bird" in reply[1]["content"]
    assert done[0].question in seen[-4] and "Bird number 0." in seen[-4]


def test_a_skill_with_contexts_gets_new_ones_and_knowledge_is_asked_about_its_documents():
    examples = tuple(SeedExample(f"Is part {i} right?", "Yes.", f"The text of part {i}.") for i in range(5))
    say = lambda p, i, seed: random_text(p, i, seed)  # noqa: E731
    for kind, documents in (("skill", ()), ("knowledge", ("A passage.", "Another passage."))):
        one = writing(say, rows=3, task=Task("t", "generate"), template="{q}")
        done = one.run(branches([Leaf("x", kind, "About.", examples, documents)], None))
        assert len(done) == 3
        if kind == "skill":
            assert [m[-1]["content"] for m in one.writer.prompts[:3]] == ["Write an example of a text."] * 3
            assert one.writer.prompts[3][-1]["content"].startswith(f"{done[0].context}\n\n") and "The text of" not in done[0].context
        else:
            assert {d.context for d in done} <= set(documents) and one.writer.prompts[0][-1]["content"].startswith(done[0].context)


def test_examples_of_one_pattern_raise_what_counts_as_near():
    assert own_nearness([]) == own_nearness(["a"]) == 0 and own_nearness(["a b", "a c", "d"]) == 0.5
    leaf = Leaf("r", "skill", "", tuple(SeedExample(f"what are five words that rhyme with w{i}?", "x.") for i in range(4)))
    one = writing(lambda p, i, seed: f"what are five words that rhyme with v{i}?" if p[-1]["content"].endswith("question.") else "Answer.", rows=3,
                  task=Task("t", "generate"), template="{q}", attempts=1)
    assert len(one.run(branches([leaf], None))) == 3 and one.report()["near_raised"] == {"r": 0.875}
    one.filter.held_out.add("what are five words that rhyme with test?")
    assert one.filter.question("what are five words that rhyme with rest?", ["a b c d e f g h?"], near=0.9) is None
    assert one.filter.dropped == {"leaked": 1}, "held-out rows keep the settings' threshold"


def test_an_answer_that_is_no_choice_and_words_that_do_not_fit():
    leaf = Leaf("a/b", "skill", "d", (SeedExample("q", "Positive"), SeedExample("r", "maybe")))
    with pytest.raises(UserError, match="leaf a/b has the answer 'maybe', none of the task's choices"):
        branches([leaf], ["negative", "positive"])
    assert branches([replace(leaf, examples=leaf.examples[:1])], ["negative", "positive"])[0].examples[0].answer == "positive"
    good = words_of_conf()
    for bad, message in (
        ({k: v for k, v in good.items() if k != "judge"}, "words.judge' is None"), ({**good, "other": "x"}, "words.other' is 'x'; synthetic.words holds"),
        ({**good, "by_answer": "{label}"}, r"it takes \{answer\}"), ({**good, "question": "{x}"}, "it takes no braces"),
    ):
        with pytest.raises(UserError, match=message):
            check_words(Synthesis("s", words=bad))
