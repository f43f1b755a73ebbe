"""Sources, prompts and sampling: real HTTP servers, real folders, hostile inputs."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hostile_service import Service, serve
from modelops.base.errors import (
    EvaluationError,
    ImageBlockedError,
    ImageError,
    MissingWeightsError,
    UsageError,
)
from modelops.base.files import sha256_bytes
from modelops.base.seeding import image_seed
from modelops.data.folders import natural_key
from modelops.evaluation.evaluate import evaluate
from modelops.evaluation.prompts import (
    choose_prompts,
    clean_prompts,
    plan_images,
    plan_ready_images,
    plan_with_inputs,
    read_prompts,
)
from modelops.evaluation.settings import EvaluationSettings
from modelops.evaluation.sources.endpoint import EndpointSource
from modelops.evaluation.sources.folder import FolderSource
from modelops.evaluation.sources.open import open_source
from modelops.models.request import ImageRequest, InputImage


def png(color: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def service() -> Iterator[Service]:
    with serve() as running:
        yield running


def request(prompt: str, seed: int = 7, **more: Any) -> ImageRequest:
    return ImageRequest(prompt=prompt, seed=seed, height=32, width=32, **more)


def test_an_endpoint_gets_seed_steps_and_guidance_and_gives_pixels(service: Service) -> None:
    source = open_source(service.url + "/v1", batch_size=2)
    made = source.generate([request("sun", seed=3, steps=5, guidance=2.0), request("sun", seed=4)])
    assert [int(image[0, 0, 0]) for image in made] == [3, 4]
    first = next(body for body in service.bodies if body["seed"] == 3)
    assert first == {
        "prompt": "sun", "n": 1, "seed": 3, "steps": 5, "guidance": 2.0, "size": "32x32",
        "response_format": "b64_json", "output_format": "png",
    }  # fmt: skip
    assert source.info.sha256 == "ab" * 32
    assert source.defaults.height == 32


def test_a_busy_service_is_asked_again(service: Service) -> None:
    source = EndpointSource(service.url, max_wait_s=0.01)
    assert source.generate([request("busy")])[0].shape == (32, 32, 3)
    assert len(service.bodies) == 3


@pytest.mark.parametrize(
    ("prompt", "message", "asked"),
    [
        ("full", "HTTP 503 full", 3),
        ("always busy", "HTTP 429 rate_limit_exceeded", 3),
        ("broken", "not JSON", 1),
        ("no image", "without an image", 1),
        ("another size", "16x16", 1),
        ("canary", "release cdcdcdcdcdcd made this image", 1),
    ],
)
def test_an_answer_that_is_no_image_is_an_error(
    service: Service, prompt: str, message: str, asked: int
) -> None:
    source = EndpointSource(service.url, max_wait_s=0.01, attempts=3)
    with pytest.raises(EvaluationError, match=message):
        source.generate([request(prompt)])
    assert len(service.bodies) == asked


def test_a_blocked_image_is_told_apart(service: Service) -> None:
    with pytest.raises(ImageBlockedError, match="not allowed"):
        EndpointSource(service.url).generate([request("blocked")])


def test_nobody_there_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="cannot be reached"):
        open_source("http://127.0.0.1:9")


def test_a_folder_gives_its_images_in_order(tmp_path: Path) -> None:
    for name, shade in (("b.png", 20), ("a.png", 10)):
        (tmp_path / name).write_bytes(png((shade, shade, shade)))
    (tmp_path / "c.png").write_bytes(b"\x89PNG broken")
    source = open_source(str(tmp_path))
    assert isinstance(source, FolderSource)
    assert [int(source.read(index)[0, 0, 0]) for index in (0, 1)] == [10, 20]
    with pytest.raises(ImageError):
        source.read(2)
    with pytest.raises(EvaluationError, match="only 3 images"):
        source.read(3)


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    for uri in (str(tmp_path), str(tmp_path / "none"), "./none/here"):
        with pytest.raises(UsageError):
            open_source(uri)


def test_a_hub_id_that_cannot_be_had_says_so_in_one_line() -> None:
    with pytest.raises(MissingWeightsError, match="not in the local Hugging Face cache") as caught:
        open_source("nobody-here/no-such-model")
    assert "\n" not in str(caught.value)


def test_unusable_prompts_are_counted(tmp_path: Path) -> None:
    found = clean_prompts(["sun", " sun ", "", "a\0b", "x" * 10_001, "red heart", "y" * 10_000])
    assert found.prompts == ("sun", "red heart", "y" * 10_000)
    assert found.dropped == {"repeated": 1, "blank": 1}
    shown, faults = zip(*found.rejected, strict=True)
    assert faults == (
        "the prompt holds a null byte", "the prompt has 10001 characters, more than 10000"
    )  # fmt: skip
    assert len(found) == 5 and not any("\0" in text or len(text) > 100 for text in shown)
    file = tmp_path / "prompts.txt"
    file.write_bytes("sun\r\nhéart\n".encode())
    assert read_prompts(file).prompts == ("sun", "héart")
    file.write_bytes(b"\n\n")
    with pytest.raises(UsageError, match="no usable prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        read_prompts(file)


def test_the_choice_of_a_prompt_does_not_depend_on_the_others() -> None:
    whole = clean_prompts([f"prompt {i}" for i in range(50)])
    ten = choose_prompts(whole, 10, seed=1).prompts
    without = clean_prompts([p for p in whole.prompts if p != ten[0]])
    assert set(choose_prompts(without, 10, seed=1).prompts) >= set(ten[1:])
    assert choose_prompts(whole, None, seed=1).prompts == whole.prompts


def test_a_plan_repeats_prompts_with_other_seeds() -> None:
    plan = plan_images(clean_prompts(["a", "b"]), n=5, replicates=1, seed=9)
    assert [(p.prompt, p.replicate) for p in plan] == [
        ("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)
    ]  # fmt: skip
    assert len({p.seed for p in plan}) == 5
    assert plan[2].seed == image_seed(9, "a", 1)


def test_a_prompt_that_cannot_be_used_is_planned_and_chosen_like_any_other() -> None:
    found = clean_prompts(["a", "b\0", "c"])
    plan = plan_images(found, n=None, replicates=2, seed=9)
    assert [(p.prompt, p.owner, p.replicate) for p in plan[:3]] == [
        ("a", 0, 0), ("c", 1, 0), ("b\N{SYMBOL FOR NULL}", 2, 0)
    ]  # fmt: skip
    assert [p.fault is None for p in plan] == [True, True, False] * 2
    many = clean_prompts([f"p{i}\0" if i % 2 else f"p{i}" for i in range(60)])
    chosen = choose_prompts(many, 20, seed=3)
    assert len(chosen) == 20 and len(chosen.prompts) not in (0, 20)
    assert chosen.sha256 != choose_prompts(many, 21, seed=3).sha256


def test_line_k_of_the_prompts_belongs_to_image_k_of_a_folder() -> None:
    """Also where lines are repeated, blank or unusable: none of them moves the others."""
    found, plan = plan_ready_images(["sun", "sun", "", "a\0", "moon"], 7, seed=9)
    assert found.prompts == ("sun", "moon")
    null = "a\N{SYMBOL FOR NULL}"
    assert [p.prompt for p in plan] == ["sun", "sun", "", null, "moon", "sun", "sun"]
    assert [p.replicate for p in plan] == [0, 1, 0, 0, 0, 2, 3]
    assert [p.owner for p in plan if p.fault is None] == [0, 0, 1, 0, 0]
    assert [p.fault for p in plan if p.fault] == [
        "its line of the prompts is blank", "the prompt holds a null byte"
    ]  # fmt: skip
    assert len({p.owner for p in plan}) == 4
    few = plan_ready_images(["sun", "moon", "star"], 2, seed=9)
    assert few[0].prompts == ("sun", "moon") and [p.owner for p in few[1]] == [0, 1]


def test_a_service_that_hangs_is_given_up_after_two_requests(service: Service) -> None:
    source = EndpointSource(service.url, timeout_s=0.2, attempts=5)
    with pytest.raises(EvaluationError, match=r"timed out after 0\.2 s"):
        source.generate([request("hang")])
    assert [body["prompt"] for body in service.bodies] == ["hang", "hang"]


def test_no_image_of_a_batch_is_asked_for_twice_because_another_failed(service: Service) -> None:
    names = ["sun", "blocked", "moon", "another size", "star"]
    made = EndpointSource(service.url).generate_each([request(name) for name in names])
    kinds = [type(each) for each in made]
    assert kinds == [np.ndarray, ImageBlockedError, np.ndarray, EvaluationError, np.ndarray]
    assert sorted(body["prompt"] for body in service.bodies) == sorted(names)


def test_shades_are_real(service: Service) -> None:
    made = EndpointSource(service.url).generate([request("sun", seed=150)])[0]
    assert np.unique(made).tolist() == [150]


def shades(source: FolderSource) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source.files))]


def test_files_are_in_the_order_in_which_people_count(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png((number, 0, 0)))
    (tmp_path / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert [path.name for path in source.files] == names
    assert shades(source) == list(range(12))
    for wanted in (
        ["a2.png", "a10.png", "b1.png"], ["img_9.png", "img_10.png"], ["x1y2.png", "x1y10.png"],
        ["A.png", "a.png", "b.png"],
    ):  # fmt: skip
        for order in (wanted, wanted[::-1]):
            assert sorted(order, key=lambda name: (natural_key(name), name)) == wanted


def test_what_sample_left_says_which_image_is_of_which_prompt(tmp_path: Path) -> None:
    listed = [
        {"prompt": "red heart", "file": "0000-0.png"},
        {"prompt": "red heart", "file": "0000-1.png"},
        {"prompt": "sun", "file": "0001-0.png"}, {"prompt": "sun", "file": "0001-1.png"},
        {"prompt": "sun", "file": None, "failure": "no"},
    ]  # fmt: skip
    folder = tmp_path / "made"
    folder.mkdir()
    for shade, name in enumerate(
        ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png", "grid.png"]
    ):
        (folder / name).write_bytes(png((shade, 0, 0)))
    (folder / "samples.json").write_text(json.dumps({"images": listed, "grid": "grid.png"}))
    source = FolderSource(folder)
    assert shades(source) == [0, 1, 2, 3]
    assert source.prompts == ["red heart", "red heart", "sun", "sun"]
    out = tmp_path / "out.json"
    settings = EvaluationSettings(safety="none")
    record = evaluate(source, settings, out_path=out)
    assert "fewer than three prompts" in (record.metrics["diversity_lite0"].not_measured or "")
    rows = json.loads((tmp_path / "out/per_image.json").read_text())
    assert [(row["file"], row["prompt"]) for row in rows] == [
        (item["file"], item["prompt"]) for item in listed[:4]
    ]
    (tmp_path / "p.txt").write_text("red heart\nmoon\n")
    with pytest.raises(UsageError, match="'sun' is not in it"):
        evaluate(
            source, replace(settings, prompts_file=tmp_path / "p.txt"), out_path=tmp_path / "x.json"
        )
    (folder / "0001-0.png").unlink()
    with pytest.raises(UsageError, match=r"names 0001-0\.png, which is not there"):
        FolderSource(folder)


def sampled(folder: Path, listed: list[dict[str, str]]) -> Path:
    """A folder as `modelops sample` leaves it, with the images 0.png to 3.png."""
    folder.mkdir()
    for shade in range(4):
        (folder / f"{shade}.png").write_bytes(png((shade, 0, 0)))
    (folder / "samples.json").write_text(json.dumps({"images": listed}))
    return folder


def test_an_image_that_samples_json_names_twice_or_of_other_bytes_is_refused(
    tmp_path: Path,
) -> None:
    first = {"file": "0.png", "prompt": "sun"}
    with pytest.raises(UsageError, match=r"samples\.json: names 0\.png twice"):
        FolderSource(sampled(tmp_path / "twice", [first, {"file": "1.png", "prompt": "a"}, first]))
    right = {**first, "sha256": sha256_bytes(png((0, 0, 0)))}
    assert shades(FolderSource(sampled(tmp_path / "right", [right]))) == [0]
    with pytest.raises(UsageError, match=r"0\.png is another image .* the sha256 differs"):
        FolderSource(sampled(tmp_path / "other", [{**first, "sha256": "0" * 64}]))


def test_images_that_samples_json_does_not_name_are_a_warning(tmp_path: Path) -> None:
    listed = [{"file": f"{k}.png", "prompt": f"sun {k}"} for k in range(2)]
    folder = sampled(tmp_path / "made", listed)
    for name in ("grid.png", "notes.txt"):
        (folder / name).write_bytes(png((9, 9, 9)))
    source = FolderSource(folder)
    record = evaluate(source, EvaluationSettings(safety="none"), out_path=tmp_path / "e.json")
    assert record.source.details["unlisted_images"] == 2
    warned = record.metrics["failed_image_rate"].warnings
    assert "2 images of the folder are not in samples.json and are left out: 2.png, 3.png" in warned


def test_images_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(png((number, 0, 0)))
    prompts = tmp_path / "p.txt"
    prompts.write_text("a\nb\n")
    settings = EvaluationSettings(safety="none", prompts_file=prompts)
    with pytest.raises(UsageError, match="5 images for the 2 lines"):
        evaluate(FolderSource(tmp_path), settings, out_path=tmp_path / "e.json")
    for n in (2, 5, 12):
        with pytest.raises(UsageError, match="5 images for the 2 lines"):
            evaluate(FolderSource(tmp_path), replace(settings, n=n), out_path=tmp_path / "e.json")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "6.png").write_bytes(png((6, 0, 0)))
    with pytest.raises(UsageError, match="images in the folder and in more/ below it"):
        FolderSource(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path) -> None:
    for name, mark in (("with.txt", b"\xef\xbb\xbf"), ("without.txt", b"")):
        (tmp_path / name).write_bytes(mark + b"red heart\nsun\n")
    both = [read_prompts(tmp_path / name) for name in ("with.txt", "without.txt")]
    assert both[0] == both[1]
    assert both[0].prompts == ("red heart", "sun")


def test_a_byte_order_mark_is_no_part_of_any_prompt(tmp_path: Path) -> None:
    """`cat a.txt b.txt` leaves one before a later line."""
    mark = "\ufeff"
    joined = [f"{mark}red heart", f" {mark} sun ", f"{mark}", f"moon{mark}", f"{mark}{mark}sea"]
    (tmp_path / "p.txt").write_text("\n".join(joined))
    assert read_prompts(tmp_path / "p.txt").prompts == ("red heart", "sun", "moon", "sea")
    found, plan = plan_ready_images(joined, 5, seed=0)
    assert [planned.prompt for planned in plan] == ["red heart", "sun", "", "moon", "sea"]
    inputs = [InputImage(path="a.png", sha256="0")]
    found, plan = plan_with_inputs(joined, inputs, n=None, replicates=1, seed=0)
    assert [planned.prompt for planned in plan] == ["red heart", "sun", "moon", "sea"]
    assert found.dropped == {"blank": 1}


def test_images_are_paired_with_the_lines_that_their_names_say(tmp_path: Path) -> None:
    """Names as `modelops sample -n 2` gives them, without its samples.json."""
    folder = tmp_path / "made"
    folder.mkdir()
    (tmp_path / "prompts.txt").write_text("red heart\ngreen dog\nblue house\n")
    for prompt in range(3):
        for k in range(2):
            (folder / f"{prompt:04d}-{k}.png").write_bytes(png((60 * prompt, 90 * k, 9)))
    settings = EvaluationSettings(
        prompts_file=tmp_path / "prompts.txt", safety="none", resamples=20
    )
    record = evaluate(open_source(str(folder)), settings, out_path=tmp_path / "e.json")
    rows = json.loads((tmp_path / record.files["per_image"].path).read_text())
    assert [row["prompt"] for row in rows] == [
        "red heart", "red heart", "green dog", "green dog", "blue house", "blue house"
    ]  # fmt: skip
    (folder / "0003-0.png").write_bytes(png((1, 2, 3)))
    with pytest.raises(UsageError, match="an image is named for line 3"):
        evaluate(open_source(str(folder)), settings, out_path=tmp_path / "e.json")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{number}.png")
    (folder / "6.png").unlink()
    with pytest.raises(UsageError, match="6 images for the 3 lines"):
        evaluate(open_source(str(folder)), settings, out_path=tmp_path / "e.json")
