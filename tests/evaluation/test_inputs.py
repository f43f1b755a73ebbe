"""Input images of image-to-image and inpainting pipelines, in `sample` and `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modelops.base.errors import IntegrityError, ModelopsError, UsageError
from modelops.base.images import read_image
from modelops.cli.main import main
from modelops.evaluation.inputs import read_input_images
from modelops.evaluation.prompts import plan_with_inputs
from modelops.evaluation.workers.tasks import Job, job_from_json, job_to_json
from modelops.models.pipelines.form import CallForm, read_form
from modelops.models.pipelines.inputs import image_arguments
from modelops.models.request import ImageRequest, InputImage
from modelops.models.sources import open_checkpoint
from zoo.all import family

IMG2IMG = "Stable Diffusion 1.5 (img2img)"
INPAINTING = "Stable Diffusion 1.5 (inpainting, four channels)"
LIGHT = ("--safety", "none", "--prompt-filter", "none", "--resamples", "20", "--no-report")


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 32)) -> Path:
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def half_mask(size: tuple[int, int] = (40, 32)) -> Image.Image:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:, size[0] // 2 :] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module")
def img2img(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("img2img") / "pipeline"
    family(IMG2IMG).make().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inpainting") / "pipeline"
    family(INPAINTING).make().save_pretrained(path)
    return path


@pytest.fixture()
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (1, 2, 10):
        picture(folder / f"{number}.png", number)
    return folder


def inputs(n: int) -> list[InputImage]:
    return [InputImage(f"{k}.png", f"digest {k}") for k in range(n)]


def pairs(lines: list[str], n_images: int, **changes: Any) -> list[tuple[str, str, int]]:
    options = {"n": None, "replicates": 1, "seed": 5} | changes
    _, plan = plan_with_inputs(lines, inputs(n_images), **options)
    return [(each.prompt, each.image.path, each.replicate) for each in plan if each.image]


def test_line_k_belongs_to_image_k() -> None:
    assert pairs(["a", "b"], 2) == [("a", "0.png", 0), ("b", "1.png", 0)]
    assert pairs(["a"], 3) == [("a", "0.png", 0), ("a", "1.png", 1), ("a", "2.png", 2)]
    assert pairs(["a", "b"], 1) == [("a", "0.png", 0), ("b", "0.png", 0)]
    assert pairs(["a", "", "a\r"], 2) == [("a", "0.png", 0), ("a", "1.png", 1)]
    with pytest.raises(UsageError, match="3 prompts for 2 input images"):
        pairs(["a", "b", "", "c"], 2)
    assert pairs(["a", "b"], 2, replicates=2) == [
        ("a", "0.png", 0), ("b", "1.png", 0), ("a", "0.png", 1), ("b", "1.png", 1),
    ]  # fmt: skip


def test_fewer_pairs_are_chosen_and_more_are_repeated() -> None:
    everything = pairs(["a", "b", "c", "d"], 4)
    few = pairs(["a", "b", "c", "d"], 4, n=2)
    assert len(few) == 2
    assert set(few) < set(everything)
    assert pairs(["a", "b"], 2, n=3)[2] == ("a", "0.png", 1)
    with pytest.raises(UsageError, match="no usable prompt"):
        pairs(["", " "], 2)


def test_other_input_images_are_another_protocol() -> None:
    def digest(images: list[InputImage]) -> str:
        return plan_with_inputs(["a"], images, n=None, replicates=1, seed=0)[0].sha256

    assert digest(inputs(2)) == digest(inputs(2))
    assert digest(inputs(2)) != digest(inputs(3))
    assert digest(inputs(2)) != digest(inputs(2)[::-1])


def test_a_folder_lists_images_and_their_masks(photos: Path) -> None:
    half_mask().save(photos / "2_mask.png")
    found = read_input_images(photos)
    names = [(Path(each.path).name, each.mask and Path(each.mask).name) for each in found.images]
    assert names == [("1.png", None), ("2.png", "2_mask.png"), ("10.png", None)]
    half_mask().save(photos / "3-mask.png")
    with pytest.raises(UsageError, match="a mask without its image"):
        read_input_images(photos)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no image in it"):
        read_input_images(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_input_images(tmp_path / "photos")


def form_of(name: str) -> CallForm:
    return read_form(family(name).make())


def test_what_is_transparent_is_painted_anew(photos: Path) -> None:
    form = form_of(INPAINTING)
    seen = Image.open(photos / "1.png").convert("RGBA")
    seen.putalpha(Image.eval(half_mask(), lambda level: 255 - level))
    seen.save(photos / "1.png")
    found = image_arguments(form, read_input_images(photos).images[0])
    assert np.array_equal(np.array(found["mask_image"]), np.array(half_mask()))
    assert found["image"].mode == "RGB"
    with pytest.raises(UsageError, match="wants a mask"):
        image_arguments(form, read_input_images(photos).images[1])
    half_mask((8, 8)).save(photos / "1_mask.png")
    with pytest.raises(UsageError, match=r"a mask of 8x8 pixels for an image of 40x32"):
        image_arguments(form, read_input_images(photos).images[0])


def test_a_file_that_changed_is_not_used(photos: Path) -> None:
    form = form_of(IMG2IMG)
    found = read_input_images(photos).images[0]
    picture(photos / "1.png", 7)
    with pytest.raises(IntegrityError, match="changed since"):
        image_arguments(form, found)
    (photos / "2.png").write_bytes((photos / "2.png").read_bytes()[:100])
    with pytest.raises(ModelopsError, match=r"2\.png: truncated"):
        image_arguments(form, read_input_images(photos).images[1])


def test_images_are_diffusers_own(photos: Path, img2img: Path, inpainting: Path) -> None:
    half_mask().save(photos / "2_mask.png")
    listed = read_input_images(photos).images
    for checkpoint, given in ((img2img, listed[0]), (inpainting, listed[1])):
        source = open_checkpoint(checkpoint)
        request = ImageRequest(prompt="sun", seed=3, steps=6, guidance=4.0, image=given)
        made = source.generate([request])[0]
        arguments: dict[str, Any] = {"image": Image.open(given.path).convert("RGB")}
        if given.mask:
            arguments["mask_image"] = Image.open(given.mask)
        own = source.pipeline(
            prompt="sun", num_inference_steps=6, guidance_scale=4.0, output_type="np",
            generator=torch.Generator().manual_seed(3), **arguments,
        ).images[0]  # fmt: skip
        assert made.shape == own.shape
        assert np.abs(made.astype(int) - np.rint(own * 255).astype(int)).max() <= 1


def test_what_has_no_effect_is_refused(photos: Path, img2img: Path) -> None:
    source = open_checkpoint(img2img)
    given = read_input_images(photos).images[0]
    request = ImageRequest(prompt="sun", seed=3, steps=6)
    with pytest.raises(UsageError, match="changes an image that it is given"):
        source.check(request)
    with pytest.raises(UsageError, match="the size of its input images"):
        source.check(ImageRequest(prompt="sun", seed=3, height=64, width=64, image=given))
    half_mask().save(photos / "1_mask.png")
    masked = read_input_images(photos).images[0]
    with pytest.raises(UsageError, match="takes no mask"):
        source.generate([ImageRequest(prompt="sun", seed=3, image=masked)])


def test_pairs_do_not_shift(photos: Path, img2img: Path, tmp_path: Path) -> None:
    (photos / "3.avif").write_bytes(b"?")
    with pytest.raises(UsageError, match=r"3\.avif: not an image that is read"):
        read_input_images(photos)
    (photos / "3.avif").unlink()
    (photos / "4.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UsageError, match=r"4\.png: not an image that is read"):
        read_input_images(photos)
    (photos / "4.png").unlink()
    arguments = ["sample", str(img2img), "--prompt", "sun", "--input-images", str(photos)]
    assert main([*arguments, "--out", str(photos)]) == 2
    assert not (photos / "samples.json").exists()


def test_masks_are_checked_before_the_first_image(
    photos: Path, inpainting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        half_mask().save(photos / f"{number}_mask.png")
    arguments = ["sample", str(inpainting), "--prompt", "sun", "--input-images", str(photos)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "10.png: " in (error := capsys.readouterr().err)
    assert "NAME_mask.png" in error
    assert not (tmp_path / "out").exists()


def test_too_few_steps_are_one_line(
    photos: Path, img2img: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", str(img2img), "--prompt", "sun", "--input-images", str(photos)]
    assert main([*arguments, "--steps", "1", "--out", str(tmp_path / "out")]) in (1, 2)
    assert "unexpected" not in capsys.readouterr().err


def test_sample_changes_every_image(photos: Path, img2img: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sample", str(img2img), "--prompt", "sun", "--steps", "6", "--out", str(out)]
    assert main([*arguments, "--input-images", str(photos), "-n", "2"]) == 0
    entries = json.loads((out / "samples.json").read_text("utf-8"))["images"]
    assert [(each["file"], each["input"]) for each in entries] == [
        ("0000-0.png", "1.png"), ("0000-1.png", "1.png"), ("0001-0.png", "2.png"),
        ("0001-1.png", "2.png"), ("0002-0.png", "10.png"), ("0002-1.png", "10.png"),
    ]  # fmt: skip
    assert len({each["seed"] for each in entries}) == 6
    assert read_image(out / "0000-0.png").shape == (32, 40, 3)
    assert {(each["height"], each["width"]) for each in entries} == {(32, 40)}


def test_sample_refuses_images_where_none_are_taken(
    photos: Path, img2img: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--prompt", "sun", "--out", str(tmp_path / "out")]
    assert main(["sample", str(img2img), *out]) == 2
    assert "--input-images" in capsys.readouterr().err
    plain = tmp_path / "plain"
    family("DDIM").make().save_pretrained(plain)
    assert main(["sample", str(plain), *out, "--input-images", str(photos)]) == 2
    assert "takes no input images" in capsys.readouterr().err


def test_eval_changes_the_images_of_a_folder(
    photos: Path, img2img: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("sun\nmoon\nhouse\n", "utf-8")
    common = ["eval", str(img2img), "--prompts", str(prompts), "--steps", "6", *LIGHT]
    common += ["--input-images", str(photos)]
    assert main([*common, "--out", str(tmp_path / "record.json")]) == 0
    record = json.loads((tmp_path / "record.json").read_text("utf-8"))
    assert (record["sampling"]["height"], record["sampling"]["width"]) == (32, 40)
    listed = read_input_images(photos)
    assert record["inputs"]["input_images"]["sha256"] == listed.sha256
    rows = json.loads((tmp_path / "record" / "per_image.json").read_text("utf-8"))
    assert [row["input"] for row in rows] == ["1.png", "2.png", "10.png"]
    source = open_checkpoint(img2img)
    for row, image in zip(rows, listed.images, strict=True):
        request = ImageRequest(prompt=row["prompt"], seed=row["seed"], steps=6, image=image)
        made = read_image(tmp_path / "record" / row["image"]).astype(int)
        assert np.abs(made - source.generate([request])[0].astype(int)).max() <= 1
    job = Job(0, ImageRequest(prompt="sun", seed=1, image=listed.images[0]), tmp_path / "x.png")
    assert job_from_json(json.loads(json.dumps(job_to_json(job)))) == job  # for other processes
    capsys.readouterr()
    assert main(["eval", str(img2img), "--input-images", str(photos), "--out", "x.json"]) == 2
    assert "--prompts" in capsys.readouterr().err
