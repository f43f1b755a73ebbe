"""A failing verdict is not signed, however it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelops.base.errors import GateFailedError, GateUndecidedError, ModelopsError, UsageError
from modelops.gates.signoff import sign_off
from modelops.gates.written import verdicts_in


def verdict(answer: str, line: str | None = None) -> dict[str, Any]:
    criterion = {
        "name": "c", "evidence": "e", "metric": "m", "bound": "= b", "value": "b",
        "answer": line or answer, "reason": "r",
    }  # fmt: skip
    return {
        "kind": "verdict", "schema_version": 1, "status": "ok",
        "started_at": "2026-01-02T03:04:05Z", "answer": answer, "policy_sha256": "0" * 64,
        "criteria": [criterion],
    }  # fmt: skip


def quoted(text: str, sign: str) -> str:
    return "".join(f"{sign}{line}\n" for line in text.splitlines())


def written(data: dict[str, Any]) -> dict[str, str]:
    plain = json.dumps(data, indent=1)
    block = yaml.safe_dump(data, sort_keys=False)
    escaped = plain.replace('"verdict"', r'"v\u0065rdict"')
    return {
        "value escaped": escaped,
        "key escaped": plain.replace('"kind"', r'"\u006bind"'),
        "mark": "\ufeff" + escaped,
        "text first": "the verdict: " + escaped,
        "list": f"[{escaped}]",
        "lines": '{"a": 1}\n' + json.dumps(data) + "\n",
        "tabs": json.dumps(data, indent="\t").replace('"verdict"', r'"v\u0065rdict"'),
        "yaml": block,
        "yaml escaped": block.replace("kind: verdict", r'"kind": "v\x65rdict"'),
        "yaml tagged": block.replace("kind: verdict", "kind: !gate verdict"),
        "yaml folded": block.replace("kind: verdict", "kind: >-\n  verdict"),
        "yaml flow": yaml.safe_dump(data, default_flow_style=True),
        "yaml second": f"a: 1\n---\n{block}",
        "yaml inside": "gate:\n" + quoted(block, "  "),
        "yaml alias": f"base: &b\n{quoted(block, '  ')}copy: *b\n",
        "single quotes": plain.replace('"', "'"),
        "front matter": f"---\n{block}---\n# Card\n\ttext: [\n",
        "fence": f"# Card\n\ntext: [\n\n```json\n{escaped}\n```\nmore\n",
        "yaml fence": f"# Card\n\ntext: [\n\n~~~~yaml\n{block}~~~~\nmore\n",
        "fence of a list": f"- one:\n\n  ```\n{quoted(block, '  ')}  ```\n",
        "open fence": f"text: [\n```yaml\n{block}",
        "indented": f"# Card\n\ntext: [\n\n{quoted(block, '    ')}\nmore\n",
        "quote": f"# Card\n\ntext: [\n\n> ```yaml\n{quoted(block, '> ')}> ```\n",
        "html": f"<p>x</p><pre>{escaped}</pre>",
    }


FORMS = sorted(written(verdict("fail")))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["verdict.json", "card.md"])
def test_a_failing_verdict_is_not_signed(tmp_path: Path, form: str, name: str) -> None:
    cases = {("fail", "fail"): GateFailedError, ("undecided", "undecided"): GateUndecidedError}
    cases["pass", "fail"] = GateFailedError
    path = tmp_path / name
    for (answer, line), error in cases.items():
        path.write_text(written(verdict(answer, line))[form], "utf-8")
        with pytest.raises((error, UsageError)):  # a UsageError: a record that cannot be read
            sign_off(path, name="Ada", role="approver")
    assert list(tmp_path.iterdir()) == [path]
    assert verdicts_in(written(verdict("pass"))[form])[0]["answer"] == "pass"


@pytest.mark.parametrize("text", [
    "# Charter\n\nkind: verdict\n\nno more\n", "{" * 200, "a: &a [*a]\n", "```\nkind: card\n```\n",
    "---\ntitle: x\n---\n{{ x }} {'kind': 1}\n", "\udcff".encode("utf-8", "replace").decode(),
    written(verdict("pass"))["fence"], written(verdict("pass"))["yaml"], "",
])  # fmt: skip
def test_other_texts_and_passing_verdicts_are_signed(tmp_path: Path, text: str) -> None:
    path = tmp_path / "charter.md"
    path.write_text(text, "utf-8")
    assert sign_off(path, name="Ada", role="owner").is_file()


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 5000, '{"a": ' * 100_000])
def test_a_text_that_cannot_be_read_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "charter.md"
    path.write_text(text, "utf-8")
    with pytest.raises(ModelopsError, match="nested too deeply"):
        sign_off(path, name="Ada", role="owner")
