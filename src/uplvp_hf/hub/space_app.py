"""The page of a model (`space/app.py`): run here, or written as the folder of a Space."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from ..files import new_folder
from .push import check_repo_id

SPACE = Path(__file__).parent / "space"


def load_app() -> ModuleType:
    """`space/app.py` as a module. Raises ImportError with what to install where gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('The page needs gradio: pip install "uplvp_hf[app]".')
    spec = importlib.util.spec_from_file_location("uplvp_hf_space_app", SPACE / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare_space(output: str | os.PathLike, model: str) -> Path:
    """Writes the folder of a Space for a model of the Hub; it needs nothing of this library there.

    Args:
        output: folder to write; must not exist or be empty. It appears complete or not at all.
        model: USER/NAME of the model's repository, which the page loads.

    Returns:
        `output`. Its README says which variables the Space reads; `TRUST_REMOTE_CODE` is left off.

    Raises:
        ValueError: for a name that is not USER/NAME. FileExistsError: if `output` holds something.
    """
    from uplvp_hf.evaluation import visualize
    from uplvp_hf.models import errors, images, thresholds

    output = Path(output)
    check_repo_id(model)
    with new_folder(output) as folder:
        for module in (visualize, images, errors, thresholds):
            shutil.copyfile(module.__file__, folder / Path(module.__file__).name)
        for file in SPACE.glob("*.*"):
            shutil.copyfile(file, folder / file.name)
        # There it is no package.
        text = (folder / "images.py").read_text(encoding="utf-8").replace("from .errors import", "from errors import")
        (folder / "images.py").write_text(text, encoding="utf-8")
        for name in ("app.py", "README.md"):
            text = (folder / name).read_text(encoding="utf-8").replace("uplvp/mask2former-coco", model)
            (folder / name).write_text(text, encoding="utf-8")
    return output
