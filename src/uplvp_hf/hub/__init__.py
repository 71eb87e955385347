"""The Hub: model cards, pushing models, and pages that show them."""

from .card import build_card
from .errors import HubError
from .push import check_repo_id, prepare_folder, push_folder
from .space_app import prepare_space

__all__ = ["HubError", "build_card", "check_repo_id", "prepare_folder", "prepare_space", "push_folder"]
