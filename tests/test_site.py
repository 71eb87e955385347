"""The documentation site: its links and pages, without building it (`make docs` does)."""

import ast
import configparser
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import uplvp_hf

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/uplvp/uplvp_hf"
CONFIG = {"repo_url": REPOSITORY}


@pytest.fixture(scope="module")
def hooks(load_script):
    return load_script("hooks", "docs")


def load_setup():
    spec = importlib.util.spec_from_file_location("setup_of_uplvp_hf", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def site_file(place, excluded=False):
    return SimpleNamespace(src_uri=place, inclusion=SimpleNamespace(is_excluded=lambda: excluded))


FILES = [site_file(name) for name in ("index.md", "changelog.md", "contributing.md", "data.md", "overview.png")]
FILES += [site_file("reference/index.md"), site_file("results/scenes.jsonl", excluded=True)]


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("index.md", "docs/data.md#rows", "data.md#rows"),
        ("index.md", "docs/overview.png", "overview.png"),
        ("index.md", "CONTRIBUTING.md", "contributing.md"),
        ("index.md", "docs/notebooks", f"{REPOSITORY}/tree/main/docs/notebooks"),
        ("data.md", "../README.md#limits", "index.md#limits"),
        ("data.md", "../src/uplvp_hf/cli.py", f"{REPOSITORY}/blob/main/src/uplvp_hf/cli.py"),
        ("data.md", "results/scenes.jsonl", f"{REPOSITORY}/blob/main/docs/results/scenes.jsonl"),
        ("reference/index.md", "../data.md", "../data.md"),
        ("data.md", "nowhere.md", "nowhere.md"),
        ("data.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("data.md", "#rows", "#rows"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(hooks, page, link, wanted):
    found = hooks.on_page_markdown(f"See [this]({link}).\n", SimpleNamespace(file=site_file(page)), CONFIG, FILES)
    assert found == f"See [this]({wanted}).\n"


def test_code_is_left_as_it_is(hooks):
    text = "`[a](../README.md)`\n\n```python\nx = [f](../README.md)\n```\n"
    assert hooks.on_page_markdown(text, SimpleNamespace(file=site_file("data.md")), CONFIG, FILES) == text


def test_the_package_index_gets_addresses():
    text = load_setup().long_description()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 30 and all(link.startswith(("https://", "#")) for link in links)
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures and all(link.startswith(f"{REPOSITORY}/raw/main/docs/") for link in pictures)
    for link in links:  # each is a file of the repository
        if link.startswith(f"{REPOSITORY}/"):
            assert (ROOT / link.removeprefix(REPOSITORY).split("/main/")[1].split("#")[0]).exists(), link


def test_one_version_and_one_address():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert version == uplvp_hf.__version__ and setup["metadata"]["url"] == REPOSITORY == load_setup().REPOSITORY
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)} \(", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"repo_url: {REPOSITORY}\n" in (ROOT / "mkdocs.yml").read_text()


def test_every_document_is_in_the_navigation():
    """mkdocs warns of a page that is missing there, too; this needs no mkdocs."""
    text = (ROOT / "mkdocs.yml").read_text()
    documents = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.ipynb")]
    missing = [name for name in (f.relative_to(ROOT / "docs").as_posix() for f in documents) if name not in text]
    assert not missing


def public_names(package):
    """`__all__` of a package, from its source; that of `uplvp_hf` and of `labeling` is made of other lists."""
    if package == "uplvp_hf":
        return set(uplvp_hf._NAMES)
    if package == "uplvp_hf.labeling":
        return set(importlib.import_module(package)._NAMES)
    source = ROOT / "src" / package.replace(".", "/") / "__init__.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


ROOMS = ("data", "labeling", "inference", "evaluation", "export", "hub", "conversion")


@pytest.mark.parametrize("package", ["uplvp_hf", *(f"uplvp_hf.{room}" for room in ROOMS)])
def test_every_public_name_is_in_the_reference(package):
    pages = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "reference").glob("*.md"))
    entries = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    shown = {entry.rpartition(".")[2] for entry in entries}  # some are shown under the package's own name
    assert public_names(package) <= shown, public_names(package) - shown
