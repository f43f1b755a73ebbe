"""Monitoring policy, the `monitoring:` section of policy.yaml: intervals, and what counts as drift.

monitoring:
  evaluate_every_days: 28        # an older evaluation is overdue
  windows: 4                     # looks at the drift log until the next evaluation
  alpha: 0.05                    # chance of any false alarm in all of them together
  min_n: 100                     # images or prompts that a side needs; fewer are undecided
  margins: {feature_mean: 0.5, image_filter_rate: 0.02}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelops.base.errors import ConfigError
from modelops.base.files import read_yaml

POLICY_FILE = "policy.yaml"
DEFAULT_EVALUATE_EVERY_DAYS = 30.0
MIN_WINDOW_ALPHA = 1e-4  # below, 99,999 permutations show nothing: nine tests share it

Margin = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Margins(_Section):
    """Smallest change that matters; a change that is or looks smaller is no drift.

    Attributes:
        feature_mean: shift of the images' mean features, in standard deviations.
        feature_covariance: change of their covariance, relative to it (Frobenius).
        image_score, prompt_length: distance of P(later > earlier) from a half, 0 to 0.5.
        image_filter_rate, prompt_filter_rate: difference of the shares that are stopped.
        script_mix: total variation distance of the shares of scripts, 0 to 1.
        latency_p50, latency_p95: increase as a share: 0.25 is a quarter slower.
    """

    feature_mean: Margin = 0.5
    feature_covariance: Margin = 0.5
    image_score: Margin = 0.1
    image_filter_rate: Margin = 0.02
    prompt_filter_rate: Margin = 0.05
    prompt_length: Margin = 0.15
    script_mix: Margin = 0.1
    latency_p50: Margin = 0.25
    latency_p95: Margin = 0.5


class MonitoringPolicy(_Section):
    """Policy for watching a served release.

    Attributes:
        evaluate_every_days: days after which the evaluation of the served model is overdue.
        windows: number of judgements of the drift log until the next evaluation.
        alpha: chance of at least one false alarm in all those windows; each gets an equal part, of
            1e-4 at least.
        min_n: images, prompts or requests that each side of a test needs.
        margins: see Margins.
    """

    evaluate_every_days: float = Field(default=DEFAULT_EVALUATE_EVERY_DAYS, gt=0, lt=1e6)
    windows: int = Field(default=4, ge=1, le=1000)
    alpha: float = Field(default=0.05, gt=0, le=0.5)
    min_n: int = Field(default=100, ge=20)
    margins: Margins = Margins()

    @model_validator(mode="after")
    def _can_be_shown(self) -> MonitoringPolicy:
        if self.window_alpha < MIN_WINDOW_ALPHA * (1 - 1e-9):
            raise ValueError(
                f"alpha {self.alpha:g} in {self.windows} windows is {self.window_alpha:.2g} each; "
                f"a permutation test shows nothing below {MIN_WINDOW_ALPHA:g}"
            )
        return self

    @property
    def window_alpha(self) -> float:
        """Chance of a false alarm in one window (Bonferroni over the windows)."""
        return self.alpha / self.windows

    @property
    def window_days(self) -> float:
        """Days between two judgements of the log."""
        return self.evaluate_every_days / self.windows


def read_monitoring(path: str | Path) -> MonitoringPolicy | None:
    """The `monitoring:` section of a policy; None if it has none.

    Raises:
        UsageError: the file is missing or unreadable.
        ConfigError: the section is not valid; one line that names the key.
    """
    section = read_yaml(path).get("monitoring")
    if section is None:
        return None
    try:
        return MonitoringPolicy.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["monitoring", *map(str, first["loc"])])
        raise ConfigError(f"{path}: {key}: {first['msg']}") from error


def released_monitoring(release_dir: str | Path) -> MonitoringPolicy | None:
    """Return the monitoring policy in a release; None if the release has none.

    Raises:
        ConfigError: it has a section that is not valid.
    """
    path = Path(release_dir) / POLICY_FILE
    return read_monitoring(path) if path.is_file() else None
