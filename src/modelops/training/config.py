"""Training configs: YAML in, a frozen and checked `TrainConfig` out. Imports no torch.

An unknown key, a wrong type, a value out of range or sizes that do not divide are a `ConfigError`
that names the file, the key and, for a misspelt key, the one that was probably meant. Relative
paths in a config are relative to the folder of the config file.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from modelops.base.errors import ConfigError
from modelops.base.files import read_yaml, sha256_json
from modelops.base.guidance import guidance_scale
from modelops.records.base import InputRef

NORM_GROUPS = 32  # of diffusers' GroupNorm: every level's width is a multiple of it


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text and 5e4 as text: make them numbers again; refuse yes and no."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"should be a number, got {value!r}") from None
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("should be a finite number")
        return int(value) if value.is_integer() else value
    return value


def _precision(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false; fp32 is another name of it."""
    return "no" if value is False or value == "fp32" else value


Real = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


class ModelSection(_Section):
    """Model to train."""

    name: Literal["unet_2d_small"] = "unet_2d_small"
    """The network: a UNet2DConditionModel on pixel-unshuffled RGB."""
    channels: Whole = Field(default=64, gt=0)
    """Width of the first level; a multiple of 32."""
    resolution: Whole = Field(default=64, ge=8, le=2048)
    """Image height and width, in pixels."""
    patch_size: Whole | None = Field(default=None, gt=0)
    """Pixel-unshuffle factor; by default such that the network works on 16 x 16 positions up to 64
    pixels and on 32 x 32 above."""
    multipliers: tuple[Whole, ...] = Field(default=(1, 2, 2), min_length=1, max_length=6)
    """Width of each level, as a multiple of `channels`."""
    layers_per_block: Whole = Field(default=2, gt=0, le=8)
    """Residual blocks per level."""
    attention_levels: tuple[Whole, ...] | None = None
    """Levels with attention (0 is the outermost); by default all but the outermost."""
    cross_attention: bool = False
    """Attend to the text's tokens, beside the pooled embedding."""
    prediction: Literal["velocity", "sample"] = "velocity"
    """What the network's output is: noise - image, or the image. The loss is always on velocity."""
    text_encoder: str | None = None
    """A transformers directory or hub id; by default the packaged all-MiniLM-L6-v2. Of a caption it
    reads 32 tokens; longer ones are counted before the first step, and in train.json."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        levels = len(self.multipliers)
        if self.patch_size is None:
            object.__setattr__(self, "patch_size", default_patch_size(self.resolution))
        if self.attention_levels is None:
            object.__setattr__(self, "attention_levels", tuple(range(1, levels)))
        patch, attention = self.patch_size or 1, self.attention_levels or ()
        if self.resolution % patch:
            raise ValueError(
                f"resolution {self.resolution} is not a multiple of patch_size {patch}"
            )
        grid, halvings = self.resolution // patch, 2 ** (levels - 1)
        if grid % halvings:
            raise ValueError(
                f"resolution {self.resolution} with patch_size {patch} gives a {grid} x {grid} "
                f"grid, which {levels} levels cannot halve {levels - 1} times"
            )
        for factor in self.multipliers:
            if factor < 1 or (self.channels * factor) % NORM_GROUPS:
                raise ValueError(
                    f"channels {self.channels} x multiplier {factor} is not a positive multiple of "
                    f"{NORM_GROUPS}"
                )
        if any(level not in range(levels) for level in attention):
            raise ValueError(
                f"attention_levels {list(attention)} name levels beyond 0..{levels - 1}"
            )
        return self

    @property
    def patch(self) -> int:
        """`patch_size`, filled in."""
        return self.patch_size or default_patch_size(self.resolution)


class DataSection(_Section):
    """Data to train on. Paths are relative to the config file's folder."""

    manifest: str | None = None
    """manifest.parquet or .csv; its images are read unless `shards` is given."""
    splits: str | None = None
    """splits.parquet; by default the one beside the manifest or the shards, when there. Without one
    every image is trained on and there is no validation."""
    shards: str | None = None
    """shard_manifest.csv: read the images from its tar files."""
    balance: Literal["none", "group"] = "none"
    """group: draw with weight 1 / (size of the sample's group)^balance_power, so that a few large
    groups of variants do not crowd out the rest."""
    balance_power: Real = Field(default=0.5, ge=0, le=1)
    """0.5 is a compromise; 1 draws every group equally often."""
    horizontal_flip: Real = Field(default=0.0, ge=0, le=1)
    """Probability that a training image is mirrored."""
    cache_gb: Real = Field(default=4.0, ge=0)
    """Decoded images are kept in memory up to this size, and beyond it decoded when needed. Images
    that cannot be decoded are found before the first step either way, left out and counted."""

    @model_validator(mode="after")
    def _some_pictures(self) -> Self:
        if self.manifest is None and self.shards is None:
            raise ValueError("give `manifest` (manifest.parquet) or `shards` (shard_manifest.csv)")
        return self


class TrainingSection(_Section):
    """Settings of the training."""

    optimizer: Literal["adamw", "adam", "muon"] = "adamw"
    """adamw decays weights apart from the gradient; only matrices and kernels are decayed. muon
    orthogonalises the updates of hidden layers and leaves the rest to adamw, at the same lr."""
    lr: Real = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[Real, Real] = (0.9, 0.99)
    """Adam's decay rates, each in [0, 1)."""
    weight_decay: Real = Field(default=0.01, ge=0)
    """Weight decay."""
    microbatch: Whole = Field(default=64, gt=0)
    """Images per forward pass and process. Effective batch = microbatch x grad_accum_steps x
    processes."""
    grad_accum_steps: Whole = Field(default=1, gt=0)
    """Forward passes per optimizer step."""
    total_steps: Whole = Field(default=1000, gt=0)
    """Optimizer steps."""
    time_limit_seconds: Real | None = Field(default=None, gt=0)
    """Make fewer steps than total_steps if they would take longer than this, from the measuring of
    the precision to the end of the last checkpoint. The plan is made from measured steps,
    validations, grids and checkpoints, corrected on the way and kept in the checkpoints; the
    learning rate ends near 0 all the same."""
    save_every_steps: Whole = Field(default=500, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Whole | None = Field(default=3, gt=0)
    """How many of the newest checkpoints to keep, beside the early one; null keeps all."""
    early_checkpoint: Real | None = Field(default=0.05, gt=0, lt=1)
    """Fraction of the steps after which one checkpoint is saved and kept for comparison."""
    precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(_precision)] = (
        "auto"
    )
    """auto: the fastest of fp32, bf16 and fp16 here, by a few measured steps; fp32 unless another
    gains a tenth. Or bf16, fp16 (with dynamic loss scaling, on a GPU), or no, which is fp32."""
    seed: Whole = Field(default=0, ge=0, lt=2**53)
    """Every random stream is derived from it."""
    warmup_steps: Whole | None = Field(default=None, ge=0)
    """Linear warm-up; by default 1 % of the steps, but at least 50 and at most a tenth of them."""
    lr_schedule: Literal["linear_decay", "constant", "cosine"] = "linear_decay"
    """After warm-up: constant and then linear to 0, constant, or a half cosine to 0."""
    lr_decay_fraction: Real = Field(default=0.3, gt=0, le=1)
    """The last part of the steps over which linear_decay goes to 0."""
    caption_dropout: Real = Field(default=0.1, ge=0, lt=1)
    """Share of samples trained with the empty caption, for classifier-free guidance."""
    grad_clip: Real = Field(default=1.0, gt=0)
    """Largest gradient norm."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the noise level, stratified over the effective batch."""
    compile: bool = False
    """torch.compile the network."""
    channels_last: bool = False
    """Keep activations as NHWC in memory."""
    validate_every_steps: Whole | None = Field(default=None, gt=0)
    """Steps between validations; by default a twentieth of the steps, or more where validations
    would take over a tenth of a time limit."""
    validation_samples: Whole = Field(default=256, gt=0)
    """At most this many held-out images are validated on, with fixed times and noise."""
    early_check_every_steps: Whole | None = Field(default=None, ge=0)
    """Steps between checks of a few samples against their nearest training images; 0 makes none.
    By default they are made at validations, as often as 3 % of the training time allows."""
    sample_every_steps: Whole | None = Field(default=None, gt=0)
    """Steps between sample grids; by default one at each checkpoint, unless they would take over a
    tenth of a time limit: then one at the end, or none."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the grid; by default 16 held-out captions."""
    sample_steps: Whole = Field(default=24, gt=0)
    """Sampler steps of the grid, and the default of the checkpoints."""
    sample_guidance: Annotated[Real, AfterValidator(guidance_scale)] = 3.0
    """Guidance scale of the grid, and the default of the checkpoints; 0 and 1 are both off."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} should each be in [0, 1)")
        return self


class EmaSection(_Section):
    """The averaged weights that are evaluated and released."""

    use: bool = True
    """Average the weights, in float32."""
    decay: Real = Field(default=0.9999, ge=0, lt=1)
    """Decay per step once the run is long enough."""
    warmup: Literal["ramp", "power", "none"] = "ramp"
    """How the decay grows to `decay` after n steps: ramp (1 + n) / (10 + n), power as in EDM2,
    (1 - 1/n)^(g + 1), or none: not at all. A fixed 0.9999 still samples noise after 1,500 steps."""
    power_std: Real = Field(default=0.1, gt=0, lt=0.28)
    """For power: width of the averaged window relative to the run's length."""


class LoggingSection(_Section):
    """Records that are written during the run."""

    wandb_project: str | None = None
    """Also log to this Weights & Biases project, if wandb is installed."""
    log_every_steps: Whole = Field(default=50, gt=0)
    """Steps between lines of stats.jsonl; fewer in a short run, for 40 lines if it has 40 steps."""
    tensorboard: bool = True
    """Also write TensorBoard events."""


class TrainConfig(_Section):
    """One training run."""

    model: ModelSection
    """What is trained."""
    data: DataSection
    """What it is trained on."""
    training: TrainingSection
    """How it is trained."""
    ema: EmaSection = EmaSection()
    """The averaged weights."""
    logging: LoggingSection = LoggingSection()
    """What is written down."""

    @property
    def sha256(self) -> str:
        """Digest of the whole config, defaults included."""
        return sha256_json(self.model_dump(mode="json"))

    def warmup(self, total_steps: int) -> int:
        """Warm-up steps of a run of `total_steps`."""
        if self.training.warmup_steps is not None:
            return min(self.training.warmup_steps, total_steps)
        return min(max(50, math.ceil(total_steps / 100)), total_steps // 10)

    def differences(self, other: TrainConfig) -> list[str]:
        """Keys that change what is learned and differ, as "training.lr: 0.001 -> 0.0001".

        How often to log, save, validate or sample, how much to cache, and how an effective batch is
        split into microbatches and processes do not count.
        """
        before, after = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        return [
            f"{key}: {before[key]} -> {after[key]}"
            for key in before
            if key not in _OPERATIONAL and before[key] != after[key]
        ]


_OPERATIONAL = {
    "data.cache_gb", "data.manifest", "data.splits", "data.shards",  # the digests count, not names
    "training.microbatch", "training.grad_accum_steps", "training.save_every_steps",
    "training.keep_checkpoints", "training.early_checkpoint", "training.compile",
    "training.channels_last", "training.validate_every_steps", "training.validation_samples",
    "training.early_check_every_steps", "training.sample_every_steps", "training.sample_prompts",
    "training.sample_steps", "training.sample_guidance", "training.time_limit_seconds",
    "logging.wandb_project", "logging.log_every_steps", "logging.tensorboard",
}  # fmt: skip


class RunSpec(BaseModel):
    """runs/NAME/config.json: a frozen config, where its paths start, and its inputs by digest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    kind: Literal["run"] = "run"
    run_name: str
    root: str  # folder of the config file, relative to the run directory
    config: TrainConfig
    config_sha256: str
    inputs: dict[str, InputRef]
    processes: int = 1

    @property
    def effective_batch(self) -> int:
        """Samples per optimizer step."""
        training = self.config.training
        return training.microbatch * training.grad_accum_steps * self.processes


def default_patch_size(resolution: int) -> int:
    """The unshuffle factor with a 16 x 16 inner grid up to 64 pixels and 32 x 32 above."""
    return max(1, resolution // (16 if resolution <= 64 else 32))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config and check it.

    Args:
        path: the file.
        overrides: "section.key=value" each, the value in YAML; they win over the file.

    Raises:
        ConfigError: the file is not a valid config; one line that names the key.
    """
    data = read_yaml(path)
    for override in overrides:
        _apply(data, override)
    return parse_config(data, source=str(path))


def parse_config(data: dict[str, Any], *, source: str) -> TrainConfig:
    """Check a config that was already read; `source` is the name that errors give.

    Raises:
        ConfigError: it is not valid.
    """
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        # An unknown key explains more than the missing one it was meant to be.
        found = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")[0]
        raise _explain(found, source) from error


def _explain(found: Any, source: str) -> ConfigError:
    location = [str(part) for part in found["loc"]]
    key = ".".join(part for part in location if not part.startswith(("function-", "literal[")))
    if found["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        elsewhere = [
            name for name in _flat_keys() if name.split(".")[-1] == location[-1] and name != key
        ]
        guess = close[0] if close else (elsewhere[0] if elsewhere else None)
        hint = f"did you mean {guess!r}?" if guess else f"known keys: {', '.join(known)}"
        return ConfigError(f"{source}: {key}: unknown key", hint=hint)
    if found["type"] == "missing":
        return ConfigError(f"{source}: {key}: missing")
    message = str(found["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    given = found.get("input")
    tail = (
        f", got {given!r}" if isinstance(given, (int, float, str)) and "got" not in message else ""
    )
    return ConfigError(f"{source}: {key or 'config'}: {message}{tail}")


def _known_keys(location: Sequence[str]) -> list[str]:
    model: Any = TrainConfig
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(model.model_fields)


def _flat_keys() -> Iterable[str]:
    for section in TrainConfig.model_fields:
        for key in _known_keys([section]):
            yield f"{section}.{key}"


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value for section, keys in data.items() for key, value in keys.items()
    }


def _apply(data: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(
            f"--set {override}: not of the form section.key=value", hint="--set training.lr=1e-3"
        )
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error
    section = data.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(f"{parts[0]}: should be a section of keys")
    section[parts[1]] = value
