"""State of samplers and of global generators that each call has of its own."""

from __future__ import annotations

import random

import numpy as np
import torch

from modelops.models.pipelines.state import GlobalNoise, Samplers, watching_global_noise
from zoo.all import family


def test_a_call_leaves_samplers_as_they_were() -> None:
    pipeline = family("Kandinsky 2.2").make()
    inner = pipeline.decoder_pipe.scheduler
    assert inner is pipeline.scheduler  # a combined pipeline's parts have the same objects
    samplers = Samplers(pipeline)
    before = inner.num_inference_steps
    one, other = samplers.fresh(), samplers.fresh()
    with samplers.using(one):
        inner.set_timesteps(3)
        with samplers.using(other):
            inner.set_timesteps(7)
        assert len(inner.timesteps) == 3
    assert inner.num_inference_steps == before
    with samplers.using(other):
        assert len(inner.timesteps) == 7


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_noise_goes_on_where_its_image_left_it() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with GlobalNoise(2**53 - 1):
        expected = [draw(), draw()]
    noise, other = GlobalNoise(2**53 - 1), GlobalNoise(3)
    with noise:
        first = draw()
    with other:
        assert draw() != first
    with noise:
        second = draw()
    assert [first, second] == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_from_a_global_generator_is_seen() -> None:
    for work in (lambda: torch.rand(1), np.random.rand, random.random):
        with watching_global_noise() as drawn:
            work()
        assert drawn == [True]
    with watching_global_noise() as drawn:
        torch.rand(1, generator=torch.Generator().manual_seed(1))
    assert drawn == [False]
