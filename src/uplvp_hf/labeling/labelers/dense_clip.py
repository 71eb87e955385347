"""The language-vision labeler: class names against dense features, calibrated, cut into instances."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...data.dataset import Row
from ...models.errors import UserError
from ...models.prompts import mask_weights
from ..cutting.cut import cut_instances
from ..cutting.proposals import Proposals
from ..encoders.backbone import Encoder
from ..encoders.clip import RECOMMENDED_FILE, Clip
from ..encoders.precomputed import PrecomputedFeatures
from ..encoders.prompt_templates import TEMPLATES, read_background, read_templates
from ..encoders.text import TextEmbeddings, split_synonyms, texts_of
from ..encoders.windows import View, dense_grids
from ..fingerprint import fingerprint
from ..naming.examples import Examples
from ..protocol import Finish, Labeler
from ..settings import DenseClipSettings, Recipe

# Calibration spread below this is a class whose similarity never changes; dividing by it would make noise evidence.
MIN_STD = 1e-4
VIEW_SETTINGS = ("templates", "image_size", "side", "window", "stride")
RECOMMENDABLE = (*VIEW_SETTINGS, *(knob.name for knob in fields(Recipe)))  # an encoder's folder may recommend these
TOWER_SETTINGS = frozenset(RECOMMENDABLE) - {"templates"}
WITHOUT_EFFECT = ("window_batch", "cache_mb")  # on the labels
# Evidence by kind: threshold of a pixel, peak of an instance (None: the threshold), least score.
# cosine: UPLVP's own values, read off the name of its label file (..._02_015_ann.json): t1 = .2 for pixels, t2 = .15
# for an instance. They were made for OpenSeg's features and CLIP ViT-L/14@336 text; another encoder's cosines lie
# elsewhere, which is what calibration is for.
DEFAULTS = {"zscore": (1.0, 2.0, 0.0), "softmax": (0.5, None, 0.0), "cosine": (0.2, None, 0.15)}


class DenseClipLabeler(Labeler):
    """Masks with classes from a vocabulary, without any training (UPLVP's mask proposal with a training-free CLIP).

    Args:
        clip: see `clip.load_clip`; or `PrecomputedFeatures`, which take the place of an image tower and need `text`.
        entries: vocabulary entries, synonyms separated by commas (the best one counts).
        settings, changes: see `DenseClipSettings`.
        text: precomputed embeddings of the entries, then the background names (`text.load_text_embeddings`).
        guide: the other backbone for attention "proxy".
        examples: annotated images that take the place of words: evidence for a class is the similarity to what its
            examples show. Then `entries` are empty, and there are no background names.

    What depends on the encoder (RECOMMENDABLE) is taken from `clip.recommended` where it is not given here, before the
    defaults; attribute `recommended` says what was. Knobs of a recipe come only with that recipe.

    Raises UserError for an empty vocabulary, a wrong setting, or text that does not fit, and as `read_examples` does.
    """

    name = "clip"

    def __init__(
        self,
        clip: Clip | PrecomputedFeatures,
        entries: Sequence[str],
        settings: DenseClipSettings | None = None,
        *,
        text: TextEmbeddings | None = None,
        guide: Encoder | None = None,
        examples: Examples | None = None,
        **changes: Any,
    ) -> None:
        self.examples, entries = examples, list(entries) if examples is None else examples.names
        if not entries:
            raise UserError("the vocabulary is empty: give at least one class name")
        self.source, self.encoder_name, self.license = clip, clip.name, clip.license
        config = DenseClipSettings.of(settings, **changes)
        if not isinstance(clip, Clip):
            _refuse_tower_settings(config.given)
        self.recommended = _recommended(clip, config)
        config = DenseClipSettings.of(config, **self.recommended)
        self.entries, self.templates = entries, list(read_templates(config.templates or TEMPLATES))
        self.background, self.guide = read_background(config.background, entries), guide
        if config.attention == "proxy" and guide is None and isinstance(clip, Clip):
            raise UserError("attention 'proxy' needs a second backbone: give a guide encoder, such as a DINO")
        self.view = None
        if isinstance(clip, Clip):
            window = clip.image_size if config.window is None else config.window
            size = config.image_size or 2 * clip.image_size
            self.view = View(size, config.side or "shorter", window or None, config.stride)
        self.config = _with_defaults(config, bool(self.background))
        self.text_digest = None if text is None else _digest(text)
        text = text if examples is None else self._shown(examples)
        self.text = texts_of(clip, self.entries, self.background, self.templates, text)
        self.vocabulary = [] if config.class_agnostic else [split_synonyms(entry)[0] for entry in entries]
        self.cache = MapCache(int(config.cache_mb * 2**20))
        self.mean: torch.Tensor | None = None
        self.std: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.source.device

    @property
    def settings(self) -> dict[str, Any]:
        """What the labels depend on, for the store's header."""
        values = {name: value for name, value in self.config.as_dict().items() if name not in WITHOUT_EFFECT}
        values |= {name: getattr(self, name) for name in ("entries", "templates", "background")}
        if self.text_digest is not None:
            values |= {"templates": None, "text": self.text_digest}
        if self.examples is not None:
            values |= {"templates": None, "examples": fingerprint(self.examples.dataset)}
        if self.view is None:
            kept = {name: value for name, value in values.items() if name not in TOWER_SETTINGS}
            return kept | {"features": self.source.name, "layout": self.source.layout}
        guide = None if self.guide is None else self.guide.name
        return values | asdict(self.view) | {"guide": guide, "dtype": str(self.source.dtype).removeprefix("torch.")}

    def _shown(self, examples: Examples) -> TextEmbeddings:
        """For each class the mean feature under its examples' masks, in place of its name's embedding."""
        if self.view is None or self.background:
            raise UserError("the clip labeler takes examples in place of words: without precomputed features, and "
                            "without background names")  # fmt: skip
        sums = torch.zeros(len(examples.names), self.source.dimension)
        for example in examples.images():
            options = (self.view, self.config, self.guide, self.config.window_batch)
            grid = dense_grids(self.source, [example.image], None, *options)[0].float().cpu()
            weights = mask_weights(torch.from_numpy(np.stack(example.masks)), (grid.shape[1], grid.shape[2]))
            vectors = F.normalize(torch.einsum("dhw,nhw->nd", grid, weights), dim=1)
            sums.index_add_(0, torch.tensor(example.labels), vectors)
        examples.refuse_unseen(sums.any(dim=1).tolist())
        return TextEmbeddings(F.normalize(sums, dim=1), torch.arange(len(sums)), len(sums))

    def similarities(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[torch.Tensor]:
        """One (T, h, w) float32 cosine map an image, T names: synonyms of the classes, then background."""
        return [maps for maps, _ in self._encode(images, rows)]

    def _encode(self, images: Sequence[Image.Image], rows: Sequence[Row] | None) -> Encoded:
        """Similarities, and the features that splitting needs, of every image."""
        with_features = self.config.split == "ncut"
        if self.view is None:
            if rows is None:
                raise UserError("precomputed features are found by the dataset's rows: call with rows")
            features = self.source(rows, self.text.vectors.shape[1])
        else:
            vectors = None if with_features else self.text.vectors
            features = dense_grids(
                self.source, images, vectors, self.view, self.config, self.guide, self.config.window_batch
            )
            if not with_features:
                return [(maps, None) for maps in features]
        vectors = self.text.vectors.to(features[0]) if features else None
        return [(torch.einsum("td,dhw->thw", vectors, grid), grid if with_features else None) for grid in features]

    def measure(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> list[dict[str, Any]]:
        """Number of cells of each image, and every class's sum and sum of squares over them; [] uncalibrated.

        The maps are kept within `cache_mb`, for the call that labels exactly these images together.
        """
        if self.config.calibration is None or not images:
            return []
        encoded = self._encode(images, rows)
        if self.view is not None:  # precomputed features go by the rows, not by the pixels
            self.cache.put(images, encoded)
        entries = []
        for maps, _ in encoded:
            cells = self.text.per_class(maps, dim=0).flatten(1).double().cpu()
            sums = {"total": cells.sum(dim=1).tolist(), "squares": (cells**2).sum(dim=1).tolist()}
            entries.append({"count": cells.shape[1], **sums})
        return entries

    def calibrate(self, statistics: list[dict[str, Any]]) -> dict[str, Any]:
        """Every class's mean and deviation over all places of the measured images; {} without calibration.

        Raises UserError when there is no image to calibrate on.
        """
        if self.config.calibration is None:
            return {}
        if not statistics:
            raise UserError("no readable image to calibrate the clip labeler on; use calibration=None")
        count = sum(entry["count"] for entry in statistics)
        total, squares = (
            torch.tensor([entry[name] for entry in statistics], dtype=torch.float64).sum(dim=0)
            for name in ("total", "squares")
        )
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        return {"calibration": {"mean": mean.tolist(), "std": std.tolist(), "images": len(statistics)}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `calibrate` returned, from this or an earlier run."""
        if self.config.calibration is not None:
            values = state["calibration"]
            self.mean = torch.tensor(values["mean"], device=self.device)
            self.std = torch.tensor(values["std"], device=self.device).clamp_min(MIN_STD)

    def evidence(self, similarities: torch.Tensor) -> torch.Tensor:
        """(T, h, w) cosines -> (K, h, w): deviations above the mean, probabilities, or the cosines; -inf for classes
        that denoising drops."""
        classes = len(self.entries)
        if self.config.calibration is not None:
            if self.mean is None or self.std is None:
                raise UserError("the clip labeler is not calibrated: call restore(calibrate(measure(images))) first")
            values = (self.text.per_class(similarities, dim=0) - self.mean[:, None, None]) / self.std[:, None, None]
        elif self.background:
            values = self._probabilities(similarities)
        else:
            values = self.text.per_class(similarities, dim=0)
        values = values[:classes]
        if self.config.denoise > 0:
            best = self._probabilities(similarities)[:classes].amax(dim=(1, 2))
            values = values.masked_fill((best < self.config.denoise)[:, None, None], -torch.inf)
        return values

    def _probabilities(self, similarities: torch.Tensor) -> torch.Tensor:
        return self.text.per_class((similarities * self.config.logit_scale).softmax(dim=0), dim=0)

    def begin(self, images: Sequence[Image.Image], rows: Sequence[Row] | None = None) -> Finish:
        """The forward passes; what it returns cuts the instances: one `Proposals` an image, with labels unless
        class-agnostic, masks at the image's size."""
        if not images:
            return list
        encoded = self.cache.pop(images) or self._encode(images, rows)

        def cut() -> Iterator[Proposals]:
            for image, (maps, features) in zip(images, encoded):
                maps = maps.to(self.device)
                features = None if features is None else features.to(self.device)
                yield self.instances(self.evidence(maps), image.size[::-1], image, features)

        return cut

    def instances(
        self,
        evidence: torch.Tensor,
        size: tuple[int, int],
        image: Image.Image | None = None,
        features: torch.Tensor | None = None,
    ) -> Proposals:
        """Class map, threshold, components, filters, NMS: (K, h, w) evidence -> proposals of `size` (H, W)."""
        return cut_instances(evidence, size, self.config, self._score, image, features)

    def _score(self, mean_evidence: float) -> float:
        """Mean evidence as a score in [0, 1]; deviations through a sigmoid, .5 at the threshold."""
        if self.config.calibration is not None:
            return float(1 / (1 + np.exp(self.config.threshold - mean_evidence)))
        return float(np.clip(mean_evidence, 0, 1))


Encoded = list[tuple[torch.Tensor, torch.Tensor | None]]  # similarities and features of the images of a batch


class MapCache:
    """Maps of batches of images in main memory, until `limit` bytes are held.

    A batch is found only as a whole, in its order: an image's floats may depend in their last bits on its batch mates,
    and labels must not depend on what happens to be kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._batches: dict[tuple[int, ...], tuple[int, Encoded]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    @staticmethod
    def _key(images: Sequence[Image.Image]) -> tuple[int, ...]:
        return tuple(zlib.crc32(image.tobytes(), image.width) for image in images)

    def put(self, images: Sequence[Image.Image], encoded: Encoded) -> None:
        """Keep a batch's maps where there is room."""
        kept = [(maps.cpu(), None if features is None else features.cpu()) for maps, features in encoded]
        size = sum(tensor.nbytes for pair in kept for tensor in pair if tensor is not None)
        key = self._key(images)
        if key not in self._batches and self.held + size <= self.limit:
            self._batches[key] = size, kept
            self.held += size

    def pop(self, images: Sequence[Image.Image]) -> Encoded | None:
        """A batch's maps, which are then forgotten, or None."""
        size, found = self._batches.pop(self._key(images), (0, None)) if self._batches else (0, None)
        self.held -= size
        return found


def _recommended(clip: Clip | PrecomputedFeatures, config: DenseClipSettings) -> dict[str, Any]:
    """What the encoder recommends and the user did not give. Raises UserError for settings that no encoder decides."""
    values = dict(getattr(clip, "recommended", {}))
    wrong = sorted(values.keys() - set(RECOMMENDABLE))
    if wrong:
        raise UserError(
            f"{clip.name}, {RECOMMENDED_FILE}: {wrong[0]!r} is no setting that an encoder decides; these are "
            f"{', '.join(RECOMMENDABLE)}"
        )
    recipe = values.get("attention", Recipe().attention)
    if "attention" in config.given and config.attention != recipe:
        values = {name: value for name, value in values.items() if name in VIEW_SETTINGS}
    return {name: value for name, value in values.items() if name not in config.given}


def _refuse_tower_settings(given: Collection[str]) -> None:
    """Raises UserError for settings of an image tower where its features are precomputed."""
    useless = sorted(TOWER_SETTINGS.intersection(given))
    if useless:
        raise UserError(f"{', '.join(useless)}: no effect with precomputed features; leave out")


def _with_defaults(config: DenseClipSettings, background: bool) -> DenseClipSettings:
    """Thresholds that the kind of evidence calls for, where they are not given."""
    threshold, peak, min_score = DEFAULTS[config.calibration or ("softmax" if background else "cosine")]
    threshold = threshold if config.threshold is None else config.threshold
    peak = (threshold if peak is None else peak) if config.peak is None else config.peak
    min_score = min_score if config.min_score is None else config.min_score
    return replace(config, threshold=threshold, peak=peak, min_score=min_score)


def _digest(text: TextEmbeddings) -> str:
    """A short fingerprint of precomputed vectors."""
    content = text.vectors.float().cpu().contiguous().numpy().tobytes()
    return hashlib.sha256(content + text.owners.cpu().numpy().tobytes()).hexdigest()[:16]
