"""The demo's steps, in the order of a release."""

from __future__ import annotations

from pathlib import Path

from modelops.base.steps import Chain, Step
from modelops.demo.budgets import Budget, trainer_config
from modelops.demo.data_stages import DataStages
from modelops.demo.project import (
    CARDS,
    CONFIG,
    DEDUP,
    EARLY,
    ENDPOINT,
    FINAL,
    GRID,
    LIT,
    MANIFEST,
    ONNX_DIR,
    POLICY,
    RELEASED,
    RELEASED_DIR,
    RUN,
    SEED,
    SHARDS,
    SPLITS,
    VERDICT,
    cited,
    grid_prompts,
    int8_record,
)
from modelops.demo.stages import Stages
from modelops.training.config import load_config


def demo_chain(root: Path, budget: Budget) -> Chain:
    """The steps of the demo in project directory `root`; the trainer's config there, or the
    budget's own before there is one, says at what resolution."""
    config = root / CONFIG
    resolution = load_config(
        config if config.exists() else trainer_config(budget.config)
    ).model.resolution
    data = DataStages(root, budget, resolution)
    stages = Stages(root, budget)
    size = {
        "prompts": budget.prompts,
        "steps": budget.steps,
        "seed": SEED,
        "resamples": budget.resamples,
    }
    evaluated = [MANIFEST, SPLITS, LIT]
    steps = [
        Step(
            name="corpus", title="Draw and caption the images", run=data.corpus,
            outputs=[MANIFEST, "data/images"],
            settings={"pictures": budget.pictures, "resolution": resolution},
        ),
        Step(
            name="dedup", title="Find near-duplicates", run=data.dedup,
            inputs=[MANIFEST, "data/images"], outputs=[DEDUP],
        ),
        Step(
            name="split", title="Split without leaks", run=data.split,
            inputs=[MANIFEST, DEDUP], outputs=[SPLITS, "data/split.json"],
            settings={"seed": SEED},
        ),
        Step(
            name="shards", title="Pack shards", run=data.shards,
            inputs=[MANIFEST, SPLITS, "data/images"], outputs=["data/shards", SHARDS],
            settings={"resolution": resolution},
        ),
        Step(
            name="loader", title="Test the data loader", run=data.loader,
            inputs=[SHARDS, "data/shards"], outputs=["data/smoke.json"],
        ),
        Step(
            name="train", title="Train", run=stages.train,
            inputs=[CONFIG, MANIFEST, SPLITS, SHARDS],
            outputs=[f"{RUN}/train.json", f"{RUN}/checkpoints"],
        ),
        Step(
            name="lit", title="Fit the text-image scorer", run=stages.lit,
            inputs=[MANIFEST, SPLITS], outputs=[LIT], settings={"seed": SEED},
        ),
        Step(
            name="early", title="Evaluate the checkpoint at 5 %", run=stages.evaluate_early,
            inputs=[f"{RUN}/train.json", *evaluated], outputs=[EARLY], settings=size,
        ),
        Step(
            name="final", title="Evaluate the final checkpoint", run=stages.evaluate_final,
            inputs=[f"{RUN}/train.json", *evaluated], outputs=[FINAL], settings=size,
        ),
        Step(
            name="grid", title="Draw the fixed 8 x 8 grid", run=stages.grid,
            inputs=[f"{RUN}/train.json"], outputs=[GRID],
            settings={"prompts": grid_prompts(), "seed": SEED},
        ),
        Step(
            name="onnx", title="Export to ONNX", run=stages.export_onnx,
            inputs=[f"{RUN}/train.json"], outputs=[ONNX_DIR],
        ),
        Step(
            name="int8", title="Export to INT8, and choose what is released",
            run=stages.export_int8, inputs=[ONNX_DIR, SPLITS], outputs=[RELEASED_DIR],
            settings={
                "prompts": budget.calibration_prompts, "seed": SEED,
                "search_seconds": budget.search_seconds, "allow": budget.allow_slow_int8,
            },
        ),
        Step(
            name="evaluate-released", title="Evaluate the artifact to be released",
            run=stages.evaluate_released, inputs=[RELEASED_DIR, *evaluated], outputs=[RELEASED],
            settings=size,
        ),
        Step(
            name="cards", title="Write the cards", run=stages.cards,
            inputs=lambda: [
                FINAL, EARLY, RELEASED, f"{RUN}/train.json", ONNX_DIR, RELEASED_DIR,
                int8_record(root), DEDUP, "data/split.json", GRID,
            ],
            outputs=list(CARDS),
        ),
        Step(
            name="gate", title="Decide", run=stages.gate,
            inputs=[POLICY, FINAL, EARLY, RELEASED, RELEASED_DIR], outputs=[VERDICT],
        ),
        Step(
            name="release", title="Build the release", run=stages.release,
            inputs=lambda: [VERDICT, POLICY, RELEASED_DIR, ONNX_DIR, *CARDS, *cited(root)],
            outputs=["release"],
        ),
        Step(
            name="serve", title="Serve it once and ask for an image", run=stages.serve,
            inputs=["release"], outputs=[ENDPOINT],
        ),
    ]  # fmt: skip
    return Chain(root, steps)
