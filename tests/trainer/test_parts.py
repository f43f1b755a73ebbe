"""The pieces of the trainer against references."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modelops.models.networks import make_pipeline, make_unet
from modelops.trainer.batches import TrainingBatches, group_weights
from modelops.trainer.ema import Ema, effective_decay, power_exponent
from modelops.trainer.memory import is_out_of_memory, smaller_microbatch
from modelops.trainer.objective import (
    flow_losses,
    images_to_latents,
    predict_velocity,
    stratified_sigmas,
)
from modelops.trainer.pictures import PictureSet
from modelops.trainer.report import loss_trend
from modelops.training.config import EmaSection, TrainConfig


def _config(**training: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"resolution": 16, "patch_size": 2, "channels": 32, "multipliers": [1]},
            "data": {"manifest": "unused", "balance": training.pop("balance", "none")},
            "training": training,
        }
    )


class _Texts:
    """Embeddings that say which caption they are of."""

    def lookup(self, captions: list[str]) -> tuple[torch.Tensor, None, None]:
        numbers = [float(caption or -1) for caption in captions]
        return torch.tensor(numbers)[:, None].repeat(1, 4), None, None


def _pictures(count: int, groups: list[str] | None = None) -> PictureSet:
    images = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    names = [str(index) for index in range(count)]
    return PictureSet(names, names, groups or names, images, images.__getitem__)


def test_ema_equals_its_recursion() -> None:
    torch.manual_seed(0)
    live = torch.nn.Linear(3, 2)
    section = EmaSection(decay=0.9, warmup="ramp")
    ema = Ema(live, section)
    expected = live.weight.detach().double().numpy().copy()
    for update in range(1, 40):
        with torch.no_grad():
            live.weight.add_(torch.randn_like(live.weight))
        used = ema.update(live, update)
        decay = min(0.9, (1 + update) / (10 + update))
        assert used == decay
        expected = decay * expected + (1 - decay) * live.weight.detach().double().numpy()
    np.testing.assert_allclose(ema.network.weight.numpy(), expected, rtol=1e-5)
    assert ema.network.weight.data_ptr() != live.weight.data_ptr()


def test_ema_stays_float32_and_moves_for_bf16_weights() -> None:
    live = torch.nn.Linear(4, 4).to(torch.bfloat16)
    ema = Ema(live, EmaSection(decay=0.9999, warmup="none"))
    before = ema.network.weight.clone()
    with torch.no_grad():
        live.weight.add_(0.01)
    ema.update(live, 1)
    assert ema.network.weight.dtype == torch.float32
    assert not torch.equal(before, ema.network.weight)


def test_power_ema_has_the_exponents_of_edm2() -> None:
    # Karras et al. 2023: relative widths 0.05 and 0.10 are exponents 16.97 and 6.94.
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    section = EmaSection(decay=0.9999, warmup="power")
    assert effective_decay(section, 1) == 0.0
    assert effective_decay(section, 1000) == pytest.approx((1 - 1e-3) ** 7.937, abs=1e-5)
    assert effective_decay(section, 10**7) == 0.9999


def test_one_sigma_per_stratum_and_the_right_distribution() -> None:
    sigmas = stratified_sigmas(1, "timestep", 5, 64, sampling="uniform")
    assert sorted(np.floor(sigmas * 64).astype(int)) == list(range(64))
    many = np.concatenate(
        [stratified_sigmas(1, "timestep", step, 64, sampling="logit_normal") for step in range(50)]
    )
    logits = np.log(many / (1 - many))
    assert abs(logits.mean()) < 0.02
    assert abs(logits.std() - 1) < 0.02


def test_the_network_that_knows_the_answer_has_no_loss() -> None:
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    clean = images_to_latents(images, 2)
    noise = torch.randn_like(clean)
    sigmas = torch.tensor([0.2, 0.5, 0.9])
    common = {"images": images, "noise": noise, "sigmas": sigmas, "pooled": torch.zeros(3, 4),
              "tokens": None, "mask": None, "patch_size": 2}  # fmt: skip
    knows_velocity = flow_losses(lambda *_, **__: (noise - clean,), prediction="velocity", **common)
    knows_image = flow_losses(lambda *_, **__: (clean,), prediction="sample", **common)
    assert float(knows_velocity.max()) == 0.0
    assert float(knows_image.max()) < 1e-9
    wrong = flow_losses(lambda *_, **__: (noise - clean + 2,), prediction="velocity", **common)
    torch.testing.assert_close(wrong, torch.full((3,), 4.0))


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_training_and_sampling_share_one_velocity(prediction: str) -> None:
    torch.manual_seed(0)
    unet = make_unet(
        resolution=16, patch_size=2, channels=32, multipliers=(1,), attention_levels=()
    )
    pipeline = make_pipeline(unet, None, None, patch_size=2, prediction=prediction)
    latents, sigmas, pooled = (
        torch.randn(2, 12, 8, 8),
        torch.tensor([0.01, 0.7]),
        torch.randn(2, 384),
    )
    with torch.no_grad():
        ours = predict_velocity(unet, latents, sigmas, pooled, None, None, prediction=prediction)
        theirs = pipeline.predict_velocity(latents, sigmas, pooled)
    assert torch.equal(ours, theirs)


def test_latents_are_what_the_pipeline_decodes() -> None:
    unet = make_unet(
        resolution=16, patch_size=2, channels=32, multipliers=(1,), attention_levels=()
    )
    pipeline = make_pipeline(unet, None, None, patch_size=2)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    decoded = pipeline.decode(images_to_latents(images, 2)).permute(0, 2, 3, 1) * 255
    assert torch.equal(decoded.round().to(torch.uint8), images)


def test_an_epoch_shows_every_picture_once() -> None:
    batches = TrainingBatches(_pictures(20), _Texts(), _config(), 8)  # type: ignore[arg-type]
    seen = np.concatenate([batches.step_to_indices(step) for step in range(5)])
    assert sorted(seen[:20]) == list(range(20))
    assert sorted(seen[20:40]) == list(range(20))
    assert list(seen[:20]) != list(seen[20:40])


def test_parts_of_a_batch_are_the_batch() -> None:
    config = _config(caption_dropout=0.5)
    batches = TrainingBatches(_pictures(20), _Texts(), config, 8)  # type: ignore[arg-type]
    whole = batches.step_to_batch(3, 0, 8)
    again = TrainingBatches(_pictures(20), _Texts(), config, 8)  # type: ignore[arg-type]
    parts = [again.step_to_batch(3, start, start + 2) for start in range(0, 8, 2)]
    for name in ("images", "noise", "sigmas", "pooled"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), joined), name
    dropped = (whole.pooled[:, 0] == -1).sum()
    assert 0 < dropped < 8


def test_balance_draws_small_groups_more_often() -> None:
    groups = ["big"] * 64 + [f"single {index}" for index in range(16)]
    weights = group_weights(groups)
    assert weights[0] == pytest.approx(1 / 8)
    assert weights[-1] == 1.0
    config = _config(balance="group")
    batches = TrainingBatches(_pictures(80, groups), _Texts(), config, 80)  # type: ignore[arg-type]
    drawn = np.concatenate([batches.step_to_indices(step) for step in range(30)])
    share = (drawn < 64).mean()
    assert share == pytest.approx(8 / 24, abs=0.02)  # 64 / 8 against 16 x 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_out_of_memory_in_all_its_spellings(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_failure_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_smaller_microbatch_divides_the_rest() -> None:
    assert smaller_microbatch(64, 64) == 32
    assert smaller_microbatch(12, 36) == 6
    assert smaller_microbatch(5, 15) == 1
    assert smaller_microbatch(1, 8) is None


def test_loss_trend_needs_more_than_noise() -> None:
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, 60)
    assert loss_trend(list(np.linspace(1, 0.2, 60) + noise)) == "down"
    assert loss_trend(list(np.linspace(0.2, 1, 60) + noise)) == "up"
    assert loss_trend(list(0.5 + noise)) == "flat"
    assert loss_trend([1.0, 0.5]) == "unknown"
    assert loss_trend([9.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.3, 0.2, 0.1, 0.11, 0.1, 0.12]) == "down"


def test_text_table_survives_on_disk(tmp_path: Path) -> None:
    from modelops.models.encoders import load_text_encoder
    from modelops.trainer.texts import TextTable

    tokenizer, encoder = load_text_encoder()
    cache = tmp_path / "texts.safetensors"
    table = TextTable(
        ["a sun", "a sun", "a moon"], tokenizer, encoder, keep_tokens=True, cache=cache
    )
    pooled, tokens, mask = table.lookup(["a moon", "", "a sun"])
    assert tokens is not None and mask is not None
    assert pooled.norm(dim=1) == pytest.approx([384**0.5] * 3, rel=1e-5)
    broken = SimpleNamespace(config=encoder.config, parameters=encoder.parameters)  # cannot embed
    again = TextTable(["a moon", "a sun"], tokenizer, broken, keep_tokens=True, cache=cache)
    assert torch.equal(again.lookup(["a moon", "", "a sun"])[0], pooled)
