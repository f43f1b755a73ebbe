"""`modelops serve`: `bentoml serve` with a verified release."""

from __future__ import annotations

from pathlib import Path

import click

from modelops.cli.output import dry_run_option, emit, json_option, say


@click.command()
@click.argument("release", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True, type=int, help="Port to listen on.")
@dry_run_option
@json_option
def serve(release: Path, host: str, port: int, dry_run: bool, as_json: bool) -> None:
    """Verify RELEASE and serve it with BentoML, as OpenAI's Images API.

    \b
    Example:
      modelops serve release --port 3000
    \b
    Then, with the openai package in Python:
      client = OpenAI(base_url="http://127.0.0.1:3000/v1", api_key="none")
      client.images.generate(prompt="red heart")
    """
    import shlex

    from modelops.release import verify_release
    from modelops.serving.check import curl_line
    from modelops.serving.launch import check_address, run_server, serve_command

    record = verify_release(release)
    address = check_address(host, port)
    url = f"http://{address if address != '0.0.0.0' else '127.0.0.1'}:{port}"
    command = serve_command(address, port)
    if dry_run:
        emit(
            {"status": "dry-run", "command": command, "release": str(release), "url": url},
            as_json=as_json,
            text=f"MODELOPS_RELEASE={shlex.quote(str(release))} {shlex.join(command)}",
        )
        return
    say(f"{record.name} {record.version} at {url} (Ctrl-C stops it); when it is ready, try")
    say(f"  {curl_line(url, 'red heart')}")
    code = run_server(release, host=address, port=port)
    emit({"status": "stopped", "code": code}, as_json=as_json)
    if code:
        raise click.exceptions.Exit(code)
