"""Release policy, policy.yaml: the evidence that a release needs, and its criteria.

version: 1
subject: artifact                 # what is released: the verdict is bound to its digest
evidence:
  early: evaluations/early.json
  final: evaluations/final.json
  artifact: artifacts/pilot/int8/artifact.json
  train: runs/pilot/train.json
baselines: {early: run}           # may be of another model: an earlier checkpoint of the run
criteria:
  - {name: learned, evidence: final, metric: frechet_distance_lite0,
     at_most: {ratio: 0.5, of: early}}
  - {name: follows prompts, evidence: final, metric: lit_alignment_gain, above: 0, use: low}
  - {name: parity, evidence: artifact, parity: all}
  - {name: loss falls, evidence: train, field: loss_trend, equals: down}
monitoring: {evaluate_every_days: 28, windows: 4}    # see modelops.monitoring.policy
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from modelops.base.errors import ConfigError
from modelops.base.files import read_yaml
from modelops.monitoring.policy import Margins, MonitoringPolicy
from modelops.records.measurements import SLICES, is_slice_name

COMPARISONS = ("at_most", "at_least", "below", "above")


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text: make it a number again; refuse yes, no and NaN."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"should be a number, not {value!r}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should be a finite number")
    return value


Real = Annotated[float, BeforeValidator(_number)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RelativeBound(_Section):
    """`{ratio: 0.5, of: early}` or `{plus: 0.01, of: early}`: the same metric of other evidence."""

    of: str
    ratio: Real | None = Field(None, gt=0)
    plus: Real | None = None

    @model_validator(mode="after")
    def _one_relation(self) -> Self:
        if (self.ratio is None) == (self.plus is None):
            raise ValueError("give either ratio or plus")
        return self


def _bound(value: Any) -> Any:
    return value if isinstance(value, dict) else _number(value)


Bound = Annotated[RelativeBound | float, BeforeValidator(_bound)]


class PolicyCriterion(_Section):
    """One thing that must hold: exactly one of `metric`, `field` and `parity`.

    Attributes:
        name: unique in the policy.
        evidence: name of the record.
        metric: key of a Measurement: of an evaluation's `metrics` or `slices` (see
            `modelops.records.measurements`), an artifact's `speed` or a split's `leakage`.
        at_most, at_least, below, above: the bound of a metric or of a numeric field; one of them.
        use: the number that decides: `value` (the point), `low`, `high`, or `worst`, the end of the
            interval that is harder to pass with.
        min_n: with fewer observations the answer is `undecided`.
        field: name of a plain field of the record, such as loss_trend or verdict.
        equals: required value of the field.
        parity: `all`, or the names of the parity checks that must have passed.
    """

    name: str = Field(min_length=1, max_length=120)
    evidence: str
    metric: str | None = None
    at_most: Bound | None = None
    at_least: Bound | None = None
    below: Bound | None = None
    above: Bound | None = None
    use: Literal["value", "low", "high", "worst"] = "value"
    min_n: int = Field(0, ge=0, strict=True)
    field: str | None = None
    equals: str | int | float | bool | None = None
    parity: Literal["all"] | list[str] | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        asked = [key for key in ("metric", "field", "parity") if getattr(self, key) is not None]
        if len(asked) != 1:
            raise ValueError("give exactly one of metric, field and parity")
        bounds = [key for key in COMPARISONS if getattr(self, key) is not None]
        if self.parity is not None:
            if bounds or self.equals is not None:
                raise ValueError("parity takes no bound: each check carries its own")
            if self.parity == []:
                raise ValueError("name at least one parity check, or all")
        elif self.metric is not None:
            if self.metric.startswith(SLICES) and not is_slice_name(self.metric):
                raise ValueError(
                    f"{self.metric!r}: write slices.COLUMN.VALUE.METRIC or "
                    "slices.COLUMN.worst.METRIC, with .difference for slice minus rest"
                )
            if len(bounds) != 1 or self.equals is not None:
                raise ValueError("a metric needs exactly one of at_most, at_least, below and above")
        elif len(bounds) + (self.equals is not None) != 1:
            raise ValueError("a field needs exactly one of equals and a bound")
        elif isinstance(self.bound, RelativeBound):
            raise ValueError("the bound of a field is a plain number")
        if self.metric is None and (self.use != "value" or self.min_n):
            raise ValueError("use and min_n belong to a metric")
        return self

    @property
    def comparison(self) -> str | None:
        """at_most, at_least, below or above; None without a bound."""
        return next((key for key in COMPARISONS if getattr(self, key) is not None), None)

    @property
    def bound(self) -> RelativeBound | float | None:
        """The bound itself."""
        return getattr(self, self.comparison) if self.comparison else None


class Policy(_Section):
    """A checked policy.yaml."""

    version: Literal[1]
    subject: str
    evidence: dict[str, str] = Field(min_length=1)
    baselines: dict[str, Literal["run", "any"]] = {}
    criteria: list[PolicyCriterion] = Field(min_length=1)
    monitoring: MonitoringPolicy | None = None

    @field_validator("evidence")
    @classmethod
    def _inside_the_project(cls, evidence: dict[str, str]) -> dict[str, str]:
        for name, path in evidence.items():
            pure = PurePosixPath(path)
            if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
                raise ValueError(f"{name}: {path!r} should be a path below the project's root")
        return evidence

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for where, name in self._named_evidence():
            if name not in self.evidence:
                raise ValueError(
                    f"{where}: no evidence named {name!r}{_suggest(name, self.evidence)}"
                )
        names = [criterion.name for criterion in self.criteria]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two criteria are named {twice!r}")
        if self.subject in self.baselines:
            raise ValueError(f"the subject {self.subject!r} cannot be a baseline")
        for criterion in self.criteria:
            if criterion.evidence in self.baselines:
                raise ValueError(
                    f"criterion {criterion.name!r}: decides on the baseline "
                    f"{criterion.evidence!r}, "
                    "which is not what is released"
                )
        return self

    def _named_evidence(self) -> list[tuple[str, str]]:
        named = [("subject", self.subject)]
        named += [("baselines", name) for name in self.baselines]
        for criterion in self.criteria:
            named.append((f"criterion {criterion.name!r}", criterion.evidence))
            if isinstance(criterion.bound, RelativeBound):
                named.append((f"criterion {criterion.name!r}", criterion.bound.of))
        return named


def load_policy(path: str | Path) -> Policy:
    """Read and check a policy.

    Raises:
        UsageError: the file is missing or unreadable.
        ConfigError: it is not a valid policy; one line that names the key.
    """
    data = read_yaml(path)
    try:
        return Policy.model_validate(data)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")[0]
        raise _explain(found, data, str(path)) from error


def _explain(found: Any, data: dict[str, Any], source: str) -> ConfigError:
    location = found["loc"]
    key = _where(location, data)
    if found["type"] == "extra_forbidden":
        name = str(location[-1])
        model = _model_at(location)
        known = list(model.model_fields)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return ConfigError(f"{source}: {key}: unknown key", hint=hint)
    if found["type"] == "missing":
        return ConfigError(f"{source}: {key}: missing", hint="see `modelops gate --help`")
    message = str(found["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    given = found.get("input")
    tail = f", got {given!r}" if isinstance(given, str | int | float) else ""
    return ConfigError(f"{source}: {key or 'policy'}: {message}{tail}")


def _where(location: tuple[Any, ...], data: dict[str, Any]) -> str:
    """`criteria.learned.at_most`: a criterion is named by its name, not by its number."""
    parts: list[str] = []
    for depth, part in enumerate(location):
        if isinstance(part, int) and location[0] == "criteria" and depth == 1:
            entry = data["criteria"][part]
            name = entry.get("name") if isinstance(entry, dict) else None
            parts.append(str(name) if isinstance(name, str) else f"number {part + 1}")
        elif str(part) != "float" and not str(part).startswith("function-"):
            parts.append(str(part))
    return ".".join(parts)


def _model_at(location: tuple[Any, ...]) -> type[BaseModel]:
    if location[0] == "monitoring" and len(location) > 1:
        return Margins if location[1] == "margins" and len(location) > 2 else MonitoringPolicy
    if any("RelativeBound" in str(part) for part in location):
        return RelativeBound
    return PolicyCriterion if location[0] == "criteria" and len(location) > 2 else Policy


def _suggest(name: str, known: dict[str, str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f" (there are: {', '.join(known)})"
