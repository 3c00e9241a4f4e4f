"""GRPO and RLOO, with a right answer's reward and with a learnt one: what earns what, TRL's gradients, how texts are drawn, what is refused, learning."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.cell import identity
from pipeline.cell import run as cell_run
from pipeline.core.compose import build, compose
from pipeline.core.files import UserError, read_jsonl
from pipeline.core.settings import Precision, Task, Train
from pipeline.data.rows import Encoded, Encoder, Example
from pipeline.engine import answering, decode
from pipeline.models.base import load_model, load_tokenizer
from pipeline.models.rates import read_if_there
from pipeline.objectives.base import Online, Sample, drawn_later
from pipeline.objectives.grpo import Grpo
from pipeline.records.results import read as read_result
from pipeline.scoring.drawing import RewardReader, enders, until
from pipeline.scoring.reading import answer_in, is_right
from pipeline.serving import artefact as evaluate
from pipeline.training import stepping
from pipeline.training.online import DrawingPolicy, OnlineLoop, OnlineRun, Rollouts

CPU = torch.device("cpu")
CHOICE = Task("t", "choice")
NUMBER = Task("t", "generate", answer_pattern=r"-?\d[\d,]*(?:\.\d+)?")
ROW = {"answer": "bad", "choices": ["bad", "bad luck", "good"]}
SHORT = ["experiment=mine", "train_rows=64", "train.batch_size=8", "train.validations=2"]


def test_an_answer_is_the_choice_that_a_text_begins_with_or_what_the_task_extracts():
    assert [answer_in(t, ROW, CHOICE) for t in (" bad", "Bad luck, he said", "goodbye", "so bad", "")] == ["bad", "bad luck", "good", None, None]
    assert answer_in("It is 3 or 4,000.", {}, NUMBER) == "4,000"
    assert [is_right(text, ROW, CHOICE) for text in (" bad film", "bad luck", "BAD", "nothing")] == [True, False, True, False]
    assert [is_right(text, {"answer": "4000"}, NUMBER) for text in ("= 4,000.0", "none")] == [True, False]


@pytest.mark.parametrize("change", ["algorithm=ppo", "num_generations=1", "temperature=0", "beta=-1"])
def test_values_out_of_range_are_refused(change):
    with pytest.raises(UserError, match=f"objective.*{change.split('=')[0]}"):
        build(compose(["technique=grpo", f"objective.{change}"]).objective, "objective")


def test_without_an_adapter_there_is_nothing_to_hold_against():
    at: Any = SimpleNamespace(model=object(), rows=[], encoder=None)
    with pytest.raises(UserError, match="objective.beta is 0.1, but only an adapter"):
        Grpo("grpo", 2, 1.0, beta=0.1).prepared([], at)


def test_a_start_is_asked_for_by_name(overrides):
    cfg = compose([*overrides, *SHORT, "technique=grpo"])
    with pytest.raises(UserError, match="start=full, but .*full-s0-n64 holds no finished cell; run it first: python -m pipeline.train .*technique=full"):
        cell_run.run(cfg)


@pytest.mark.parametrize("name", ["logit_distillation", "reward_model"])
def test_the_fast_engine_and_packs_leave_such_objectives_alone(monkeypatch, name):
    objective = build(compose([f"technique={name}"]).objective, "objective")
    assert not objective.plain
    eager: Any = SimpleNamespace()
    method = build(compose(["technique=lora"]).method, "method")
    monkeypatch.setattr(stepping, "Eager", lambda run: eager)
    run = stepping.Run(torch.nn.Linear(1, 1), method, objective, [[]], Train(0.1, 1, 1, 1, engine="fast"), 0, 5, None, None, 0)
    assert stepping.choose(run) is eager and eager.reason == "the objective makes batches of its own"


def test_drawn_texts_are_trained_on_by_any_engine():
    made = [build(compose([f"technique={name}", *more]).objective, "objective") for name in ("grpo", "rloo") for more in ([], ["objective.temperature=0.7"])]
    assert [(o.plain, cell_run.LOOPS[o.trainer]) for o in made] == [(True, OnlineLoop), (False, OnlineLoop)] * 2


# what is drawn


def online(encoder: Encoder, samples: int = 4, temperature: float = 1.0, longest: int = 5) -> Online:
    return Online(encoder, ROWS, samples, temperature, longest, 256, lambda samples, policy: ([s.example for s in samples], {}))


@pytest.fixture(scope="module")
def encoder(tiny):
    return Encoder(load_tokenizer(tiny / "models" / "smollm2_135m"), CHOICE, 64, "error")


ROWS: list[dict] = [
    {"id": str(i), "prompt": f"Review: {'film ' * (i + 1)}\nSentiment:", "answer": "positive", "choices": ["negative", "positive"]}
    for i in range(4)
]


def a_run(tiny: Any, encoder: Encoder, asked: Online, *words: str, precision: str = "fp32", **more: Any) -> stepping.Run:
    """Of LoRA whose B is no longer zero."""
    cfg = compose(["technique=grpo", "train.engine=eager", "train.batch_size=4", *words])
    torch.manual_seed(0)
    method = build(cfg.method, "method")
    model = method.wrap(load_model(tiny / "models" / "smollm2_135m", Precision(precision), CPU))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    examples = [[encoder.example(Example(row["prompt"], row["answer"]))] for row in ROWS]
    later = drawn_later(examples, asked.samples, asked.longest)
    settings = dataclasses.replace(read_if_there(cfg).train, lr=0.1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return stepping.Run(model, method, build(cfg.objective, "objective"), later, settings, 0, 3, CPU, dtype, encoder.pad_id, online=asked, **more)


def begun(run: stepping.Run) -> Rollouts:
    assert run.online
    rollouts = Rollouts(run, run.online)
    rollouts.begin([])
    return rollouts


def exact(model: Any, sample: Any) -> list[float]:
    """log p of the drawn tokens, one sequence at a time."""
    ids, start = sample.example.ids, sample.example.start
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(chances[i - 1, ids[i]]) for i in range(start, len(ids))]


@pytest.mark.parametrize("engine", ["eager", "fast"])
def test_texts_are_drawn_with_the_probabilities_that_training_has_and_the_base_s_stand_beside_them(tiny, encoder, engine, monkeypatch):
    run = a_run(tiny, encoder, online(encoder))
    if engine == "fast":  # the hand-written pass over the weights in training, and captured decoding (which a CPU calls anew)
        monkeypatch.setattr(answering, "STATIC", ("cpu",))
        run = dataclasses.replace(run, settings=dataclasses.replace(run.settings, engine="fast"))
        stepped = stepping.choose(OnlineRun(**vars(run), rollouts=SimpleNamespace(ready=False)))
        assert stepped.engine == "handwritten"
    rollouts = begun(run)
    samples = rollouts._samples(0)
    assert len(samples) == 16 and rollouts.drawing.sampler and len({s.text for s in samples}) > 4
    mine, before = rollouts.policy.log_p(samples), rollouts.policy.reference(samples)
    assert before is not None
    for sample, values, drawn, based in zip(samples, mine, rollouts._nats, before, strict=True):
        assert values.tolist() == pytest.approx(exact(run.model, sample), abs=2e-4) and drawn == pytest.approx(values.tolist(), abs=2e-4)
        with run.model.disable_adapter():
            assert based.tolist() == pytest.approx(exact(run.model, sample), abs=2e-4)
    again = begun(run)
    assert [s.example for s in again._samples(0)] == [s.example for s in samples], "a function of weights, seed and step"
    assert [s.example for s in again._samples(1)] != [s.example for s in samples]


def test_in_bf16_log_p_as_drawn_is_that_of_training_bit_for_bit(tiny, encoder, monkeypatch):
    monkeypatch.setattr(answering, "STATIC", ("cpu",))

    def judge(samples: Any, policy: DrawingPolicy) -> Any:
        mine, before = policy.log_p(samples), policy.reference(samples)
        assert before is not None and any(not torch.equal(one, other) for one, other in zip(mine, before, strict=True))
        return [s.example for s in samples], {}

    asked = dataclasses.replace(online(encoder), judge=judge, exact=True)
    run = a_run(tiny, encoder, asked, "train.engine=fast", precision="bf16")
    rollouts = Rollouts(run, asked)
    stepped = stepping.choose(OnlineRun(**vars(run), rollouts=rollouts))
    assert stepped.engine == "handwritten"
    rollouts.begin([])
    losses = [float(stepped.step(step, 1.0)[0]) for step in range(3)]
    assert [rollouts.seen[step + 1]["sampling_gap"] for step in range(3)] == [0.0] * 3 and losses[2] < losses[0]


def test_what_is_drawn_follows_the_model_s_distribution(tiny, encoder):
    asked = online(encoder, samples=500, longest=1, temperature=2.0)
    run = a_run(tiny, encoder, asked)
    samples = begun(run)._samples(0)
    first = [s for s in samples if s.row is ROWS[0]]
    ids = first[0].example.ids
    with torch.no_grad():
        chances = (run.model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1] / 2).softmax(-1)
    counts = torch.bincount(torch.tensor([s.example.ids[-1] for s in first]), minlength=len(chances))
    spread = (500 * chances * (1 - chances)).sqrt()
    assert len(first) == 500 and bool(((counts - 500 * chances).abs() < 4.5 * spread + 2).all())


def test_a_text_ends_where_its_answer_is_complete(encoder):
    negative, film, end = encoder.answer("negative"), encoder.answer("film"), encoder.end_id
    ends = enders({"choices": ["negative", "film", "film plot"]}, encoder)
    assert ends == [negative, encoder.answer("film plot")], "film may go on"
    assert until([*negative, 5, 6], end, ends) == negative and until([*film, 5, end, 6], end, ends) == [*film, 5, end]
    assert until([7, 8, 9], end, ends) == [7, 8, 9]
    assert enders({"choices": ["negative"]}, Encoder(encoder.tokenizer, NUMBER, 64, "error")) == []


def test_a_model_without_captured_decoding_draws_by_its_own_generate(tiny, encoder, monkeypatch):
    monkeypatch.setattr(decode, "unsuited", lambda model: "it is another one")
    run = a_run(tiny, encoder, online(encoder))
    rollouts = Rollouts(run, run.online)
    notes: list[str] = []
    rollouts.begin(notes)
    assert notes == ["texts are drawn by the model's own generate: it is another one"] and len(rollouts._samples(0)) == 16


# against TRL


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "beta"), [("grpo", 0.0), ("grpo", 0.2), ("rloo", 0.2)])
def test_the_gradient_is_that_of_trl_s_loss_of_its_own_step(tiny, encoder, tmp_path, algorithm, beta):
    """TRL samples, rewards and judges one step; from its texts and rewards ours has the same gradient."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    asked = online(encoder)
    run = a_run(tiny, encoder, asked, f"objective.algorithm={algorithm}", f"objective.beta={beta}", "objective.num_generations=4")
    kept: dict[str, Any] = {}

    def reward(completions: Any, **_: Any) -> list[float]:
        return [len(c) + 3.0 * c.count("film") for c in completions]

    kind = algorithm.upper()
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=16, num_generations=4, max_completion_length=5, beta=beta, learning_rate=0.0,
        bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no", report_to="none", remove_unused_columns=False,
    )
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS])
    trainer = getattr(trl, f"{kind}Trainer")(model=run.model, reward_funcs=reward, args=args, train_dataset=data, processing_class=encoder.tokenizer)
    for name, parameter in run.model.named_parameters():
        if "lora_B.default" in name:  # away from the reference
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    compute = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: compute(model, kept.setdefault("inputs", inputs))
    trainer.train()
    model, inputs = trainer.accelerator.unwrap_model(trainer.model), kept["inputs"]
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(compute(trainer.model, inputs), trained)
    samples = []
    laid_out = [inputs[f"{part}_{kind}"] for part in ("prompt", "completion") for kind in ("ids", "mask")]
    for ids, mask, said, there in sorted(zip(*laid_out, strict=True), key=lambda one: one[0].tolist()):  # TRL shuffles them
        prompt, drawn = ids[mask.bool()].tolist(), said[there.bool()].tolist()
        samples.append(Sample({}, Encoded((*prompt, *drawn), len(prompt)), encoder.tokenizer.decode(drawn, skip_special_tokens=True)))
    policy, objective, apart = DrawingPolicy(run, asked), run.objective, None
    if beta:
        mine = policy.log_p(samples)
        model.set_adapter("ref")  # TRL keeps the adapter that training began with
        apart = [theirs - own for own, theirs in zip(mine, policy.log_p(samples), strict=True)]
        model.set_adapter("default")
        assert max(float(one.abs().max()) for one in apart) > 0.1
    examples = objective.weighted(samples, reward([s.text for s in samples]), apart)
    loss = sum(objective.loss(model, batch) for batch in objective.batches(examples, run.settings, encoder.pad_id))
    actual = torch.autograd.grad(loss, trained)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-3)


# learning


def started_at_full(overrides: list[str]) -> Any:
    start = compose([*overrides, *SHORT, "technique=full", "train.lr=1e-3", "train.epochs=2"])
    return cell_run.run(start, folder=identity.folder_of(start))


@pytest.mark.parametrize("name", [pytest.param("grpo", marks=pytest.mark.slow), "rloo"])
def test_right_answers_become_likelier_under_our_meter(overrides, tmp_path, name):
    before = started_at_full(overrides)
    engine = "fast" if name == "rloo" else "eager"
    cfg = compose([*overrides, *SHORT, f"technique={name}", "train.lr=5e-3", "train.epochs=4", f"train.engine={engine}"])
    actual = cell_run.run(cfg, folder=tmp_path / "cell")
    assert actual.test.accuracy >= 0.95 and actual.test.nll < before.test.nll
    rewards = [p["reward"] for p in actual.history]
    assert len(rewards) == actual.work.steps == 32 and sum(rewards[-8:]) > sum(rewards[:8]) > 0
    assert actual.history[0]["lr"] < actual.history[3]["lr"] and "validation_metric" in actual.history[15]
    assert actual.work.engine == ("handwritten" if name == "rloo" else "eager")
    assert max(p["sampling_gap"] for p in actual.history) < 1e-4 and actual.history[-1]["kl"] > 0.05 > abs(actual.history[0]["kl"])
    assert actual.phases.train_s > 0 and actual.phases.validate_s > 0 and actual.work.tokens > 32 * 8 * 8 and actual.memory.peak_bytes
    assert actual.phases.other_s <= 0.02 * actual.phases.wall_s and any(n.startswith("begins at mine/full-s0-n64") for n in actual.notes)
    stored = [p for p in read_jsonl(tmp_path / "cell" / "predictions.jsonl") if p["split"] == "test"]
    assert [p["prediction"] for p in evaluate.score_artefact(cfg, tmp_path / "cell" / "artefact", "test")[0]] == [p["prediction"] for p in stored]


def test_a_run_that_diverges_ends_with_a_note(overrides, tmp_path):
    more = ["technique=rloo", "start=null", "train.lr=1e30", "train.steps=6", "objective.num_generations=4", "train.validations=0"]
    actual = cell_run.run(compose([*overrides, *SHORT, *more]), folder=tmp_path / "cell")
    assert actual.status == "diverged" and actual.work.diverged_at and len(actual.history) < 6


@pytest.mark.slow
def test_a_kl_costs_where_no_answer_is_right_that_is_said_and_methods_between_steps_go_along(overrides, tmp_path):
    never = compose([*overrides, *SHORT, "technique=grpo", "start=null", "train.steps=2", "objective.num_generations=2", "objective.beta=0.1",
                     "task.scoring=generate", "+task.answer_pattern=never", "train.validations=0"])
    actual = cell_run.run(never)
    assert any("no sampled answer earned anything" in note for note in actual.notes) and all("kl" in point for point in actual.history)
    more = ["technique=grpo", "start=null", "method=adalora", "train.steps=12", "objective.num_generations=2", "train.validations=0"]
    assert cell_run.run(compose([*overrides, *SHORT, *more])).work.steps == 12


def test_a_reward_that_counts_one_word_raises_its_share(overrides, monkeypatch):
    seen: list[list[str]] = []

    def counted(samples: Any, policy: Any, task: Any, proxy: Any, self: Any = None) -> Any:
        seen.append([word for s in samples for word in s.text.split()])
        return self.weighted(samples, [float(s.text.split().count("film")) for s in samples], None), {}

    monkeypatch.setattr(Grpo, "_judged", lambda self, *args: counted(*args, self=self))
    more = ["technique=rloo", "start=null", "task.scoring=generate", "+task.answer_pattern=never", "task.max_new_tokens=6", "train.lr=2e-2", "train.steps=30"]
    cell_run.run(compose([*overrides, *SHORT, *more, "train.validations=0"]), splits=())
    shares = [words.count("film") / len(words) for words in seen]
    assert shares[0] < 0.1 and sum(shares[-5:]) / 5 > 0.8


def test_a_run_that_was_killed_resumes_with_the_draws_that_it_would_have_made(overrides, monkeypatch):
    words = [*overrides, *SHORT, "technique=grpo", "start=null", "train.lr=5e-3", "train.steps=6", "train.checkpoint_every_s=0", "objective.beta=0.1"]
    whole = cell_run.run(compose([*words, "variant=whole"]), folder=identity.folder_of(compose([*words, "variant=whole"])))
    cfg, drawn = compose(words), Rollouts.examples

    def killed(self: Any, step: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return drawn(self, step)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Rollouts, "examples", killed)
        cell_run.run(cfg, folder=identity.folder_of(cfg))
    resumed = cell_run.run(cfg, folder=identity.folder_of(cfg))
    assert resumed.work.resumed and resumed.history == whole.history and resumed.scores == whole.scores


# a learnt reward


def rewarded(overrides: list[str], *more: str) -> None:
    cfg = compose([*overrides, *SHORT, "technique=reward_model", *more])
    cell_run.run(cfg, folder=identity.folder_of(cfg))


@pytest.mark.parametrize("name", [pytest.param("rlhf_grpo", marks=pytest.mark.slow), "rlhf_rloo"])
def test_a_reward_model_s_favourites_become_likelier_and_its_cost_is_told(overrides, name):
    before = started_at_full(overrides)
    rewarded(overrides, "train.lr=1e-2", "train.epochs=3")
    cfg = compose([*overrides, *SHORT, f"technique={name}", "train.lr=5e-3", "train.epochs=4"])
    cell_run.run(cfg, folder=identity.folder_of(cfg))
    actual = read_result(identity.folder_of(cfg))
    first, last = ([sum(p[key] for p in part) for key in ("reward", "gold_reward")] for part in (actual.history[:8], actual.history[-8:]))
    assert last[0] > first[0] and last[1] > first[1] and actual.test.accuracy > before.test.accuracy and all("kl" in p for p in actual.history)
    assert set(actual.before) == {"mine/full-s0-n64", "mine/reward_model-s0-n64"}
    assert {b.part for b in actual.before.values()} == {"start", "reward"} and all(b.seconds > 0 for b in actual.before.values())
    assert actual.labelled_rows == 64 + 12, "the pairs are those of the same rows"
    assert actual.objective == name and actual.hyperparameters["reward"] == "reward_model"


def test_a_reward_model_that_knows_nothing_is_refused_with_its_figure_but_for_a_control(overrides):
    started_at_full(overrides)
    rewarded(overrides, "objective.shuffle=true", "train.steps=1", "train.lr=1e-9")
    words = [*overrides, *SHORT, "technique=rlhf_rloo", "train.steps=2"]
    with pytest.raises(UserError, match=r"objective.reward=reward_model ranks \d+\.\d% of 12 held-out pairs right \(p = .*: nothing could be learnt from it"):
        cell_run.run(compose(words))
    assert cell_run.run(compose([*words, "objective.unproven=use"])).status == "ok"
    with pytest.raises(UserError, match="objective.reward=full is a cell of full, which gives no rewards"):
        cell_run.run(compose([*words, "objective.reward=full"]))
    with pytest.raises(UserError, match="objective.reward=nobody, but .* holds no finished cell"):
        cell_run.run(compose([*words, "objective.reward=nobody"]))


def test_a_drawn_text_s_reward_is_that_of_its_tokens_after_the_row_s_prompt(tiny, encoder):
    from pipeline.scoring import rewards
    from pipeline.scoring.scorer import Scorer

    model = load_model(tiny / "models" / "smollm2_135m", Precision("fp32"), CPU)
    rewards.attach(model)
    read = RewardReader(Scorer(model, encoder, CHOICE, lambda p: p, 64, CPU, torch.float32))
    drawn = [encoder.answer("negative"), [*encoder.answer("negative"), encoder.end_id], encoder.answer("film plot"), []]
    actual = read([ROWS[0]] * 4, drawn)
    with torch.no_grad():
        for ids, value in zip((drawn[0], drawn[0], drawn[2], []), actual, strict=True):
            state = model.model(input_ids=torch.tensor([[*encoder.prompt(ROWS[0]["prompt"]), *ids]])).last_hidden_state[0, -1]
            assert value == pytest.approx(float(state @ model.reward_head.weight[0]), abs=1e-5)
