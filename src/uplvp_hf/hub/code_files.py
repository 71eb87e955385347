"""The model's source files in a repository, so that it loads where this library is not installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .run_record import read_json

# Per `model_type`: the file after `configuration_` and `modeling_`, the prefix of the classes, and what further auto
# classes find in the repository.
OWN_MODELS = {
    "uplvp": (
        "uplvp",
        "Uplvp",
        {"AutoModel": "UplvpForInstanceSegmentation", "AutoModelForPreTraining": "UplvpForPreTraining"},
    ),
    "knet": ("knet", "KNet", {"AutoModel": "KNetModel"}),
    "queryinst": ("queryinst", "QueryInst", {"AutoModel": "QueryInstModel"}),
    "mask_rcnn": ("mask_rcnn", "MaskRcnn", {"AutoModel": "MaskRcnnForInstanceSegmentation"}),
}
# The stock pipeline asks for AutoModelForImageSegmentation only; the others are what users look for.
_AUTO_MODELS = (
    "AutoModelForImageSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
)

# By transformers' names of the backends.
_IMAGE_PROCESSORS = {
    "torchvision": "image_processing_uplvp.UplvpImageProcessor",
    "pil": "image_processing_pil_uplvp.UplvpImageProcessorPil",
}
_PIPELINES = {
    "instance-segmentation": {
        "impl": "pipeline_uplvp.UplvpInstanceSegmentationPipeline",
        "pt": ["AutoModelForInstanceSegmentation"],
        "type": "image",
    }
}
_COMMON_FILES = ("image_processing_uplvp.py", "image_processing_pil_uplvp.py", "pipeline_uplvp.py")


def add_code(folder: Path, model_type: str) -> None:
    """Copies the model's source files, and names the classes in `config.json` (`auto_map`,
    `custom_pipelines`).

    A folder with them loads with `trust_remote_code=True` where this library is not installed. The image processor is
    named there too, not in its own file: from that the stock pipeline would infer a video processor in remote code, and
    ask for `trust_remote_code` even where this library is installed (transformers 5.23). For the same reason the type
    is left out of that file; transformers then looks into `config.json`.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    import uplvp_hf.models

    source = Path(uplvp_hf.models.__path__[0])
    module, prefix, further = OWN_MODELS[model_type]
    files: set[str] = set()
    for name in (f"configuration_{module}.py", f"modeling_{module}.py", *_COMMON_FILES):
        files |= {str(source / name), *get_relative_import_files(source / name)}
    for file in sorted(files):
        shutil.copyfile(file, folder / Path(file).name)
    config: dict[str, Any] = {"AutoConfig": f"configuration_{module}.{prefix}Config"}
    config |= dict.fromkeys(_AUTO_MODELS, f"modeling_{module}.{prefix}ForInstanceSegmentation")
    config |= {auto: f"modeling_{module}.{name}" for auto, name in further.items()}
    config["AutoImageProcessor"] = _IMAGE_PROCESSORS
    _change(folder / "config.json", lambda content: content.update(auto_map=config, custom_pipelines=_PIPELINES))
    _change(folder / "preprocessor_config.json", lambda content: content.pop("image_processor_type", None))


def _change(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(path)
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
