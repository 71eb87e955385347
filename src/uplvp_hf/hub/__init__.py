"""The Hub: model cards, and pushing models."""

from .card import build_card
from .push import prepare_folder, push_folder

__all__ = ["build_card", "prepare_folder", "push_folder"]
