"""Checkers of the real classes against the libraries' own answers, and that none is half-loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from modelops.base.errors import IntegrityError, MissingWeightsError, UsageError
from modelops.base.files import sha256_file
from modelops.models.pretrained import fetch_directory
from modelops.safety.checkers import (
    DiffusersSafetyCheckerFilter,
    TransformersFilter,
    unsafe_labels,
)
from modelops.safety.image import SafetyFilterError, checked_verdicts
from modelops.safety.probe import require_working
from modelops.safety.registry import open_image_filter
from small_checkers import SIZE, save_classifier

Drawings = list[np.ndarray]


def changed(source: Path, target: Path, **tensors: Any) -> Path:
    """A copy of a checker with other weights; None takes one out."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for key, value in tensors.items():
        name = key.replace("__", ".")
        assert name in weights
        if value is None:
            del weights[name]
        else:
            weights[name] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_classifier_scores_as_transformers_own_pipeline(
    classifier: Path, drawings: Drawings
) -> None:
    from transformers import pipeline

    theirs = pipeline("image-classification", model=str(classifier))(
        [Image.fromarray(image) for image in drawings]
    )
    expected = [{row["label"]: row["score"] for row in rows}["nsfw"] for rows in theirs]
    found = TransformersFilter(classifier)
    ours = checked_verdicts(found, drawings)
    np.testing.assert_allclose([v.score for v in ours], expected, atol=1e-5)
    assert np.ptp(expected) > 0.01
    middle = float(np.median(expected))
    strict = TransformersFilter(classifier, threshold=middle)
    assert [v.blocked for v in strict.check(drawings)] == [v.score >= middle for v in ours]
    alone = [found.check([image])[0].score for image in drawings[:3]]
    np.testing.assert_allclose(alone, [v.score for v in ours[:3]], atol=1e-6)


def test_its_info_names_weights_and_labels(classifier: Path) -> None:
    info = TransformersFilter(classifier, threshold=0.25).info
    assert info["weights_sha256"] == sha256_file(classifier / "model.safetensors")
    assert info["labels"] == ["normal", "nsfw"] and info["unsafe_labels"] == ["nsfw"]
    assert info["threshold"] == 0.25 and info["architecture"] == "ViTForImageClassification"


def test_many_unsafe_labels_are_added_and_of_many_at_once_the_greatest_counts(
    tmp_path: Path, drawings: Drawings
) -> None:
    labels = ("drawings", "hentai", "neutral", "porn", "sexy")
    added = TransformersFilter(save_classifier(tmp_path / "a", labels))
    assert added.unsafe == ("hentai", "porn", "sexy")
    single = [
        [v.score for v in TransformersFilter(tmp_path / "a", unsafe=(name,)).check(drawings)]
        for name in added.unsafe
    ]
    np.testing.assert_allclose(
        [v.score for v in added.check(drawings)], np.sum(single, axis=0), atol=1e-6
    )
    multi = save_classifier(tmp_path / "b", labels, problem_type="multi_label_classification")
    single = [
        [v.score for v in TransformersFilter(multi, unsafe=(name,)).check(drawings)]
        for name in added.unsafe
    ]
    np.testing.assert_allclose(
        [v.score for v in TransformersFilter(multi).check(drawings)], np.max(single, axis=0)
    )


@pytest.mark.parametrize(
    ("labels", "chosen", "message"),
    [
        (["LABEL_0", "LABEL_1"], [], "does not say whether it is unsafe"),
        (["nsfw", "sfw"], ["porn"], "no label 'porn'"),
        (["normal", "safe"], [], "0 of 2 labels unsafe"),
        (["a", "b"], ["a", "b"], "2 of 2 labels unsafe"),
    ],
)
def test_labels_that_do_not_say_are_refused(
    labels: list[str], chosen: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        unsafe_labels(labels, chosen, where="here")


def test_a_checker_without_all_of_its_weights_is_refused(classifier: Path, tmp_path: Path) -> None:
    headless = changed(classifier, tmp_path / "headless", classifier__weight=None)
    with pytest.raises(IntegrityError, match=r"missing keys, such as classifier\.weight"):
        TransformersFilter(headless)
    wide = changed(classifier, tmp_path / "wide", classifier__weight=torch.zeros(3, 16))
    with pytest.raises(IntegrityError):
        TransformersFilter(wide)
    cut = changed(classifier, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(IntegrityError, match="cannot be loaded"):
        TransformersFilter(cut)


def test_pickled_weights_and_missing_parts_are_refused(classifier: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(classifier, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(MissingWeightsError, match="safetensors"):
        TransformersFilter(pickled)
    bare = changed(classifier, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(MissingWeightsError, match="preprocessor_config"):
        TransformersFilter(bare)


def test_scores_that_are_not_numbers_are_an_error(
    classifier: Path, tmp_path: Path, drawings: Drawings
) -> None:
    broken = changed(
        classifier, tmp_path / "nan", classifier__bias=torch.tensor([0.0, float("nan")])
    )
    with pytest.raises(SafetyFilterError, match="not a probability"):
        TransformersFilter(broken).check(drawings)
    with pytest.raises(SafetyFilterError, match="cannot be checked"):
        TransformersFilter(classifier).check([np.zeros((4, 4), np.uint8)])


def test_a_hub_id_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingWeightsError, match="nobody/no-such-checker"):
        fetch_directory("nobody/no-such-checker")


@pytest.fixture(scope="session")
def safety_checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's directory with safety_checker/ and feature_extractor/."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    config = CLIPConfig(
        text_config={**small, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={**small, "image_size": SIZE, "patch_size": 8}, projection_dim=8,
    )  # fmt: skip
    model = StableDiffusionSafetyChecker(config)
    torch.nn.init.normal_(model.visual_projection.weight)
    torch.nn.init.normal_(model.concept_embeds)
    torch.nn.init.normal_(model.special_care_embeds)
    root = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(root / "safety_checker")
    CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(root / "feature_extractor")
    return root


def set_thresholds(root: Path, target: Path, drawings: Drawings) -> Path:
    """Thresholds between the drawings, so that half meet a special concept, and some meet a
    concept only because of that."""
    shutil.copytree(root, target)
    loaded = DiffusersSafetyCheckerFilter(root)
    with torch.no_grad():
        pixels = loaded._processor(images=drawings, return_tensors="pt")["pixel_values"]
        embeds = loaded._model.visual_projection(loaded._model.vision_model(pixels)[1])
        embeds = torch.nn.functional.normalize(embeds)
        special = embeds @ torch.nn.functional.normalize(loaded._model.special_care_embeds).T
        concept = embeds @ torch.nn.functional.normalize(loaded._model.concept_embeds).T
    file = target / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    met = special[:, 0] > special[:, 0].median()
    weights["special_care_embeds_weights"] = torch.tensor([float(special[:, 0].median()), 1, 1])
    limits = torch.ones(17)
    place = int(met.nonzero()[0])  # flagged by the adjustment alone
    limits[3] = concept[place, 3] + 0.005
    limits[5] = concept[:, 5].quantile(0.7)
    weights["concept_embeds_weights"] = limits
    save_file(weights, file, metadata={"format": "pt"})
    return target


def test_the_concept_checker_agrees_with_diffusers(
    safety_checker: Path, tmp_path: Path, drawings: Drawings
) -> None:
    directory = set_thresholds(safety_checker, tmp_path / "pipeline", drawings)
    found = DiffusersSafetyCheckerFilter(directory)
    pixels = found._processor(images=drawings, return_tensors="pt")["pixel_values"]
    _, expected = found._model(pixels, [np.zeros((2, 2, 3)) for _ in drawings])
    verdicts = checked_verdicts(found, drawings)
    assert [v.blocked for v in verdicts] == list(expected)
    assert 0 < sum(expected) < len(drawings)
    with torch.no_grad():
        found._model.special_care_embeds_weights.fill_(1.0)
    assert sum(v.blocked for v in found.check(drawings)) < sum(expected)
    assert found.info["concepts"] == 17 and found.info["special_concepts"] == 3


def test_a_step_of_the_threshold_is_a_hundredth_of_cosine(
    safety_checker: Path, tmp_path: Path, drawings: Drawings
) -> None:
    directory = set_thresholds(safety_checker, tmp_path / "pipeline", drawings)
    file = directory / "safety_checker" / "model.safetensors"
    raised = load_file(file)
    raised["concept_embeds_weights"] += 0.01
    stricter = DiffusersSafetyCheckerFilter(directory, threshold=0.55)
    before = [v.blocked for v in stricter.check(drawings)]
    save_file(raised, file, metadata={"format": "pt"})
    after = [v.blocked for v in DiffusersSafetyCheckerFilter(directory).check(drawings)]
    assert before == after


def test_weights_named_as_the_hub_names_them_load_too(
    safety_checker: Path, tmp_path: Path, drawings: Drawings
) -> None:
    """CompVis' file nests the tower twice and holds position ids."""
    shutil.copytree(safety_checker, tmp_path / "hub")
    file = tmp_path / "hub" / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    if not any(key.startswith("vision_model.vision_model.") for key in weights):
        weights = {
            f"vision_model.{key}" if key.startswith("vision_model.") else key: value
            for key, value in weights.items()
        }
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, file, metadata={"format": "pt"})
    ours = DiffusersSafetyCheckerFilter(safety_checker).check(drawings)
    assert DiffusersSafetyCheckerFilter(tmp_path / "hub").check(drawings) == ours


def test_an_incomplete_concept_checker_is_refused(safety_checker: Path, tmp_path: Path) -> None:
    shutil.copytree(safety_checker, tmp_path / "hub")
    file = tmp_path / "hub" / "safety_checker" / "model.safetensors"
    weights = load_file(file)
    del weights["concept_embeds"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match="concept_embeds"):
        DiffusersSafetyCheckerFilter(tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub" / "feature_extractor")
    with pytest.raises(MissingWeightsError, match="preprocessor_config"):
        DiffusersSafetyCheckerFilter(tmp_path / "hub")


def test_weights_that_are_all_zero_do_not_work(
    classifier: Path, safety_checker: Path, tmp_path: Path
) -> None:
    for checker, opened in (
        (classifier, TransformersFilter),
        (safety_checker / "safety_checker", DiffusersSafetyCheckerFilter),
    ):
        extractor = safety_checker / "feature_extractor" / "preprocessor_config.json"
        whole = tmp_path / f"{checker.name}-whole"
        shutil.copytree(checker, whole)
        if not (whole / "preprocessor_config.json").exists():
            shutil.copy(extractor, whole)
        require_working(opened(whole))
        weights = load_file(whole / "model.safetensors")
        zero = {
            name: value if "concept" in name or "special" in name else torch.zeros_like(value)
            for name, value in weights.items()
        }
        save_file(zero, whole / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SafetyFilterError, match="do not depend on the image"):
            require_working(opened(whole))


def test_files_that_are_overwritten_later_change_no_verdict(
    classifier: Path, safety_checker: Path, tmp_path: Path, drawings: Drawings
) -> None:
    for source, kind in (
        (classifier, TransformersFilter),
        (safety_checker, DiffusersSafetyCheckerFilter),
    ):
        folder = Path(shutil.copytree(source, tmp_path / source.name))
        opened = kind(folder)  # type: ignore[operator]
        before, about = opened.check(drawings), opened.info
        for path in folder.rglob("*.safetensors"):
            with path.open("r+b") as handle:
                handle.seek(path.stat().st_size // 4)
                handle.write(b"\x11" * (path.stat().st_size // 2))
            assert opened.check(drawings) == before and opened.info == about
            os.truncate(path, 64)  # a mapped page that is gone ends the process
        assert opened.check(drawings) == before


def test_workers_share_the_weights_of_a_filter(classifier: Path, tmp_path: Path) -> None:
    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line.split(None, 5)[5] for line in lines if str(tmp_path) in line}

    name = f"transformers:{classifier}"
    first, files = open_image_filter(name, store=tmp_path), mapped()
    second = open_image_filter(name, store=tmp_path)
    assert len(files) == 1 and mapped() == files and first.info == second.info
    del first, second
    assert not list(tmp_path.glob("modelops-model-*"))
