"""`modelops abtest`: a blind, randomised test of two sources by people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from modelops.cli.options import DIRECTORY, FILE, PATH, dry_run_option, seed_option
from modelops.cli.output import emit, is_json, json_option, progress, say, show, table

if TYPE_CHECKING:
    from modelops.base.errors import ModelopsError
    from modelops.records.base import Measurement
    from modelops.records.comparison import AbTestRecord

_STUDY = click.argument("directory", metavar="DIR", type=DIRECTORY)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def abtest() -> None:
    """Ask people which of two sources is better, without telling them which is which.

    \b
    Example:
      modelops abtest build evaluations/early.json evaluations/final.json --out study
      modelops abtest serve study
      modelops abtest score study
    """


@abtest.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option("--out", type=DIRECTORY, required=True,
              metavar="DIR", help="Folder of the study; empty or not there yet.")  # fmt: skip
@click.option("-n", type=click.IntRange(1), default=100, show_default=True,
              help="Number of pairs to show; the seed chooses them.")  # fmt: skip
@click.option("--all", "take_all", is_flag=True, help="Show every pair; -n is then ignored.")
@click.option("--repeat", type=click.FloatRange(0, 1), default=0.2, show_default=True,
              metavar="SHARE",
              help="Share of the pairs that are shown again with sides swapped.")  # fmt: skip
@click.option("--attention", type=click.IntRange(0), default=0, show_default=True, metavar="N",
              help="Number of attention checks, each with a scrambled image.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**53 - 1),
              help="Seed for choosing pairs and sides. Whoever knows it is no longer blind.  "
              "[default: random]")  # fmt: skip
@click.option("--title", default="Which is better?", show_default=True, help="Title of the page.")
@click.option("--question", default="Which image shows the prompt better?", show_default=True,
              help="Question that raters are asked.")  # fmt: skip
@click.option("--allow", type=click.Choice(["steps", "guidance"]), multiple=True,
              help="Setting that may differ between A and B. Repeatable.")  # fmt: skip
@dry_run_option
@json_option
def build(
    a: Path, b: Path, out: Path, n: int, take_all: bool, dry_run: bool, **chosen: Any
) -> None:
    """Make a study of A and B: evaluation records, or folders written by `modelops sample`.

    Both must have the same prompts, seeds and settings; what differs is listed. Images get names
    that tell nothing. DIR/key.json says which is whose: the server does not read it, and it may be
    kept elsewhere until the votes are in.

    \b
    Examples:
      modelops abtest build evaluations/early.json evaluations/final.json --out study
      modelops abtest build samples-24-steps samples-12-steps --allow steps --out study
    """
    from modelops.abtest.build import StudySettings, build_study

    settings = StudySettings(n=None if take_all else n, **chosen)
    with progress("Building") as report:
        study = build_study(a, b, out, settings, dry_run=dry_run, on_progress=report)
    left_out = "".join(f"; {count} {reason}" for reason, count in study.left_out.items())
    text = f"{out}: {len(study.trials)} trials of {study.n_pairs} pairs{left_out}"
    result = {
        "status": "ok", "study": str(out), "pairs": study.n_pairs, "trials": len(study.trials),
        "left_out": study.left_out, "differences": study.differences, "dry_run": dry_run,
    }  # fmt: skip
    emit(result, text=f"would write {text}" if dry_run else text)
    if not is_json() and not dry_run:
        say(f"next: modelops abtest serve {out}")


@abtest.command()
@_STUDY
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True,
              help="Port to listen on; 0 takes any free port.")  # fmt: skip
@json_option
def serve(directory: Path, host: str, port: int) -> None:
    """Serve the study in DIR to raters, until Ctrl-C.

    Each vote is on disk, in DIR/votes.jsonl, before its rater sees the next pair. A rater who comes
    back under the same name continues where they were. There are no passwords: with --host 0.0.0.0,
    anyone who reaches the address can vote under any name.

    \b
    Example:
      modelops abtest serve study --port 8765
    """
    import contextlib
    import signal
    import threading

    from modelops.abtest.server import AbTestServer, Session

    session = Session(directory, on_finished=lambda rater: say(f"{rater} has finished"))
    with contextlib.closing(session):
        server = AbTestServer(session, host, port)
        if session.log.torn_bytes:
            say(f"votes.jsonl: a last line cut short ({session.log.torn_bytes} bytes) was dropped")
        for rater, mine in session.log.standing.items():
            say(f"{rater}: {len(mine)} of {len(session.study.trials)}")
        say(f"{server.url} (Ctrl-C stops it); with a name: {server.url}?rater=NAME")

        def stop(*_: object) -> None:
            # From another thread: shutdown waits for the loop that this signal interrupted.
            threading.Thread(target=server.shutdown).start()

        previous = {
            number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            server.serve_forever(poll_interval=0.2)
        finally:
            server.server_close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        done = {rater: len(mine) for rater, mine in session.log.standing.items()}
    emit({"status": "stopped", "url": server.url, "votes": done})


@abtest.command()
@_STUDY
@click.option("--key", "key_path", type=PATH, metavar="FILE",
              help="Key of the study: which image is whose.  [default: DIR/key.json]")  # fmt: skip
@click.option("--out", type=FILE, metavar="FILE",
              help="Record to write.  [default: DIR/abtest.json]")  # fmt: skip
@click.option("--min-attention", type=click.FloatRange(0, 1), default=0.0, show_default=True,
              metavar="SHARE",
              help="Leave out raters who pass a smaller share of the checks.")  # fmt: skip
@click.option("--require", type=click.Choice(["better", "not-worse"]),
              help="Exit with 3 if B is not, or with 4 if the votes do not decide it.")  # fmt: skip
@click.option("--margin", type=click.FloatRange(0, 0.5, max_open=True), default=0.05,
              show_default=True, help="Margin of the win rate for `not-worse`.")  # fmt: skip
@seed_option("Seed of the bootstrap resampling.")
@click.option("--resamples", type=click.IntRange(20), default=2000, show_default=True,
              help="Number of bootstrap resamples.")  # fmt: skip
@json_option
def score(
    directory: Path, key_path: Path | None, out: Path | None, min_attention: float,
    require: Literal["better", "not-worse"] | None, margin: float, seed: int, resamples: int,
) -> int:  # fmt: skip
    """Print how often B beats A in the study in DIR, and how reliable the raters are.

    A tie counts half. Intervals are clustered by prompt. With --require better the whole interval
    of the win rate must be above 0.5, with not-worse above 0.5 less the margin: exits 0 for yes, 3
    for no, 4 for undecided. Without it, exits 0 for any result, and 1 if there are no votes.

    \b
    Examples:
      modelops abtest score study
      modelops abtest score study --require not-worse --margin 0.05
    """
    from modelops.abtest.score import decide, score_study
    from modelops.base.errors import EvaluationError, GateFailedError, GateUndecidedError

    path = out or directory / "abtest.json"
    record = score_study(
        directory, key_path=key_path, min_attention=min_attention, seed=seed, resamples=resamples
    )
    record.write(path)
    refusal: ModelopsError | None = None
    answer = None
    if require:
        answer, reason = decide(record, require, margin=margin)
        error = {"fail": GateFailedError, "undecided": GateUndecidedError}.get(answer)
        if error:
            refusal = error(f"{require}: {reason}", hint=f"read {path}")
    elif record.status != "ok":
        refusal = EvaluationError(
            f"{directory}: {record.error}", hint=f"modelops abtest serve {directory}"
        )
    if is_json():
        shown = record.model_dump(mode="json", exclude={"environment"})
        emit({**shown, "path": str(path), "answer": answer})
        if refusal:
            say(f"error: {refusal.message}")  # stdout already carries its one object
        return refusal.exit_code if refusal else 0
    if record.n_votes:
        _print(record)
    if refusal:
        raise refusal
    say(str(path))
    return 0


def _print(record: AbTestRecord) -> None:
    for name, source in record.sources.items():
        show(f"{name}: {source.uri}")
    table(
        ["B against A", "value", "95 % interval", "n", "method"],
        [[name, *_cells(measured)] for name, measured in record.metrics.items()],
    )
    test = record.sign_test
    if test:
        show(
            f"prompts: {test.prompts_b} for B, {test.prompts_a} for A, {test.prompts_even} even; "
            f"exact sign test p = {test.p_value:.3g}"
        )
    table(
        ["rater", "votes", "A", "B", "equal", "left", "same twice", "attention", "s a vote", ""],
        [
            [name, str(r.votes), str(r.for_a), str(r.for_b), str(r.equal), str(r.left),
             _of(r.same_twice, r.shown_twice), _of(r.attention_passed, r.attention_shown),
             "" if r.median_s is None else f"{r.median_s:.1f}", "left out" if r.left_out else ""]
            for name, r in record.raters.items()
        ],
    )  # fmt: skip
    for warning in record.warnings:
        say(f"note: {warning}")


def _cells(measured: Measurement) -> list[str]:
    if measured.value is None:
        return ["not measured", "", "", measured.not_measured or ""]
    interval = f"[{measured.low:.3f}, {measured.high:.3f}]"
    return [f"{measured.value:.3f}", interval, str(measured.n), measured.method]


def _of(part: int, whole: int) -> str:
    return f"{part} of {whole}" if whole else ""
