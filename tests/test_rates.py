"""The learning rate that follows from the base's weights, and the fit of its rule."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_cell import run

from benchmarks import rank_rates, rates_fit, rates_tuners
from benchmarks.rates import MIDDLE, Grid, rates_of
from pipeline.core.compose import compose
from pipeline.core.files import UserError
from pipeline.models import rates
from pipeline.search.space import at, parse


def write_weights(folder: Path, size: float, *more: tuple[str, tuple[int, ...], float]) -> Path:
    """A model folder with matrices in two blocks whose numbers are all `size`."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.layers.{i}.mlp.{name}.weight": torch.full((8, 4), size, dtype=torch.bfloat16) for i in range(2) for name in ("up", "down")}
    tensors |= {name: torch.full(shape, value) for name, shape, value in more}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_the_size_of_weights_is_the_median_over_the_blocks_matrices(tmp_path):
    odd = [("model.layers.0.q.weight", (4, 4), 100.0), ("model.layers.1.norm.weight", (4,), 9.0), ("model.embed_tokens.weight", (5, 4), 7.0)]
    assert rates.weight_rms(write_weights(tmp_path / "a", 0.25, *odd)) == 0.25
    assert rates.weight_rms(tmp_path) is None


@pytest.mark.parametrize(("power", "expected"), [(0.0, 1e-3), (1.0, 1e-4), (0.5, 3.2e-4), (-0.5, 3.2e-3)])
def test_a_rate_follows_the_weights_by_its_power(tmp_path, overrides, power, expected):
    write_weights(tmp_path / "small", rates.REFERENCE / 10)
    words = [*overrides, "technique=lora", f"paths.models={tmp_path}", "model.name=small", "train.reference_lr=1e-3", f"train.lr_power={power}"]
    assert rates.read(compose(words)).train.lr == pytest.approx(expected, rel=0.02)
    assert rates.read(compose([*words, "train.lr=0.7"])).train.lr == 0.7


def test_the_reference_base_has_the_reference_rate():
    folder = Path("models/smollm2_135m")
    if not folder.exists():
        pytest.skip("the default model is not prepared here")
    assert rates.weight_rms(folder) == pytest.approx(rates.REFERENCE, rel=0.005)


def test_what_is_missing_is_said(tmp_path, overrides):
    words = [*overrides, "technique=lora", f"paths.models={tmp_path}"]
    with pytest.raises(UserError, match="run: python -m pipeline.base_model model=nowhere, or set train.lr"):
        rates.read(compose([*words, "model.name=nowhere"]))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no matrix of numbers in its blocks"):
        rates.read(compose([*words, "model.name=bare"]))
    with pytest.raises(UserError, match="'train.lr' is missing; set it, or train.reference_lr"):
        rates.read(compose([*words, "train.reference_lr=null"]))


def test_a_result_and_a_sweep_show_the_number(overrides):
    number = rates.read(compose([*overrides, "technique=lora"])).train.lr
    assert number is not None and number != compose([*overrides, "technique=lora"]).train.reference_lr
    result = run(overrides, "technique=lora", "train.steps=2", "train.schedule=constant", "train.warmup_share=0", "evaluate.latency_rows=0")
    assert result.hyperparameters["lr"] == number == result.history[-1]["lr"] and result.config["train"]["lr"] is None
    space = parse({"train.lr": {"factor": 10}}, "search", compose([*overrides, "technique=lora"]))
    assert space.parameters["train.lr"].low == pytest.approx(number / 10) and space.parameters["train.lr"].high == pytest.approx(number * 10)
    assert rates.read(at(compose([*overrides, "technique=lora"]), {"train.lr": 0.25})).train.lr == 0.25


def test_every_technique_has_a_rate_and_the_fitted_powers():
    fitted = json.loads(Path("experiments/rates/rules.json").read_text())["rules"]
    for path in sorted(Path("conf/technique").glob("*.yaml")):
        if path.stem == "peft_config":  # its rate is the file's
            continue
        train = yaml.safe_load(path.read_text())["train"]
        assert train.get("lr") or train["reference_lr"], path
        if path.stem in fitted and path.stem not in rates_fit.KEPT:
            assert train.get("lr_power", 0.0) == fitted[path.stem]["lr_power"], path


# the fit


def lines(law: dict[str, float], technique: str = "lora") -> list[dict]:
    """Grids whose best rate is law[model], and half as good one decade away; the untouched base is right on none."""
    made = []
    for model in rates_fit.MODELS:
        for task in rates_fit.TASKS:
            made.append({"model": model, "task": task, "technique": "zero_shot", "lr": None, "test": {"bits": f"{1 << 200:x}"}})
            for rate in rates_of(technique):
                right = round(160 * 0.5 ** abs(math.log10(rate / law[model])))
                bits = int("1" + "1" * right + "0" * (200 - right), 2)
                made.append({"model": model, "task": task, "technique": technique, "lr": rate, "test": {"bits": f"{bits:x}"}})
    return made


def test_a_grid_with_further_rates_counts_and_one_with_fewer_does_not():
    law = dict.fromkeys(rates_fit.MODELS, 2e-3)
    rows = lines(law)
    further = [{**row, "lr": 7.0} for row in rows if row["lr"]]
    assert all(len(grid) == 8 for grid in rates_fit.grids([*rows, *further], 7).by["lora"].values())
    assert not rates_fit.grids(rows, 8).by["lora"]


def test_several_seeds_of_a_grid_count_as_their_mean():
    def row(seed: int, lr: float | None, bits: str) -> dict:
        test = {"test": {"bits": f"{int('1' + bits, 2):x}"}} if bits else {}
        return {"model": "smollm2_135m", "task": "cqa", "technique": "lora", "lr": lr, "seed": seed, **test}

    pair = ("smollm2_135m", "cqa")
    first = [row(0, None, "0000"), row(0, 1e-3, "1111"), row(0, 1e-2, "1000")]
    data = rates_fit.grids([*first, row(1, 1e-3, "1100"), row(1, 1e-2, "")], 2)
    assert data.by["lora"][pair] == {1e-3: (75.0, "11111100"), 1e-2: (12.5, "10000000")}  # one that diverged answers nothing right
    assert data.regret("lora", pair, 1e-2) == 62.5 and rates_fit.worse("0" * 16, "1" * 8) and not rates_fit.worse("1" * 16, "1" * 8)
    assert rates_fit.grids([*first, row(1, 1e-3, "1100")], 2).by["lora"][pair][1e-3] == (100.0, "1111")  # the second seed's grid is not whole


def test_the_tuners_have_the_rates_that_their_runs_choose():
    """As `benchmarks.rates defaults` would write them."""
    rows = [json.loads(line) for line in Path("experiments/tuners/rates.jsonl").read_text().splitlines()]
    made = rates_tuners.chosen(rows)
    assert len(made) == len({row["technique"] for row in rows if row["lr"] is not None}) == len(rates_tuners.MIDDLE)
    for choice in made:
        train = yaml.safe_load(Path(f"conf/technique/{choice.technique}.yaml").read_text())["train"]
        assert f"{choice.rate:.1e}" == f"{train.get('reference_lr', train.get('lr')):.1e}", choice


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_known_law_is_found_and_holds_on_the_held_out_pairs(power):
    law = {m: 2e-3 * (rates_fit.RMS[m] / rates_fit.RMS["smollm2_135m"]) ** power for m in rates_fit.MODELS}
    data = rates_fit.grids(lines(law), 7)
    fitted_on, held_out = rates_fit.halves()
    found = rates_fit.rules(data, rates_fit.RMS, rates_fit.POWERS, fitted_on)
    assert found["lora"][1] == power and 1e-3 <= found["lora"][0] <= 5e-3
    judged = rates_fit.judge(data, rates_fit.as_rule(found, rates_fit.RMS), held_out, ["lora"])
    assert judged["cases"] == 6 and judged["mean_regret"] < 8 and judged["below_untrained"] == []
    if power:
        constant = rates_fit.as_rule(rates_fit.rules(data, rates_fit.RMS, (0,), fitted_on), rates_fit.RMS)
        assert rates_fit.judge(data, constant, held_out, ["lora"])["mean_regret"] > judged["mean_regret"] + (3 if power == 1 else 0)


def test_every_model_and_task_is_in_both_halves():
    one, other = rates_fit.halves()
    assert len(one) == len(other) == 6 and not one & other
    for half in (one, other):
        assert {m for m, _ in half} == set(rates_fit.MODELS) and {t for _, t in half} == set(rates_fit.TASKS)


def test_a_rate_between_two_of_the_grid_is_interpolated_and_a_cliff_counts():
    pair = ("smollm2_135m", "cqa")
    data = rates_fit.Grids({"lora": {pair: {1e-3: (50.0, ""), 1e-2: (10.0, "")}}}, {})
    assert data.regret("lora", pair, 1e-3) == 0 and data.regret("lora", pair, 10**-2.5) == pytest.approx(20) and data.regret("lora", pair, 1.0) == 40


def test_below_the_untouched_base_is_told_by_rows():
    assert rates_fit.worse("0" * 20, "1" * 20) and rates_fit.worse("", "1") and not rates_fit.worse("0" * 3 + "1", "1" * 3 + "0")


def test_of_many_cases_one_that_chance_explains_is_not_told_apart():
    """Six rows lost of six: one in 32 by itself, no longer below 5% as one of two; eight are one in 128."""
    first, second = [(model, "cqa") for model in rates_fit.MODELS[:2]]

    def judged(lost: int) -> dict:
        even = (100.0, "1" * 40)
        data = rates_fit.Grids({"lora": {first: {1e-3: (50.0, "0" * lost + "1" * (40 - lost))}, second: {1e-3: even}}}, {first: even, second: even})
        return rates_fit.judge(data, lambda *_: 1e-3, {first, second}, ["lora"])

    assert judged(6)["below_untrained"] == [["lora", *first]] and judged(6)["below_of_all"] == []
    assert judged(8)["below_untrained"] == judged(8)["below_of_all"] == [["lora", *first]]


def test_a_row_that_two_seeds_lose_is_no_second_row():
    """Five rows lost of five: one in sixteen by chance, however many seeds lose them; six are one in 32."""
    assert not rates_fit.worse(2 * "00000", "11111") and rates_fit.worse(2 * "000000", "111111") and not rates_fit.worse(2 * "111111", "000000")


def test_the_rates_of_ranks_come_from_the_tuned_files_of_an_archive(tmp_path):
    for rank, trials in ((2, [(1e-4, 0.25), (1e-3, 0.5)]), (16, [(1e-4, 0.5), (1e-3, None)])):
        path = tmp_path / f"tuning/rank_cqa/lora+r{rank}-n700.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        made = [{"settings": {"train.lr": lr}, "validation": value, "validation_rows": 100} for lr, value in trials]
        path.write_text(yaml.safe_dump({"trials": made}))
    (tmp_path / "tuning/rank_cqa/full-n700.yaml").write_text("trials: none of LoRA's")
    with tarfile.open(tmp_path / "results.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "tuning", "tuning")
    *_, first, second = rank_rates.table(tmp_path / "results.tar.xz").splitlines()
    assert first == "| rank_cqa (700, 100) | 2 | 25.0 | **50.0** |" and second == "| rank_cqa (700, 100) | 16 | **50.0** |  |"


@pytest.mark.parametrize("technique", MIDDLE)
def test_a_grid_has_seven_rates_half_a_decade_apart(technique):
    grid = rates_of(technique)
    assert len(grid) == 7 and all(2.9 < high / low < 3.4 for low, high in zip(grid, grid[1:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["lora", "full", "ia3", "head_only"])
def test_a_later_run_of_a_grid_is_what_it_is_alone(overrides, technique):
    from pipeline.cell.inputs import Shared

    words = [*overrides, f"technique={technique}", "train.engine=fast", "evaluate.transfer_rows=0", "evaluate.forgetting=false"]
    cfg = compose(words)
    shared = Shared()
    shared.preload(Path(cfg.paths.models) / cfg.model.name, False)
    many, alone = Grid(words, shared), Grid(words, shared)
    many.run(1e-4), many.run(0.3)
    assert many.run(3e-2) == alone.run(3e-2)


def test_the_best_of_equals_is_high_by_luck_and_a_better_one_is_not():
    rng = np.random.default_rng(7)
    answers = lambda share: "".join("01"[int(r)] for r in rng.random(200) < share)  # noqa: E731
    grids = [{10.0**-i: (0.0, answers(0.5)) for i in range(7)} for _ in range(40)]
    high = np.mean([max(bits.count("1") for _, bits in grid.values()) / 2 - 50 for grid in grids])
    assert np.mean([rates_fit.best_by_luck(grid) for grid in grids]) == pytest.approx(high, abs=0.7) and high > 3.0
    assert rates_fit.best_by_luck(grids[0] | {1e-9: (0.0, answers(0.9))}) == pytest.approx(0.0, abs=0.3)
