"""What is searched: one definition of a searched parameter, for `python -m pipeline.sweep` and `python -m pipeline.tune` alike.

Library. `sweep.space` (conf/sweep/*.yaml) and `search` (conf/search/*.yaml, which a technique chooses or writes itself) give a config key of the cell
one of these entries:

    {choices: [1, 2, 4]}                       one of these values
    {low: 1.0e-4, high: 1.0e-2, log: true}     a range, of whole numbers if both ends are whole; `step` draws every so many only, and not with log
    {factor: 10}                               a range from a tenth of the cell's own value to ten times it; gives way to choices or ends beside it
    {times: 2, of: method.config.r}            linked, not searched: always that multiple of another entry
    {power: -0.5, of: method.config.r}         linked: the cell's own value, times what the other entry is over its own to that power; gives way as factor does
    least, most                                how far pipeline.tune may widen the choices or the range beside them
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from pipeline.core.files import UserError
from pipeline.core.settings import build
from pipeline.models import rates
from pipeline.records import tuned

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FORMS = "{choices: [...]}, {low: ..., high: ...}, {factor: ...}, {times: ..., of: ...} or {power: ..., of: ...}"
LIMITS = ("least", "most")
MOST_POWER = 4

Point = dict[str, Any]
"""Config key -> value."""


@dataclass(frozen=True)
class Parameter:
    """What a config key of the cell may be; the fields are an entry's."""

    choices: tuple[Any, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False
    factor: int | float | None = None
    """Replaced by low and high when the entry is read."""
    times: int | float | None = None
    power: int | float | None = None
    """The value is scale · (the other entry's)^power, to three digits."""
    scale: int | float | None = None
    """Of a power; follows from the cell's own values when the entry is read."""
    of: str | None = None
    least: int | float | None = None
    most: int | float | None = None

    @property
    def linked(self) -> bool:
        return self.times is not None or self.power is not None

    def follow(self, other: Any) -> Any:
        """The value of a linked one where the other entry has this."""
        if self.power is None:
            assert self.times is not None
            return self.times * other
        assert self.scale is not None
        return float(f"{self.scale * other**self.power:.3g}")

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers, truth values included."""
        return all(isinstance(value, int) for value in self.extremes)

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The choices, or the ends of the range."""
        return self.choices if self.choices is not None else (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values there are; infinite for a continuum."""
        if self.choices is not None:
            return len(self.choices)
        assert self.low is not None and self.high is not None
        step = self.step or (1 if self.whole else None)
        return int((self.high - self.low) / step + 1e-9) + 1 if step else math.inf

    def distance(self, one: Any, other: Any) -> float:
        """Between two values as a share of the width from the lowest to the highest, of logarithms where `log` says so or all choices are above 0; of what has
        no order 0 or 1."""
        numbers = [value for value in (one, other, *self.extremes) if is_number(value)]
        if one == other or len(numbers) < 2 + len(self.extremes):
            return float(one != other)
        positive = min(numbers) > 0 and (self.log or self.choices is not None)
        first, second, *ends = map(math.log if positive else float, (one, other, *self.extremes))
        width = max(ends) - min(ends)
        return abs(first - second) / width if width else 1.0

    @property
    def distribution(self) -> BaseDistribution:
        """What Optuna draws it from."""
        from optuna import distributions

        if self.choices is not None:
            return distributions.CategoricalDistribution(self.choices)
        assert self.low is not None and self.high is not None
        if self.whole:
            return distributions.IntDistribution(int(self.low), int(self.high), self.log, int(self.step or 1))
        return distributions.FloatDistribution(self.low, self.high, self.log, self.step)

    @property
    def entry(self) -> dict[str, Any]:
        """As YAML says it, without what is at its default and without the limits of widening."""
        fields = {name: value for name, value in asdict(self).items() if value is not None and value is not False and name not in LIMITS}
        return fields | ({"choices": list(self.choices)} if self.choices is not None else {})


@dataclass(frozen=True)
class Space:
    """The parameters of a search by config key."""

    parameters: dict[str, Parameter]

    @property
    def searched(self) -> dict[str, Parameter]:
        return {key: p for key, p in self.parameters.items() if not p.linked}

    @property
    def keys(self) -> list[str]:
        """Config keys that a trial sets: those searched, then those linked."""
        return [*self.searched, *(key for key, p in self.parameters.items() if p.linked)]

    @property
    def size(self) -> float:
        return math.prod(p.size for p in self.searched.values())

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return {key: p.distribution for key, p in self.searched.items()}

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return {key: p.entry for key, p in self.parameters.items()}

    def grid(self) -> Iterator[Point]:
        """Every point of the choices, in their order."""
        return (dict(zip(self.searched, values, strict=True)) for values in itertools.product(*(p.choices or () for p in self.searched.values())))

    def draw(self, seed: int) -> Iterator[Point]:
        """Random points without end, the same for the same seed. The same point may come again."""
        import optuna

        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
        optuna.logging.set_verbosity(level)
        while True:
            yield self.point(study.ask(self.distributions).params)

    def point(self, values: Mapping[str, Any]) -> Point:
        return {key: values[key] for key in self.searched}

    def complete(self, point: Mapping[str, Any]) -> Point:
        """The point and the settings linked to it."""
        return {**point, **{key: p.follow(point[p.of]) for key, p in self.parameters.items() if p.linked and p.of is not None and p.of in point}}

    def distance(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Between two points: the sum over what is searched."""
        return math.fsum(p.distance(one[key], other[key]) for key, p in self.searched.items())

    def order(self, point: Mapping[str, Any]) -> tuple[Any, ...]:
        """Sorts points: by the place of their choices, or by value."""
        return tuple(p.choices.index(point[key]) if p.choices else point[key] for key, p in self.searched.items())

    def covers(self) -> list[Point]:
        """Settings that between them take every extreme: one parameter at a time, with what is linked to it."""
        return [self.complete({key: value}) for key, p in self.searched.items() for value in p.extremes]


def declared(cfg: DictConfig) -> Space:
    """What a technique declares to be searched. Raises UserError: an entry of another form, or of a key that the cell does not have."""
    try:
        return parse(tuned.searches(cfg), "search", cfg)
    except UserError as error:
        raise UserError(f"technique {cfg.technique.name}: {error}") from error


def parse(entries: Any, name: str, cfg: DictConfig) -> Space:
    """The checked space of entries by config key. name: where they stand in the config, for the messages.

    Raises:
        UserError: an entry of another form, or of a key that the cell does not have.
    """
    if not isinstance(entries, dict):
        raise UserError(f"{name} is {entries!r}; write a config key with {FORMS}")
    space = Space({key: _parameter(entry, name, key, cfg) for key, entry in entries.items()})
    for key, p in space.parameters.items():
        if p.linked and p.of not in space.searched:
            raise UserError(f"{name} {key!r} follows {p.of!r}, which {name} does not search; it has {', '.join(space.searched)}")
        _check_exists(cfg, key, name)
    return space


def _parameter(entry: Any, name: str, key: str, cfg: DictConfig) -> Parameter:
    where = f"{name} {key!r}"
    if not isinstance(entry, dict) or not entry:
        raise UserError(f"{where} is {entry!r}; write {FORMS}")
    parameter: Parameter = build(Parameter, dict(entry), f"{name}.{key}")
    forms = [form for form, value in (("choices", parameter.choices), ("low and high", parameter.low), ("times", parameter.times)) if value is not None]
    if len(forms) > 1:
        raise UserError(f"{where} has {' and '.join(forms)}; keep one of them")
    if parameter.factor is not None:
        parameter = replace(parameter, factor=None) if forms else _around(where, parameter, cfg, key)
    if parameter.power is not None and forms:
        parameter = replace(parameter, power=None, of=None if parameter.times is None else parameter.of)
    if parameter.scale is not None:
        raise UserError(f"{where} has a scale, which follows from the cell's own values; take it out")
    if parameter.power is not None:
        parameter = _along(where, name, parameter, cfg, key)
    if parameter.linked:
        if set(parameter.entry) not in ({"times", "of"}, {"power", "scale", "of"}):
            raise UserError(f"{where} is {entry!r}; write {{times: <number>, of: <a key that is searched>}}, or power in the place of times")
        return parameter
    _check_values(where, entry, parameter)
    for number in parameter.extremes if key.rpartition(".")[2] == "r" else ():
        if type(number) is not int or number < 1:
            raise UserError(f"{where} contains {number!r}; a rank is a whole number of at least 1")
    return parameter


def own_point(cfg: DictConfig, space: Space) -> Point:
    """The cell's own settings of what is searched."""
    return {key: _own(cfg, key) for key in space.searched}


def _own(cfg: DictConfig, key: str) -> Any:
    """The cell's own value of a key; of a learning rate that follows from the model, the number."""
    value = OmegaConf.select(cfg, key)
    return rates.read(cfg).train.lr if key == "train.lr" and value is None else value


def _around(where: str, parameter: Parameter, cfg: DictConfig, key: str) -> Parameter:
    factor = parameter.factor
    if factor is None or factor <= 1:
        raise UserError(f"{where} has factor {factor!r}; write a factor above 1, or low and high")
    value = _own(cfg, key)
    if not is_number(value) or value <= 0:
        raise UserError(f"{where} has factor {factor!r} of {value!r}; write a factor of a number above 0, or low and high")
    return replace(parameter, factor=None, low=float(f"{value / factor:.6g}"), high=float(f"{value * factor:.6g}"), log=True)


def _along(where: str, name: str, parameter: Parameter, cfg: DictConfig, key: str) -> Parameter:
    power = parameter.power
    if power is None or not abs(power) <= MOST_POWER:
        raise UserError(f"{where} has power {power!r}; write one from {-MOST_POWER} to {MOST_POWER}")
    if parameter.of is None:
        raise UserError(f"{where} has power {power!r}; write of, the key that it follows, beside it")
    _check_exists(cfg, parameter.of, name)
    own, other = _own(cfg, key), _own(cfg, parameter.of)
    for one, value in ((key, own), (parameter.of, other)):
        if not is_number(value) or value <= 0:
            raise UserError(f"{where} follows {parameter.of!r} by a power, and {one} is {value!r}; write a number above 0, or choices")
    return replace(parameter, scale=float(f"{own / other**power:.6g}"))


def is_number(value: Any) -> bool:
    """Whether it is a number, which a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_values(where: str, entry: Any, parameter: Parameter) -> None:
    if parameter.choices is not None:
        if not parameter.choices or len(set(parameter.choices)) != len(parameter.choices):
            raise UserError(f"{where} has choices {list(parameter.choices)}; list each value once, and at least one")
        if set(parameter.entry) != {"choices"}:
            raise UserError(f"{where} is {entry!r}; keep its choices alone, or low and high")
    elif parameter.low is None or parameter.high is None or parameter.low > parameter.high or (parameter.log and parameter.low <= 0):
        raise UserError(f"{where} is {entry!r}; write choices, or low and high with low <= high (above 0 for log)")
    if parameter.step is not None and (parameter.step <= 0 or parameter.log):
        raise UserError(f"{where} has step {parameter.step}; a step is above 0, and does not go with log")


def _check_exists(cfg: DictConfig, key: str, name: str) -> None:
    parent_key, _, last = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key) if parent_key else cfg
    known = list(parent) if isinstance(parent, DictConfig) else []
    if last not in known:
        there = f"; {parent_key} has {', '.join(map(str, known))}" if known else ""
        raise UserError(f"{name} names {key!r}, which a cell of technique {cfg.technique.name!r} does not have{there}; choose another technique or key")
    if not OmegaConf.is_missing(parent, last) and isinstance(parent[last], DictConfig | ListConfig):
        raise UserError(f"{name} names {key!r}, which is a group of keys; name one of them")


def at(cfg: DictConfig, settings: Mapping[str, Any], new_keys: bool = False) -> DictConfig:
    """A copy of the cell's config with these settings. new_keys: also those that it does not have."""
    cell = copy.deepcopy(cfg)
    for key, value in settings.items():
        OmegaConf.update(cell, key, value, merge=False, force_add=new_keys)
    return cell


def overrides(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
