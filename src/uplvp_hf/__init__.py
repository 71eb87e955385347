"""uplvp_hf: instance segmentation from many images and few labels.

Importing this package is quick: nothing heavy is loaded until a name is used. The auto classes of transformers
(`AutoConfig`, `AutoModelForInstanceSegmentation`, `AutoImageProcessor`, `pipeline`, ...) know UPLVP, K-Net, QueryInst,
Mask R-CNN and ICPC models from the moment that both packages are imported, in any order.
"""

import importlib
from typing import TYPE_CHECKING

from ._register import register_when_needed

if TYPE_CHECKING:  # what editors and type checkers see; `_NAMES` says the same to Python
    from .data import InstanceDataset as InstanceDataset, load_dataset_rows as load_dataset_rows
    from .evaluation.predictor import evaluate_model as evaluate_model, predict_dataset as predict_dataset
    from .labeling.pipeline import label_images as label_images
    from .models.configuration_few_shot import UplvpFewShotConfig as UplvpFewShotConfig
    from .models.configuration_icpc import IcpcConfig as IcpcConfig
    from .models.configuration_knet import KNetConfig as KNetConfig
    from .models.configuration_mask_rcnn import MaskRcnnConfig as MaskRcnnConfig
    from .models.configuration_queryinst import QueryInstConfig as QueryInstConfig
    from .models.configuration_uplvp import UplvpConfig as UplvpConfig
    from .models.image_processing_icpc import IcpcImageProcessor as IcpcImageProcessor
    from .models.image_processing_pil_icpc import IcpcImageProcessorPil as IcpcImageProcessorPil
    from .models.image_processing_pil_uplvp import UplvpImageProcessorPil as UplvpImageProcessorPil
    from .models.image_processing_uplvp import UplvpImageProcessor as UplvpImageProcessor
    from .models.modeling_few_shot import UplvpForFewShotSegmentation as UplvpForFewShotSegmentation
    from .models.modeling_icpc import IcpcForSemanticSegmentation as IcpcForSemanticSegmentation
    from .models.modeling_knet import KNetForInstanceSegmentation as KNetForInstanceSegmentation, KNetModel as KNetModel
    from .models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation as MaskRcnnForInstanceSegmentation
    from .models.modeling_queryinst import (
        QueryInstForInstanceSegmentation as QueryInstForInstanceSegmentation,
        QueryInstModel as QueryInstModel,
    )
    from .models.modeling_uplvp import (
        UplvpForInstanceSegmentation as UplvpForInstanceSegmentation,
        UplvpForPreTraining as UplvpForPreTraining,
    )
    from .models.pipeline_uplvp import UplvpInstanceSegmentationPipeline as UplvpInstanceSegmentationPipeline
    from .training.loop import train as train

__version__ = "0.2.0"

_NAMES = {
    "UplvpConfig": "models.configuration_uplvp",
    "UplvpForInstanceSegmentation": "models.modeling_uplvp",
    "UplvpForPreTraining": "models.modeling_uplvp",
    "UplvpFewShotConfig": "models.configuration_few_shot",
    "UplvpForFewShotSegmentation": "models.modeling_few_shot",
    "UplvpImageProcessor": "models.image_processing_uplvp",
    "UplvpImageProcessorPil": "models.image_processing_pil_uplvp",
    "UplvpInstanceSegmentationPipeline": "models.pipeline_uplvp",
    "KNetConfig": "models.configuration_knet",
    "KNetForInstanceSegmentation": "models.modeling_knet",
    "KNetModel": "models.modeling_knet",
    "QueryInstConfig": "models.configuration_queryinst",
    "QueryInstForInstanceSegmentation": "models.modeling_queryinst",
    "QueryInstModel": "models.modeling_queryinst",
    "MaskRcnnConfig": "models.configuration_mask_rcnn",
    "MaskRcnnForInstanceSegmentation": "models.modeling_mask_rcnn",
    "IcpcConfig": "models.configuration_icpc",
    "IcpcForSemanticSegmentation": "models.modeling_icpc",
    "IcpcImageProcessor": "models.image_processing_icpc",
    "IcpcImageProcessorPil": "models.image_processing_pil_icpc",
    "InstanceDataset": "data",
    "load_dataset_rows": "data",
    "label_images": "labeling.pipeline",
    "evaluate_model": "evaluation.predictor",
    "predict_dataset": "evaluation.predictor",
    "train": "training.loop",
}
__all__ = [*_NAMES, "__version__"]


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'uplvp_hf' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_when_needed()
