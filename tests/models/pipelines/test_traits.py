"""Traits of pipelines, found by calling them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from modelops.base.errors import UsageError
from modelops.export.calibration import DEFAULT_PROMPTS, own_prompts
from modelops.models.pipelines.observe import find_traits
from modelops.models.request import ImageRequest
from modelops.models.sources import PipelineSource
from modelops.records.evaluation import SourceInfo
from zoo.all import family

EXPECTED: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1.5 (PNDM)": {"guidance": "guidance_scale", "negative": True},
    "SDXL (LCM)": {"guidance": "guidance_scale", "negative": False},
    "Flux 1 (dev)": {"guidance": "guidance_scale", "negative": False},
    "Flux 1 (schnell)": {"guidance": "true_cfg_scale", "guided_by_negative": True},
    "QwenImage": {"guidance": "true_cfg_scale", "guided_by_negative": True, "negative": True},
    "CogView4": {"guidance": "guidance_scale", "sharing": "same length"},
    "PRX": {"guidance": "guidance_scale", "sharing": "one", "takes_many": False},
    "HiDream-I1 (fast)": {"global_noise": True, "sharing": "one"},
    "DiT": {"guidance": "guidance_scale", "is_of_classes": True, "negative": False},
    "DDPM": {"guidance": "", "fixed_size": (32, 32), "negative": False},
    "Stable Diffusion 1.5 (inpainting, four channels)": {
        "wants_image": True,
        "guidance": "guidance_scale",
        "negative": True,
    },
    "SDXL (refiner)": {"wants_image": True, "guidance": "guidance_scale", "size_of_input": True},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_traits_are_those_of_the_family(name: str) -> None:
    found = find_traits(family(name).make())
    expected = {"sharing": "any", "global_noise": False, "wants_image": False, "takes_many": True}
    if EXPECTED[name].get("wants_image"):
        expected["sharing"] = "one"
    expected |= EXPECTED[name]
    assert {key: getattr(found, key) for key in expected} == expected


def request(**fields: Any) -> ImageRequest:
    return ImageRequest(**({"prompt": "sun", "seed": 1} | fields))


def test_what_has_no_effect_is_refused() -> None:
    plain = find_traits(family("Stable Diffusion 1.5 (PNDM)").make())
    plain.check(request(guidance=3.0, negative_prompt="rain", height=64, width=64))
    schnell = find_traits(family("Flux 1 (schnell)").make())
    schnell.check(request())
    schnell.check(request(guidance=1.0))  # off
    schnell.check(request(guidance=4.0, negative_prompt="rain"))
    with pytest.raises(UsageError, match="without a negative prompt"):
        schnell.check(request(guidance=4.0))
    with pytest.raises(UsageError, match="without guidance"):
        schnell.check(request(negative_prompt="rain"))
    noise = find_traits(family("DDPM").make())
    noise.check(request(height=32, width=32))
    for wrong in ({"guidance": 2.0}, {"negative_prompt": "rain"}, {"height": 64, "width": 64}):
        with pytest.raises(UsageError, match=r"no effect|32x32 pixels only"):
            noise.check(request(**wrong))
    classes = find_traits(family("DiT").make())
    classes.check(request(prompt="7"))
    with pytest.raises(UsageError, match="classes"):
        classes.check(request())


def test_exports_of_classes_are_compared_on_different_ones() -> None:
    classes = find_traits(family("DiT").make())
    assert own_prompts(classes, DEFAULT_PROMPTS) == [str(125 * number) for number in range(8)]
    few = replace(classes, form=replace(classes.form, n_classes=3, classes={}))
    assert own_prompts(few, DEFAULT_PROMPTS) == ["0", "1", "2"]
    with pytest.raises(UsageError, match="classes"):
        own_prompts(few, ["1", "3"])


def test_prompts_of_one_length_share_calls() -> None:
    """CogView4 pads to the longest of a call: an image would follow its company."""
    pipeline = family("CogView4").make()
    source = PipelineSource(pipeline, SourceInfo(kind="checkpoint", uri="x", runtime="torch-cpu"))
    long = "a dog with a face and the flag of a house and a cat and a red sun with a blue heart"
    texts = ("red heart", long, "green sun", long)
    requests = [
        request(prompt=text, seed=seed, steps=2, height=32, width=32)
        for seed, text in enumerate(texts)
    ]
    calls: list[list[str]] = []
    encode = pipeline.encode_prompt

    def encode_prompt(prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        calls.append(prompt)
        return encode(prompt, *args, **kwargs)

    assert source.traits.sharing == "same length"
    pipeline.encode_prompt = encode_prompt
    together = source.generate(requests)
    assert [set(texts) for texts in calls] == [{"red heart", "green sun"}, {long}]
    assert source.info.details["prompts_per_call"] == "same length"
    alone = [source.generate([one])[0] for one in requests]
    for first, second in zip(alone, together, strict=True):
        assert np.abs(first.astype(int) - second.astype(int)).max() <= 1


def test_a_number_of_steps_that_cannot_be_changed_is_known() -> None:
    sprint = find_traits(family("Sana Sprint").make())
    assert sprint.fixed_steps == 2
    sprint.check(request(steps=2))
    with pytest.raises(UsageError, match="in 2 steps only"):
        sprint.check(request(steps=4))
