"""precision: auto: what it measures and takes, and that measuring changes nothing."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from modelops.base.errors import TrainingError
from modelops.base.files import read_json, write_json
from modelops.records.read import read_record
from modelops.records.train import TrainRecord
from modelops.trainer.batches import Batch
from modelops.trainer.optimizers import make_optimizer
from modelops.trainer.precision import StepsOnACopy, Trial, candidates, choose, measure
from modelops.trainer.setup import make_network
from modelops.trainer.stepper import Stepper
from modelops.training.config import TrainConfig, load_config
from runs import freeze

Write = Callable[..., Path]
Trainer = Callable[..., Any]
CPU = torch.device("cpu")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"}


class Simulated:
    """Steps that take what a table says: {precision: (seconds of an image, of setting up)}."""

    def __init__(self, speeds: dict[str, tuple[float, float]], **fits: int) -> None:
        self.speeds = speeds
        self.fits = fits
        self.made: list[tuple[str, int]] = []
        self.updates = 0

    def gradient(self, precision: str, images: int) -> float:
        if images > self.fits.get(precision, 1000):
            raise torch.OutOfMemoryError("CUDA out of memory")
        first = precision not in {name for name, _ in self.made}
        self.made.append((precision, images))
        image, setting_up = self.speeds[precision]
        return image * images + setting_up * first

    def update(self) -> float:
        self.updates += 1
        return 0.1

    @property
    def spent(self) -> float:
        return sum(self.speeds[name][0] * images for name, images in self.made)


def _measure(steps: Simulated, asked: str = "auto", limit: float | None = None) -> dict[str, Trial]:
    return measure(steps, list(steps.speeds), asked=asked, microbatch=64, per_step=128, limit=limit)


def test_fast_candidates_take_turns_with_whole_microbatches() -> None:
    steps = Simulated({"fp32": (0.008, 0.3), "bf16": (0.004, 1.0)})
    trials = _measure(steps)
    assert trials["fp32"].seconds == pytest.approx(0.008 * 128 + 0.1)
    assert trials["bf16"].seconds == pytest.approx(0.004 * 128 + 0.1)
    whole = [name for name, images in steps.made if images == 64]
    assert whole[:10] == ["fp32"] * 2 + ["bf16"] * 2 + ["fp32", "bf16"] * 3
    assert choose("auto", trials).precision == "bf16"


def test_medians_count_where_a_pass_is_disturbed() -> None:
    class Disturbed(Simulated):
        def gradient(self, precision: str, images: int) -> float:
            seconds = super().gradient(precision, images)
            return 5 * seconds if len(self.made) % 5 == 0 else seconds

    steps = Disturbed({"fp32": (0.008, 0.0), "bf16": (0.004, 0.0)})
    assert _measure(steps)["bf16"].seconds == pytest.approx(0.004 * 128 + 0.1)


def test_emulated_bf16_is_given_up_after_one_image() -> None:
    # The pilot on two AVX2 cores: 15.7 images/s in fp32, one in bf16.
    steps = Simulated({"fp32": (0.064, 0.1), "bf16": (1.3, 0.1)})
    trials = _measure(steps)
    assert [images for name, images in steps.made if name == "bf16"] == [1, 1]
    assert trials["bf16"].given_up
    assert trials["bf16"].seconds == pytest.approx(20 * trials["fp32"].seconds, rel=0.1)
    choice = choose("auto", trials)
    assert choice.precision == "fp32"
    assert "bf16 was given up: 20.3 times slower than fp32 on one image" in choice.reason
    slower = Simulated({"fp32": (0.4, 0.1), "bf16": (8.0, 0.1)})
    assert choose("auto", _measure(slower)).precision == "fp32"
    assert [images for name, images in slower.made if name == "bf16"] == [1]


def test_a_format_that_falls_behind_with_more_images_is_given_up_there() -> None:
    class Emulated(Simulated):
        def gradient(self, precision: str, images: int) -> float:
            return 0.1 + super().gradient(precision, images)  # whatever the images

    steps = Emulated({"fp32": (0.03, 0.0), "bf16": (0.25, 0.0)})
    trials = _measure(steps)
    assert [images for name, images in steps.made if name == "bf16"] == [1, 1, 4, 4]
    assert "5.0 times slower than fp32 on 4 images" in trials["bf16"].note


def test_setting_up_is_no_reason_to_give_up() -> None:
    steps = Simulated({"fp32": (0.001, 0.0), "bf16": (0.0008, 1.5)})
    assert choose("auto", _measure(steps)).precision == "bf16"


def test_slow_machines_measure_with_fewer_images() -> None:
    steps = Simulated({"fp32": (0.25, 0.0), "bf16": (0.2, 0.0)})
    trials = _measure(steps)
    assert max(images for _, images in steps.made) == 4
    assert steps.spent < 12
    assert trials["fp32"].seconds == pytest.approx(32.1)
    assert trials["fp32"].note == "on 4 of 64 images"
    assert choose("auto", trials).precision == "bf16"
    measure(steps, ["fp32"], asked="fp32", microbatch=64, per_step=64, whole=True)
    assert steps.made[-1] == ("fp32", 64)


def test_a_time_limit_shortens_the_measuring() -> None:
    steps = Simulated({"fp32": (0.25, 0.0), "bf16": (0.2, 0.0)})
    _measure(steps, limit=40.0)
    assert max(images for _, images in steps.made) == 1
    assert steps.spent < 0.1 * 40
    steps = Simulated({"fp32": (30.0, 0.0), "bf16": (20.0, 0.0)})
    trials = _measure(steps, limit=90.0)
    assert steps.made == [("fp32", 1), ("bf16", 1)]
    assert trials["bf16"].seconds == pytest.approx(20 * 128 + 0.1)
    assert choose("auto", trials).precision == "bf16"


def test_what_is_named_is_only_seen_to_fit() -> None:
    steps = Simulated({"fp32": (0.008, 0.0)})
    assert _measure(steps, asked="fp32")["fp32"].seconds == pytest.approx(0.008 * 128 + 0.1)
    assert [images for _, images in steps.made] == [1, 1, 4, 4, 16, 16, 64, 64]


def test_what_does_not_fit_is_not_taken() -> None:
    speeds = {"fp32": (0.01, 0.0), "bf16": (0.02, 0.0)}
    trials = _measure(Simulated(speeds, fp32=1))
    assert math.isinf(trials["fp32"].seconds)
    choice = choose("auto", trials)
    assert (choice.precision, choice.reason) == ("bf16", "fp32 runs out of memory")
    for fits in (0, 2):
        trials = _measure(Simulated(speeds, fp32=fits, bf16=fits))
        assert all(math.isinf(trial.seconds) for trial in trials.values())


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    class Broken(Simulated):
        def gradient(self, precision: str, images: int) -> float:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        _measure(Broken({"fp32": (1.0, 0.0)}))


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ({"fp32": 1.0, "bf16": 0.95}, "fp32"),
        ({"fp32": 1.0, "bf16": 0.5}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.5, "fp16": 0.48}, "bf16"),
        ({"fp32": 1.0, "bf16": 0.5, "fp16": 0.4}, "fp16"),
        ({"fp32": 1.0, "bf16": 20.0, "fp16": 0.4}, "fp16"),
        ({"fp32": 1.0}, "fp32"),
    ],
)
def test_a_narrow_format_has_to_be_worth_it(seconds: dict[str, float], taken: str) -> None:
    choice = choose("auto", {name: Trial(value) for name, value in seconds.items()})
    assert choice.precision == taken
    assert not choice.warning
    assert all(name in choice.reason for name in seconds if name != taken)


def test_what_is_asked_for_is_taken_with_a_word_on_its_speed() -> None:
    call = Simulated({"fp32": (0.064, 0.1), "bf16": (1.3, 0.1)})
    choice = choose("bf16", _measure(call, asked="bf16"))
    assert choice.precision == "bf16"
    assert "times slower than fp32 here" in choice.warning
    assert "\n" not in choice.warning
    assert not choose("bf16", {"fp32": Trial(1.0), "bf16": Trial(1.02)}).warning
    assert not choose("fp32", {"fp32": Trial(1.0)}).warning


def test_candidates_of_a_cpu() -> None:
    assert candidates("auto", CPU) == ["fp32", "bf16"]
    assert candidates("bf16", CPU) == ["fp32", "bf16"]
    assert candidates("fp32", CPU) == ["fp32"]
    with pytest.raises(TrainingError, match="fp16 needs a GPU"):
        candidates("fp16", CPU)


@pytest.fixture
def config(write_config: Write) -> TrainConfig:
    return load_config(write_config(training={"optimizer": "muon"}))


@pytest.fixture
def batch() -> Batch:
    random = torch.Generator().manual_seed(0)
    return Batch(
        images=torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=random),
        noise=torch.randn(4, 12, 8, 8, generator=random),
        sigmas=torch.rand(4, generator=random),
        pooled=torch.randn(4, 384, generator=random),
        tokens=None,
        mask=None,
    )


def test_measuring_leaves_weights_and_random_streams_alone(
    config: TrainConfig, batch: Batch
) -> None:
    network = make_network(config, 384)
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    steps = StepsOnACopy(network, batch, config, CPU)
    for precision in ("fp32", "bf16", "fp32"):
        assert steps.gradient(precision, 4) > 0
        assert steps.update() > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


def test_fp16_scales_its_losses_and_leaves_out_a_step_that_overflows(
    config: TrainConfig, batch: Batch
) -> None:
    network = make_network(config, 384)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    norms = {}
    for precision in ("fp32", "fp16"):
        twin = copy.deepcopy(network)
        optimizer = make_optimizer(twin, config.training)
        stepper = Stepper(twin, twin, optimizer, config, device=CPU, precision=precision)
        stepper.backward(batch, 0, 2, of=4)
        stepper.backward(batch, 2, 4, of=4)
        norms[precision] = stepper.clip()
        assert stepper.update(norms[precision])
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.02)
    assert stepper.scaler is not None
    scale, weights = stepper.scaler.get_scale(), copy.deepcopy(twin.state_dict())
    stepper.backward(batch, 0, 4, of=4)
    first = next(weight for weight in twin.parameters() if weight.grad is not None)
    assert first.grad is not None
    first.grad[...] = math.inf
    assert not stepper.update(stepper.clip())
    assert stepper.scaler.get_scale() == scale / 2
    assert all(torch.equal(value, weights[name]) for name, value in twin.state_dict().items())


def _record(run_dir: Path) -> TrainRecord:
    return read_record(run_dir / "train.json", TrainRecord)


def _learned(run_dir: Path, step: int) -> dict[str, Any]:
    folder = run_dir / "checkpoints" / f"step-{step}"
    rows = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {
        f"row {row['step']} {name}": np.array(row[name])
        for row in rows
        for name in ("loss", "grad_norm", "validation_loss", "train_probe_loss")
        if name in row
    }
    for name in (
        "unet/diffusion_pytorch_model", "training_state/weights", "training_state/optimizer",
    ):  # fmt: skip
        tensors = load_file(folder / f"{name}.safetensors")
        found |= {f"{name} {key}": value for key, value in tensors.items()}
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_auto_learns_bit_for_bit_what_its_choice_learns(
    write_config: Write, run_trainer: Trainer, tmp_path: Path, optimizer: str
) -> None:
    config = write_config(training={"precision": "auto", "optimizer": optimizer})
    auto, named = tmp_path / "auto", tmp_path / "named"
    freeze(config, auto)
    done = run_trainer(auto)
    assert done.code == 0, done.err
    record = _record(auto)
    rates = record.precision_images_per_second
    assert record.precision in rates
    assert list(rates) == ["fp32", "bf16"]
    assert all(rate is not None and rate > 0 for rate in rates.values())
    assert record.setup_seconds is not None and record.setup_seconds > 0
    report = (auto / "report.md").read_text()
    assert f"| precision | {record.precision}: {record.precision_reason} |" in report
    assert f"bf16 {rates['bf16']:.4g} images/s" in report

    freeze(config, named, overrides=[f"training.precision={record.precision}"])
    done = run_trainer(named)
    assert done.code == 0, done.err
    assert _record(named).precision_reason == "asked for"
    ours, theirs = _learned(auto, 8), _learned(named, 8)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not np.array_equal(value, theirs[name])] == []


def test_a_resumed_run_keeps_its_precision(
    write_config: Write, run_trainer: Trainer, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    freeze(write_config(training={"precision": "auto"}), run_dir)
    done = run_trainer(run_dir)
    assert done.code == 0, done.err
    first = _record(run_dir)
    assert f"precision {first.precision}: " in done.out
    other = {"fp32": "bf16", "bf16": "fp32"}[first.precision]
    for step, precision in ((4, other), (8, other)):
        path = run_dir / "checkpoints" / f"step-{step}" / "training_state" / "state.json"
        state = read_json(path)
        assert state["progress"]["precision"] == first.precision
        state["progress"]["precision"] = precision  # as if it had been faster then
        write_json(path, state)
    (run_dir / "checkpoints" / "step-8" / "unet" / "config.json").write_text("{}")
    done = run_trainer(run_dir, "--resume")
    assert done.code == 0, done.err
    assert "going on from step 4" in done.out
    again = _record(run_dir)
    assert (again.precision, again.sessions) == (other, 2)
    assert again.precision_images_per_second == first.precision_images_per_second
    assert '"text": "precision' not in done.out


@pytest.mark.slow
def test_without_bf16_instructions_auto_is_fp32_and_bf16_is_told_its_price(
    write_config: Write, tmp_path: Path, trainer_environment: dict[str, str]
) -> None:
    """On a newer processor, torch is made to believe that it has AVX2 only."""
    config = write_config(
        model={"channels": 64, "multipliers": [1, 2]},
        training={"total_steps": 2, "validate_every_steps": 100, "microbatch": 16},
    )
    for asked, taken in (("auto", "fp32"), ("bf16", "bf16")):
        run_dir = tmp_path / asked
        freeze(config, run_dir, overrides=[f"training.precision={asked}"])
        done = subprocess.run(
            [sys.executable, "-m", "modelops.trainer", str(run_dir / "config.json")],
            capture_output=True, text=True, check=False,
            env={**trainer_environment, **AVX2, "PATH": os.environ["PATH"]},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = _record(run_dir)
        assert record.precision == taken
        rates = record.precision_images_per_second
        fp32, bf16 = rates["fp32"], rates["bf16"]
        assert fp32 is not None and bf16 is not None and fp32 > 2 * bf16
        warnings = [line for line in done.stderr.splitlines() if "slower than fp32" in line]
        assert len(warnings) == (asked == "bf16")
        assert len([line for line in record.warnings if "slower" in line]) == len(warnings)
