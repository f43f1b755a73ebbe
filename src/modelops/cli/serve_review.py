"""`modelops serve review`: people decide what the filters blocked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from modelops.cli.options import DIRECTORY, EXISTING_DIRECTORY, EXISTING_FILE
from modelops.cli.output import emit, is_json, json_option, say, show, table

if TYPE_CHECKING:
    from modelops.serving.moderation.review import Evidence, Listed


@click.command()
@click.argument("directory", metavar="DIR", type=EXISTING_DIRECTORY)
@click.argument("entry", metavar="[ID]", required=False)
@click.option(
    "--uphold", multiple=True, metavar="ID", help="Record that ID was rightly blocked. Repeatable."
)
@click.option(
    "--overturn", multiple=True, metavar="ID", help="Record that ID was a false alarm. Repeatable."
)
@click.option("--reviewer", metavar="NAME", help="Name of the reviewer.  [default: your user name]")
@click.option(
    "--reason", metavar="TEXT", help="Reason of the decision; needed with --uphold and --overturn."
)
@click.option(
    "--key", metavar="FILE", type=EXISTING_FILE,
    help="Private key (PEM) of the reviewer, for encrypted entries.",
)  # fmt: skip
@click.option(
    "--pictures", metavar="DIR", type=DIRECTORY,
    help="Folder to write the images of ID to.",
)  # fmt: skip
@click.option("--page", is_flag=True, help="Write DIR/review.html, with blurred images.")
@click.option(
    "--purge-older", type=click.FloatRange(min=0), metavar="DAYS",
    help="Delete entries that are at least this many days old; decisions stay. Where the machine's "
    "clock jumped ahead, days count by the folder's, which follows by a day. 0 deletes all.",
)  # fmt: skip
@json_option
def review(
    directory: Path,
    entry: str | None,
    uphold: tuple[str, ...],
    overturn: tuple[str, ...],
    reviewer: str | None,
    reason: str | None,
    key: Path | None,
    pictures: Path | None,
    page: bool,
    purge_older: float | None,
) -> None:
    """List the blocked requests in the quarantine DIR, show ID, or decide.

    A node that is served with --quarantine DIR writes there. Decisions are appended to
    DIR/decisions.jsonl, with reviewer and reason; the last one on an entry counts. The summary
    gives the share of blocks that were false alarms, with a 95 % interval. It cannot count what a
    filter missed.

    \b
    Examples:
      modelops serve review quarantine
      modelops serve review quarantine --page
      modelops serve review quarantine 3fa9 --pictures /tmp/look
      modelops serve review quarantine --overturn 3fa9 --reviewer alice --reason "a sunflower"
    """
    from modelops.serving.moderation.encryption import read_private_key
    from modelops.serving.moderation.review import (
        find_entry,
        list_entries,
        read_decisions,
        weigh,
        write_page,
    )

    deciding = uphold or overturn
    chosen = [
        name
        for name, given in (
            ("ID", entry), ("--uphold or --overturn", deciding), ("--page", page),
            ("--purge-older", purge_older is not None),
        )
        if given
    ]  # fmt: skip
    if len(chosen) > 1:
        raise click.UsageError(f"{chosen[0]} and {chosen[1]} do not go together")
    if pictures is not None and not entry:
        raise click.UsageError("--pictures needs the ID of an entry")
    if (reason or reviewer) and not deciding:
        raise click.UsageError("--reviewer and --reason go with --uphold or --overturn")
    private = read_private_key(key) if key is not None else None
    if purge_older is not None:
        _purge(directory, purge_older)
    elif deciding:
        _decide(directory, uphold, overturn, reviewer, reason, private)
    elif entry:
        _show(find_entry(directory, entry, private), pictures)
    else:
        listed = list_entries(directory, private)
        evidence = [_with_interval(one) for one in weigh(read_decisions(directory))]
        if page:
            path = write_page(directory, listed, evidence)
            emit({"status": "ok", "page": str(path), "entries": len(listed)},
                 text=str(path))  # fmt: skip
            say("it holds the images; it is deleted when the first of them is")
            return
        _list(directory, listed, evidence)


def _purge(directory: Path, days: float) -> None:
    from modelops.serving.moderation.store import tidy_folder

    gone, _ = tidy_folder(directory, max_age_s=days * 86400)
    text = f"{directory}: {gone} {'entry' if gone == 1 else 'entries'} deleted"
    emit({"status": "ok", "deleted": gone}, text=text)


def _decide(
    directory: Path,
    uphold: tuple[str, ...],
    overturn: tuple[str, ...],
    reviewer: str | None,
    reason: str | None,
    private: Any,
) -> None:
    import getpass

    from modelops.serving.moderation.review import decide

    if not reason or not reason.strip():
        raise click.UsageError("a decision needs a reason: --reason TEXT")
    if both := set(uphold) & set(overturn):
        raise click.UsageError(f"{min(both)} is both upheld and overturned")
    answers: dict[str, Literal["upheld", "overturned"]] = {
        **dict.fromkeys(uphold, "upheld"), **dict.fromkeys(overturn, "overturned")
    }  # fmt: skip
    made = decide(
        directory, answers, reviewer=reviewer or getpass.getuser(), reason=reason, key=private
    )
    emit(
        {"status": "ok", "decisions": [one.model_dump(exclude_none=True) for one in made]},
        text="\n".join(f"{one.entry[:8]} {one.decision} by {one.reviewer}" for one in made),
    )


def _show(listed: Listed, pictures: Path | None) -> None:
    import base64

    from modelops.base.files import write_bytes

    entry = listed.entry
    assert entry is not None
    written = []
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True, mode=0o700)
        for picture in entry.pictures:
            if picture.png is not None:
                path = pictures / f"{entry.id[:8]}-{picture.index}.png"
                write_bytes(path, base64.b64decode(picture.png), private=True)
                written.append(str(path))
    about = entry.model_dump(exclude_none=True)
    for picture_of in about["pictures"]:
        picture_of.pop("png", None)  # --pictures writes it
    decision = listed.decision and listed.decision.model_dump(exclude_none=True)
    emit({"status": "ok", "entry": about, "decision": decision, "written": written})  # fmt: skip
    if is_json():
        return
    request, made_by = entry.request, entry.filter
    prompt = request.prompt if request.prompt is not None else "not kept"
    lines = [
        f"{entry.id}",
        f"  blocked   {entry.created}, {entry.stage} filter {made_by.name}"
        + (f", threshold {made_by.threshold:g}" if made_by.threshold is not None else ""),
        f"  prompt    {prompt!r}" if request.prompt is not None else f"  prompt    {prompt}",
        f"  request   {entry.request_id}",
        f"  release   {entry.release.name} {entry.release.version}, {entry.release.sha256[:12]}",
    ]
    if entry.reasons:
        lines.append(f"  reasons   {_plain(', '.join(entry.reasons))}")
    if entry.partial is not None:
        lines.append(f"  partial   image {entry.partial} of a request that was not finished")
    for picture in entry.pictures:
        lines.append(
            f"  image {picture.index} score {picture.score:.4f} "
            f"{'blocked' if picture.blocked else 'not blocked, not kept'}: seed {picture.seed}, "
            f"{request.steps} steps, guidance {request.guidance:g}"
        )
    said = listed.decision
    lines.append(
        f"  {said.decision} by {said.reviewer}, {said.decided}: {said.reason}"
        if said else "  not decided yet"
    )  # fmt: skip
    show("\n".join([*lines, *(f"written: {path}" for path in written)]))


def _with_interval(evidence: Evidence) -> dict[str, Any]:
    """Share of decided blocks that were false alarms, exact interval, and a sentence."""
    from modelops.metrics.intervals import clopper_pearson

    share = clopper_pearson(evidence.overturned, evidence.decided)
    at = "" if evidence.threshold is None else f" at {evidence.threshold:g}"
    return {
        "stage": evidence.stage,
        "filter": evidence.filter,
        "filter_sha256": evidence.filter_sha256,
        "threshold": evidence.threshold,
        "decided": evidence.decided,
        "false_alarms": evidence.overturned,
        "share": share.value,
        "low": share.low,
        "high": share.high,
        "method": share.method,
        "at_thresholds": evidence.at_thresholds(),
        "text": f"{evidence.stage} filter {evidence.filter}{at}: {evidence.overturned} of "
        f"{evidence.decided} decided blocks were false alarms: {share.value:.0%} "
        f"[{share.low:.0%}, {share.high:.0%}]",
    }


def _list(directory: Path, listed: list[Listed], evidence: list[dict[str, Any]]) -> None:
    entries = [
        {
            "id": one.file.id,
            "sealed": one.file.sealed,
            "bytes": one.file.size,
            "problem": one.problem,
            "decision": one.decision.decision if one.decision else None,
        }
        | (
            {
                "created": one.entry.created,
                "stage": one.entry.stage,
                "filter": one.entry.filter.name,
                "score": one.entry.score,
                "request_id": one.entry.request_id,
            }
            if one.entry
            else {}
        )
        for one in listed
    ]
    emit({"status": "ok", "entries": entries, "summary": evidence})
    if is_json():
        return
    if not listed:
        show(f"{directory}: nothing in the quarantine")
    else:
        table(
            ["id", "blocked", "by", "score", "prompt", "decision"],
            [_row(one) for one in listed],
        )
    for one in evidence:
        show(one["text"])
        for level in one["at_thresholds"]:
            show(
                f"  at {level['threshold']:g}: {level['upheld_still_blocked']} right and "
                f"{level['overturned_still_blocked']} wrong blocks would stay"
            )


def _row(one: Listed) -> list[str]:
    said = one.decision.decision if one.decision else ""
    entry = one.entry
    if entry is None:
        return [one.file.id[:8], "", one.problem or "", "", "", said]
    score = "" if entry.score is None else f"{entry.score:.3f}"
    prompt = entry.request.prompt
    return [
        entry.id[:8], entry.created[:19].replace("T", " "), f"{entry.stage}: {entry.filter.name}",
        score, "not kept" if prompt is None else _plain(prompt)[:40], said,
    ]  # fmt: skip


def _plain(text: str) -> str:
    """Remove characters that a terminal would interpret."""
    return "".join(c if c.isprintable() else "?" for c in text)
