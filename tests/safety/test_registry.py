"""Filters by name: built in, from a really installed package, and names that make no sense."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from modelops.base.errors import MissingWeightsError, UsageError
from modelops.safety.image import ImageVerdict, SafetyFilterError, checked_verdicts
from modelops.safety.probe import require_working
from modelops.safety.registry import (
    FilterName,
    check_image_filter,
    check_prompt_filter,
    image_filter_names,
    open_image_filter,
    open_prompt_filter,
    parse_filter,
    pin_image_filter,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PACKAGE = """
import numpy as np
from modelops.safety.image import ImageVerdict
from modelops.safety.prompt import PromptVerdict

class Brightness:
    def __init__(self, name, threshold):
        self.threshold = threshold
        self.info = {"filter": "brightness", "threshold": threshold, "of": name.target}
    def check(self, images):
        scores = [float(image.mean() / 255) for image in images]
        return [ImageVerdict(s, s >= self.threshold) for s in scores]

def bright(name, *, threshold):
    return Brightness(name, threshold)

def nameless(name, *, threshold):
    found = Brightness(name, threshold)
    found.info = {}
    return found

class Constant(Brightness):
    def check(self, images):
        return [ImageVerdict(self.score, False) for _ in images]

def constant(name, *, threshold):
    found = Constant(name, threshold)
    found.score = float(name.target)
    return found

class Sparse(Constant):
    score = 0.0
    def probe(self):
        self.tried = True

def sparse(name, *, threshold):
    return Sparse(name, threshold)

def raising(name, *, threshold):
    raise ValueError("no luck")

class Shouting:
    info = {"filter": "shouting"}
    def check(self, prompt):
        return PromptVerdict(prompt.isupper(), ("shouting: capitals",) * prompt.isupper())

def shouting(name):
    return Shouting()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What pip leaves of an installed package: a module and its dist-info."""
    (tmp_path / "other_filters.py").write_text(PACKAGE)
    info = tmp_path / "other_filters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-filters\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[modelops.image_filters]\n"
        "bright = other_filters:bright\nnameless = other_filters:nameless\n"
        "constant = other_filters:constant\nsparse = other_filters:sparse\n"
        "raising = other_filters:raising\nabsent = other_filters:absent\n"
        "open_nsfw = other_filters:bright\n"
        "[modelops.prompt_filters]\nshouting = other_filters:shouting\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_come_apart() -> None:
    assert parse_filter("open_nsfw") == FilterName("open_nsfw")
    assert parse_filter("transformers:a/b,unsafe=x,unsafe=y z,revision=v1") == FilterName(
        "transformers", "a/b", {"unsafe": ("x", "y z"), "revision": ("v1",)}
    )
    assert parse_filter("words:C:/lists, old").target == "C:/lists, old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "not the name"),
        (":x", "not the name"),
        ("maybe", "no image filter 'maybe'"),
        ("open_nsfw:x", "nothing after a colon"),
        ("open_nsfw,unsafe=x", "no option 'unsafe'"),
        ("transformers", "does not say what to open"),
        ("transformers:no/such/directory", "no such file"),
        ("diffusers-safety-checker:nowhere", "no such file"),
        ("blocklist:nowhere.txt", "no such file"),
        (f"transformers:a/b,revision={COMMIT},revision=main", "2 revisions"),
    ],
)
def test_names_that_make_no_sense_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_image_filter(name)


def test_built_in_filters_open_by_name(classifier: Path, tmp_path: Path) -> None:
    assert open_image_filter("open_nsfw").info["threshold"] == 0.5
    found = open_image_filter(f"transformers:{classifier},unsafe=nsfw", threshold=0.2)
    assert found.info["unsafe_labels"] == ["nsfw"] and found.info["threshold"] == 0.2
    (tmp_path / "animals.txt").write_text("zebra\n")
    assert open_prompt_filter("words").check("a nude").blocked
    own = open_prompt_filter(f"words:{tmp_path}")
    assert own.check("a zebra").blocked and not own.check("a nude").blocked
    with pytest.raises(UsageError, match="no such file"):
        check_prompt_filter("words:nowhere")


def test_an_installed_package_adds_filters(package: Path) -> None:
    assert {"open_nsfw", "bright"} <= set(image_filter_names())
    found = open_image_filter("bright:lamp", threshold=0.9)
    verdicts = checked_verdicts(found, [np.full((4, 4, 3), level, np.uint8) for level in (0, 255)])
    assert verdicts == [ImageVerdict(0.0, False), ImageVerdict(1.0, True)]
    assert found.info["of"] == "lamp"
    assert open_prompt_filter("shouting").check("HELLO").reasons == ("shouting: capitals",)
    assert open_image_filter("open_nsfw").info["filter"] == "open_nsfw"  # not to be replaced


@pytest.mark.parametrize("name", ["nameless", "raising", "absent"])
def test_a_package_filter_that_cannot_start_is_an_error(package: Path, name: str) -> None:
    with pytest.raises(SafetyFilterError, match=name):
        open_image_filter(name)


class Faulty:
    info = {"filter": "faulty"}  # noqa: RUF012

    def __init__(self, *answers: object) -> None:
        self.answers = answers

    def check(self, images: object) -> list[object]:
        return list(self.answers)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([ImageVerdict(0.1, False)], "scored 1 of 2"),
        ([], "scored 0 of 2"),
        ([ImageVerdict(0.1, False), ImageVerdict(float("nan"), False)], "not a probability"),
        ([ImageVerdict(0.1, False), ImageVerdict(1.7, True)], "not a probability"),
        ([0.1, 0.2], "not a verdict"),
        ([ImageVerdict(0.1, None), ImageVerdict(0.1, False)], "not a verdict"),  # type: ignore[arg-type]
    ],
)
def test_answers_that_are_none_are_errors(answers: list[object], message: str) -> None:
    images = [np.zeros((4, 4, 3), np.uint8)] * 2
    with pytest.raises(SafetyFilterError, match=message):
        checked_verdicts(Faulty(*answers), images)  # type: ignore[arg-type]


def test_naming_filters_loads_nothing_heavy() -> None:
    code = (
        "import sys; from modelops.safety import registry as r"
        "; r.check_image_filter('transformers:a/b'); r.image_filter_names()"
        "; assert not {'torch', 'transformers', 'diffusers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("score", ["0", "1", "0.25", "1e-30"])
def test_a_filter_with_one_answer_for_everything_does_not_work(package: Path, score: str) -> None:
    with pytest.raises(SafetyFilterError, match="do not depend on the image"):
        require_working(open_image_filter(f"constant:{score}"))


def test_a_packages_filter_may_try_itself_in_its_own_way(package: Path) -> None:
    require_working(open_image_filter("bright"))
    sparse = open_image_filter("sparse")
    require_working(sparse)
    assert sparse.tried  # type: ignore[attr-defined]


def test_serving_takes_filters_of_the_hub_by_commit_only(classifier: Path) -> None:
    for revision in ("", ",revision=main", ",revision=v1.0", f",revision={COMMIT[:39]}"):
        for name in ("transformers", "diffusers-safety-checker"):
            check_image_filter(f"{name}:a/b{revision}")
            with pytest.raises(UsageError, match="is not pinned") as refused:
                check_image_filter(f"{name}:a/b{revision}", pinned=True)
            assert "revision=" in str(refused.value.hint)
    check_image_filter(f"transformers:a/b,revision={COMMIT}", pinned=True)
    for own in ("open_nsfw", f"transformers:{classifier}"):
        check_image_filter(own, pinned=True)
        assert pin_image_filter(own) == own
    with pytest.raises(UsageError, match="has no revisions"):
        check_image_filter(f"transformers:{classifier},revision={COMMIT}")


def test_an_evaluation_pins_what_the_hub_gives_now(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a real cache of the hub's client, which it asks when there is no network."""
    cached = tmp_path / "models--a--b"
    shutil.copytree(classifier, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pinned = pin_image_filter("transformers:a/b,unsafe=nsfw")
    assert pinned == f"transformers:a/b,unsafe=nsfw,revision={COMMIT}"
    assert pin_image_filter(pinned) == pinned
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingWeightsError, match="not in the local Hugging Face cache"):
        pin_image_filter("transformers:a/c")


@pytest.mark.parametrize(
    ("unsafe", "message"),
    [("porn", "no label 'porn'"), ("normal", "unsafe=normal: this label is for harmless images")],
)
def test_a_wrong_label_is_named_before_anything_is_loaded(
    classifier: Path, unsafe: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_image_filter(f"transformers:{classifier},unsafe={unsafe}")
