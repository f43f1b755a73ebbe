"""Explanations of the metrics for someone who has not met them before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Words:
    """A metric's title, its part of the card, and what it says."""

    title: str
    part: str
    says: str


PARTS = ("quality", "prompts", "memorization", "safety", "other")

METRICS: dict[str, Words] = {
    "frechet_distance_lite0": Words(
        "Fréchet distance (Lite0)", "quality",
        "How far the generated images are, as a set, from real held-out images: means and "
        "covariances of EfficientNet-Lite0 features. 0 would be equal; lower is better. "
        "**Not FID**: FID uses other features, and no published FID compares with it.",
    ),
    "frechet_distance_lite0_floor": Words(
        "Fréchet distance (Lite0) of training images", "quality",
        "Its floor: the same distance between real training images and real held-out ones at the "
        "same n: what a perfect generator would score here.",
    ),
    "frechet_distance_infinity_lite0": Words(
        "Fréchet distance (Lite0) at infinite n", "quality",
        "What the Fréchet distance tends to as the number of images grows: its bias in n taken "
        "off.",
    ),
    "kernel_distance_lite0": Words(
        "Kernel distance (Lite0)", "quality",
        "The same question with a cubic kernel, unbiased in n; it may be slightly negative. "
        "Lower is better. Not KID, which uses Inception's features.",
    ),
    "kernel_distance_lite0_floor": Words(
        "Kernel distance (Lite0) of training images", "quality",
        "Its floor: the same distance for real training images.",
    ),
    "precision_lite0": Words(
        "Precision", "quality",
        "Share of generated images that lie among real ones: low means unreal images.",
    ),
    "recall_lite0": Words(
        "Recall", "quality",
        "Share of real held-out images that lie among generated ones: low means little variety.",
    ),
    "density_lite0": Words("Density", "quality", "Precision that outliers inflate less."),
    "coverage_lite0": Words("Coverage", "quality", "Recall that outliers inflate less."),
    "fid": Words(
        "FID", "quality",
        "Fréchet distance on Inception features. Its mode says how images are resized: clean as "
        "clean-fid, legacy_pytorch as pytorch-fid, legacy_tensorflow as torch-fidelity.",
    ),
    "fid_infinity": Words(
        "FID, extrapolated to infinite n", "quality",
        "What FID tends to as the number of images grows: its bias in n taken off.",
    ),
    "cmmd": Words(
        "CMMD", "quality",
        "Distance between the sets with a Gaussian kernel on CLIP ViT-L/14-336 embeddings.",
    ),
    "gaussian_mmd_clip": Words(
        "Gaussian MMD (CLIP)", "quality",
        "CMMD's formula on another CLIP's embeddings: not CMMD.",
    ),
    "frechet_distance_clip": Words(
        "Fréchet distance (CLIP)", "quality", "On CLIP's image embeddings. Not FID."
    ),
    "frechet_distance_dinov2": Words(
        "Fréchet distance (DINOv2)", "quality", "On DINOv2's features. Not FID."
    ),
    "kernel_distance_dinov2": Words(
        "Kernel distance (DINOv2)", "quality", "On DINOv2's features. Not KID."
    ),
    "kid": Words("KID", "quality", "Kernel distance on Inception features."),
    "inception_score": Words(
        "Inception Score", "quality",
        "How sure and how varied Inception's classes are; it never looks at real images.",
    ),
    "precision_inception": Words("Precision (Inception)", "quality", "On Inception features."),
    "recall_inception": Words("Recall (Inception)", "quality", "On Inception features."),
    "density_inception": Words("Density (Inception)", "quality", "On Inception features."),
    "coverage_inception": Words("Coverage (Inception)", "quality", "On Inception features."),
    "diversity_lite0": Words(
        "Diversity within a prompt", "prompts",
        "Mean distance between images of one prompt with different seeds; 0 means that the seed "
        "changes nothing.",
    ),
    "diversity_lite0_between": Words(
        "Diversity between prompts", "prompts", "The same between images of different prompts."
    ),
    "clip_score_torchmetrics": Words(
        "CLIP score on torchmetrics' scale", "prompts",
        "100 times the cosine, without a prefix: another number than CLIPScore.",
    ),
    "clip_retrieval_top1": Words(
        "Own prompt found first by CLIP", "prompts", "Among all evaluated prompts."
    ),
    "clip_retrieval_top5": Words(
        "Own prompt among CLIP's first five", "prompts", "The same, among the first five."
    ),
    "lit_alignment": Words(
        "Alignment with its prompt (LiT)", "prompts",
        "Mean cosine between an image and its own prompt in a small image–text model trained on "
        "the training split. Not a CLIPScore.",
    ),
    "lit_alignment_shuffled": Words(
        "Alignment with another prompt (LiT)", "prompts",
        "The same with prompts shuffled among the images: what ignoring the prompt would score.",
    ),
    "lit_alignment_gain": Words(
        "Alignment gain (own − other prompt)", "prompts",
        "Own minus shuffled, paired. Clear of zero means that images follow their prompts.",
    ),
    "lit_retrieval_top1": Words(
        "Own prompt found first", "prompts",
        "How often the image–text model finds a generated image's own prompt first among all "
        "prompts; chance is one in their number.",
    ),
    "lit_retrieval_top5": Words("Own prompt among the first five", "prompts", "The same."),
    "lit_alignment_real": Words(
        "Alignment of real held-out images (LiT)", "prompts",
        "Real images with their own captions: what a perfect generator would score.",
    ),
    "lit_heldout_retrieval_top1": Words(
        "Skill of the judge: top-1", "prompts",
        "How often the image–text model finds the right caption of a *real* held-out image "
        "first. Alignment scores are worth no more than this judge.",
    ),
    "lit_heldout_retrieval_top5": Words(
        "Skill of the judge: top-5", "prompts", "The same, among the first five."
    ),
    "clipscore": Words(
        "CLIPScore", "prompts", "Agreement of image and prompt as CLIP ViT-B/32 judges it."
    ),
    "nearest_train_distance": Words(
        "Distance to the nearest training image", "memorization",
        "Median over generated images, in feature space. Small means copies.",
    ),
    "nearest_train_distance_heldout": Words(
        "Distance of real held-out images to theirs", "memorization",
        "The same for real images that were not trained on: the base rate to compare with.",
    ),
    "nearest_train_distance_gap": Words(
        "Distance gap (generated − held-out)", "memorization",
        "Generated minus held-out. Below zero means closer to the training set than new real "
        "images are, a sign of copying.",
    ),
    "near_copy_rate": Words(
        "Near copies", "memorization",
        "Share of generated images with cosine ≥ 0.95 to a training image.",
    ),
    "near_copy_rate_heldout": Words(
        "Near copies among real held-out images", "memorization", "The base rate of the same."
    ),
    "authenticity_lite0": Words(
        "Authenticity", "memorization",
        "Share of generated images farther from their nearest training image than that one is "
        "from its own nearest.",
    ),
    "authenticity_lite0_heldout": Words(
        "Authenticity of real held-out images", "memorization", "The base rate of the same."
    ),
    "unsafe_rate": Words(
        "Unsafe images", "safety",
        "Share that the image filter flags, with an exact (Clopper–Pearson) interval: 0 of 200 "
        "still allows 1.8 %.",
    ),
    "image_false_positive_rate": Words(
        "Real images flagged", "safety",
        "Share of real held-out images that the image filter flags.",
    ),
    "prompt_block_rate": Words(
        "Evaluated prompts blocked", "safety", "Share that the prompt filter would not answer."
    ),
    "false_positive_rate_benign": Words(
        "Benign prompts blocked", "safety",
        "Share of a packaged list of harmless prompts that the prompt filter would not answer.",
    ),
    "residual_unsafe_rate": Words(
        "Unsafe images after the filters", "safety",
        "What an independent filter still calls unsafe among images that would be served.",
    ),
    "blocklist_match_rate": Words(
        "Images on the block-list", "safety", "Share that equals an image of the block-list."
    ),
    "failed_image_rate": Words(
        "Failed images", "other", "Share of requests that gave no image at all."
    ),
}  # fmt: skip


def words_of(key: str) -> Words:
    """Words for a metric; one that is not known keeps its key."""
    return METRICS.get(key) or Words(key, "other", "")


def plain_words_of(key: str) -> Words:
    """The same without Markdown's stars."""
    words = words_of(key)
    return Words(words.title, words.part, words.says.replace("*", ""))
