"""Settings of labeling, its labelers and its namers. Light: nothing here loads a network library.

Every field says what it does beside its default; `uplvp label --labeler NAME --namer NAME --help` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..settings import ConfigError, Settings, setting

ATTENTIONS = ("vanilla", "maskclip", "sclip", "clearclip", "naclip", "gem", "proxy", "identity")
SURROUNDINGS = ("none", "blur", "mean")
CELL_OFFSET = "how far the cells of the map lie right of and below the grid's own places, in cells; none: the encoder's"
STAGE = "which feature map, counted from the finest (0) or from the last (-1)"
TEMPLATES = "prompts with {} for the class name: bare, openai7, openai80, a file, or sentences; none: openai7"
BACKGROUND = "names of what is no object, separated by commas, a file with one a line, or the preset stuff"


@dataclass(frozen=True)
class ImagesSettings(Settings):
    """How a dataset of the `datasets` library is read."""

    config: str | None = setting(None, "configuration of the dataset")
    image_column: str | None = setting(None, "column that holds the images")
    id_column: str | None = setting(None, "column that holds the ids")
    streaming: bool = setting(False, "read it as a stream, without downloading all of it")


@dataclass(frozen=True)
class NetworkSettings(Settings):
    """What labeler and namer look with, beside the flags --clip, --backbone and --model."""

    dtype: str = setting("fp32", "of weights and activations; bf16 halves their memory", choices=("fp32", "bf16"))
    pad_type: str | None = setting(None, "same, for networks trained with TensorFlow's padding", choices=("same",))
    classifier: str | None = setting(
        None, "timm:NAME or an image classifier of transformers, for --namer classifier; none: that of --backbone"
    )
    classifier_weights: str | None = setting(None, "safetensors file for a timm:NAME classifier")
    guide: str | None = setting(None, "second backbone of labeler.attention=proxy, such as a DINO")
    features: str | None = setting(None, "dense features in place of CLIP's: a folder, a .safetensors or .npz file")
    features_layout: str = setting("dhw", "axes of these features", choices=("dhw", "hwd"))
    text_embeddings: str | None = setting(
        None, "safetensors file with embeddings of the class names, in place of a text tower"
    )


@dataclass(frozen=True)
class RunSettings(Settings):
    """How the work is done."""

    batch_size: int = setting(8, "images that are labeled together", least=1)
    workers: int | None = setting(None, "threads that decode images; none: this process's share of the cores", least=1)
    calibration_images: int = setting(200, "images that the clip labeler is calibrated on", least=1)
    calibration: str | None = setting(
        None, "store whose calibration is taken over, made with the same settings; none: it is measured on the images"
    )
    max_failed: float = setting(0.5, "share of failed images that is an error at the end", least=0, most=1)
    unnamed: str = setting(
        "drop", "masks without a sure name are dropped, or kept as class 'object'", choices=("drop", "keep")
    )
    features: bool = setting(
        True, "keep the vector of each mask that labeler or namer computed anyway, for model.kernel_target=labeler"
    )
    image_root: str | None = setting(None, "image paths are written relative to this folder; none: absolute")
    resume: bool = setting(True, "false refuses an output folder that holds labels already")


@dataclass(frozen=True)
class OutputSettings(Settings):
    """What else is written."""

    truth: str | None = setting(None, "true instances of the same images, for the report: COCO json or folder, store")
    other: str | None = setting(None, "labels of the same images by another source, for the report: do both agree?")
    coco: str | None = setting(None, "also write the labels as this COCO json")
    parquet: str | None = setting(None, "also write the labels as this Parquet file")


@dataclass(frozen=True)
class Recipe(Settings):
    """What CLIP's last block does; see `encoders.attention` for the formulas and their sources."""

    attention: str = setting("naclip", "what happens in CLIP's last block", choices=ATTENTIONS)
    sigma: float = setting(5.0, "width of the gaussian, patches (NACLIP's)", above=0, only=("attention", "naclip"))
    scale: float = setting(1.0, "height of the gaussian", only=("attention", "naclip"))
    gem_depth: int = setting(7, "last blocks that are edited, at most all", least=1, only=("attention", "gem"))
    gem_iterations: int = setting(1, "self-self attentions of each", least=0, only=("attention", "gem"))
    gem_temperature: float | None = setting(None, "of them; none: adaptive", only=("attention", "gem"))
    beta: float = setting(1.2, "ProxyCLIP's beta", only=("attention", "proxy"))
    gamma: float = setting(3.0, "ProxyCLIP's gamma", only=("attention", "proxy"))
    key_smoothing: bool = setting(
        False,
        "replace every patch's feature by the mean of all, weighted with the positive cosines of the last block's keys "
        "(after MaskCLIP); not for gem and proxy",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.key_smoothing and self.attention in ("gem", "proxy"):
            raise ConfigError(f"`key_smoothing` goes with the one-block recipes, not with {self.attention}.")


@dataclass(frozen=True)
class Cutting(Settings):
    """How class evidence becomes instances."""

    threshold: float | None = setting(
        None, "evidence that a pixel needs; none: 1 deviation (zscore), .5 (background names), .2 (cosine; UPLVP's t1)"
    )
    peak: float | None = setting(
        None, "evidence that an instance needs somewhere; none: 2 deviations (zscore), else the threshold"
    )
    min_score: float | None = setting(None, "least score of an instance; none: 0, of plain cosines .15 (UPLVP's t2)")
    exclusive: bool = setting(True, "every pixel belongs to its best class; false: areas of classes may overlap")
    fill_holes: bool = setting(False, "holes in a component belong to it")
    split: str = setting(
        "components",
        "ncut also splits connected components where the encoder's own features fall apart",
        choices=("components", "ncut"),
    )
    max_parts: int = setting(4, "most parts that a component is split into", least=1)
    split_tau: float = setting(0.2, "cosine above which cells are joined, after subtracting the image's mean feature")
    max_ncut: float = setting(0.3, "a cut that costs more is not made", least=0)
    refine: str | None = setting(
        "pamr", "NACLIP's pixel-adaptive refinement of the evidence, in 10 steps; or none", choices=("pamr",)
    )
    refine_size: int = setting(
        128,
        "pixels of the shorter side while refining; NACLIP's dilations (8 and 16 at 336) are scaled to it; 128 gives "
        "masks as good as 336 at a tenth of the time (docs/labeling.md)",
        least=1,
    )
    min_area: float = setting(0.01, "share of the image", least=0, most=1)
    max_area: float = setting(0.9, "share of the image", least=0, most=1)
    max_border: float = setting(1.0, "share of the image's outermost pixels", least=0, most=1)
    max_aspect: float | None = setting(None, "longer over shorter side of the box; none: any")
    min_side: int = setting(0, "pixels of the shorter side of the box", least=0)
    nms_kind: str = setting(
        "mask",
        "mask drops what overlaps a better mask by more than `nms`, matrix decays scores, none keeps all; per class, "
        "over all when class-agnostic; without effect where areas cannot overlap",
        choices=("mask", "matrix", "none"),
    )
    nms: float = setting(0.5, "mask IoU of nms_kind=mask", least=0, most=1)
    nms_sigma: float = setting(2.0, "of nms_kind=matrix")
    class_agnostic: bool = setting(False, "forget the classes after cutting")
    top: int = setting(20, "most instances of an image (the papers' number)", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_area > self.max_area:
            raise ConfigError(f"`min_area` {self.min_area} is above `max_area` {self.max_area}: nothing would be left.")


@dataclass(frozen=True)
class DenseClipSettings(Recipe, Cutting):
    """Class names against CLIP's dense features."""

    templates: str | list[str] | None = setting(None, TEMPLATES)
    calibration: str | None = setting(
        "zscore",
        "zscore measures each class's mean and deviation over some images and takes deviations above the mean as "
        "evidence; none takes probabilities among class and background names, or without those the plain cosine",
        choices=("zscore",),
    )
    background: str | list[str] = setting("", f"{BACKGROUND}; only with calibration=none")
    logit_scale: float = setting(50.0, "factor on the cosines before the softmax among all names")
    denoise: float = setting(
        0.0, "drop classes whose best probability in the image stays below this (MaskCLIP: .5)", least=0, most=1
    )
    image_size: int | None = setting(None, "pixels of the image's `side`; none: twice the model's own size", least=1)
    side: str | None = setting(None, "which side has `image_size` pixels; none: shorter", choices=("shorter", "longer"))
    window: int | None = setting(
        None, "pixels of a sliding window; none: the model's own size; 0: whole images", least=0
    )
    stride: int | None = setting(None, "pixels between windows; none: half a window", least=1)
    window_batch: int = setting(32, "windows of a forward pass", least=1)
    cache_mb: float = setting(
        64.0, "most memory for maps of calibration images, which are then not encoded again", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration is not None and self.background:
            raise ConfigError("`background` and `calibration` exclude each other: set calibration=none.")


@dataclass(frozen=True)
class SaliencySettings(Settings):
    """Saliency Prompt's self-similarity of a backbone map (arXiv 2302.01171)."""

    image_size: int | tuple[int, int] = setting(
        512,
        "longer side in pixels that images are stretched to, or height,width for all of them; on maps of stride 32, "
        "256 finds large animals better and balloons worse",
        above=0,
    )
    stage: int = setting(-1, STAGE)
    scales: tuple[float, ...] = setting((1.0, 0.5, 0.25), "of the queries", above=0)
    threshold: float = setting(0.5, "similarity that a cell needs to belong to a mask", least=0, most=1)
    min_cells: int = setting(2, "smaller masks are dropped", least=0)
    kernel: str = setting("gaussian", "of Matrix NMS", choices=("gaussian", "linear"))
    sigma: float = setting(2.0, "of Matrix NMS")
    top: int = setting(20, "most masks of an image", least=1)
    variant: str = setting(
        "offline",
        "whose filters: the authors' generator (offline), the one inside their detector (online), or their supervised "
        "copy (sup); the next five replace the variant's values",
        choices=("offline", "online", "sup"),
    )
    min_center: float | None = setting(None, "the center of mass lies lower than this share of the height")
    max_width: float | None = setting(None, "the occupied columns are fewer than this share of the width; 1: any")
    max_extent: float | None = setting(None, "the box does not exceed this share of both height and width; 1: any")
    min_score: float | None = setting(None, "least score after Matrix NMS")
    when_empty: str | None = setting(
        None,
        "what an image whose masks were all filtered out gets: nothing (skip) or its best mask (best)",
        choices=("skip", "best"),
    )
    median: int = setting(0, "side in cells of a median filter over the masks, odd from 3 on; 0 for none", least=0)
    cell_offset: float | None = setting(None, CELL_OFFSET)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.median and (self.median < 3 or self.median % 2 == 0):
            raise ConfigError(f"`median`: a filter of {self.median} cells has no middle; use 0, 3, 5, ...")


@dataclass(frozen=True)
class ForegroundSettings(Settings):
    """Strong and unusual cells of a classifier's maps, sharpened by regression."""

    norm_sizes: tuple[int, ...] = setting((256, 384, 512, 768), "longer sides at which the norm is taken", above=0)
    component_sizes: tuple[int, ...] = setting(
        (384, 512, 768), "longer sides at which norm + principal component are taken", above=0
    )
    component: float = setting(1.0, "weight of the principal component")
    refine: bool = setting(True, "sharpen by regression on the maps of `fine_stages` at the largest size")
    strength: float = setting(3.0, "ridge penalty per pixel", above=0)
    blend: float = setting(0.5, "weight of the coarse map in the result")
    grid: int = setting(
        96, "longer side in cells of the map that is thresholded; 160 gives the same masks of large animals", least=1
    )
    min_area: float = setting(0.02, "share of the image", least=0, most=1)
    max_area: float = setting(0.95, "share of the image", least=0, most=1)
    top: int = setting(20, "most instances of an image", least=1)
    stage: int = setting(-1, STAGE)
    fine_stages: tuple[int, ...] = setting((-3, -2), "maps that the regression reads")
    cell_offset: float | None = setting(None, CELL_OFFSET)
    split: str = setting(
        "components",
        "shape also takes components apart at their necks, ncut where the last map's features fall apart: groups of "
        "animals are one component else",
        choices=("components", "shape", "ncut"),
    )
    neck: float = setting(0.6, "of shape: widest neck, as a share of the width of the smaller part", least=0, most=1)
    max_parts: int = setting(4, "most parts that a component is split into", least=1)
    split_tau: float = setting(0.2, "of ncut, as in `cutting.split_tau`")
    max_ncut: float = setting(0.3, "of ncut: a cut that costs more is not made", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.norm_sizes and not self.component_sizes:
            raise ConfigError("`norm_sizes` and `component_sizes` are both empty: give at least one size.")
        if self.refine and not self.fine_stages:
            raise ConfigError("`refine` needs `fine_stages`: give some, or refine=false.")


@dataclass(frozen=True)
class NcutSettings(Settings):
    """MaskCut: repeated normalized cuts of a backbone's features (arXiv 2301.11320)."""

    image_size: int = setting(480, "longer side in pixels; the eigenproblem grows with its square", least=1)
    stage: int = setting(-1, STAGE)
    masks: int = setting(3, "most masks of an image", least=1)
    tau: float = setting(0.15, "cosine above which two cells are joined")
    min_area: float = setting(0.01, "share of the cells", least=0, most=1)
    max_iou: float = setting(0.5, "IoU with an earlier mask at which an image is finished", least=0, most=1)
    center: bool = setting(False, "subtract the image's mean feature, for features that all point one way")
    refine: str | None = setting(None, "pamr follows the image's own edges", choices=("pamr",))
    min_agreement: float = setting(0.5, "least IoU with itself before refinement", least=0, most=1)
    max_area: float = setting(1.0, "share of the image", least=0, most=1)
    max_border: float = setting(1.0, "share of the image's outermost pixels", least=0, most=1)
    cell_offset: float | None = setting(None, CELL_OFFSET)


@dataclass(frozen=True)
class FileSettings(Settings):
    """How the images of a file with masks or boxes are found."""

    match: str = setting(
        "auto",
        "what ties the file's images to the labeled ones: the whole file name (or its last part where that is "
        "unambiguous), the image id, or auto: the name, else the id of an image of equal size",
        choices=("auto", "file_name", "image_id"),
    )
    categories: str | None = setting(
        None, "COCO json that names the categories of a list, which has ids only; none: the ids"
    )
    missing: str | None = setting(
        None,
        "images that the file does not have: fail lists them, empty gives them no masks; none: empty for lists, which "
        "leave out images without results, else fail",
        choices=("fail", "empty"),
    )


@dataclass(frozen=True)
class MaskFileSettings(FileSettings):
    """Masks that another program wrote."""

    min_score: float = setting(0.0, "masks of a lower score are left out")
    min_area: int = setting(1, "masks of fewer pixels are left out", least=0)
    top: int = setting(100, "most masks of an image, best scores first", least=1)


@dataclass(frozen=True)
class MaskGeneratorSettings(Settings):
    """Masks of SAM and its kin; the first six are those of transformers' pipeline and SAM's own generator."""

    points: int = setting(32, "points along each side of the grid that the model is prompted with", least=1)
    points_batch: int = setting(64, "points of a forward pass of the mask decoder", least=1)
    min_iou: float = setting(0.88, "least IoU that the model predicts for its mask; it becomes the score")
    min_stability: float = setting(0.95, "least IoU between the masks at a higher and a lower cut-off")
    crop_layers: int = setting(0, "how often finer crops are looked at too; costs 4^layers passes", least=0)
    nms: float = setting(0.7, "box IoU above which the worse of two masks is dropped, by the model's own rule")
    min_area: float = setting(0.001, "share of the image", least=0, most=1)
    max_area: float = setting(0.9, "share of the image", least=0, most=1)
    max_border: float = setting(1.0, "share of the image's outermost pixels", least=0, most=1)
    mask_nms: float = setting(0.9, "mask IoU above which the worse of two masks is dropped", least=0, most=1)
    top: int = setting(100, "most masks of an image", least=1)


@dataclass(frozen=True)
class SegmenterSettings(Settings):
    """Predictions of a trained segmenter; the first two are those of the reference's own second round."""

    min_score: float = setting(0.5, "least score", least=0, most=1)
    min_area: int = setting(32, "pixels of the image", least=0)
    nms: float | None = setting(None, "mask IoU above which the worse of two masks of a class is dropped; none: keep")
    class_agnostic: bool = setting(False, "forget the classes")
    top: int = setting(100, "most masks of an image", least=1)


@dataclass(frozen=True)
class CenterBoxSettings(Settings):
    """One box in the middle of every image: what any labeler has to beat."""

    side: float = setting(0.5**0.5, "of the box, as a share of the image's sides", above=0, most=1)


@dataclass(frozen=True)
class ZeroShotSettings(Settings):
    """CLIP zero-shot on the crop of each mask."""

    templates: str | list[str] | None = setting(None, TEMPLATES)
    background: str | list[str] = setting("", f"{BACKGROUND}; they take their share of the probability")
    context: float = setting(0.1, "share of the box's longer side added on every side of the crop", least=0)
    surroundings: str = setting(
        "none",
        "pixels of the crop outside of the mask stay, are blurred, or painted in the mean color",
        choices=SURROUNDINGS,
    )
    temperature: float = setting(1.0, "divides the logits; 1 gives CLIP's probabilities", above=0)
    batch_size: int = setting(64, "crops of a forward pass", least=1)


@dataclass(frozen=True)
class ClassifierSettings(Settings):
    """An image classifier whose classes are mapped to the user's."""

    class_map: str | dict[str, Any] | None = setting(
        None, "{class name: [classes of the classifier, by index, range or name]}, or a YAML or JSON file with one"
    )
    mode: str = setting(
        "image", "image gives all masks the image's best class, crop classifies each crop", choices=("image", "crop")
    )
    image_size: int = setting(
        320, "longer side in pixels of what the classifier sees; more than it was trained with names better", least=1
    )
    context: float = setting(0.1, "of a crop: share of the box's longer side added on every side", least=0)
    surroundings: str = setting(
        "none",
        "of a crop: pixels outside of the mask stay, are blurred, or painted in the mean color",
        choices=SURROUNDINGS,
    )
    others: str = setting(
        "ignore",
        "classes outside of the map share no probability (ignore), or keep theirs (count), so that what is none of "
        "the classes has a low confidence",
        choices=("ignore", "count"),
    )
    batch_size: int = setting(32, "images or crops of a forward pass", least=1)


@dataclass(frozen=True)
class NoSettings(Settings):
    """Nothing to set."""
