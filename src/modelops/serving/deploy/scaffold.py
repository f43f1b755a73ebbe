"""Deployment files of a node, from templates: container, compose, Kubernetes, monitoring.

DIR/
  Dockerfile  compose.yaml
  prometheus/  prometheus.yaml  modelops.rules.yaml  modelops.rules.test.yaml
  grafana/     provisioning/{datasources,dashboards}/  dashboards/modelops.json
  kubernetes/  kustomization, deployment, service, ... .yaml

No container engine and no cluster has run them: what is checked is their structure, the rules with
promtool, and the rules against a real node with a real Prometheus.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from modelops import __version__
from modelops.base.errors import UsageError
from modelops.base.files import check_writable, read_text, write_text
from modelops.serving.deploy.launch import DRAIN_S

JOB = "modelops"  # Prometheus' job, and the name of everything in Kubernetes
PRE_STOP_S = 10
_MARGIN_S = 20
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_IMAGE = re.compile(
    r"(?:[a-z0-9][a-z0-9.-]*(?::\d+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[\w][\w.-]{0,127})?"
    r"(?:@sha256:[0-9a-f]{64})?"
)

# file in the directory -> template
FILES = {
    "Dockerfile": "Dockerfile",
    "compose.yaml": "compose.yaml",
    "prometheus/prometheus.yaml": "prometheus.yaml",
    "prometheus/modelops.rules.yaml": "rules.yaml",
    "prometheus/modelops.rules.test.yaml": "rules_test.yaml",
    "grafana/provisioning/datasources/prometheus.yaml": "grafana_datasource.yaml",
    "grafana/provisioning/dashboards/modelops.yaml": "grafana_dashboards.yaml",
    "grafana/dashboards/modelops.json": "dashboard.json",
    "kubernetes/kustomization.yaml": "kustomization.yaml",
    "kubernetes/deployment.yaml": "deployment.yaml",
    "kubernetes/service.yaml": "service.yaml",
    "kubernetes/horizontalpodautoscaler.yaml": "horizontalpodautoscaler.yaml",
    "kubernetes/adapter-values.yaml": "adapter_values.yaml",
    "kubernetes/poddisruptionbudget.yaml": "poddisruptionbudget.yaml",
    "kubernetes/servicemonitor.yaml": "servicemonitor.yaml",
    "kubernetes/prometheusrule.yaml": "prometheusrule.yaml",
}
State = Literal["new", "same", "different"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaffoldOptions:
    """Options of a deployment.

    Attributes:
        image: name of the container image, with its registry if it has one.
        gpus: NVIDIA GPUs of a node, with a worker for each; 0 serves on processors, with one.
        replicas, max_replicas: nodes, at least and at most.
        latency_budget_s: seconds that p95 of a request may take before an alert.
        evaluate_every_days: an older evaluation of the served model is an alert; 0 leaves that to
            the released policy.
        time_scale: factor on every duration of the rules; a test makes it small.
        targets: what the compose file's Prometheus scrapes.
    """

    image: str = f"modelops-node:{__version__}"
    gpus: int = 0
    replicas: int = 2
    max_replicas: int = 8
    latency_budget_s: float = 30
    evaluate_every_days: float = 0
    time_scale: float = 1.0
    targets: Sequence[str] = ("node:3000",)

    def __post_init__(self) -> None:
        if not _IMAGE.fullmatch(self.image):
            raise UsageError(
                f"image {self.image!r}: not the name of a container image",
                hint="such as modelops-node:1.0 or registry.example/team/modelops-node:1.0",
            )
        if not 0 <= self.gpus <= 64:
            raise UsageError(f"gpus {self.gpus}: must be 0 to 64")
        if not 1 <= self.replicas <= self.max_replicas <= 10_000:
            raise UsageError(
                f"replicas {self.replicas} to {self.max_replicas}: at least 1, at most the maximum"
            )
        if not (math.isfinite(self.evaluate_every_days) and self.evaluate_every_days >= 0):
            raise UsageError("evaluate-every: must be 0 or more days")
        for name in ("latency_budget_s", "time_scale"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name.replace('_', '-')}: must be above 0")


def render(options: ScaffoldOptions | None = None) -> dict[str, str]:
    """Render every file of a scaffold: {path below the directory: text}."""
    import yaml

    context = _context(options or ScaffoldOptions())
    environment = _environment()

    def fill(template: str, **more: Any) -> str:
        return environment.get_template(template).render(context, **more)

    rules = fill("rules.yaml")
    alerts = [rule for group in yaml.safe_load(rules)["groups"] for rule in group["rules"]]
    runbooks = {rule["alert"]: rule["annotations"]["runbook"] for rule in alerts}
    groups = rules[rules.index("groups:") :].rstrip()
    return {
        path: fill(template, runbooks=runbooks, rules=groups) for path, template in FILES.items()
    }


def scaffold_files(
    directory: str | Path, options: ScaffoldOptions | None = None
) -> dict[Path, State]:
    """Return the files of a scaffold, and whether each is there already.

    Raises:
        UsageError: the directory is a file, or a file in it cannot be read.
    """
    top = Path(directory)
    if top.exists() and not top.is_dir():
        raise UsageError(f"{directory}: not a directory", hint="name a new or empty directory")
    return {top / path: _state(top / path, text) for path, text in render(options).items()}


def write_scaffold(
    directory: str | Path, options: ScaffoldOptions | None = None, *, force: bool = False
) -> list[Path]:
    """Write a scaffold; files that already say the same are left alone.

    Args:
        directory: made if it is not there.
        force: replace files whose content differs.

    Returns:
        The files that were written.

    Raises:
        UsageError: a file differs and `force` is not given; then nothing is written.
        ModelopsError: the directory cannot be written.
    """
    states = scaffold_files(directory, options)
    different = [path for path, state in states.items() if state == "different"]
    if different and not force:
        names = ", ".join(path.relative_to(directory).as_posix() for path in different)
        raise UsageError(
            f"{directory}: {names} would be overwritten",
            hint="move what you want to keep, or use --force",
        )
    unusable = [path for path in different if not path.is_file()]
    if unusable:
        raise UsageError(f"{unusable[0]}: not a file", hint="move it away")
    check_writable(directory)
    texts = {Path(directory) / path: text for path, text in render(options).items()}
    written = [path for path, state in states.items() if state != "same"]
    for path in written:
        write_text(path, texts[path])
    return written


def scale_duration(text: str, factor: float) -> str:
    """Multiply a Prometheus duration by a factor: ("5m", 1) is 5m, ("5m", 0.02) is 6000ms."""
    if factor == 1:
        return text
    return f"{max(1, round(int(text[:-1]) * _SECONDS[text[-1]] * factor * 1000))}ms"


def _context(options: ScaffoldOptions) -> dict[str, Any]:
    from modelops.serving.telemetry.metrics import FAULT_CODES

    def duration(text: str) -> str:
        return scale_duration(text, options.time_scale)

    return {
        "job": JOB,
        "version": __version__,
        "image": options.image,
        "gpus": options.gpus,
        "workers": max(1, options.gpus),
        "replicas": options.replicas,
        "max_replicas": options.max_replicas,
        "latency_budget_s": _plain(options.latency_budget_s),
        "evaluate_every_days": _plain(options.evaluate_every_days),
        "fault_codes": "|".join(FAULT_CODES),
        "drain_s": DRAIN_S,
        "pre_stop_s": PRE_STOP_S,
        "grace_s": PRE_STOP_S + DRAIN_S + _MARGIN_S,
        "scrape_timeout": duration("10s"),
        "targets": list(options.targets),
        "d": duration,
    }


def _environment() -> Any:
    import jinja2

    folder = resources.files("modelops.serving.deploy") / "templates"

    def load(name: str) -> str:
        return (folder / name).read_text("utf-8")

    # Other marks than jinja's own: Prometheus and Grafana have their {{ }} in the same files.
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        variable_start_string="<<",
        variable_end_string=">>",
        block_start_string="<%",
        block_end_string="%>",
        comment_start_string="<#",
        comment_end_string="#>",
        autoescape=False,
    )


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _state(path: Path, text: str) -> State:
    if not path.exists():
        return "new"
    return "same" if path.is_file() and read_text(path) == text else "different"
