"""FID, KID, Inception Score and PRDC against clean-fid, torch-fidelity and prdc, in each mode.

    pip install --no-deps -r bench/requirements.txt
    python bench/bench_parity.py                      # random weights, drawings against photographs
    python bench/bench_parity.py --weights pt_inception-2015-12-05-6726825d.pth --first A --second B

Prints a table of relative differences; exits 1 if one is above the limit. All read the same files
of mixed sizes, RGBA, grey, PNG and JPEG, decoded as the peers do (an alpha channel is dropped).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import inception_peers as peers
from modelops.metrics.frechet import features_to_frechet_distance
from modelops.metrics.inception import InceptionExtractor, logits_to_inception_score
from modelops.metrics.kernel import kernel_distance
from modelops.metrics.prdc import prdc

NEIGHBOURS = 3
SPLITS = 5


@dataclass(frozen=True)
class Row:
    mode: str
    peer: str
    metric: str
    ours: float
    theirs: float
    relative: float
    counts: bool = True  # towards the limit


def row(
    mode: str, peer: str, metric: str, ours: float, theirs: float, *, counts: bool = True
) -> Row:
    size = max(abs(ours), abs(theirs)) or 1.0
    return Row(mode, peer, metric, ours, theirs, abs(ours - theirs) / size, counts)


def compare_cleanfid(mode: str, lab: dict[str, Any]) -> Iterator[Row]:
    from cleanfid import fid as cleanfid
    from prdc import compute_prdc

    model = peers.cleanfid_model(mode, lab["weights"], lab["archive"])
    x, y = (extract(mode, lab, name) for name in ("first", "second"))
    u, v = (peers.cleanfid_features(lab[name], mode, model, batch_size=16)
            for name in ("first", "second"))  # fmt: skip
    largest = float(np.abs(x - u).max() / np.abs(u).mean())
    yield Row(mode, "clean-fid", "features, largest difference over mean", 0, 0, largest, False)
    ours = features_to_frechet_distance(x, y)
    yield row(mode, "clean-fid", "FID, its features and our Fréchet", ours,
              features_to_frechet_distance(u, v))  # fmt: skip
    # With n < 2048 their sqrtm is of a singular matrix, and off.
    enough = min(len(x), len(y)) > x.shape[1]
    yield row(mode, "clean-fid", "FID", ours, peers.cleanfid_frechet(u, v), counts=enough)
    if len(x) == len(y) <= 1000:  # then each of its subsets is the whole
        theirs = cleanfid.kernel_distance(u.astype(float), v.astype(float), num_subsets=1)
        yield row(mode, "clean-fid", "KID", kernel_distance(x, y).value, theirs)
    with peers.quiet():
        spheres = compute_prdc(u, v, nearest_k=NEIGHBOURS)
    made = prdc(x, y, seed=0, neighbours=NEIGHBOURS)
    for name, theirs in spheres.items():
        yield row(mode, "prdc", name, made[name].value, float(theirs))


def compare_fidelity(lab: dict[str, Any]) -> Iterator[Row]:
    mode, peer = "legacy_tensorflow", "torch-fidelity"
    x, y = (extract(mode, lab, name) for name in ("first", "second"))
    n = min(len(x), len(y))
    theirs = peers.fidelity_metrics(
        lab["first"], lab["second"], lab["weights"], isc=True, fid=True, kid=True, prc=True,
        isc_splits=SPLITS, kid_subsets=1, kid_subset_size=n, prc_neighborhood=NEIGHBOURS,
        save_cpu_ram=True,
    )  # fmt: skip
    ours = features_to_frechet_distance(x, y)
    yield row(mode, peer, "FID", ours, theirs["frechet_inception_distance"])
    if len(x) == len(y):
        kid = kernel_distance(x, y).value
        yield row(mode, peer, "KID", kid, theirs["kernel_inception_distance_mean"])
    spheres = prdc(y, x, seed=0, neighbours=NEIGHBOURS)
    for name in ("precision", "recall"):
        yield row(mode, peer, name, spheres[name].value, theirs[name])
    extractor = InceptionExtractor(lab["weights"], mode=mode)
    order = np.random.RandomState(2020).permutation(len(x))
    score = logits_to_inception_score(
        extractor.features_to_logits(x), splits=SPLITS, order=order
    ).value
    yield row(mode, peer, "Inception Score", score, theirs["inception_score_mean"])


def extract(mode: str, lab: dict[str, Any], name: str) -> Any:
    extractor = InceptionExtractor(lab["weights"], mode=mode)
    files = peers.picture_files(lab[name])
    return extractor.images_to_features(peers.read_as_peers(path) for path in files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=120, help="images a side")
    parser.add_argument("--weights", type=Path, help="a state dict of the FID Inception")
    parser.add_argument("--archive", type=Path, help="clean-fid's inception-2015-12-05.pt")
    parser.add_argument("--first", type=Path, help="a folder of images")
    parser.add_argument("--second", type=Path, help="another")
    parser.add_argument("--limit", type=float, default=1e-4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        first = options.first or peers.write_pictures(root / "first", options.count)
        second = options.second or peers.write_photographs(root / "second", options.count)
        some = peers.picture_files(first)[:8] + peers.picture_files(second)[:8]
        weights = options.weights or peers.random_weights(root / "weights", calibration=some)
        archive = options.archive or peers.write_torchscript(weights, root / "weights")
        lab = {"first": first, "second": second, "weights": weights, "archive": archive}
        rows = list(compare_fidelity(lab))
        for mode in ("clean", "legacy_pytorch"):
            rows += compare_cleanfid(mode, lab)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(f"| mode | peer | metric | ours | theirs | relative difference |\n|{'---|' * 6}")
        for item in rows:
            note = "" if item.counts else " (not counted)"
            print(f"| {item.mode} | {item.peer} | {item.metric} | {item.ours:.8g} | "
                  f"{item.theirs:.8g} | {item.relative:.1e}{note} |")  # fmt: skip
    worst = max(item.relative for item in rows if item.counts)
    print(f"largest counted difference {worst:.1e}, limit {options.limit:.0e}", file=sys.stderr)
    return int(worst > options.limit)


if __name__ == "__main__":
    raise SystemExit(main())
