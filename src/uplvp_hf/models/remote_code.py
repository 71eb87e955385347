"""A pushed model carries its source files, so that it loads where this library is not installed; a saved one can."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The stock pipeline asks for AutoModelForImageSegmentation only; the others are what users look for.
_AUTO_MODELS = (
    "AutoModelForImageSegmentation",
    "AutoModelForInstanceSegmentation",
    "AutoModelForUniversalSegmentation",
)
# Per `model_type`: the file after `configuration_` and `modeling_`, the prefix of the classes, and what further auto
# classes find in the folder.
OWN_MODELS = {
    "uplvp": (
        "uplvp",
        "Uplvp",
        {"AutoModel": "UplvpForInstanceSegmentation", "AutoModelForPreTraining": "UplvpForPreTraining"},
    ),
    "uplvp_few_shot": (
        "few_shot",
        "UplvpFewShot",
        dict.fromkeys(("AutoModel", *_AUTO_MODELS), "UplvpForFewShotSegmentation"),
    ),
    "knet": ("knet", "KNet", {"AutoModel": "KNetModel"}),
    "queryinst": ("queryinst", "QueryInst", {"AutoModel": "QueryInstModel"}),
    "mask_rcnn": ("mask_rcnn", "MaskRcnn", {"AutoModel": "MaskRcnnForInstanceSegmentation"}),
    "icpc": ("icpc", "Icpc", {"AutoModelForSemanticSegmentation": "IcpcForSemanticSegmentation"}),
}
SEMANTIC = ("icpc",)


def _image_processors(semantic: bool) -> dict[str, str]:
    """By transformers' names of the backends."""
    module, prefix = ("icpc", "Icpc") if semantic else ("uplvp", "Uplvp")
    return {
        "torchvision": f"image_processing_{module}.{prefix}ImageProcessor",
        "pil": f"image_processing_pil_{module}.{prefix}ImageProcessorPil",
    }


_PIPELINES = {
    "instance-segmentation": {
        "impl": "pipeline_uplvp.UplvpInstanceSegmentationPipeline",
        "pt": ["AutoModelForInstanceSegmentation"],
        "type": "image",
    }
}
_PUSH_OPTIONS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "max_shard_size")
# The files that list segmenters of which a UPLVP model wraps one, each in a dict of one line an entry.
_LISTS = ("configuration_uplvp.py", "modeling_base_uplvp.py")


class SavesItsCode:
    """For models: `push_to_hub`, and `save_pretrained` when asked, add the source files, see `add_code`."""

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args, with_code: bool | None = None, **kwargs
    ) -> None:
        """As of transformers. `with_code=True` adds the source files, without which loading needs this library.

        The default is to add them only where the model itself was loaded from such files.
        """
        push = kwargs.pop("push_to_hub", False)
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", args[0] if args else True):
            if type(self).__module__.startswith("transformers_modules.") if with_code is None else with_code:
                add_code(Path(save_directory), self.config.model_type, self.config.name_or_path)
            else:
                without_code(Path(save_directory))
        if push:  # now that the files are there
            options = {key: kwargs[key] for key in _PUSH_OPTIONS if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """The last step of `push_to_hub`, on the temporary folder that it has saved the model to."""
        add_code(Path(working_dir), self.config.model_type, self.config.name_or_path)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def add_code(folder: Path, model_type: str, origin: str = "") -> None:
    """Copies the model's source files, and names the classes in `config.json` (`auto_map`, `custom_pipelines`).

    A folder with them loads with `trust_remote_code=True` where this library is not installed. The image processor is
    named there too, not in its own file: from that the stock pipeline would infer a video processor in remote code, and
    ask for `trust_remote_code` even where this library is installed (transformers 5.23).

    origin: folder or repository that the model was loaded from. Where this very code came from one, only the files that
    the model itself needs lie beside it. Raises OSError for a file that is in neither place.
    """
    module, prefix, further = OWN_MODELS[model_type]
    semantic = model_type in SEMANTIC
    processors = _image_processors(semantic)
    segmenter = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("segmenter_config") or {}
    named = [f"configuration_{module}.py", f"modeling_{module}.py"]
    named += [f"{reference.split('.')[0]}.py" for reference in processors.values()]
    named += [] if semantic else ["pipeline_uplvp.py"]
    for name, text in _sources(named, origin, segmenter.get("model_type")).items():
        (folder / name).write_text(text, encoding="utf-8")
    config: dict[str, Any] = {"AutoConfig": f"configuration_{module}.{prefix}Config"}
    if not semantic:
        config |= dict.fromkeys(_AUTO_MODELS, f"modeling_{module}.{prefix}ForInstanceSegmentation")
    config |= {auto: f"modeling_{module}.{name}" for auto, name in further.items()}
    config["AutoImageProcessor"] = processors
    pipelines = None if semantic else _PIPELINES
    _change(folder / "config.json", {"auto_map": config, "custom_pipelines": pipelines})
    name_processor_in_config(folder)


def _sources(names: Sequence[str], origin: str, segmenter: str | None) -> dict[str, str]:
    """The text of these files and of all that they import by `from .name import`; of the segmenters, the one used."""
    from transformers.utils import cached_file

    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            beside = Path(__file__).with_name(name)
            text = (beside if beside.is_file() else Path(cached_file(origin, name))).read_text(encoding="utf-8")
            found[name] = text = _without_other_segmenters(text, segmenter) if name in _LISTS else text
            waiting += [f"{module}.py" for module in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE)]
    return found


def _without_other_segmenters(text: str, segmenter: str | None) -> str:
    """Takes the entries of other segmenters, and the imports of their classes, out of the source."""
    entries = re.findall(r'^    "(\w+)": (\w+),$', text, re.MULTILINE)
    others = {name for key, name in entries if key != segmenter}

    def kept(line: re.Match) -> str:
        names = [name for name in line[2].split(", ") if name not in others]
        return f"{line[1]}{', '.join(names)}\n" if names else ""

    text = re.sub(r"^(from \.\w+ import )([\w, ]+)\n", kept, text, flags=re.MULTILINE)
    return re.sub(
        r'^    "(\w+)": (\w+),\n', lambda line: "" if line[2] in others else line[0], text, flags=re.MULTILINE
    )


def without_code(folder: Path) -> None:
    """Removes what `config.json` says of source files, such as a model that was loaded with them has it."""
    _change(folder / "config.json", {"auto_map": None, "custom_pipelines": None})


def name_processor_in_config(folder: Path) -> None:
    """Leaves the type out of `preprocessor_config.json` where `config.json` names the image processor.

    transformers looks there only if the file itself has no type.
    """
    config, processor = folder / "config.json", folder / "preprocessor_config.json"
    if config.is_file() and processor.is_file() and "auto_map" in json.loads(config.read_text(encoding="utf-8")):
        _change(processor, {"image_processor_type": None})


def _change(path: Path, values: dict[str, Any]) -> None:
    """Sets `values` in a JSON file; None removes."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content = {key: value for key, value in {**content, **values}.items() if key not in values or value is not None}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
