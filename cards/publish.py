"""Publish the cards of a demo, or check the README's numbers against those that are published:

    python cards/publish.py DEMO_DIR
    python cards/publish.py --render
    python cards/publish.py --check

Copies to cards/openmoji-pilot/ the cards with their images, every record they print and the
verdict, in the project's own layout, so that links and `modelops card check` hold; and prints the
README's table from those records. After a change of a template, --render prints the published cards
again from the records beside them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from modelops import __version__
from modelops.base.files import (
    atomic_directory,
    read_text,
    sha256_bytes,
    sha256_file,
    tree_files,
    write_text,
)
from modelops.cards.about import parse_about
from modelops.cards.check import find_cards
from modelops.cards.dataset import render_dataset_card
from modelops.cards.model import render_model_card
from modelops.cards.sources import read_sources, split_notes, with_notes, write_sources
from modelops.demo.project import (
    EARLY,
    FINAL,
    POLICY,
    RELEASED,
    RELEASED_DIR,
    RUN,
    VERDICT,
    cited,
    describe,
    int8_record,
)
from modelops.records.base import Measurement
from modelops.records.evaluation import EvaluationRecord
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record
from modelops.records.release import Verdict
from modelops.records.train import TrainRecord

PUBLISHED = Path(__file__).parent / "openmoji-pilot"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- pilot:begin -->", "<!-- pilot:end -->"


def publish(project: Path) -> int:
    """Copy a demo's cards and records; returns the number of files."""
    cards = {f"cards/{name}": path for name, path in tree_files(project / "cards").items()}
    names = (*cited(project), f"{RELEASED_DIR}/artifact.json", VERDICT, POLICY)
    records = {name: project / name for name in names}
    files = {**cards, **records}
    with atomic_directory(PUBLISHED) as target:
        for name, path in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    return len(files)


def render_again() -> int:
    """Print the published cards again; returns their number."""
    cards = find_cards(PUBLISHED)
    for card in cards:
        sources = read_sources(card)
        sources.modelops = __version__
        sources.about = parse_about(sources.about, source=str(card)).model_dump(mode="json")
        render = render_model_card if sources.card == "model" else render_dataset_card
        body = render(sources, card.parent)
        sources.body_sha256 = sha256_bytes(body.encode())
        write_text(card, with_notes(body, split_notes(read_text(card))[1]))
        write_sources(card, sources)
    return len(cards)


def readme_table(project: Path) -> str:
    """What the pilot came to, in Markdown, every number from a record."""
    train = read_record(project / RUN / "train.json", TrainRecord)
    # What was published before the demo chose its artifact was INT8.
    evaluated = RELEASED if (project / RELEASED).is_file() else "evaluations/int8.json"
    early, final, released = (
        read_record(project / name, EvaluationRecord).metrics for name in (EARLY, FINAL, evaluated)
    )
    artifact = read_record(project / int8_record(project), ArtifactRecord)
    served = "INT8" if artifact.status == "ok" else "fp32"
    verdict = read_record(project / VERDICT, Verdict)
    distance = "frechet_distance_lite0"
    ratio = _value(final[distance]) / _value(early[distance])
    psnr = min(check.value for check in artifact.parity if check.measure == "psnr_db")
    passed = sum(criterion.answer == "pass" for criterion in verdict.criteria)
    speed = {
        name: describe(artifact.speed[f"denoiser_batch8_over_{name}"])
        for name in ("torch_eager", "onnxruntime_fp32", "openvino_fp32")
    }
    rows = [
        ("Fréchet distance (Lite0 features, not FID)", describe(final[distance]),
         f"{describe(early[distance])} at 5 % of training, so a ratio of {ratio:.2f}; "
         f"{describe(final[f'{distance}_floor'])} for real training images"),
        (f"the same of the {served} artifact that is served", describe(released[distance]), ""),
        ("alignment with own prompt (LiT cosine)", describe(final["lit_alignment"]),
         f"{describe(final['lit_alignment_shuffled'])} with shuffled prompts; "
         f"{describe(final['lit_alignment_real'])} for real images"),
        ("alignment gain, paired", describe(final["lit_alignment_gain"]),
         f"{describe(early['lit_alignment_gain'])} at 5 % of training"),
        ("the judge's own held-out retrieval, top-1",
         describe(final["lit_heldout_retrieval_top1"]),
         f"top-5 {describe(final['lit_heldout_retrieval_top5'])}"),
        ("nearest training image (1 − cosine)", describe(final["nearest_train_distance"]),
         f"{describe(final['nearest_train_distance_heldout'])} for real held-out images"),
        ("unsafe images (open_nsfw)", describe(released["unsafe_rate"]), ""),
        ("INT8 denoiser at batch 8", f"× {speed['torch_eager']} eager torch",
         f"× {speed['onnxruntime_fp32']} onnxruntime fp32, × {speed['openvino_fp32']} OpenVINO "
         f"fp32; images within {psnr:.1f} dB PSNR"),
        ("gate", f"**{verdict.answer}**", f"{passed} of {len(verdict.criteria)} criteria, "
         "[policy](cards/openmoji-pilot/policy.yaml), "
         "[verdict](cards/openmoji-pilot/gate/verdict.json)"),
    ]  # fmt: skip
    head = (
        f"{train.steps} steps, {train.images_seen:,} images seen, {train.training_seconds:.0f} s "
        f"on {train.environment.cores if train.environment else '?'} CPU cores; "
        f"n = {final[distance].n} held-out captions, 95 % intervals.\n\n"
        "| measure | value | beside it |\n|---|---|---|\n"
    )
    return head + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def readme_with(table: str) -> str:
    """The README with this table between its markers."""
    text = README.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"README.md: no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def lost_evidence() -> list[str]:
    """Evidence of the published verdict that is not beside it, in words."""
    evidence = read_record(PUBLISHED / VERDICT, Verdict).inputs
    return [
        f"{item.path}: not the file that the verdict was made of"
        for item in evidence.values()
        if not (PUBLISHED / item.path).is_file()
        or sha256_file(PUBLISHED / item.path) != item.sha256
    ]


def _value(measurement: Measurement) -> float:
    if measurement.value is None:
        raise SystemExit(f"not measured: {measurement.not_measured}")
    return measurement.value


def main(argument: str) -> int:
    """Publish, or with --check say whether the README is up to date; returns the exit code."""
    if argument == "--check":
        stale = readme_with(readme_table(PUBLISHED)) != README.read_text("utf-8")
        print("README.md: its pilot table is", "stale" if stale else "up to date")
        for problem in (lost := lost_evidence()):
            print(problem)
        return 3 if stale or lost else 0
    if argument == "--render":
        print(f"{render_again()} cards rendered in {PUBLISHED}")
        return 0
    print(f"{publish(Path(argument))} files in {PUBLISHED}")
    write_text(README, readme_with(readme_table(PUBLISHED)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
