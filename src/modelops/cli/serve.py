"""`modelops serve`: `bentoml serve` with a verified release, and what puts it into service."""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.options import (
    DIRECTORY,
    EXISTING_DIRECTORY,
    EXISTING_FILE,
    FILE,
    PATH,
    dry_run_option,
    trust_code_option,
)
from modelops.cli.output import emit, json_option, say
from modelops.cli.serve_key import key
from modelops.cli.serve_review import review
from modelops.cli.serve_swap import swap


class _ReleaseOrCommand(click.Group):
    """`modelops serve RELEASE` is `modelops serve run RELEASE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if first not in self.commands and first not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ReleaseOrCommand)
def serve() -> None:
    """Serve a release, keep its API keys, or write what puts it into service.

    `modelops serve RELEASE` is short for `modelops serve run RELEASE`.

    \b
    Examples:
      modelops serve release --port 3000
      modelops serve preflight release
      modelops serve key create alice
      modelops serve scaffold deploy
    """


serve.add_command(key)
serve.add_command(swap)
serve.add_command(review)


@serve.command()
@click.argument("release", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True, type=int, help="Port to listen on.")
@click.option(
    "--workers", metavar="N", type=click.IntRange(1, 64),
    help="Number of worker processes, each with its own engine and device.  [default: "
    "MODELOPS_WORKERS, else 1]",
)  # fmt: skip
@click.option(
    "--keys", metavar="FILE", type=EXISTING_FILE,
    help="File of API keys, made by `modelops serve key create`. Changes apply without a restart.",
)  # fmt: skip
@click.option(
    "--insecure",
    is_flag=True,
    help="Serve without keys on an address that others can reach: everybody is let in.",
)
@click.option(
    "--receipts", metavar="DIR", type=DIRECTORY,
    help="Folder for the signed receipt of each image, 256 MB at most.",
)  # fmt: skip
@click.option(
    "--drift-log", metavar="DIR", type=DIRECTORY,
    help="Folder for a log of features and scores of a tenth of the requests, for `modelops "
    "monitor`.",
)  # fmt: skip
@click.option(
    "--releases", metavar="DIR", type=EXISTING_DIRECTORY,
    help="Folder of releases that `modelops serve swap` may load while the server runs.",
)  # fmt: skip
@click.option(
    "--signing-key", metavar="FILE", type=EXISTING_FILE,
    help="P-256 key (PEM) that signs images and receipts.  [default: a development key]",
)  # fmt: skip
@click.option(
    "--signing-chain", metavar="FILE", type=EXISTING_FILE,
    help="Certificate of that key, then those of its issuers (PEM).",
)  # fmt: skip
@click.option(
    "--watermark-key", metavar="FILE", type=EXISTING_FILE,
    help="Key of the invisible watermark that is put into each image; `modelops watermark key` "
    "makes one.",
)  # fmt: skip
@click.option(
    "--quarantine", metavar="DIR", type=DIRECTORY,
    help="Folder for blocked images, for `modelops serve review`; 256 MB and 30 days at most.",
)  # fmt: skip
@click.option(
    "--log-prompts",
    is_flag=True,
    help="Write prompts into the log, which otherwise leaves them out.",
)
@click.option(
    "--log-file", type=FILE,
    help="File that the log is appended to.  [default: stderr]",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True,
    help="Format of the log: one JSON object a line, or text; auto is text on a terminal.",
)  # fmt: skip
@dry_run_option
@trust_code_option
@json_option
def run(
    release: Path,
    host: str,
    port: int,
    workers: int | None,
    keys: Path | None,
    insecure: bool,
    receipts: Path | None,
    drift_log: Path | None,
    releases: Path | None,
    signing_key: Path | None,
    signing_chain: Path | None,
    watermark_key: Path | None,
    quarantine: Path | None,
    log_prompts: bool,
    log_file: Path | None,
    log_format: str,
    dry_run: bool,
) -> None:
    """Verify RELEASE and serve it with BentoML, as OpenAI's Images API.

    Every image carries a signed C2PA manifest and comes with a signed receipt, which `modelops
    replay` checks. On an address that others can reach, API keys are needed.

    RELEASE may be a folder of releases: then the one that was promoted last is served, and others
    in it may be swapped in (`modelops serve swap`).

    With --workers, processes share the port, and /metrics and /readyz answer for all of them; a
    full one answers 429 even when another is idle. With MODELOPS_DEVICE=cuda each takes a GPU of
    its own, on a processor its share of the cores.

    \b
    Example:
      modelops serve run release --port 3000
    \b
    Then, with the openai package in Python:
      client = OpenAI(base_url="http://127.0.0.1:3000/v1", api_key="none")
      client.images.generate(prompt="red heart")
    """
    import os
    import shlex

    from modelops.releases.verify import verify_release
    from modelops.serving.deploy.check import curl_line
    from modelops.serving.deploy.launch import check_address, run_server, serve_command
    from modelops.serving.http.access import check_open_address
    from modelops.serving.provenance.manifests import Marker
    from modelops.serving.provenance.signing import open_signing_key
    from modelops.serving.rollout.active_release import release_to_serve
    from modelops.serving.settings import NodeSettings

    standing = release_to_serve(release)
    record = verify_release(standing)
    if standing != release and releases is None:
        releases = release  # a folder of releases
    address = check_address(host, port)
    reached_at = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    url = f"http://[{reached_at}]:{port}" if ":" in reached_at else f"http://{reached_at}:{port}"
    command = serve_command(address, port)
    folders = {
        "api_keys_file": keys, "receipts": receipts, "drift_log": drift_log, "releases": releases,
        "signing_key": signing_key, "signing_chain": signing_chain,
        "watermark_key": watermark_key, "quarantine": quarantine, "log_file": log_file,
    }  # fmt: skip
    given = {
        **{name: str(path.resolve()) for name, path in folders.items() if path is not None},
        **({"workers": workers} if workers is not None else {}),
        **({"insecure": True} if insecure else {}),
        **({"log_prompts": True} if log_prompts else {}),
        **({"log_format": log_format} if log_format != "auto" else {}),
    }
    environment = NodeSettings(**given).to_environment()
    # All of them, so that a wrong one is reported before anything starts.
    settings = NodeSettings.from_environment({**os.environ, **environment})
    check_open_address(address, settings)
    if dry_run:
        shown = {"MODELOPS_RELEASE": str(release), **environment}
        words = [f"{name}={shlex.quote(value)}" for name, value in shown.items()]
        emit(
            {"status": "dry-run", "command": command, "environment": environment,
             "release": str(release), "url": url},
            text=f"{' '.join(words)} {shlex.join(command)}",
        )  # fmt: skip
        return
    signer = open_signing_key(settings.signing_key, settings.signing_chain)
    Marker(signer, software=(record.name, record.version))  # which tries it
    if signer.development:
        say("signing with a DEVELOPMENT key: good for trying it, not for production")
    say(f"{record.name} {record.version} at {url} (Ctrl-C stops it)")
    say("when it is ready, open that address in a browser, or try")
    say(f"  {curl_line(url, 'red heart')}")
    code = run_server(release, host=address, port=port, environment=environment)
    emit({"status": "stopped", "code": code})
    if code:
        raise click.exceptions.Exit(code)


@serve.command()
@json_option
def settings() -> None:
    """List the settings of a node: variable, value, default and meaning.

    The values are those of this environment; `*` marks what it sets. An option of `modelops serve`
    sets the variable of its name. A wrong value ends with exit code 2.

    \b
    Example:
      MODELOPS_WORKERS=2 modelops serve settings
    """
    import os
    import shutil
    import textwrap

    from modelops.serving.deploy.start import check_names
    from modelops.serving.settings import NodeSettings

    check_names(os.environ)
    rows = NodeSettings.from_environment().table()
    width = max(60, min(100, shutil.get_terminal_size().columns))
    lines = []
    for row in rows:
        default = f" (default {row['default']})" if row["set"] and row["default"] else ""
        mark = "*" if row["set"] else " "
        lines.append(f"{mark} {row['variable']}={row['value']}{default}")
        lines += textwrap.wrap(
            str(row["about"]), width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    emit({"settings": rows}, text="\n".join(lines))


@serve.command()
@click.argument("model", metavar="DIR", type=PATH)
@click.option(
    "--runtime", default="auto", show_default=True, metavar="NAME",
    help="Runtime that would serve it: onnxruntime, openvino, tensorrt or auto.",
)  # fmt: skip
@click.option(
    "--out", metavar="FILE", type=FILE,
    help="Record to write, for `modelops release build --preflight` on another machine.",
)  # fmt: skip
@trust_code_option
@json_option
def preflight(model: Path, runtime: str, out: Path | None) -> None:
    """Say whether this machine gives the numbers that a release or an artifact was gated with.

    INT8 sums saturate on processors without VNNI in some runtimes; a node refuses to serve such
    numbers. Exit code 1 says that nothing of DIR can be served here.

    \b
    Examples:
      modelops serve preflight release
      modelops serve preflight artifacts/pilot/int8 --out preflight.json
    """
    from modelops.serving.deploy.preflight import run_preflight

    record = run_preflight(model, runtime=runtime)
    if out is not None:
        record.write(out)
    lines = [f"processor: {record.processor}"]
    for one in record.reproduced:
        lines.append(f"{one.runtime}: {one.answer} {one.distance}".rstrip())
    served = record.runtime or ("the fallback" if record.fallback else "nothing")
    lines.append(f"served here: {served} ({record.reason})")
    emit(record.model_dump(mode="json"), text="\n".join(lines))
    if record.status != "ok":
        raise click.exceptions.Exit(1)


@serve.command()
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--image", help="Name of the container image, with its registry if it has one.")
@click.option(
    "--gpus",
    default=0,
    show_default=True,
    help="NVIDIA GPUs of a node, with one worker each; 0 serves on CPUs.",
)
@click.option(
    "--replicas", default=2, show_default=True, help="Smallest number of nodes in Kubernetes."
)
@click.option(
    "--max-replicas", default=8, show_default=True, help="Largest number of nodes in Kubernetes."
)
@click.option(
    "--latency-budget", default=30.0, show_default=True, metavar="SECONDS",
    help="Seconds of a request (p95) above which an alert fires.",
)  # fmt: skip
@click.option(
    "--evaluate-every", default=0.0, metavar="DAYS",
    help="Age in days of the last evaluation above which an alert fires.  "
    "[default: the released policy's, or 30]",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace files whose content differs.")
@dry_run_option
@json_option
def scaffold(
    directory: Path,
    image: str | None,
    gpus: int,
    replicas: int,
    max_replicas: int,
    latency_budget: float,
    evaluate_every: float,
    force: bool,
    dry_run: bool,
) -> None:
    """Write a Dockerfile, a compose file, Kubernetes manifests, alert rules and a dashboard.

    Files that are there already are not overwritten without --force.

    \b
    Example:
      modelops serve scaffold deploy --image modelops-node:1.0
    \b
    Then:
      promtool test rules deploy/prometheus/modelops.rules.test.yaml
      kubectl apply -k deploy/kubernetes
    """
    from modelops.serving.deploy.scaffold import ScaffoldOptions, scaffold_files, write_scaffold

    options = ScaffoldOptions(
        **({"image": image} if image else {}),  # type: ignore[arg-type]
        gpus=gpus,
        replicas=replicas,
        max_replicas=max_replicas,
        latency_budget_s=latency_budget,
        evaluate_every_days=evaluate_every,
    )
    if dry_run:
        states = {str(path): state for path, state in scaffold_files(directory, options).items()}
        words = {
            "new": "would be written",
            "same": "is there already",
            "different": "would be replaced" if force else "says something else: needs --force",
        }
        lines = [f"{path}: {words[state]}" for path, state in states.items()]
        emit({"status": "dry-run", "files": states}, text="\n".join(lines))
        return
    written = [str(path) for path in write_scaffold(directory, options, force=force)]
    text = "\n".join([f"written: {path}" for path in written] or [f"{directory}: up to date"])
    emit({"status": "ok", "written": written}, text=text)
