"""The demo's steps from training to serving; each calls the function behind a command."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from modelops.base.errors import (
    ExportError,
    GateFailedError,
    GateUndecidedError,
    TrainingError,
    UsageError,
)
from modelops.base.files import atomic_directory, write_bytes
from modelops.base.steps import OnProgress
from modelops.cards.about import openmoji_about
from modelops.demo.budgets import Budget
from modelops.demo.project import (
    CARDS,
    CONFIG,
    DEDUP,
    EARLY,
    ENDPOINT,
    FINAL,
    GRID,
    INT8_DIR,
    INT8_REFUSED,
    LIT,
    MANIFEST,
    MODEL_NAME,
    ONNX_DIR,
    POLICY,
    RELEASED,
    RELEASED_DIR,
    RUN,
    SEED,
    SERVED_IMAGES,
    SHARDS,
    SPLITS,
    VERDICT,
    cited,
    describe,
    grid_prompts,
    int8_record,
)
from modelops.records.export import ArtifactRecord
from modelops.records.read import read_record
from modelops.records.train import TrainRecord


class Stages:
    """Steps on the model; each returns one line about its result."""

    def __init__(self, root: Path, budget: Budget) -> None:
        self.root = root
        self.budget = budget

    def train(self, report: OnProgress) -> str:
        from modelops.training.launch import launch_training, plan_run

        run = self.root / RUN
        resume = (run / "config.json").exists()
        if resume:
            try:
                plan_run(self.root / CONFIG, run_dir=run, resume=True)
            except UsageError:  # the config or the data has changed: another run
                shutil.rmtree(run)
                resume = False
        if (run / "train.json").exists() and read_record(
            run / "train.json", TrainRecord
        ).status == "ok":
            shutil.rmtree(run)  # finished, and yet asked for again: --force, or edited outputs
            resume = False
        lines: list[str] = []
        code = launch_training(
            self.root / CONFIG, run, resume=resume, on_line=lines.append, on_progress=report
        )
        if code != 0:
            said = [line for line in lines if line.strip()]
            raise TrainingError(
                f"training ended with exit code {code}: {said[-1] if said else 'no message'}",
                hint="run `modelops demo` again to go on from the last checkpoint",
            )
        record = self.train_record()
        return (
            f"{record.parameters / 1e6:.1f} M parameters, {record.steps} steps, "
            f"{record.images_seen} images seen, loss {record.loss_trend}"
        )

    def lit(self, report: OnProgress) -> str:
        from modelops.evaluation.lit import fit_lit

        record = fit_lit(
            self.root / MANIFEST, self.root / SPLITS, self.root / LIT, seed=SEED, on_progress=report
        )
        top5 = record.metrics["heldout_retrieval_top5"]
        return f"held-out retrieval top-5 {describe(top5)} of {top5.n}"

    def evaluate_early(self, report: OnProgress) -> str:
        first = min(self.train_record().checkpoints, key=lambda checkpoint: checkpoint.step)
        return self._evaluate(self.root / RUN / first.path, EARLY, report)

    def evaluate_final(self, report: OnProgress) -> str:
        return self._evaluate(self.final_checkpoint, FINAL, report)

    def evaluate_released(self, report: OnProgress) -> str:
        return self._evaluate(self.root / RELEASED_DIR, RELEASED, report)

    def _evaluate(
        self, source: Path | str, out: str, report: OnProgress, n: int | None = None
    ) -> str:
        from modelops.evaluation.evaluate import evaluate
        from modelops.evaluation.report.page import write_report
        from modelops.evaluation.settings import EvaluationSettings
        from modelops.evaluation.sources.open import open_source

        settings = EvaluationSettings(
            manifest=self.root / MANIFEST,
            splits=self.root / SPLITS,
            lit=self.root / LIT,
            n=n or self.budget.prompts,
            seed=SEED,
            steps=self.budget.steps,
            resamples=self.budget.resamples,
            slice_by=("words",),
        )
        record = evaluate(
            open_source(str(source)), settings, out_path=self.root / out, on_progress=report
        )
        write_report(self.root / out)
        distance = record.metrics["frechet_distance_lite0"]
        gain = record.metrics["lit_alignment_gain"]
        return f"Fréchet (Lite0) {describe(distance)}, alignment gain {describe(gain)}"

    def grid(self, report: OnProgress) -> str:
        from modelops.base.seeding import image_seed
        from modelops.evaluation.grids import write_grid
        from modelops.models.request import ImageRequest
        from modelops.models.sources import open_checkpoint

        source = open_checkpoint(self.final_checkpoint)
        base = source.defaults
        prompts = grid_prompts()
        images: list[Any] = []
        for start in range(0, len(prompts), source.batch_size):
            images += source.generate(
                [
                    ImageRequest(
                        prompt=prompt, seed=image_seed(SEED, prompt),
                        steps=self.budget.steps or base.steps, guidance=base.guidance,
                        height=base.height, width=base.width,
                    )
                    for prompt in prompts[start : start + source.batch_size]
                ]
            )  # fmt: skip
            report(len(images), len(prompts))
        write_grid(self.root / GRID, images, prompts, columns=8, tile=128)
        return f"{len(prompts)} prompts, one seed each, none selected"

    def export_onnx(self, report: OnProgress) -> str:
        from modelops.export.to_onnx import export_onnx

        record = export_onnx(
            self.final_checkpoint, self.root / ONNX_DIR, overwrite=True, on_progress=report
        )
        return f"{_parity(record)}, {record.bytes_total / 1e6:.0f} MB"

    def export_int8(self, report: OnProgress) -> str:
        from modelops.base.seeding import numpy_generator
        from modelops.data.manifest import read_manifest
        from modelops.data.split import read_splits
        from modelops.export.to_int8 import Int8Options, export_int8

        splits = read_splits(self.root / SPLITS)
        captions = sorted(
            {row.caption for row in read_manifest(self.root / MANIFEST, check_files=False).rows
             if splits[row.id] == "train"}
        )  # fmt: skip
        picked = numpy_generator(SEED, "calibration prompts").permutation(len(captions))
        refused = self.root / INT8_REFUSED
        refused.unlink(missing_ok=True)  # of an earlier run
        try:
            record = export_int8(
                self.root / ONNX_DIR,
                self.final_checkpoint,
                self.root / INT8_DIR,
                prompts=[captions[i] for i in picked[: self.budget.calibration_prompts]],
                seed=SEED,
                options=Int8Options(search_seconds=self.budget.search_seconds),
                allow=self.budget.allow_slow_int8,
                overwrite=True,
                on_progress=report,
            )
        except ExportError as error:
            if not refused.is_file() or read_record(refused, ArtifactRecord).status != "refused":
                raise
            # A processor on which INT8 does not pay, say: the record stays, and fp32 is released.
            shutil.rmtree(self.root / INT8_DIR, ignore_errors=True)
            self._choose(ONNX_DIR)
            return f"fp32 is released; {error.message.splitlines()[0]}"
        self._choose(INT8_DIR)
        return f"INT8 is released; {_parity(record)}, {record.bytes_total / 1e6:.0f} MB"

    def _choose(self, artifact: str) -> None:
        """Let an artifact be the one that is evaluated, gated and served."""
        with atomic_directory(self.root / RELEASED_DIR) as target:
            shutil.copytree(self.root / artifact, target, dirs_exist_ok=True)

    def cards(self, report: OnProgress) -> str:
        from modelops.cards.dataset import write_dataset_card
        from modelops.cards.model import write_model_card
        from modelops.data.stats import manifest_statistics

        cards = self.root / "cards"
        report(0, 2)
        write_dataset_card(
            cards / "dataset_card.md",
            statistics=manifest_statistics(
                self.root / MANIFEST, self.root / SPLITS, self.root / DEDUP
            ),
            manifest=self.root / MANIFEST,
            dedup=self.root / DEDUP,
            split=self.root / "data/split.json",
            smoke=self.root / "data/smoke.json",
            shard_manifest=self.root / SHARDS,
            about=openmoji_about(),
        )
        report(1, 2)
        write_model_card(
            cards / "model_card.md",
            train=self.root / RUN / "train.json",
            evaluations={
                "early": self.root / EARLY, "final": self.root / FINAL,
                "released": self.root / RELEASED,
            },
            artifacts={
                "onnx": self.root / ONNX_DIR / "artifact.json",
                "int8": self.root / int8_record(self.root),
            },
            split=self.root / "data/split.json",
            dedup=self.root / DEDUP,
            pictures={
                "64 common prompts, one fixed seed each, none selected": self.root / GRID,
                "Loss": self.root / RUN / "loss.png",
            },
            dataset_card=cards / "dataset_card.md", about=openmoji_about(),
        )  # fmt: skip
        return "model_card.md, dataset_card.md"

    def gate(self, report: OnProgress) -> str:
        from modelops.gates.decide import decide

        verdict = decide(self.root / POLICY, root=self.root, out_path=self.root / VERDICT)
        unmet = [line for line in verdict.criteria if line.answer != "pass"]
        if unmet:
            raise (GateFailedError if verdict.answer == "fail" else GateUndecidedError)(
                f"the gate says {verdict.answer}: "
                + "; ".join(f"{line.name}: {line.reason}" for line in unmet),
                hint=f"see {self.root / VERDICT}; the policy is {self.root / POLICY}",
            )
        return f"{verdict.answer}, {len(verdict.criteria)} of {len(verdict.criteria)} criteria met"

    def release(self, report: OnProgress) -> str:
        from modelops.base.files import sha256_tree
        from modelops.monitoring.reference import release_files
        from modelops.releases.build import build_release
        from modelops.serving.node.batch_invariance import release_proofs

        model = self.root / RELEASED_DIR
        is_int8 = read_record(model / "artifact.json", ArtifactRecord).format == "int8"
        fallback = self.root / ONNX_DIR if is_int8 else None
        said, golden = release_proofs(model, self.root / ".modelops", fallback=fallback)
        reference, _ = release_files(
            [self.root / RELEASED], model_sha256=sha256_tree(model),
            folder=self.root / ".modelops/monitoring",
        )  # fmt: skip
        record = build_release(
            self.root / "release",
            model_dir=model,
            fallback=fallback,
            verdict=self.root / VERDICT,
            policy=self.root / POLICY,
            cards=[self.root / name for name in CARDS],
            name=MODEL_NAME,
            version="1.0.0",
            defaults=said,
            # Where they lie in the project, so that the cards' links and `card check` hold.
            extra_files={
                **golden,
                **reference,
                **{name: self.root / name for name in cited(self.root)},
            },
            notice="\n".join(openmoji_about().attribution),
        )
        size = sum(file.bytes for file in record.files.values())
        return f"{len(record.files)} files, {size / 1e6:.0f} MB, every one by digest"

    def serve(self, report: OnProgress) -> str:
        from modelops.evaluation.compare.agreement import compare_images
        from modelops.serving.deploy.check import check_endpoint
        from modelops.serving.deploy.launch import start_server

        log = self.root / ".modelops/server.log"
        with start_server(self.root / "release", log_path=log) as server:
            check = check_endpoint(server.url, "red heart", seed=1)
            self._evaluate(server.url, ENDPOINT, report, n=SERVED_IMAGES)
        write_bytes(self.root / "evaluations/served.png", check.png)
        found = compare_images(self.root / ENDPOINT, self.root / RELEASED)
        return (
            f"openai client served in {check.second_s:.1f} s; {found.identical} of {found.n} "
            f"served images equal the gated ones, the rest within {found.largest} of 255"
        )

    @property
    def final_checkpoint(self) -> Path:
        return self.root / RUN / self.train_record().checkpoints[-1].path

    def train_record(self) -> TrainRecord:
        return read_record(self.root / RUN / "train.json", TrainRecord)


def _parity(record: ArtifactRecord) -> str:
    worst = [check for check in record.parity if not check.holds]
    return f"parity: {len(record.parity) - len(worst)} of {len(record.parity)} checks passed"
