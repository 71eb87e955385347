"""docs/architecture.md holds: its files exist, imports point downwards, and no two modules import each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "uplvp_hf"
# The files that are copied beside a model are programs of their own.
COPIED = (PACKAGE / "hub" / "templates", PACKAGE / "hub" / "space")
# From the top to the bottom. Rooms of one line do not import each other, except as `SIDEWAYS` says.
FLOORS = [
    {"cli", "commands"},
    {"benchmark", "demo", "auto"},
    {"training", "labeling", "inference", "hub", "export"},
    {"evaluation", "conversion"},
    {"data"},
    {"settings", "files", "progress"},
    {"models"},
]
SIDEWAYS = {
    ("cli", "commands"),
    ("demo", "benchmark"),  # the demo is a recipe of the benchmark, with a page
    ("auto", "benchmark"),  # the arms that it decides between are a benchmark
    ("hub", "inference"),  # example images of a card are predictions
    ("inference", "export"),  # an exported folder predicts like a model
    ("export", "inference"),
}


def module_name(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def modules():
    files = [path for path in PACKAGE.rglob("*.py") if not any(folder in path.parents for folder in COPIED)]
    return {module_name(path): path for path in files}


def imported(path, known, everywhere):
    """Modules of ours that a file imports: `everywhere`, or only as it is loaded (not in functions, not for types)."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found, waiting = set(), [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if not everywhere:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, name in names:
            inner = f"{base}.{name}"
            found.add(inner if inner in known else base)
    return found & set(known)


def room(module):
    return module.split(".")[1] if "." in module else None


def test_imports_point_downwards():
    """Imports inside functions count too: a room that is only needed late is still known to the one that needs it."""
    known = modules()
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upwards = []
    for module, path in known.items():
        if room(module) not in floor:  # the package itself, and what registers its models
            continue
        for target in imported(path, known, everywhere=True):
            here, there = room(module), room(target)
            if there not in floor or here == there or (here, there) in SIDEWAYS:
                continue
            if floor[there] <= floor[here]:
                upwards.append(f"{module} imports {target}")
    assert not upwards, "\n".join(sorted(upwards))


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert rooms == {name for floor in FLOORS for name in floor} - {"cli", "files", "settings", "progress"}


def test_no_module_imports_itself_over_others():
    known = modules()
    graph = {module: imported(path, known, everywhere=False) - {module} for module, path in known.items()}
    done, cycles = set(), []

    def visit(module, trail):
        if module in trail:
            cycles.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    assert not cycles, "\n".join(cycles)


def test_models_are_flat_and_stand_alone():
    """These files travel to the Hub, where transformers follows `from .name import` and nothing else."""
    for path in sorted((PACKAGE / "models").iterdir()):
        assert path.suffix == ".py" or path.name == "__pycache__", path
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1 and "uplvp_hf" not in (node.module or ""), f"{path.name}:{node.lineno}"
                assert node.level == 0 or (node.module and "." not in node.module), f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_documents_name_what_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = [ROOT, ROOT / "docs", PACKAGE]
    names = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|md|yaml|cfg|toml))`", text))
    names |= set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    assert len(names) > 10
    missing = [name for name in sorted(names) if not any((folder / name).exists() for folder in folders)]
    assert not missing, f"{document} names what does not exist: {missing}"


def test_documents_name_functions_that_exist():
    """`name()` in the documents is a function or a class of the package, or a method."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("docs/architecture.md", "CONTRIBUTING.md"))
    defined = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                defined.add(node.name)
    wanted = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)\(\)`", text)}
    assert len(wanted) > 15
    assert not wanted - defined


def test_errors_are_for_users_or_bugs():
    """A plain ValueError shows its traceback, so nothing of ours raises one on purpose."""
    # A metric that `evaluate.load` takes by its path, and drawing, which a Space has beside its page: both work without
    # the package, and only a program that calls them in a wrong way sees their errors.
    alone = {"uplvp_hf.evaluation.coco_map", "uplvp_hf.evaluation.visualize"}
    raising = []
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and node.exc is not None and module not in alone:
                name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if getattr(name, "id", None) in ("ValueError", "Exception"):
                    raising.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not raising


def test_editors_see_the_names_that_python_finds():
    """The `TYPE_CHECKING` block of the package imports each public name from the module that it is loaded from."""
    import uplvp_hf

    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name}
    assert seen == uplvp_hf._NAMES


MOST_LINES = {"file": 400, "function": 60}


def test_files_and_functions_can_be_read_in_one_sitting():
    longer = set()
    for path in sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(PACKAGE if PACKAGE in path.parents else ROOT).as_posix()
        if len(text.splitlines()) > MOST_LINES["file"]:
            longer.add(name)
        if PACKAGE not in path.parents:
            continue
        for node in ast.walk(ast.parse(text)):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_function and node.end_lineno - node.lineno + 1 > MOST_LINES["function"]:
                longer.add(f"{name}:{node.name}")
    assert not longer
