"""Saturated throughput: the node, the stock services and the offline limit, interleaved."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from modelops.base.seeding import numpy_generator
from serving.figures import Spread
from serving.mix import Wanted, make_mix
from serving.options import CLIENTS, Options, Result, saturated
from serving.servers import BATCHING, BENCH, NODE, ONE_BY_ONE, SERVERS, Server, serve

OFFLINE = "offline limit"
LONGEST = BATCHING["longest"]
CONDITIONS = {True: "image filter + PNG", False: "no image filter"}


def throughput(options: Options) -> Result:
    """Saturated throughput of the node, the stock services and the offline limit, interleaved."""
    mix = options.mix
    conditions = [True] if options.only_filtered else [True, False]
    runs = [(name, filtered) for filtered in conditions for name in (*SERVERS, OFFLINE)]
    found: dict[tuple[str, bool], list[dict[str, float]]] = {run: [] for run in runs}
    pictures: dict[str, list[Any]] = {}
    generator = numpy_generator(0, "serving bench order")
    for round_index in range(options.rounds):
        for pick in generator.permutation(len(runs)):
            name, filtered = runs[pick]
            if name == OFFLINE:
                figures = offline(options, filtered=filtered)
            else:
                with serve(name, options.paths, filtered=filtered) as server:
                    if name not in pictures:
                        pictures[name] = [picture_of(server, wanted) for wanted in mix[:4]]
                    figures = saturated(server, options, mix)
            found[runs[pick]].append(figures)
            rows = figures.get("mean_rows", float("nan"))
            print(f"  round {round_index + 1}  {CONDITIONS[filtered]:20} {name:26} "
                  f"{figures['images_per_s']:7.2f} images/s {rows:6.1f} rows a batch",
                  file=sys.stderr)  # fmt: skip
    result = Result()
    for filtered in conditions:
        _throughput_table(result, {name: found[name, filtered] for name, _ in runs}, filtered)
    result.figures["pictures"] = _compared(pictures)
    return result


def offline(options: Options, *, filtered: bool) -> dict[str, Any]:
    """See offline.py."""
    mix = make_mix(options.prompts, options.offline_images)
    with tempfile.TemporaryDirectory() as folder:
        plan, result = Path(folder) / "plan.json", Path(folder) / "result.json"
        plan.write_text(json.dumps({
            "artifact": str(options.paths.artifact), "max_rows": options.max_rows,
            "filtered": filtered, "mix": [wanted.fields for wanted in mix],
        }))  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "serving.offline", str(plan), str(result)],
            check=True, cwd=BENCH, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def _throughput_table(
    result: Result, rounds: dict[str, list[dict[str, float]]], filtered: bool
) -> None:
    condition = CONDITIONS[filtered]
    print(f"\nSaturated throughput, {condition}; {CLIENTS} clients; median (lowest to highest)")
    print(
        f"{'':28}{'images/s':>24}{'row-steps/s':>13}{'cores':>7}{'load':>6}"
        f"  {'node / it':>22}  failed"
    )
    node = rounds[NODE]
    for name, values in rounds.items():
        ratios = [mine["images_per_s"] / (theirs["images_per_s"] or float("nan"))
                  for mine, theirs in zip(node, values, strict=True)]  # fmt: skip
        images, work, cores, load = (
            Spread.of([value.get(key, 0.0) for value in values])
            for key in ("images_per_s", "row_steps_per_s", "cores", "load_cores")
        )
        failed = int(sum(value.get("failures", 0) for value in values))
        print(f"{name:28}{images.text():>24}{work.value:13.0f}{cores.value:7.2f}{load.value:6.2f}"
              f"  {Spread.of(ratios).text():>22}  {failed}")  # fmt: skip
        result.figures[f"{condition}: {name}"] = {"rounds": values, "node_over_it": ratios}
        for goal_name, text, bound in (
            (OFFLINE, "throughput / offline limit", 0.9),
            (ONE_BY_ONE, "throughput / stock, one at a time", 3.0),
            (LONGEST, "throughput / stock batching to the longest", 1.3),
        ):
            if goal_name == name:
                result.goal(f"{text}, {condition}", bound, ratios)


def picture_of(server: Server, wanted: Wanted) -> Any:
    """Pixels that a server makes of a request."""
    request = urllib.request.Request(
        server.generate, data=server.body(wanted).encode(),
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        raw = answer.read()
    try:
        body = json.loads(raw)
    except ValueError:
        body = raw.decode("ascii")  # BentoML answers a plain string as text
    if isinstance(body, dict):
        body = body["data"][0]["b64_json"]
    text = body[0] if isinstance(body, list) else body
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")).astype(float)


def _compared(pictures: dict[str, list[Any]]) -> dict[str, float]:
    print("\nThe same images? Mean difference to the node's, of 255 levels, 4 requests")
    own = pictures[NODE]
    differences = {
        name: float(np.mean([np.abs(a - b).mean() for a, b in zip(made, own, strict=True)]))
        for name, made in pictures.items()
    }  # fmt: skip
    for name, difference in differences.items():
        print(f"  {name:28}{difference:7.2f}")
    return differences
