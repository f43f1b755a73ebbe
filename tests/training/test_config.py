from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from modelops.base.errors import ConfigError
from modelops.training.config import TrainConfig, load_config
from modelops.training.new_project import template

CONFIGS = Path(__file__).parents[2] / "trainer" / "configs"

# Word for word what the guide prints.
GUIDE = """\
model:    {name: unet_2d_small, channels: 64, resolution: 128}
data:     {manifest: data/manifest.parquet}
training: {optimizer: adamw, lr: 1e-4, betas: [0.9, 0.999], weight_decay: 0.01, microbatch: 4, grad_accum_steps: 8, total_steps: 50000, save_every_steps: 2000, precision: bf16}
ema:      {use: true, decay: 0.9999}
logging:  {wandb_project: pilot_project, log_every_steps: 100}
"""  # noqa: E501


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    path = tmp_path / "pilot_config.yaml"
    path.write_text(GUIDE)
    return path


def test_the_guides_file_loads_unchanged(guide: Path) -> None:
    config = load_config(guide)
    assert config.training.lr == 1e-4  # YAML 1.1 reads this as text
    assert config.training.betas == (0.9, 0.999)
    assert config.model.patch == 4
    assert config.ema.warmup == "ramp"
    assert (CONFIGS / "pilot_config.yaml").read_text() == GUIDE


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_configs_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("grad_accum_steps", "grad_acum_steps", ["training.grad_acum_steps", "'grad_accum_steps'"]),
        ("ema:  ", "emma:  ", ["emma: unknown key", "'ema'"]),
        ("channels: 64", "lr: 1e-3", ["model.lr: unknown key", "'training.lr'"]),
        ("total_steps: 50000", "total_steps: 0", ["training.total_steps", "greater than 0"]),
        ("microbatch: 4", "microbatch: four", ["training.microbatch", "a number, got 'four'"]),
        ("microbatch: 4", "microbatch: yes", ["training.microbatch", "a number"]),
        ("microbatch: 4", "microbatch: 1.5", ["training.microbatch", "integer"]),
        ("lr: 1e-4", "lr: .nan", ["training.lr", "finite"]),
        ("lr: 1e-4", "lr: 1, lr: 2", ["line 3", "twice"]),
        ("betas: [0.9, 0.999]", "betas: [0.9, 1.5]", ["betas"]),
        ("betas: [0.9, 0.999]", "betas: [0.9]", ["betas"]),
        ("resolution: 128", "resolution: 100", ["resolution 100"]),
        ("resolution: 128", "resolution: 8, patch_size: 4", ["2 x 2", "3 levels"]),
        ("channels: 64", "channels: 60", ["channels 60", "32"]),
        ("channels: 64", "channels: 64, attention_levels: [3]", ["attention_levels [3]"]),
        ("precision: bf16", "precision: int8", ["training.precision", "'bf16'"]),
        ("{manifest: data/manifest.parquet}", "{}", ["data", "manifest"]),
        ("{manifest: data/manifest.parquet}", "[", ["line"]),
        ("lr: 1e-4", "lr: " + "9" * 5000, ["5000 digits"]),
        ("lr: 1e-4", "lr: 2024-13-45", ["month"]),
        ("lr: 1e-4", "lr: " + "[" * 10_000, ["not YAML"]),
    ],
)  # fmt: skip
def test_a_mistake_names_file_and_key(guide: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in GUIDE
    guide.write_text(GUIDE.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(guide)
    text = str(caught.value)
    assert str(guide) in text
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.parametrize("word", ["no", "'no'", "fp32"])
def test_a_bare_no_means_no_mixed_precision(guide: Path, word: str) -> None:
    guide.write_text(GUIDE.replace("bf16", word))
    assert load_config(guide).training.precision == "no"


def test_precision_is_measured_unless_it_is_named(guide: Path) -> None:
    assert load_config(guide).training.precision == "bf16"
    guide.write_text(GUIDE.replace(", precision: bf16", ""))
    assert load_config(guide).training.precision == "auto"
    guide.write_text(template("pilot_config.yaml"))
    assert load_config(guide).training.precision == "auto"
    for path in CONFIGS.glob("*.yaml"):
        if path.read_text() != GUIDE:
            assert load_config(path).training.precision == "auto", path.name


def test_overrides_win_and_are_checked(guide: Path) -> None:
    config = load_config(guide, ["training.lr=3e-4", "model.multipliers=[1, 2]"])
    assert config.training.lr == 3e-4
    assert config.model.attention_levels == (1,)
    for bad in ("lr=1", "training.lr", "training.learning_rate=1"):
        with pytest.raises(ConfigError):
            load_config(guide, [bad])


def test_guidance_of_the_samples_is_off_or_at_least_1(guide: Path) -> None:
    def guidance(value: str) -> float:
        return load_config(guide, [f"training.sample_guidance={value}"]).training.sample_guidance

    assert [guidance(value) for value in ("0", "1", "4.5")] == [1.0, 1.0, 4.5]
    for value in ("-3", "0.5"):
        with pytest.raises(ConfigError, match=r"sample_guidance.*must be 0 or 1 \(off\)"):
            guidance(value)


def test_warmup_is_one_percent_within_bounds(guide: Path) -> None:
    config = load_config(guide)
    assert [config.warmup(total) for total in (5, 60, 1000, 50_000)] == [0, 6, 50, 500]


def test_patch_size_keeps_the_inner_grid_small(guide: Path) -> None:
    sizes = {}
    for resolution in (16, 32, 64, 128, 256):
        config = load_config(guide, [f"model.resolution={resolution}"])
        sizes[resolution] = resolution // config.model.patch
    assert sizes == {16: 16, 32: 16, 64: 16, 128: 32, 256: 32}


def test_differences_ignore_what_does_not_change_learning(guide: Path) -> None:
    before = load_config(guide)
    same = load_config(guide, ["training.microbatch=8", "logging.log_every_steps=1"])
    assert before.differences(same) == []
    other = load_config(guide, ["training.lr=2e-4"])
    assert before.differences(other) == ["training.lr: 0.0001 -> 0.0002"]


def test_a_config_survives_its_own_json(guide: Path) -> None:
    config = load_config(guide)
    again = TrainConfig.model_validate(yaml.safe_load(config.model_dump_json()))
    assert again == config
    assert again.sha256 == config.sha256
