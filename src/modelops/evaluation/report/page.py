"""One evaluation record as a page for a person: a single HTML file that asks nothing of a network.

The page is a pure function of the record, the images beside it and, with `against`, a second
record: written twice, it has the same bytes. It names the record's digest, so that `check_report`
can tell a page that no longer belongs to its record.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from markupsafe import Markup, escape

from modelops.base.errors import UsageError
from modelops.base.files import read_json, read_text, sha256_bytes, sha256_json, write_text
from modelops.evaluation.report.content import Content, page_content
from modelops.evaluation.report.text import number, plural, seconds, visible
from modelops.records.evaluation import EvaluationRecord
from modelops.records.read import read_record

_SEAL = "<!-- modelops report, sha256 of all above: {} -->\n"
_SEALED = re.compile(r"<!-- modelops report, sha256 of all above: ([0-9a-f]{64}) -->\n\Z")
_META = re.compile(r'<meta name="modelops-(record|against)" content="([0-9a-f]{64}) ([^"]*)">')


def write_report(
    record_path: str | Path,
    *,
    out: str | Path | None = None,
    against: str | Path | None = None,
) -> Path:
    """Write the report of an evaluation record and return its path.

    Args:
        out: the page; beside the record, with the suffix .html, if None.
        against: an earlier record; the page then says what is better or worse than there.

    Raises:
        UsageError: a file is not an evaluation record, or the page would replace something else.
        ModelopsError: the page cannot be written.
    """
    source = Path(record_path)
    target = Path(out) if out is not None else source.with_suffix(".html")
    record = read_record(source, EvaluationRecord)
    if target.resolve() in {Path(p).resolve() for p in (source, against) if p is not None}:
        raise UsageError(f"{target}: is the record itself", hint="give another --out")
    if (
        target.is_file()
        and _META.search(target.read_bytes()[:4096].decode("utf-8", "replace")) is None
    ):
        raise UsageError(f"{target}: is there and is no report", hint="give another --out")
    content = page_content(source, record, against=Path(against) if against else None)
    write_text(target, _render(content, source, target, Path(against) if against else None))
    return target


def check_report(
    report_path: str | Path, record_path: str | Path, *, against: str | Path | None = None
) -> list[str]:
    """Return why a report no longer belongs to its record, a line each; empty if it does.

    Args:
        against: the second record; the one that the report names, if None.

    Raises:
        UsageError: the record is none, or the page is not a report.
    """
    page = Path(report_path)
    text = read_text(page)
    named = {name: (digest, place) for name, digest, place in _META.findall(text[:4096])}
    seal = _SEALED.search(text)
    if "record" not in named:
        raise UsageError(f"{page}: not a report that modelops wrote")
    read_record(record_path, EvaluationRecord)
    reasons = []
    if named["record"][0] != record_digest(record_path):
        reasons.append(f"{record_path} is another record than the one it shows")
    if seal is None or seal.group(1) != sha256_bytes(text[: seal.start()].encode()):
        reasons.append("the page was changed after it was written")
    if "against" in named:
        digest, place = named["against"]
        other = Path(against) if against else page.parent / unquote(html.unescape(place))
        if not other.is_file():
            reasons.append(f"{other}, which it compares with, is not there")
        elif record_digest(other) != digest:
            reasons.append(f"{other} is another record than the one it compares with")
    elif against is not None:
        reasons.append(f"it does not compare with {against}")
    return reasons


def record_digest(path: str | Path) -> str:
    """sha256 of the canonical JSON of a record's file; `Record.digest` of the version that wrote
    it, and the same for every later one."""
    return sha256_json(read_json(path))


def _render(content: Content, source: Path, target: Path, against: Path | None) -> str:
    import jinja2

    folder = files("modelops.evaluation.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_finalize, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"number": number, "plural": plural, "seconds": seconds, "lines": _lines}
    style = (folder / "report.css").read_text("utf-8")
    script = (folder / "report.js").read_text("utf-8")

    def address(path: str | Path) -> str:
        """A file as seen from the page."""
        return "./" + quote(Path(os.path.relpath(path, target.parent)).as_posix())

    text = environment.from_string((folder / "report.html.j2").read_text("utf-8")).render(
        page=content, address=address, record=content.record, source=source, against=against,
        digest=record_digest(source), against_digest=record_digest(against) if against else None,
        style=Markup(style), script=Markup(script),
        style_hash=_csp_hash(style), script_hash=_csp_hash(script),
    )  # fmt: skip
    return text + _SEAL.format(sha256_bytes(text.encode()))


def _finalize(value: Any) -> Any:
    """Check the value of an expression of the template, before it is escaped.

    Raises:
        ValueError: None or a bare float, which the template should have put into words.
    """
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    raise ValueError(f"a page cannot print {value!r}: format it or say why it is missing")


def _lines(text: str) -> Markup:
    """Text that keeps its ends of lines."""
    return escape(visible(text, lines=True))


def _csp_hash(text: str) -> Markup:
    digest = hashlib.sha256(text.encode()).digest()
    return Markup(f"sha256-{base64.b64encode(digest).decode('ascii')}")
