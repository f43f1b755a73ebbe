"""Arguments of calls, as signatures and configurations state them."""

from __future__ import annotations

import pytest

from modelops.base.errors import UsageError
from modelops.models.pipelines.arguments import pipeline_arguments
from modelops.models.pipelines.form import CallForm, read_form
from modelops.models.pipelines.observe import find_traits
from modelops.models.request import ImageRequest
from zoo.all import family


def form_of(name: str) -> CallForm:
    return read_form(family(name).make())


def test_a_class_is_a_number_or_a_name() -> None:
    form = form_of("DiT")
    assert (form.subject, form.n_classes) == ("class", 1000)
    assert form.class_number(" 7 ") == 7
    name, number = next(iter(form.classes.items()))
    assert form.class_number(name.upper()) == number
    for wrong in ("1000", "-1", "1.5", "", "red heart", "٣"):
        with pytest.raises(UsageError, match="is none") as found:
            form.class_number(wrong)
        assert "0 to 999" in (found.value.hint or "")
    near = name[:-1]
    with pytest.raises(UsageError) as found:
        form.class_number(near)
    assert name.lower() in (found.value.hint or "").lower()


@pytest.mark.parametrize(
    ("name", "subject", "guidance"),
    [
        ("Stable Diffusion 1.5 (PNDM)", "prompt", ("guidance_scale",)),
        ("QwenImage", "prompt", ("guidance_scale", "true_cfg_scale")),
        ("Kandinsky 2.2", "prompt", ("guidance_scale",)),
        ("Consistency model (classes)", "class", ()),
        ("Consistency model", "nothing", ()),
        ("DDPM", "nothing", ()),
    ],
)
def test_a_signature_says_of_what_images_are_made(
    name: str, subject: str, guidance: tuple[str, ...]
) -> None:
    form = form_of(name)
    assert (form.subject, form.guidance) == (subject, guidance)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("Kandinsky 2.2", (512, 512)),
        ("Z-Image", (1024, 1024)),
        ("DiT", (None, None)),
    ],
)
def test_the_native_size_is_the_calls_own(name: str, size: tuple[int | None, int | None]) -> None:
    pipeline = family(name).make()
    found = find_traits(pipeline)
    assert found.own_size == size
    assert found.fixed_size in (None, found.native_size)


def test_what_a_request_leaves_open_is_not_passed() -> None:
    form = form_of("PixArt-sigma")
    given = pipeline_arguments(form, [ImageRequest(prompt="sun", seed=1)])
    assert given.keys() == {"prompt", "generator", "output_type"}
    request = ImageRequest(
        prompt="sun", seed=1, steps=3, guidance=2.0, height=64, width=32, negative_prompt="rain"
    )
    given = pipeline_arguments(form, [request, request])
    assert given["prompt"] == ["sun", "sun"]
    assert given["negative_prompt"] == ["rain", "rain"]
    assert (given["num_inference_steps"], given["guidance_scale"]) == (3, 2.0)
    assert (given["height"], given["width"]) == (64, 32)
    assert given["use_resolution_binning"] is False  # it would draw another size than asked
    other = pipeline_arguments(form_of("QwenImage"), [request], "true_cfg_scale")
    assert other["true_cfg_scale"] == 2.0
    assert "guidance_scale" not in other
