"""The house stays in order: imports run one way, rooms keep their one task, files stay short enough to read."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

import isolator

ROOT = Path(isolator.__file__).parent
MOST_LINES = 400
# What runs inside a box is one file that must stand alone; it may be as long as it needs to be.
ONE_FILE = {"guest/guest.py"}

# room -> the rooms it may import; rooms are the packages and single modules below isolator/.
MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "cancellation": set(),
    "resources": set(),
    "guest": set(),
    "settings": {"model"},
    "seccomp": {"model", "resources"},
    "identity": {"model"},
    "host": {"model", "cancellation"},
    "audit": {"model"},
    "store": {"model"},
    "images": {"model", "resources"},
    "policy": {"model", "settings"},
    "backends": {"model", "images", "seccomp"},
    "network": {"model", "backends", "cancellation"},
    "agents": {"model", "settings", "cancellation", "policy", "host", "audit", "store", "backends", "network"},
    "files": {"model", "host", "cancellation"},
    "messages": {"model", "store"},
    "execs": {"model", "settings", "cancellation", "policy", "host", "audit", "agents"},
    "api": {
        "model",
        "settings",
        "cancellation",
        "identity",
        "audit",
        "store",
        "backends",
        "network",
        "agents",
        "execs",
        "messages",
        "files",
    },
    "client": set(),
    # The CLI asks the daemon through the client; what it does on its own (images, config, doctor) is listed here.
    "cli": {"client", "settings", "model", "images", "seccomp", "audit", "daemon"},
}
# The composition root knows every part; nobody but the command that starts it knows the root.
COMPOSITION_ROOT = "daemon"


def _modules() -> dict[str, Path]:
    return {
        str(path.relative_to(ROOT)): path
        for path in sorted(ROOT.rglob("*.py"))
        if "__pycache__" not in path.parts and "_data" not in path.parts
    }


def _room(name: str) -> str:
    return name.split("/", maxsplit=1)[0].removesuffix(".py")


def _imports(path: Path, *, deferred: bool = True) -> set[str]:
    """Dotted names of what a module imports, wherever in it; type-checking-only imports count too."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if deferred else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(names: set[str]) -> set[str]:
    """Rooms of isolator among imported names; `isolator.__version__` is no room."""
    parts = {name.split(".")[1] for name in names if name.startswith("isolator.")}
    return parts - {"__version__"}


MODULES = _modules()


def test_every_room_is_on_the_plan() -> None:
    assert {_room(name) for name in MODULES} - {"__init__", "__main__", COMPOSITION_ROOT} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) in MAY_IMPORT])
def test_imports_run_down(name: str) -> None:
    allowed = MAY_IMPORT[_room(name)] | {_room(name)}
    assert _own(_imports(MODULES[name])) <= allowed, f"{name} reaches up"


def test_the_plan_has_no_circle() -> None:
    graphlib.TopologicalSorter(MAY_IMPORT).prepare()


def test_a_circle_would_be_seen() -> None:
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({**MAY_IMPORT, "model": {"api"}}).prepare()


def test_no_circle_of_modules_when_they_are_loaded() -> None:
    dotted = {
        f"isolator.{name.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__"): name for name in MODULES
    }
    graph: dict[str, set[str]] = {}
    for module, name in dotted.items():
        targets: set[str] = set()
        for imported in _imports(MODULES[name], deferred=False):
            for candidate in (imported, imported.rpartition(".")[0]):
                if candidate in dotted and candidate not in ("isolator", module):
                    targets.add(candidate)
                    break
        graph[module] = targets
    graphlib.TopologicalSorter(graph).prepare()


def test_only_the_store_speaks_sql() -> None:
    speakers = {name for name, path in MODULES.items() if any("sqlite" in item for item in _imports(path))}
    assert speakers
    assert {_room(name) for name in speakers} == {"store"}


def test_only_the_docker_backend_and_the_image_tools_speak_docker() -> None:
    speakers = {
        name for name, path in MODULES.items() if any(item.split(".")[0] == "docker" for item in _imports(path))
    }
    assert speakers
    assert {name for name in speakers if not name.startswith(("backends/docker/", "images/"))} == {
        "cli/image.py"  # loads what it built into an engine, with or without a daemon
    }


def test_only_the_api_speaks_http() -> None:
    speakers = {
        name for name, path in MODULES.items() if any(item.split(".")[0] == "aiohttp" for item in _imports(path))
    }
    assert {_room(name) for name in speakers} == {"api"}


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) == "guest"])
def test_the_guest_needs_nothing_but_the_standard_library(name: str) -> None:
    for imported in _imports(MODULES[name]):
        assert imported.split(".")[0] in sys.stdlib_module_names, imported


@pytest.mark.parametrize("name", [name for name in MODULES if _room(name) in ("model", "policy")])
def test_decisions_touch_nothing(name: str) -> None:
    """No file, clock, process, network or randomness in what decides; ids are made in one place, `model/names.py`."""
    impure = {"os", "time", "socket", "subprocess", "random", "asyncio", "pathlib", "docker", "aiohttp"}
    found = {imported.split(".")[0] for imported in _imports(MODULES[name]) if imported != "pathlib.PurePosixPath"}
    assert found & impure == set()
    assert "secrets" not in found or name == "model/names.py"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short_and_say_why(name: str) -> None:
    text = MODULES[name].read_text()
    assert name in ONE_FILE or len(text.splitlines()) <= MOST_LINES
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_keeps_changing_state(name: str) -> None:
    """At module level: no list, dict or set that is written in lower case, and no `global`."""
    tree = ast.parse(MODULES[name].read_text())
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), "global"
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        value = getattr(node, "value", None)
        if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp):
            assert all(item == "__all__" or item.lstrip("_").isupper() for item in names), names
