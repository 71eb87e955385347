"""Builds what a run needs from its settings: data, model, image processor."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data import InstanceDataset, load_dataset_rows
from ..data.manifest import take_split
from ..data.splits import SplitSpec
from ..data.store_features import feature_width
from ..data.store_reader import read_store
from ..data.text_embeddings import read_text_matrix
from ..data.training_set import TrainingSet
from ..data.transforms import TrainTransform
from ..data.usage import crowds_as_objects, training_usage
from ..files import check_model_name
from ..models.configuration_mask_rcnn import MaskRcnnConfig
from ..models.configuration_uplvp import OWN_SEGMENTERS, UplvpConfig
from ..models.errors import UserError, reading
from ..models.image_processing_base_uplvp import stored_settings
from ..models.image_processing_uplvp import UplvpImageProcessor
from ..models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation
from ..models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining, UplvpPreTrainedModel
from .backbone_weights import check_given, close, load_backbone_weights, own_look, refuse_other_look, with_own_padding
from .canvas import DIVISOR, check_canvas, preferred_size, with_canvas
from .config import ConfigError, DataSettings, ModelSettings, TrainSettings
from .freezing import freeze_backbone, refuse_random_frozen
from .mixture import MixedSamples
from .segmenter_settings import refuse_other_segmenter, refuse_unknown, refuse_unknown_names
from .vit import fade_masks, load_encoder, wants_model

logger = logging.getLogger(__name__)

TrainedModel = UplvpPreTrainedModel | MaskRcnnForInstanceSegmentation


def kernel_features(settings: TrainSettings) -> str | None:
    """The folder with features of the masks that the run is supervised by (`model.kernel_target`), or None."""
    target = settings.model.kernel_target
    if settings.stage != "pretrain" or target in (None, "prompt"):
        return None
    return settings.data.train if target == "labeler" else target


def _load(settings: DataSettings, part: str, features: str | None = None) -> InstanceDataset:
    """The rows of `data.train` or `data.val`. features: folder with those of the masks."""
    given = {key: getattr(settings, f"{part}_{key}") for key in ("images", "split", "format")}
    source = getattr(settings, part)
    if features is None:
        dataset = load_dataset_rows(source, **given)
    elif not (Path(source) / "header.json").is_file():
        raise ConfigError(
            f"`model.kernel_target` asks for features of the masks, which pseudo-label stores have; {source} is none."
        )
    elif not Path(features).is_dir():
        raise ConfigError(f"`model.kernel_target` is prompt, labeler or a folder of features; there is no {features}.")
    else:
        dataset = read_store(source, given["images"], features=features)
    return crowds_as_objects(dataset) if settings.crowds_as_objects else dataset


def build_data(settings: TrainSettings) -> tuple[InstanceDataset, InstanceDataset | None]:
    """Training rows (cut to the low-data split, whose manifest they carry) and validation rows, or None.

    Raises ConfigError and DataError for data that cannot be used, and where training would have nothing to learn.
    """
    data = settings.data
    if data.train is None:
        raise ConfigError("`data.train` is not set: give a COCO JSON, a folder or a pseudo-label store.")
    train = _load(data, "train", kernel_features(settings))
    if not train.categories:
        raise ConfigError(f"{data.train} holds images without classes: label it first (`uplvp label`).")
    seed = settings.seed if data.split_seed is None else data.split_seed
    if data.labels_per_class is not None:
        rule = SplitSpec("images", data.labels_per_class, seed, allow_fewer=data.allow_fewer)
        train = take_split(train, rule)
    elif data.subset is not None:
        train = take_split(train, data.subset, seed, data.allow_fewer)
    val = None
    if data.val is not None:
        val = _load(data, "val")
        _check_images(val, "val")
    _check_images(train, "train")
    training_usage(train, data.size, data.max_instances).refuse_nothing(train.name)
    return train, val


def _check_images(dataset: InstanceDataset, which: str) -> None:
    """Raises ConfigError when none of the first images is where the annotations say."""
    files = [row["image"] for row in dataset.rows[:20] if isinstance(row["image"], str)]
    if files and not any(Path(file).is_file() for file in files):
        raise ConfigError(
            f"No image of `data.{which}` is there, for example {files[0]}: set `data.{which}_images` to their folder."
        )


def with_image_settings(settings: TrainSettings) -> TrainSettings:
    """Fills in `data.size`, `image_mean` and `image_std` from the processor of `model.init`, else 512 and what the
    weights of the backbone were trained with, padding too, where their configuration says it, else ImageNet's.

    Raises ConfigError for another mean, deviation or padding than the checkpoint, the weights or the labels have.
    """
    data, found, look = settings.data, processor_settings(settings.model.init), own_look(settings.model)
    chosen = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    for key, standard in chosen.items():
        given, trained = getattr(data, key), found.get(key)
        if given and trained and not close(given, trained):
            raise ConfigError(
                f"`data.{key}` is {given}, but {settings.model.init} was trained with {trained}: leave the setting out."
            )
        if not trained:
            check_given(key, given, look)
        chosen[key] = list(given or trained or (getattr(look, key) if look else standard))
    size = data.size or preferred_size(settings.model.init, found)
    settings = dataclasses.replace(settings, data=dataclasses.replace(data, size=size, **chosen))
    settings = with_own_padding(settings, look)
    refuse_other_look(settings)
    return settings


def processor_settings(init: str | None) -> dict:
    """The content of a checkpoint's `preprocessor_config.json`, or nothing if there is none."""
    if init is None:
        return {}
    try:
        check_model_name(init)
    except FileNotFoundError as error:
        raise ConfigError(f"`model.init`: {error}") from error
    try:
        return stored_settings(init)
    except (OSError, UserError) as error:
        raise ConfigError(f"`model.init`: {error}") from error


def build_model(settings: TrainSettings, train: InstanceDataset) -> TrainedModel:
    """The model of the run, with the classes of the data, weights loaded and parts frozen.

    Raises ConfigError for a frozen backbone that would be random, for an `init` that is not the `segmenter` given, and
    for a Mask R-CNN with settings that need queries.
    """
    refuse_random_frozen(settings.model)
    model = _start_from(settings, train) if settings.model.init else _from_scratch(settings, train)
    if settings.prompted and settings.model.kernel_target is None:
        _check_kernel_target(model.config, settings)
    unused = [] if settings.prompted else _for_queries(settings.model)
    if unused:
        logger.warning("Without effect in fine-tuning, as they are about prompts: %s.", ", ".join(unused))
    if settings.stage == "pretrain" and settings.model.text_features is not None:
        features, names = _text_features(settings.model.text_features)
        try:
            model.set_text_features(features, names)
        except ValueError as error:
            raise ConfigError(f"`model.text_features`, {settings.model.text_features}: {error}") from error
    prepare_model(model, settings)
    if settings.stage == "finetune" and isinstance(model, UplvpForPreTraining):
        model.prompts_pseudo_alone = True
    return model


def prepare_model(model: TrainedModel, settings: TrainSettings) -> None:
    """Fits the model to the canvas, loads the weights of its backbone, and freezes what the settings name."""
    check_canvas(model.segmenter, settings)
    if settings.model.backbone_weights and not settings.model.init:  # which brings its own, perhaps trained further
        if wants_model(model.segmenter):
            load_encoder(model.segmenter, settings.model.backbone_weights)
        else:
            load_backbone_weights(model.segmenter.backbone, settings.model.backbone_weights)
    freeze_backbone(model.segmenter.backbone, settings.model, settings.data.size)
    fade_masks(model.segmenter, settings)


def _check_kernel_target(config: UplvpConfig, settings: TrainSettings) -> None:
    """Raises ConfigError for a checkpoint that is supervised by features where the run has none."""
    if config.kernel_target == "labeler" and config.supervises_kernels:
        raise ConfigError(
            f"{settings.model.init} was pre-trained towards features of the masks: set `model.kernel_target` to "
            "labeler, a folder of features, or prompt."
        )


def build_processor(data: DataSettings, size_divisor: int = DIVISOR) -> UplvpImageProcessor:
    """Resizes as the training did, without its randomness: the longer side to `data.size`, or with `data.short_edges`
    the shorter one to the last of them. On a square canvas no image sees its batch mates' shapes; otherwise batches
    are padded to their largest image."""
    size = {"longest_edge": data.size}
    if data.short_edges is not None and data.keep_ratio:
        size = {"shortest_edge": data.short_edges[-1]}
        size |= {} if data.longest_edge is None else {"longest_edge": data.longest_edge}
    elif data.short_edges is not None:
        size = {"height": data.short_edges[-1], "width": data.longest_edge}
    canvas: dict[str, Any] = {"pad_size": {"height": data.size, "width": data.size}} if data.square else {}
    canvas |= {} if size_divisor == DIVISOR else {"size_divisor": size_divisor}
    return UplvpImageProcessor(size=size, image_mean=list(data.image_mean), image_std=list(data.image_std), **canvas)


def build_samples(
    settings: TrainSettings, rows: InstanceDataset, extra: InstanceDataset | None = None
) -> TrainingSet | MixedSamples:
    """The augmented samples that a run with these settings sees (`with_image_settings` filled in)."""
    if extra is not None:
        if kernel_features(settings) is not None:
            raise ConfigError("`data.extra` has no features of its masks, which `model.kernel_target` asks for.")
        alone = dataclasses.replace(settings, seed=settings.seed + 1)
        labeled, more = build_samples(settings, rows), build_samples(alone, extra)
        assert isinstance(labeled, TrainingSet) and isinstance(more, TrainingSet)
        return MixedSamples(labeled, more)
    data = settings.data
    label_map = {category: index for index, category in enumerate(rows.category_ids)}
    transform = TrainTransform(
        data.size,
        tuple(data.scale_range),
        data.flip,
        data.color_jitter,
        short_edges=data.short_edges,
        longest_edge=data.longest_edge,
        keep_ratio=data.keep_ratio,
        rotate=data.rotate,
        rotate_probability=data.rotate_probability,
        fill=tuple(round(255 * value) for value in data.image_mean),
    )
    return TrainingSet(
        rows,
        transform,
        None if settings.model.class_agnostic else label_map,
        data.image_mean,
        data.image_std,
        settings.seed,
        data.max_instances,
        copy_paste=data.copy_paste,
        side_by_side=data.side_by_side,
        features=kernel_features(settings) is not None,
    )


def classes_of(settings: TrainSettings, train: InstanceDataset) -> tuple[dict[int, str], list[int]]:
    """Class names by index and original category ids; one class "object" for class-agnostic runs."""
    if settings.model.class_agnostic:
        return {0: "object"}, [1]
    return train.id2label, train.category_ids


def _model_class(settings: TrainSettings) -> type[UplvpPreTrainedModel]:
    return UplvpForPreTraining if settings.prompted else UplvpForInstanceSegmentation


# Settings of a run that are settings of `UplvpConfig` too.
_METHOD = sorted({item.name for item in dataclasses.fields(ModelSettings)} & set(UplvpConfig.__dataclass_fields__))


# Parts of the method that a new pre-training leaves off where no setting of theirs is given: no gain from them
# could be shown beside the pseudo labels (docs/results.md, "What prompts and kernel supervision add"). `UplvpConfig` by
# itself is the method of the papers, and so is `parts/method_of_papers`.
_PARTS = (
    ("prompt_matching", "none", ("prompt_", "num_prompts", "guidance_")),
    ("kernel_supervision_weight", 0.0, ("kernel_",)),
)


def _unasked(settings: TrainSettings, found: Any) -> dict:
    """The parts of the method where neither the user nor the checkpoint says anything of them.

    found: configuration of `model.init`, or None. Where a pre-training goes on, its settings stay; where a teacher's
    masks are to be prompts (`teacher.prompts`), what a model of ours had switched off is on.
    """
    model, ours = settings.model, getattr(found, "model_type", None) == UplvpConfig.model_type
    goes_on = ours and UplvpForPreTraining.__name__ in (found.architectures or ())
    values = {}
    for name, off, prefixes in _PARTS:
        said = any(getattr(model, key) is not None for key in _METHOD if key.startswith(prefixes))
        if settings.stage == "pretrain" and not goes_on and not said:
            values[name] = off
        elif settings.stage == "finetune" and settings.prompted and ours and not said and getattr(found, name) == off:
            values[name] = UplvpConfig.__dataclass_fields__[name].default
    return values


def _method(settings: TrainSettings, train: InstanceDataset, found: Any = None) -> dict:
    """The settings of the method that the user gave, and of `_unasked`."""
    model = settings.model
    given = {name: getattr(model, name) for name in _METHOD if getattr(model, name) is not None}
    given |= _unasked(settings, found)
    if kernel_features(settings) is not None:
        given |= {"kernel_target": "labeler", "kernel_target_dim": feature_width(train) or 1}
    elif "kernel_target" in given:  # of a checkpoint that was trained towards others, nothing stays
        given = {"kernel_target_dim": None, "kernel_head": None, **given, "kernel_target": "prompt"}
    if settings.stage == "finetune" and settings.prompted:
        given["text_dim"] = None  # the further class head of a pre-training is not trained again
    elif model.text_features is not None:
        given["text_dim"] = _text_features(model.text_features)[0].shape[1]
    return given


def _for_queries(model: ModelSettings) -> list[str]:
    """The given settings that only concern the pre-training of queries, as words for a message."""
    names = sorted({*_METHOD, "text_features"} - {"class_agnostic"})
    return [f"`model.{name}`" for name in names if getattr(model, name) is not None]


def _text_features(path: str) -> tuple[torch.Tensor, list[str]]:
    """Embeddings (classes, channels) of class names, and the names, from a safetensors file."""
    try:
        return read_text_matrix(path)
    except ValueError as error:
        raise ConfigError(f"`model.text_features`: {error}") from error


def _check_baseline(settings: TrainSettings) -> None:
    """Raises ConfigError for settings that need queries, which a Mask R-CNN does not have."""
    if settings.stage == "pretrain":
        raise ConfigError(
            "A `mask_rcnn` has no queries, so it cannot be pre-trained here: fine-tune it from a backbone "
            "(`model.backbone_weights`), or pre-train a mask2former, knet or queryinst."
        )
    given = _for_queries(settings.model)
    if given:
        raise ConfigError(f"A `mask_rcnn` has no queries: leave out {', '.join(given)}.")


def _baseline(settings: TrainSettings, train: InstanceDataset) -> MaskRcnnForInstanceSegmentation:
    """A new Mask R-CNN."""
    _check_baseline(settings)
    id2label, category_ids = classes_of(settings, train)
    given = {key: value for key, value in settings.model.segmenter.items() if key != "model_type"}
    refuse_unknown_names(given, MaskRcnnConfig, "model.segmenter.")
    config = MaskRcnnConfig(**given, id2label=id2label, category_ids=category_ids)
    refuse_unknown(given, config)
    return MaskRcnnForInstanceSegmentation(config)


def _from_scratch(settings: TrainSettings, train: InstanceDataset) -> TrainedModel:
    if settings.model.segmenter is None:
        raise ConfigError("Set `model.init` (a checkpoint) or `model.segmenter` (settings of a new segmenter).")
    if settings.model.segmenter.get("model_type") == MaskRcnnConfig.model_type:
        return _baseline(settings, train)
    id2label, category_ids = classes_of(settings, train)
    if own := OWN_SEGMENTERS.get(settings.model.segmenter.get("model_type")):
        # These refuse by themselves, without the place of the key in the recipe.
        refuse_unknown_names(settings.model.segmenter, own, "model.segmenter.")
    given = with_canvas(settings.model.segmenter, settings.data.size)
    config = UplvpConfig(
        segmenter_config=given,
        id2label=id2label,
        category_ids=category_ids,
        **_method(settings, train),
    )
    refuse_unknown(settings.model.segmenter, config.segmenter_config)
    return _model_class(settings)(config)


def _start_from(settings: TrainSettings, train: InstanceDataset) -> TrainedModel:
    """Starts from one of our checkpoints, or from a segmenter's, and logs what was kept."""
    from transformers import AutoConfig

    id2label, category_ids = classes_of(settings, train)
    cls, init = _model_class(settings), settings.model.init
    try:
        with reading(f"`model.init`: {init}"):
            found = AutoConfig.from_pretrained(init)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`model.init`: {init} is no model folder, and no model of the Hub: {reason}") from error
    segmenter = getattr(found, "segmenter_config", found)
    refuse_other_segmenter(settings.model, segmenter)
    if segmenter.model_type == MaskRcnnConfig.model_type:
        _check_baseline(settings)
        cls, method = MaskRcnnForInstanceSegmentation, {}
    else:
        method = _method(settings, train, found)
    model = cls.from_pretraining(init, id2label, category_ids, settings.model.class_head, **method)
    logger.info("From %s: %s", init, model.transfer_report)
    return model
