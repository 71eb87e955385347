"""Registers UPLVP models with transformers' auto classes and the pipeline "instance-segmentation" with its pipelines,
without importing transformers before the user does.

The registration needs the model classes, whose import takes seconds (torch, transformers). So it waits until an auto
module of transformers (the pipelines) has been imported and no module of transformers, and no model file of ours, is
half executed.
"""

import importlib.abc
import importlib.util
import sys

_AUTO = tuple(f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling", "image_processing"))
_PIPELINES = "transformers.pipelines"
_registered: set[str] = set()


def register_auto_classes() -> None:
    """Makes `AutoConfig`, `AutoModel...`, `AutoImageProcessor` and `pipeline("image-segmentation")` know our models."""
    if "auto" not in _registered:
        _registered.add("auto")
        _register_instances()
        _register_semantic()


def _register_instances() -> None:
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageSegmentation,
        AutoModelForInstanceSegmentation,
        AutoModelForPreTraining,
        AutoModelForUniversalSegmentation,
    )
    from transformers.models.auto import modeling_auto
    from transformers.utils import is_torchvision_available

    from .models.configuration_knet import KNetConfig
    from .models.configuration_queryinst import QueryInstConfig
    from .models.configuration_uplvp import UplvpConfig
    from .models.configuration_vit_mask_decoder import VitMaskDecoderConfig
    from .models.image_processing_pil_uplvp import UplvpImageProcessorPil
    from .models.modeling_knet import KNetForInstanceSegmentation, KNetModel
    from .models.modeling_queryinst import QueryInstForInstanceSegmentation, QueryInstModel
    from .models.modeling_uplvp import UplvpForInstanceSegmentation, UplvpForPreTraining
    from .models.modeling_vit_mask_decoder import VitMaskDecoder

    processors = {"pil": UplvpImageProcessorPil}
    bodies = [  # a UPLVP model is a segmenter of another architecture; there is no smaller body that all of them have
        (UplvpConfig, UplvpForInstanceSegmentation),
        _few_shot(),
        (KNetConfig, KNetModel),
        (QueryInstConfig, QueryInstModel),
        (VitMaskDecoderConfig, VitMaskDecoder),
    ]
    models = [
        (UplvpConfig, UplvpForInstanceSegmentation),
        _few_shot(),
        (KNetConfig, KNetForInstanceSegmentation),
        (QueryInstConfig, QueryInstForInstanceSegmentation),
        (VitMaskDecoderConfig, VitMaskDecoder),
    ]
    if is_torchvision_available():
        from .models.configuration_mask_rcnn import MaskRcnnConfig
        from .models.image_processing_uplvp import UplvpImageProcessor
        from .models.modeling_mask_rcnn import MaskRcnnForInstanceSegmentation

        processors["torchvision"] = UplvpImageProcessor
        bodies.append((MaskRcnnConfig, MaskRcnnForInstanceSegmentation))
        models.append((MaskRcnnConfig, MaskRcnnForInstanceSegmentation))
    AutoModelForPreTraining.register(UplvpConfig, UplvpForPreTraining)
    for config, body in bodies:
        AutoModel.register(config, body)
    # The stock pipeline tries only AutoModelForImageSegmentation and AutoModelForSemanticSegmentation.
    autos = (AutoModelForImageSegmentation, AutoModelForInstanceSegmentation, AutoModelForUniversalSegmentation)
    for config, model in models:
        AutoConfig.register(config.model_type, config)
        for auto in autos:
            auto.register(config, model)
        # Without this entry the pipeline works but logs that the model is not supported.
        modeling_auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES[config.model_type] = model.__name__
        AutoImageProcessor.register(config, image_processor_classes=dict(processors))


def _few_shot() -> tuple[type, type]:
    from .models.configuration_few_shot import UplvpFewShotConfig
    from .models.modeling_few_shot import UplvpForFewShotSegmentation

    return UplvpFewShotConfig, UplvpForFewShotSegmentation


def _register_semantic() -> None:
    """The same for semantic segmentation."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
    from transformers.models.auto import modeling_auto
    from transformers.utils import is_torchvision_available

    from .models.configuration_icpc import IcpcConfig
    from .models.image_processing_pil_icpc import IcpcImageProcessorPil
    from .models.modeling_icpc import IcpcForSemanticSegmentation

    processors = {"pil": IcpcImageProcessorPil}
    if is_torchvision_available():
        from .models.image_processing_icpc import IcpcImageProcessor

        processors["torchvision"] = IcpcImageProcessor
    AutoConfig.register(IcpcConfig.model_type, IcpcConfig)
    AutoModelForSemanticSegmentation.register(IcpcConfig, IcpcForSemanticSegmentation)
    modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[IcpcConfig.model_type] = "IcpcForSemanticSegmentation"
    AutoImageProcessor.register(IcpcConfig, image_processor_classes=processors)


def register_pipeline() -> None:
    """Makes `pipeline("instance-segmentation")` ours."""
    if "pipeline" in _registered:
        return
    _registered.add("pipeline")
    from transformers import AutoModelForInstanceSegmentation
    from transformers.pipelines import PIPELINE_REGISTRY

    from .models.pipeline_uplvp import UplvpInstanceSegmentationPipeline

    PIPELINE_REGISTRY.register_pipeline(
        "instance-segmentation",
        pipeline_class=UplvpInstanceSegmentationPipeline,
        pt_model=(AutoModelForInstanceSegmentation,),
        type="image",
    )


def register_when_needed() -> None:
    """Registers now what is already imported, the rest right after it is imported for the first time."""
    _register_imported()
    if not _complete() and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_imported() -> None:
    if any(name in sys.modules for name in _AUTO):
        register_auto_classes()
    if _PIPELINES in sys.modules:
        register_pipeline()


def _complete() -> bool:
    return _registered == {"auto", "pipeline"}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Counts the modules in execution of transformers and of our models; registers when the count returns to zero."""

    def __init__(self) -> None:
        self.running = 0

    def find_spec(self, fullname, path=None, target=None):
        if _complete() or not (fullname.split(".")[0] == "transformers" or fullname.startswith("uplvp_hf.models.")):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader) -> None:
        execute = loader.exec_module

        def exec_module(module):
            self.running += 1
            try:
                execute(module)
            finally:
                self.running -= 1
            if self.running == 0:
                _register_imported()
                if _complete() and self in sys.meta_path:
                    sys.meta_path.remove(self)

        loader.exec_module = exec_module
