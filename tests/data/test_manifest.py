"""Manifests: what is kept, what is refused, what is quarantined."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from modelops.base.errors import ManifestError, UsageError
from modelops.data.manifest import COLUMNS, MAX_CAPTION, Sample, read_manifest, write_manifest

Add = Callable[..., Sample]


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def cells(sample: Sample, **changes: str) -> dict[str, str]:
    row = {name: str(getattr(sample, name)) for name in COLUMNS}
    return {**row, "tags": ";".join(sample.tags), **changes}


@pytest.mark.parametrize("name", ["manifest.parquet", "manifest.csv"])
def test_what_is_written_is_read(tmp_path: Path, add_picture: Add, name: str) -> None:
    rows = [
        add_picture("a", tags=("sky", "blue"), extra={"group": "g", "note": 'says "hi", twice'}),
        add_picture("b", nsfw_flag=1, caption="Grüße, 世界\nzweite Zeile", source=""),
    ]
    path = write_manifest(tmp_path / name, rows)
    manifest = read_manifest(path)
    assert manifest.rows == rows
    assert manifest.quarantined == {}
    assert manifest.rows[0].group == "g" and manifest.rows[1].group == "b"
    first = path.read_bytes()
    write_manifest(path, rows)
    assert path.read_bytes() == first


def test_the_guides_example_row(tmp_path: Path, add_picture: Add) -> None:
    digest = add_picture("00001", filepath="images/00001.png").sha256
    path = tmp_path / "manifest.csv"
    path.write_text(
        "id,filepath,caption,license,source,sha256,nsfw_flag,tags,date_collected\n"
        f'00001,images/00001.png,"Aerial farmland","cc0","partnerA","{digest}",0,'
        '"satellite;farmland","2025-09-01"\n'
    )
    (row,) = read_manifest(path).rows
    assert (row.id, row.caption, row.license) == ("00001", "Aerial farmland", "cc0")
    assert row.tags == ("satellite", "farmland") and row.date_collected == "2025-09-01"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"license": ""}, "no license"),
        ({"caption": "  "}, "no caption"),
        ({"id": ""}, "no id"),
        ({"sha256": "abcd"}, "64 hexadecimal"),
        ({"filepath": "../secret.png"}, "outside"),
        ({"filepath": "/etc/passwd"}, "outside"),
        ({"filepath": "images\\b.png"}, "not a usable"),
        ({"date_collected": "yesterday"}, "not a date"),
        ({"nsfw_flag": "maybe"}, "must be 0 or 1"),
        ({"caption": "nul\0byte"}, "null byte"),
        ({"id": "a"}, "already that of line 2"),
        ({"id": "two words"}, "no space"),
        ({"id": "a.png"}, "no space, slash or dot"),
        ({"id": "a\x1b[31m"}, "no control character"),
        ({"id": "猫" * 81}, "at most 240 bytes"),
    ],
)
def test_a_faulty_row_is_named(
    tmp_path: Path, add_picture: Add, changes: dict[str, str], said: str
) -> None:
    rows = [cells(add_picture("a")), cells(add_picture("b"), **changes)]
    with pytest.raises(ManifestError, match=said) as caught:
        read_manifest(write_csv(tmp_path / "manifest.csv", rows))
    assert "manifest.csv: line 3" in caught.value.message
    assert "\n" not in str(caught.value)


def test_a_symbolic_link_is_refused(tmp_path: Path, add_picture: Add) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    outside.write_bytes(b"private")
    row = add_picture("a")
    (tmp_path / row.filepath).unlink()
    (tmp_path / row.filepath).symlink_to(outside)
    with pytest.raises(ManifestError, match="symbolic link"):
        read_manifest(write_manifest(tmp_path / "manifest.parquet", [row]))


def test_a_file_fault_is_quarantined_not_raised(tmp_path: Path, add_picture: Add) -> None:
    rows = [
        add_picture("good"),
        add_picture("gone"),
        add_picture("other", sha256="0" * 64),
        add_picture("empty", data=b""),
        add_picture("wordy", caption="x" * (MAX_CAPTION + 1)),
    ]
    (tmp_path / "images/gone.png").unlink()
    manifest = read_manifest(write_manifest(tmp_path / "manifest.parquet", rows))
    assert [row.id for row in manifest.rows] == ["good"]
    assert "No such file" in manifest.quarantined["gone"]
    assert "sha256" in manifest.quarantined["other"]
    assert "empty" in manifest.quarantined["empty"]
    assert "characters" in manifest.quarantined["wordy"]


def test_a_missing_column_is_named(tmp_path: Path, add_picture: Add) -> None:
    row = cells(add_picture("a"))
    del row["license"]
    with pytest.raises(ManifestError, match="missing column license"):
        read_manifest(write_csv(tmp_path / "manifest.csv", [row]))


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("m.csv", b"", "missing column"),
        ("m.csv", ",".join(COLUMNS).encode() + b"\n", "no rows"),
        ("m.csv", ",".join(COLUMNS).encode() + b"\n1,2\n", "line 2: 2 cells"),
        ("m.csv", ",".join(COLUMNS).encode() + b"\n\xff\xfe\n", "line 2: not UTF-8"),
        ("m.csv", ",".join(COLUMNS).encode() + b'\n"' + b"x" * 200_000 + b'"\n', "line 2"),
        ("m.parquet", b"PAR1 no", "not a readable parquet"),
        ("m.parquet", b"", "not a readable parquet"),
    ],
)
def test_an_unusable_table_says_why(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=said):
        read_manifest(path)


def test_a_missing_manifest_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such manifest"):
        read_manifest(tmp_path / "manifest.parquet")
    with pytest.raises(ManifestError, match="no rows"):
        write_manifest(tmp_path / "manifest.parquet", [])
    assert list(tmp_path.iterdir()) == []
