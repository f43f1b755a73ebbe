"""`modelops serve scaffold`: files that parse, fit together, and overwrite nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from modelops.base.errors import UsageError
from modelops.cli.main import main
from modelops.monitoring.textfile import textfile
from modelops.records.monitoring import DriftTest, MonitorRecord
from modelops.serving.deploy.launch import DRAIN_S
from modelops.serving.deploy.scaffold import (
    FILES,
    PRE_STOP_S,
    ScaffoldOptions,
    render,
    scale_duration,
    write_scaffold,
)
from modelops.serving.rollout.metrics import RolloutMetrics
from modelops.serving.settings import NodeSettings, known_variables
from modelops.serving.telemetry.metrics import NodeMetrics

CORE = ("Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget")
VARIANTS = [
    ScaffoldOptions(),
    ScaffoldOptions(
        image="registry.example:5000/team/node:2.1@sha256:" + "a" * 64, gpus=2, replicas=1,
        max_replicas=1, latency_budget_s=2.5, evaluate_every_days=7.5,
    ),
]  # fmt: skip


def manifests(options: ScaffoldOptions) -> dict[str, dict[str, Any]]:
    found = {}
    for path, text in render(options).items():
        if path.startswith("kubernetes/") and "adapter" not in path:
            (document,) = yaml.safe_load_all(text)
            found[document["kind"]] = document
    return found


def pod(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return spec, container


@pytest.mark.parametrize("options", VARIANTS)
def test_every_file_parses_and_is_filled_in(options: ScaffoldOptions) -> None:
    for path, text in render(options).items():
        if path.endswith(".json"):
            json.loads(text)
        elif path.endswith(".yaml"):
            assert list(yaml.safe_load_all(text)), path
        rest = re.sub(r"<<\.(Series|LabelMatchers|GroupBy)>>", "", text)  # the adapter's own
        assert not re.search(r"<<|>>|<%|%>|<#", rest), path
        assert text.endswith("\n") and not text.endswith("\n\n"), path


def test_nothing_names_a_machine_or_a_registry() -> None:
    """Image names without a host, no home or work folder, no address but loopback and any."""
    for path, text in render().items():
        assert not re.search(
            r"/(work|root|opt/mo|tmp/pytest)\b|pypi|https?://(?!127\.0\.0\.1|prom)", text
        ), path
        for address in re.findall(r"\b\d+\.\d+\.\d+\.\d+\b", text):
            assert address in ("127.0.0.1", "0.0.0.0"), (path, address)
    compose = yaml.safe_load(render()["compose.yaml"])
    images = [service["image"] for service in compose["services"].values()]
    assert not any("." in image.split("/")[0].split(":")[0] for image in images)


@pytest.mark.parametrize("options", VARIANTS)
def test_manifests_are_valid_kubernetes(options: ScaffoldOptions) -> None:
    """Against Kubernetes' own schemas; unknown fields are refused too."""
    kubernetes = pytest.importorskip("kubernetes_validate")
    for kind in CORE:
        kubernetes.validate(manifests(options)[kind], "1.33", strict=True)


@pytest.mark.parametrize("options", VARIANTS)
def test_manifests_select_each_other(options: ScaffoldOptions) -> None:
    """What no schema says: labels, names and ports agree across files."""
    found = manifests(options)
    assert set(found) == {*CORE, "Kustomization", "ServiceMonitor", "PrometheusRule"}
    for document in found.values():
        assert document["apiVersion"]
        assert document["kind"] == "Kustomization" or document["metadata"]["name"] == "modelops"
    listed = set(found["Kustomization"]["resources"])
    written = {path.split("/")[1] for path in FILES if path.startswith("kubernetes/")}
    assert listed == written - {"kustomization.yaml", "adapter-values.yaml"}

    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    monitor = found["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"] == found["Service"]["metadata"]["labels"]
    # The alert rules ask for the job `modelops`: the Service's label becomes the job's name.
    assert found["Service"]["metadata"]["labels"][monitor["jobLabel"]] == "modelops"
    (port,) = found["Service"]["spec"]["ports"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] == port["name"] and endpoint["path"] == "/metrics"
    _, container = pod(found)
    assert port["targetPort"] == container["ports"][0]["name"]

    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (
        options.replicas,
        options.max_replicas,
    )
    assert "replicas" not in found["Deployment"]["spec"]
    adapter = yaml.safe_load(render(options)["kubernetes/adapter-values.yaml"])
    query = adapter["rules"]["custom"][0]["seriesQuery"]
    assert query.startswith(scaler["metrics"][0]["pods"]["metric"]["name"] + "{")


@pytest.mark.parametrize("options", VARIANTS)
def test_a_pod_stops_without_losing_requests(options: ScaffoldOptions) -> None:
    spec, container = pod(manifests(options))
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PRE_STOP_S)]
    assert spec["terminationGracePeriodSeconds"] > PRE_STOP_S + DRAIN_S
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    for probe in ("livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"] == {"path": "/livez", "port": "http"}
    compose = yaml.safe_load(render(options)["compose.yaml"])["services"]["node"]
    assert int(compose["stop_grace_period"].rstrip("s")) > DRAIN_S


@pytest.mark.parametrize("options", VARIANTS)
def test_a_pod_has_what_it_mounts_and_no_more_rights_than_it_needs(
    options: ScaffoldOptions,
) -> None:
    spec, container = pod(manifests(options))
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert container["image"] == options.image
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    dockerfile = render(options)["Dockerfile"]
    assert "--uid 10001" in dockerfile and "\nUSER 10001\n" in dockerfile
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == options.gpus
    assert ("nvidia/cuda" in dockerfile) == bool(options.gpus)


@pytest.mark.parametrize("options", VARIANTS)
def test_the_node_understands_its_variables(options: ScaffoldOptions) -> None:
    """Each MODELOPS_ variable of the manifests is one that the sources read, with a good value."""
    _, container = pod(manifests(options))
    compose = yaml.safe_load(render(options)["compose.yaml"])["services"]["node"]
    in_pod = {entry["name"]: entry["value"] for entry in container["env"]}
    for variables in (in_pod, compose["environment"]):
        settings = NodeSettings.from_environment(variables)
        assert settings.evaluate_every_days == options.evaluate_every_days
    settings = NodeSettings.from_environment(in_pod)
    assert settings.device == ("cuda" if options.gpus else "cpu")
    assert settings.workers == max(1, options.gpus)  # and each of them takes a GPU of its own
    named = set(re.findall(r"MODELOPS_[A-Z_]+", "".join(render(options).values())))
    assert named <= known_variables()


def test_the_operators_rules_are_the_files_rules() -> None:
    rules = yaml.safe_load(render()["prometheus/modelops.rules.yaml"])
    assert manifests(ScaffoldOptions())["PrometheusRule"]["spec"] == rules


def _expressions(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return found + [entry["expr"] for entry in dashboard["annotations"]["list"]]


def _exported() -> set[str]:
    metrics = NodeMetrics()
    metrics.evaluated(1.0, every_days=30)
    metrics.release.labels("a", "b", "c", "d", "e").set(1)
    families = text_string_to_metric_families(metrics.text().decode())
    names = {sample.name for family in families for sample in family.samples}
    # No GPU and one worker here; `up` is Prometheus' own.
    own = {"modelops_gpu_memory_bytes", "modelops_worker_up", "up"}
    return names | own | _monitored() | {sample.name for one in _canary() for sample in one.samples}


def _canary() -> list[Any]:
    """What a rollout exports beside its nodes."""
    registry = RolloutMetrics().registry
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


def _monitored() -> set[str]:
    """What `modelops monitor` exports."""
    record = MonitorRecord(
        answer="keep", reasons=[], release="a 1", release_sha256="", model_sha256="", alpha=0.01,
        reference="evaluation", window="", period_alpha=0.05, windows=4, evaluate_every_days=28,
        tests=[DriftTest(name="t", outcome="found", reason="")],
    )  # fmt: skip
    families = text_string_to_metric_families(textfile(record))
    return {sample.name for family in families for sample in family.samples}


def test_every_metric_of_rules_and_dashboard_exists() -> None:
    files = render()
    rules = yaml.safe_load(files["prometheus/modelops.rules.yaml"])
    dashboard = json.loads(files["grafana/dashboards/modelops.json"])
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    texts = [*alerts, *_expressions(dashboard), files["kubernetes/adapter-values.yaml"]]
    used = {
        name
        for text in texts
        for name in re.findall(r"\b(?:modelops|process)_[a-z_]+\b|\bup\b(?=\{)", text)
    }
    assert used <= _exported(), used - _exported()
    assert len(used) > 25
    # And the other way: what a node exports is shown.
    shown = "".join(_expressions(dashboard))
    unseen = {
        family.name
        for family in [*text_string_to_metric_families(NodeMetrics().text().decode()), *_canary()]
        if family.name.startswith("modelops_") and family.name not in shown
    } - {"modelops_evaluation_cadence_seconds", "modelops_filter_checks"}
    assert not unseen


def test_dashboard_panels_do_not_overlap() -> None:
    dashboard = json.loads(render()["grafana/dashboards/modelops.json"])
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def test_dashboard_queries_are_promql(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (Debian: prometheus)")
    dashboard = json.loads(render()["grafana/dashboards/modelops.json"])
    rules = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "5m")}
        for number, text in enumerate(_expressions(dashboard))
    ]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run([promtool, "check", "rules", str(path)], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_its_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (Debian: prometheus)")
    write_scaffold(tmp_path)
    config = tmp_path / "prometheus" / "prometheus.yaml"
    done = subprocess.run(
        [promtool, "check", "config", str(config)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parsed = yaml.safe_load(config.read_text())
    assert parsed["scrape_configs"][0]["job_name"] == "modelops"
    compose = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]
    (target,) = parsed["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in compose
    for service in compose.values():  # what is mounted from here is written here
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./") and source not in ("./keys",):
                assert (tmp_path / source).is_dir(), source


def test_files_of_ones_own_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "deploy"
    assert main(["serve", "scaffold", str(target), "--dry-run"]) == 0
    assert not target.exists() and "would be written" in capsys.readouterr().out
    assert main(["serve", "scaffold", str(target), "--image", "mine:2", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert {Path(path).relative_to(target).as_posix() for path in written} == set(FILES)
    assert main(["serve", "scaffold", str(target), "--image", "mine:2"]) == 0
    assert "up to date" in capsys.readouterr().out
    (target / "Dockerfile").write_text("FROM scratch\n")
    (target / "compose.yaml").unlink()
    assert main(["serve", "scaffold", str(target), "--image", "mine:2"]) == 2
    assert "Dockerfile would be overwritten" in capsys.readouterr().err
    assert not (target / "compose.yaml").exists()
    assert (target / "Dockerfile").read_text() == "FROM scratch\n"
    assert main(["serve", "scaffold", str(target), "--image", "mine:2", "--force"]) == 0
    assert "mine:2" in (target / "Dockerfile").read_text() and (target / "compose.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "Not An Image"], "not the name of a container image"),
        (["--image", "a\nRUN evil"], "not the name of a container image"),
        (["--gpus", "-1"], "gpus"),
        (["--replicas", "9"], "replicas 9 to 8"),
        (["--latency-budget", "nan"], "latency-budget"),
        (["--evaluate-every", "-1"], "evaluate-every"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["serve", "scaffold", str(tmp_path / "x"), *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a directory"):
        write_scaffold(tmp_path / "file")
    (tmp_path / "deploy" / "Dockerfile").mkdir(parents=True)
    with pytest.raises(UsageError, match="not a file"):
        write_scaffold(tmp_path / "deploy", force=True)


def test_serve_still_takes_a_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`modelops serve RELEASE` and `modelops serve run RELEASE` are one command."""
    for words in (["serve"], ["serve", "run"]):
        assert main([*words, str(tmp_path)]) == 2
        assert "not a release" in capsys.readouterr().err
        assert main([*words, "--port", "3999", str(tmp_path)]) == 2
        assert "not a release" in capsys.readouterr().err
    assert main(["serve", "--help"]) == 0
    assert "scaffold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "factor", "scaled"),
    [
        ("5m", 1, "5m"),
        ("5m", 1 / 60, "5000ms"),
        ("1d", 1 / 86400, "1000ms"),
        ("30s", 0.001, "30ms"),
    ],
)
def test_durations_are_scaled(text: str, factor: float, scaled: str) -> None:
    assert scale_duration(text, factor) == scaled
