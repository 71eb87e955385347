"""The description for the package index: README.md, with addresses in place of links into the repository.

Everything else about the package is in setup.cfg.
"""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/uplvp/uplvp_hf"


def long_description() -> str:
    """README.md with absolute links; pictures are those of the main branch."""
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{REPOSITORY}/blob/main/", text)


if __name__ == "__main__":
    setup(long_description=long_description(), long_description_content_type="text/markdown")
