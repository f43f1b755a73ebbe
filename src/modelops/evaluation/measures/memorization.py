"""Memorization: nearest training images of samples, compared with those of held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelops.base.errors import EvaluationError, ImageError
from modelops.base.images import resize_image
from modelops.base.pixels import pixels_sha256
from modelops.base.seeding import numpy_generator
from modelops.evaluation.overfitting import note_overfitting
from modelops.evaluation.reference import shared_pictures
from modelops.evaluation.report.closest import closest_pairs, write_closest_page
from modelops.evaluation.workbench import Workbench
from modelops.metrics import memorization as judge
from modelops.metrics.features import cached_features
from modelops.metrics.intervals import Interval
from modelops.metrics.memorization import CopyingVerdict, Neighbours
from modelops.records.evaluation import CopyingTest, MemorizationVerdict

KEYS = (
    "nearest_train_distance", "nearest_train_distance_heldout", "nearest_train_distance_gap",
    "near_copy_rate", "near_copy_rate_heldout", "authenticity_lite0", "authenticity_lite0_heldout",
)  # fmt: skip
RULE = (
    "copies: near copies of training images, or samples closer to one than it is to its own "
    "nearest training neighbour, are more frequent among samples than among real held-out images "
    f"(one-sided exact tests, Holm over three tests, {judge.ALPHA:.0%}; one image a prompt); the "
    "latter only where they are close to one training image alone, the next being "
    f"{judge.SINGLED_OUT} times as far. "
    f"cannot tell: they are close to several, or a share of {judge.COPY_RATE:.0%} copies would be "
    f"found with less than {judge.POWER:.0%} probability, given how many known copies the "
    "features recognise. "
    "no sign of copying: neither"
)


@dataclass(frozen=True, slots=True)
class _Compared:
    """Samples and held-out images, with the neighbours' own neighbour distances."""

    samples: Neighbours
    heldout: Neighbours
    own_samples: npt.NDArray[np.float64]
    own_heldout: npt.NDArray[np.float64]


def measure(bench: Workbench) -> None:
    """Find nearest training images of samples and held-out images; add verdict and page."""
    if bench.reference is None or bench.training is None:
        raise EvaluationError("no training and held-out images to compare with")
    if not bench.n:
        raise EvaluationError("no image was made")
    training = bench.training.features
    samples = judge.nearest_neighbours(bench.features, training)
    heldout = judge.nearest_neighbours(bench.reference.features, training)
    own = judge.own_neighbour_distances(training, np.concatenate([samples.index, heldout.index]))
    found = _Compared(samples, heldout, own[: len(samples)], own[len(samples) :])
    _put_metrics(bench, found)
    new = ~shared_pictures(bench.reference, bench.training)
    bench.record.memorization = _judge(bench, found, new)
    count = bench.settings.closest_pairs
    bench.pages["closest"] = write_closest_page(
        bench.workdir / "closest.html", bench.record,
        samples=closest_pairs(bench, samples, found.own_samples, count),
        heldout=closest_pairs(bench, heldout, found.own_heldout, count, heldout=new),
        cosines=(1.0 - samples.distance, 1.0 - heldout.distance[new]),
        near_copy_cosine=bench.settings.near_copy_cosine,
    )  # fmt: skip


def _put_metrics(bench: Workbench, found: _Compared) -> None:
    settings, training, reference = bench.settings, bench.training, bench.reference
    assert training is not None and reference is not None
    made = judge.memorization_intervals(
        found.samples, found.heldout, seed=settings.seed,
        near_copy_cosine=settings.near_copy_cosine, resamples=settings.resamples,
    )  # fmt: skip
    authentic = judge.is_authentic(found.samples, found.own_samples)
    made["authentic"] = judge.rate(authentic)
    made["authentic_heldout"] = judge.rate(judge.is_authentic(found.heldout, found.own_heldout))
    known = {"sha256": training.digest, "n": len(training.samples)}
    nearest = bench.set_protocol(
        bench.extractor.protocol, "nearest training image, 1 - cosine", training=known,
        near_copy_cosine=settings.near_copy_cosine,
    )  # fmt: skip
    authenticity = bench.set_protocol(
        bench.extractor.protocol, "authenticity, 1 - cosine", training=known
    )
    n, n_heldout = bench.n, len(reference.samples)
    repeated = n - len(judge.first_of_each(bench.owner))
    clustered = ["images of one prompt are counted as independent"] if repeated else []
    counts: dict[str, tuple[str, int, bool | None, str, Mapping[str, Any]]] = {
        "nearest_train_distance": ("samples", n, None, "1 - cosine", nearest),
        "nearest_train_distance_heldout": ("heldout", n_heldout, None, "1 - cosine", nearest),
        "nearest_train_distance_gap": ("gap", n, True, "1 - cosine", nearest),
        "near_copy_rate": ("near_copies", n, False, "rate", nearest),
        "near_copy_rate_heldout": ("near_copies_heldout", n_heldout, None, "rate", nearest),
        "authenticity_lite0": ("authentic", n, True, "rate", authenticity),
        "authenticity_lite0_heldout": ("authentic_heldout", n_heldout, None, "rate", authenticity),
    }
    for key, (part, count, better, unit, protocol) in counts.items():
        interval: Interval = made[part]
        warnings = [] if key.endswith("heldout") else clustered
        bench.put(key, interval, protocol, n=count, better=better, unit=unit, warnings=warnings)
    bench.per_image["nearest_train_distance"] = found.samples.distance.tolist()
    bench.per_image["nearest_train_id"] = [training.samples[i].id for i in found.samples.index]
    bench.per_image["authentic"] = authentic.tolist()


def _judge(bench: Workbench, found: _Compared, new: npt.NDArray[np.bool_]) -> MemorizationVerdict:
    """Judge copying; `new` are the held-out images that are not training images too."""
    rows = judge.first_of_each(bench.owner)
    caveats = _caveats(bench, found, new, rows)
    control = _known_copies(bench)
    if not new.any():
        copying = CopyingVerdict(
            "cannot tell", "every held-out image is a training image", (), None
        )
    else:
        copying = judge.judge_copying(
            found.samples.take(rows), found.heldout.take(new),
            own_samples=found.own_samples[rows], own_heldout=found.own_heldout[new],
            near_copy_cosine=bench.settings.near_copy_cosine, control=control,
        )  # fmt: skip
    return MemorizationVerdict(
        answer=copying.answer, reason=copying.reason, rule=RULE, alpha=judge.ALPHA,
        tests=[
            CopyingTest(
                name=test.name, hits=test.hits, n=test.n, heldout_hits=test.heldout_hits,
                n_heldout=test.n_heldout, method=test.method, p_value=test.p_value,
                p_adjusted=test.p_adjusted, found=test.found,
            )
            for test in copying.tests
        ],
        detectable_rate=copying.detectable_rate,
        known_copies=control[1] if control else 0, known_copies_found=control[0] if control else 0,
        caveats=caveats, overfitting=note_overfitting(bench, copying),
    )  # fmt: skip


def _caveats(
    bench: Workbench,
    found: _Compared,
    new: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.int64],
) -> list[str]:
    """Return the caveats about this comparison for a reader of the verdict."""
    limit = 1.0 - bench.settings.near_copy_cosine
    caveats = []
    if unusable := len(bench.training.unusable) if bench.training else 0:
        caveats.append(f"{unusable} training images cannot be used: copies of them go unseen")
    if old := int((~new).sum()):
        caveats.append(f"{old} of {len(new)} held-out images are training images: left out")
    if repeated := bench.n - len(rows):
        caveats.append(f"{repeated} further images of the same prompts are not in the tests")
    crowded = float((found.own_heldout <= limit).mean())
    if crowded >= 0.05 and not judge.is_near_copy(found.heldout, 1.0 - limit).any():
        caveats.append(
            f"{crowded:.0%} of the training images nearest to held-out ones have a near copy "
            "within the training set, yet no held-out image is one: the split kept near copies "
            "apart, so a base rate of 0 is of its making, and a new variant of a training image "
            "would count as a copy"
        )
    if (crowded_too := float((found.own_samples <= judge.ROUNDING).mean())) > 0:
        caveats.append(
            f"{crowded_too:.0%} of the samples' nearest training images have an exact duplicate "
            "in the training set, beside which every sample looks authentic"
        )
    if bench.settings.prompts_file is not None:
        caveats.append("the prompts are not the captions of the held-out images compared with")
    return caveats


def _known_copies(bench: Workbench) -> tuple[int, int] | None:
    """Return (recognised as near copies, tried) of slightly changed training images.

    They have the samples' size. This is a control: if few are recognised, finding no copies means
    nothing.
    """
    training, settings = bench.training, bench.settings
    assert training is not None
    generator = numpy_generator(settings.seed, "known_copies")
    rows = generator.permutation(len(training.samples))[: settings.known_copies]
    side = min(bench.image(0).shape[:2])
    copies: list[npt.NDArray[np.uint8]] = []
    for row in rows:
        try:
            picture = resize_image(training.read(int(row)), side)
        except ImageError:
            continue
        copies.append(_changed(picture, len(copies), generator))
    if not copies:
        return None
    digests = [pixels_sha256(copy) for copy in copies]
    features = cached_features(
        bench.extractor, digests, copies.__getitem__, bench.workdir / "cache"
    )
    near = judge.nearest_neighbours(features, training.features)
    return int(judge.is_near_copy(near, settings.near_copy_cosine).sum()), len(copies)


def _changed(
    picture: npt.NDArray[np.uint8], place: int, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Change an image as a copy may be changed: in turn with noise, blur, or less contrast."""
    from PIL import Image, ImageFilter

    if place % 3 == 1:
        return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.5)))
    if place % 3 == 0:
        changed = picture + generator.normal(0.0, 4.0, picture.shape)
    else:
        changed = 127.5 + 0.9 * (picture.astype(np.float64) - 127.5)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)
