"""What a cell imports before its first step, what it leaves for later, and what of it is remembered."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import throughput
from pipeline.cell import inputs, source, waking
from pipeline.core import imports
from pipeline.core.collector import collected_once, uncollected
from pipeline.core.compose import ROOT, compose
from pipeline.core.files import UserError

SHORT = ["train_rows=16", "train.batch_size=8", "train.steps=1", "train.validations=1", "evaluate.test_rows=4", "seed=0", "precision=fp32"]
LATER = ("evaluate", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "bitsandbytes", "torch._dynamo.utils", "torchvision", "mlflow", "optuna")
"""Not before the first step: scoring takes some of them, the compiler and rounding others, and some nothing here."""


def python(code: str) -> str:
    """What a process of its own prints: this one has imported it all."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("technique", ["lora", "full", "ia3"])
def test_a_gpus_cell_imports_nothing_heavy_before_its_first_step_that_it_does_not_need(overrides, technique):
    """On the CPU, told not to measure its own memory, which is what makes it import early there."""
    words = [*overrides, *SHORT, f"technique={technique}"]
    found, status = python(f"""
import sys
from pipeline.cell import run
from pipeline.core.compose import compose
from pipeline.training.stepping import Eager
run.MEASURED_WITH_IMPORTS = ()
begin, found = Eager.step, []
def step(self, *args):
    found.extend(name for name in {LATER!r} if name in sys.modules)
    return begin(self, *args)
Eager.step = step
print(found, run.run(compose({words!r})).status)
""").rsplit(maxsplit=1)
    assert (found, status) == ("[]", "ok")


def test_scoring_is_imported_before_training_where_training_is_measured_with_it(overrides, monkeypatch):
    asked: list[Any] = []
    parts = inputs.build_parts(compose([*overrides, "technique=lora"]))
    monkeypatch.setattr("pipeline.scoring.answers.preload", asked.append)
    from pipeline.cell import run

    run.set_up(parts, inputs.Shared())
    assert asked == [parts.settings.task]
    monkeypatch.setattr(run, "MEASURED_WITH_IMPORTS", ())
    run.set_up(parts, inputs.Shared())
    assert len(asked) == 1, "a step that waits for it"
    run.set_up(parts, inputs.Shared(at_once=2))
    assert len(asked) == 2, "others would wait for it while this cell has the device"


def test_an_own_metric_that_cannot_be_had_is_refused_before_anything_is_loaded(overrides, tmp_path, monkeypatch):
    from pipeline.cell import run

    parts = inputs.build_parts(compose([*overrides, "technique=lora", f"task.metric={tmp_path}/none.py:f"]))
    monkeypatch.setattr(run, "MEASURED_WITH_IMPORTS", ())
    with pytest.raises(UserError):
        run.set_up(parts, inputs.Shared())


# transformers, PEFT and bitsandbytes


@pytest.mark.slow
def test_scikit_learn_cannot_be_had_while_assisted_generation_is_imported_and_can_afterwards():
    done = python("""
import sys
from importlib.abc import MetaPathFinder
from pipeline.core import imports
found = []
class Watch(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("transformers.generation.candidate_generator", "transformers.loss.loss_for_object_detection"):
            from transformers.utils import is_scipy_available, is_sklearn_available
            found.append((is_scipy_available(), is_sklearn_available()))
sys.meta_path.insert(0, Watch())
imports.import_transformers()
from transformers.utils import is_sklearn_available
print(found, "sklearn" in sys.modules, is_sklearn_available())
""")
    assert done.strip() == "[(False, False), (False, False)] False True"


@pytest.mark.slow
def test_a_base_is_rounded_in_a_process_that_had_imported_nothing(tiny):
    """bitsandbytes brings torch's compiler with it, which what is left out of the other imports must not break."""
    done = python(f"""
from pathlib import Path
import torch
from pipeline.core.settings import Precision
from pipeline.core.imports import import_peft
from pipeline.models.base import load_model
import_peft()
base = load_model(Path({str(tiny)!r}) / "models/smollm2_135m", Precision("nf4"), torch.device("cpu"))
print(type(base.model.layers[0].self_attn.q_proj).__name__)
""")
    assert done.split() == ["Linear4bit"]


PACKAGE = """
def disable(function=None, recursive=True):
    return (lambda *given: ("disabled", function(*given))) if function else disable
def allow_in_graph(function):
    seen.append(function.__name__)
    return function
seen = []
value = 1
"""


@pytest.fixture
def deferred(tmp_path, monkeypatch):
    """A package that is deferred as torch's compiler is, and the file of its code."""
    code = tmp_path / "tried" / "__init__.py"
    code.parent.mkdir()
    code.write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = find_spec("tried")
    assert spec is not None
    package = imports._Deferred(spec)
    monkeypatch.setitem(sys.modules, "tried", package)
    return package, code


def test_a_deferred_package_is_imported_when_it_is_asked_and_then_has_its_marks(deferred):
    package, _ = deferred
    least = lambda *given: min(given)  # noqa: E731
    marked, stopped = package.allow_in_graph(least), package.disable(recursive=False)(least)
    assert marked(3, 2) == stopped(3, 2) == 2
    assert Path(package.__file__).name == "__init__.py" and not hasattr(package, "__nothing__") and sys.modules["tried"] is package, "who looks at all modules"
    assert package.value == 1 and sys.modules["tried"] is not package
    assert package.seen == ["<lambda>"] and marked(3, 2) == 2 and stopped(3, 2) == ("disabled", 2), "as if it had been marked by what is there now"
    assert package.disable(least)(3, 2) == ("disabled", 2) and package.disable() is package.disable
    package.value = 4
    assert sys.modules["tried"].value == 4 and "value" in dir(package)
    with pytest.raises(AttributeError):
        _ = package.other


def test_a_deferred_package_that_cannot_be_imported_says_so_each_time(deferred):
    package, code = deferred
    code.write_text("raise ImportError('no')")
    for _ in range(2):
        with pytest.raises(ImportError, match="no"):
            _ = package.value
    code.write_text(PACKAGE.replace("value = 1", "value = 11"))
    assert package.value == 11


def test_who_asks_while_a_deferred_package_is_imported_waits_for_it(deferred):
    package, code = deferred
    code.write_text("import time\ntime.sleep(0.2)\nvalue = 5")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(package.value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [5] * 4


@pytest.mark.parametrize("first", ["torch._dynamo.utils", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "torch._dynamo.decorators"))])
def test_torchs_compiler_is_there_after_the_imports_whichever_of_its_modules_is_asked_first(first):
    """A module that is imported before its package has run meets half of what it needs."""
    done = python(f"""
import sys
from pipeline.core.imports import import_peft
import_peft()
before = "torch._dynamo.utils" in sys.modules
import torch, {first}
marked = torch.compiler.disable(lambda x: x * 2)
print(before, torch.compile(lambda x: marked(x) + 1, backend="eager")(torch.ones(1)).item(), torch._dynamo is sys.modules["torch._dynamo"],
      torch._dynamo.utils is sys.modules["torch._dynamo.utils"])
""")
    assert done.split() == ["False", "3.0", "True", "True"]


@pytest.mark.slow
def test_only_what_rounds_has_bitsandbytes_when_peft_wraps_it(tiny):
    done = python(f"""
import sys
from pathlib import Path
import torch
from pipeline.core.settings import Precision
from pipeline.core.imports import import_peft
from pipeline.models import imports
from pipeline.models.base import load_model
import_peft()
import peft
base = load_model(Path({str(tiny)!r}) / "models/smollm2_135m", Precision("fp32"), torch.device("cpu"))
config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
with imports.spared(base, config):
    peft.get_peft_model(base, config).unload()
print("bitsandbytes" in sys.modules, "scipy" in sys.modules)
with imports.spared(base, peft.LoraConfig(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())):
    print(peft.import_utils.is_bnb_available())
print(peft.import_utils.is_bnb_available())
from scipy.optimize import linear_sum_assignment
import transformers
print(transformers.utils.is_scipy_available(), transformers.utils.is_sklearn_available())
""")
    assert done.split() == ["False", "False", "True", "True", "True", "True"]


# the GPU


class Driver:
    """libcuda.so.1, which says what was asked of it."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.asked = code, []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.asked.append(name) or self.code


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A build of torch for CUDA on a machine with one GPU; what is put on it."""
    import torch

    put: list[Any] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: put.append(device))
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    return put


def test_the_gpu_starts_and_triton_reads_itself_beside_what_is_imported_and_both_are_waited_for(cuda, monkeypatch):
    driver, begun, imported, ended = Driver(), threading.Event(), threading.Event(), []
    monkeypatch.setattr(waking.ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    key = lambda: (begun.set(), imported.wait(10), ended.append("triton"))  # noqa: E731
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace(triton_key=key))
    with waking.woken("auto"):
        assert begun.wait(10) and not ended
        imported.set()
    assert ended == ["triton"] and cuda == ["cuda"]
    assert driver.asked == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


def test_without_a_gpu_that_works_nothing_is_started_and_nothing_said(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    broken = Driver(code=999)
    monkeypatch.setattr(waking.ctypes, "CDLL", lambda _: broken)
    with waking.woken("cuda"):
        pass
    assert broken.asked == ["cuInit"]
    monkeypatch.setattr(waking.ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no such library")))
    with waking.woken("auto"), pytest.raises(ZeroDivisionError), waking.woken("auto"):
        1 / 0  # noqa: B018
    monkeypatch.setattr(waking.threading, "Thread", None)
    with waking.woken("cpu"):
        pass


@pytest.mark.slow
def test_a_technique_is_made_of_its_config_without_bitsandbytes():
    """It starts CUDA where there is a GPU, which a process that is forked later cannot use then: benchmarks.slot asks whether a technique packs, and forks."""
    done = python("""
import sys
from pipeline.cell.packing import packs
from pipeline.core.compose import compose
print(packs(compose(["technique=lora"])), "bitsandbytes" in sys.modules)
""")
    assert done.split() == ["True", "False"]


# the collector


def test_the_collector_rests_while_imports_are_made_and_works_afterwards():
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > before
    with pytest.raises(ZeroDivisionError), uncollected():
        1 / 0  # noqa: B018
    assert gc.isenabled()
    gc.unfreeze()


def test_a_tokenizer_is_read_without_collections_and_what_was_let_go_is_freed_at_the_end(overrides, monkeypatch):
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    monkeypatch.setattr(inputs, "load_tokenizer", lambda *_: (gc.isenabled(), weakref.ref(Cycle())))
    gc.unfreeze()  # what tests before this one left, of which some may be freed meanwhile
    collects, let_go = inputs._load_tokenizer(inputs.build_parts(compose([*overrides, "technique=lora"])), inputs.Shared())
    assert not collects and let_go() is None and gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    with collected_once():
        pass
    assert not gc.isenabled(), "whoever has it rest goes on"
    gc.enable()


def test_what_is_forked_while_cells_are_prepared_collects(overrides):
    states: list[bool] = []
    inputs.preload([compose([*overrides, "technique=lora"])], lambda _: states.append(gc.isenabled()))
    assert states == [True] and gc.isenabled()


# base and tokenizer at once


def test_the_tokenizer_is_read_while_the_weights_move(overrides, monkeypatch):
    from transformers.utils import logging

    read, before, load = threading.Event(), logging.get_verbosity(), inputs.load_model
    tokenize = inputs.load_tokenizer

    def tokenizer(*args: Any) -> Any:
        made = tokenize(*args)
        read.set()
        return made

    def model(*args: Any) -> Any:
        assert read.wait(30), "it is read afterwards"
        return load(*args)

    monkeypatch.setattr(inputs, "load_tokenizer", tokenizer)
    monkeypatch.setattr(inputs, "load_model", model)
    parts = inputs.build_parts(compose([*overrides, "technique=lora"]))
    base, encoder = inputs.load_pair(parts, inputs.Shared())
    assert base.config.vocab_size == len(encoder.tokenizer) and logging.get_verbosity() == before
    monkeypatch.setattr(inputs, "load_tokenizer", lambda *_: (_ for _ in ()).throw(UserError("it has none")))
    with pytest.raises(UserError, match="it has none"):
        inputs.load_pair(parts, inputs.Shared())


# what code does, remembered


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept, with nothing known yet."""
    path = tmp_path / "notes.json"
    monkeypatch.setattr(source, "_place", lambda: path)
    monkeypatch.setattr(source, "_found", {})
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    yield path
    forget()


def forget() -> None:
    source.look.cache_clear()
    source._kept.cache_clear()


def test_a_files_digest_is_remembered_by_its_content(notes, tmp_path, monkeypatch):
    path = tmp_path / "some.py"
    path.write_text("import pipeline.core\nX = 1\n")
    forget()
    first = source.look(path)
    source.keep()
    assert json.loads(notes.read_text()) and first.imports == ["pipeline.core"]
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(source, "_look", None)
        assert source.look(path) == first
    path.write_text("import pipeline.core\nX = 2\n")
    forget()
    assert source.look(path).digest != first.digest


@pytest.mark.parametrize("damage", ["", "[]", "{\"a\": 1}", "{\"a\": [1, 2, 3]}", "null"])
def test_damaged_notes_are_none(notes, tmp_path, damage):
    notes.write_text(damage)
    (tmp_path / "some.py").write_text("X = 1\n")
    forget()
    assert source.look(tmp_path / "some.py").imports == []
    source.keep()
    assert len(json.loads(notes.read_text())) == 1


def test_notes_are_few_and_are_none_where_python_writes_none(notes, tmp_path, monkeypatch):
    (tmp_path / "some.py").write_text("X = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    forget()
    source.look(tmp_path / "some.py")
    source.keep()
    assert not notes.exists()
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    notes.write_text(json.dumps({str(i): ["0", []] for i in range(source.MOST)}))
    forget()
    source.look(tmp_path / "some.py")
    source.keep()
    assert len(json.loads(notes.read_text())) == 1


# the benchmark


@pytest.mark.slow
def test_the_benchmark_says_when_a_second_process_trains(overrides, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "cells_of", lambda *_: [{"technique": "lora", "train_rows": 16, "seed": 0}])
    monkeypatch.setattr(throughput, "_machine", dict)
    options = throughput.OPTIONS | {"work": str(tmp_path / "work"), "repeats": "2"}
    line = throughput.start(options, [*(w for w in overrides if not w.startswith("paths.results")), "train.batch_size=8"])
    told = SimpleNamespace(**line)
    assert told.trains_after_s == told.every_s[0] <= told.every_s[1] and len(told.every_s) == 2
    assert told.trains_after_s > 1 and all(seconds >= 0 for seconds in told.parts_s.values())
    within = {"load_task", "load_stored", "load_model", "_load_tokenizer"}
    assert within < told.parts_s.keys() and 0.8 < sum(v for k, v in told.parts_s.items() if k not in within) / told.trains_after_s <= 1.01, "nearly all of it"
