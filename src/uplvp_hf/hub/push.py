"""Makes a Hub repository of a trained model: weights, settings, code and card in one folder, which is then uploaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ..files import check_model_name, new_folder
from ..models.errors import UserError
from ..models.remote_code import OWN_MODELS, add_code, without_code
from ..models.thresholds import score_threshold
from .card import build_card
from .errors import hub_errors
from .run_record import read_json

TEMPLATES = Path(__file__).parent / "templates"


def prepare_folder(
    model_dir: str | os.PathLike,
    output: str | os.PathLike,
    repo_id: str,
    license: str = "apache-2.0",
    metrics_file: str | os.PathLike | None = None,
    examples: Sequence[str | os.PathLike] = (),
    remote_code: bool = True,
) -> Path:
    """Writes everything that a repository of the model holds, and nothing else of the run.

    Args:
        model_dir: folder with `config.json`, `preprocessor_config.json` and safetensors.
        output: folder to write; must not exist or be empty. It appears complete or not at all.
        repo_id: USER/NAME.
        license, metrics_file: see `build_card`. The text of the license is added where it is known: `LICENSE` of the
            model folder, or ours for "apache-2.0".
        examples: images for the widget; the model is run on them.
        remote_code: add the model's source files, so that the repository loads with `trust_remote_code=True` where
            this library is not installed, and `handler.py` with `requirements.txt` for Inference Endpoints. A model
            that transformers has itself needs none and gets none.

    Returns:
        `output`.

    Raises:
        FileNotFoundError: if the model folder lacks a file. FileExistsError: if `output` holds something.
        UserError: for a `repo_id` that the Hub would not take, a link that leads out of the model folder, or examples
            for a model of transformers.
    """
    model_dir, output = Path(model_dir), Path(output)
    check_repo_id(repo_id)
    weights = _weights(model_dir)
    config = read_json(model_dir / "config.json")
    own = config.get("model_type") in OWN_MODELS
    if examples and not own:
        raise UserError(
            f"{model_dir}: holds a `{config.get('model_type')}` model of transformers; examples are drawn with models "
            "of this library. Leave them out (`--example`)."
        )
    remote_code = remote_code and own
    with new_folder(output) as folder:
        for file in (*weights, model_dir / "config.json", model_dir / "preprocessor_config.json"):
            check_inside(file, model_dir)
            shutil.copyfile(file, folder / file.name)  # not its mode: safetensors writes files for their owner alone
        if remote_code:
            add_code(folder, config["model_type"])
        elif own:
            without_code(folder)
        if remote_code and "UplvpForPreTraining" not in (config.get("architectures") or []):
            for name in ("handler.py", "requirements.txt"):
                shutil.copyfile(TEMPLATES / name, folder / name)
        _add_license(model_dir, folder, license)
        shown = _add_examples(model_dir, folder, examples)
        card = build_card(model_dir, repo_id, license, metrics_file, shown, remote_code)
        card.save(folder / "README.md")
    return output


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload model",
    repo_type: str = "model",
) -> str:
    """Creates the repository if it does not exist and uploads the folder in one commit; returns the commit's address.

    Weights that an earlier push left under other names are removed by the same commit, or `from_pretrained` might
    choose them. After a failure nothing of the folder is visible, and the same call goes on where it stopped.

    Args:
        folder: as `prepare_folder` writes it. Links that lead out of it are refused.
        repo_id: USER/NAME.
        private: make the repository private, and refuse to push into an existing public one.
        revision: a branch, made if missing; default: main.
        message: of the commit.
        repo_type: "model", or "space" for a folder of `prepare_space`.

    Raises:
        HubError: for everything that the Hub or the connection refuses. UserError: for a link, or a public repository.
    """
    check_repo_id(repo_id)
    for file in Path(folder).rglob("*"):
        check_inside(file, Path(folder))
    is_space = repo_type == "space"
    with hub_errors(repo_id):
        api = HfApi()
        api.create_repo(
            repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk="gradio" if is_space else None
        )
        if private and not api.repo_info(repo_id, repo_type=repo_type).private:
            raise UserError(f"{repo_id} exists and is public; make it private in its settings first.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type=repo_type,
            revision=revision,
            commit_message=message,
            delete_patterns=None if is_space else ["model*.safetensors", "model.safetensors.index.json"],
        )
    return str(commit.commit_url)


def load_shown(name: str | os.PathLike) -> tuple[Any, Any]:
    """(model, image processor) whose results can be drawn: a trained model, or a K-Net or QueryInst by itself.

    Raises what `evaluation.load_segmenter` does; DataError for any other model, as those of transformers.
    """
    from uplvp_hf.evaluation import load_segmenter
    from uplvp_hf.models.modeling_knet import KNetForInstanceSegmentation
    from uplvp_hf.models.modeling_queryinst import QueryInstForInstanceSegmentation

    alone = {"knet": KNetForInstanceSegmentation, "queryinst": QueryInstForInstanceSegmentation}
    return load_segmenter(os.fspath(name), further=alone)


def check_inside(file: Path, folder: Path) -> None:
    """Raises UserError for a link, or a name with `..`, that leads out of `folder`."""
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} leads out of {folder}, to {file.resolve()}. Put a copy in its place.")


def check_repo_id(repo_id: str) -> None:
    """Raises UserError unless the id has the form USER/NAME in characters that the Hub accepts."""
    if repo_id.count("/") != 1:
        raise UserError(f"repo id {repo_id!r} is not of the form USER/NAME.")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"repo id {repo_id!r} is not of the form USER/NAME: {' '.join(str(error).split())}") from error


def _weights(model_dir: Path) -> list[Path]:
    if not model_dir.is_dir():
        raise FileNotFoundError(f"{model_dir}: no such folder.")
    check_model_name(model_dir)
    if not (model_dir / "preprocessor_config.json").is_file():
        raise FileNotFoundError(f"{model_dir}: no preprocessor_config.json; not the folder of a trained model.")
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [index, *(model_dir / name for name in shards)]
    else:
        files = [model_dir / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{model_dir}: no {', '.join(missing)}. Only safetensors are pushed.")
    return files


def _add_license(model_dir: Path, folder: Path, license: str) -> None:
    source = model_dir / "LICENSE"
    if source.is_file():
        check_inside(source, model_dir)
    else:
        source = TEMPLATES / f"LICENSE.{license}"
    if source.is_file():
        shutil.copyfile(source, folder / "LICENSE")


def _add_examples(model_dir: Path, folder: Path, examples: Sequence[str | os.PathLike]) -> list[tuple[str, str]]:
    """Adds example images of at most 1024 pixels, and what the model finds in them, for the widget."""
    if not examples:
        return []
    from uplvp_hf.data import InstanceDataset, open_image
    from uplvp_hf.evaluation import predict_dataset
    from uplvp_hf.evaluation.visualize import draw_instances
    from uplvp_hf.inference.predictor import memory_row

    rows = []
    for number, path in enumerate(examples, start=1):
        image = open_image(path)
        image.thumbnail((1024, 1024), Image.Resampling.LANCZOS)
        rows.append(memory_row(image, number, f"assets/example_{number}.jpg"))
    model, processor = load_shown(model_dir)
    (folder / "assets").mkdir()
    shown = []
    dataset = InstanceDataset(rows, [])
    threshold = score_threshold(model.config)
    for row, result in predict_dataset(model, processor, dataset, threshold=threshold, progress=False):
        masks = row["file_name"].replace(".jpg", "_masks.png")
        row["image"].save(folder / row["file_name"], quality=90)
        drawn = draw_instances(row["image"], result["rle"], result["labels"], result["scores"], model.config.id2label)
        drawn.save(folder / masks)
        shown.append((row["file_name"], masks))
    return shown
