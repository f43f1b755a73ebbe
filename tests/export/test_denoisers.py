"""What bench/ measures INT8 on: the pilot's calls are those that its pipeline makes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from modelops.models.sources import load_checkpoint


def test_the_pilots_rows_are_its_pipelines_calls(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    from denoisers import make_denoiser  # type: ignore[import-not-found]

    denoiser = make_denoiser("pilot", tiny_checkpoint)
    rows, again, others = (denoiser.make_rows(6, seed) for seed in (0, 0, 1))
    sys.modules.pop("denoisers")
    assert len(rows) == 6
    assert (np.diff(rows.sigmas) >= 0).all()
    assert 0 < rows.sigmas[0] < rows.sigmas[-1] <= 1
    for name, array in rows.feeds.items():
        np.testing.assert_array_equal(array, again.feeds[name])
    assert not np.array_equal(rows.feeds["sample"], others.feeds["sample"])
    unet = load_checkpoint(tiny_checkpoint).unet
    expected = (len(rows), unet.config["in_channels"], unet.config["sample_size"])
    assert denoiser.torch(rows.take(range(6))).shape[:3] == expected
