"""docs/errors.md and the code say the same: every code once, with its status, in both."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import isolator
from isolator.model import errors

ROOT = Path(isolator.__file__).parent
DOCUMENT = ROOT.parent / "docs" / "errors.md"
STATUSES = {
    name: kind.status
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.IsolatorError)
} | {"RequestTimeout": 408, "_MethodRefused": 405}
# These take the code as their second argument and raise BadRequest with it.
HELPERS = {"check_text", "_clean_path"}


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            yield name, node


def used() -> dict[str, set[int]]:
    """Every code in the package and the statuses it is raised with."""
    found: dict[str, set[int]] = {}
    for path in ROOT.rglob("*.py"):
        for name, call in _calls(ast.parse(path.read_text())):
            place = 0 if name in STATUSES else 1 if name in HELPERS else None
            if place is None or len(call.args) <= place:
                continue
            code = call.args[place]
            if isinstance(code, ast.Constant) and isinstance(code.value, str):
                found.setdefault(code.value, set()).add(STATUSES.get(name, 400))
            else:
                inside = path.name in ("environment.py", "mounts.py") and ast.unparse(code) == "code"
                assert inside, f"{path}:{call.lineno}: a code that is no literal can't be documented"
    return found


def noted() -> set[str]:
    """Codes of warnings and degradations: dictionaries with a literal `code`."""
    return {
        value.value
        for path in ROOT.rglob("*.py")
        if path.relative_to(ROOT).parts[0] not in ("cli", "client")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "code" and isinstance(value, ast.Constant)
    }


def of_the_client() -> set[str]:
    """Codes of the client's own errors: class attributes named `code`."""
    tree = ast.parse((ROOT / "client" / "errors.py").read_text())
    return {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and ast.unparse(node.target) == "code"
        and isinstance(node.value, ast.Constant)
    }


def documented(*, statuses: bool) -> list[tuple[str, str]]:
    """Rows of the tables: the code and the cell beside it."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    return [(code, cell.strip()) for code, cell in rows if cell.strip().isdigit() is statuses]


def test_every_code_is_documented_with_its_status_and_none_besides() -> None:
    rows = documented(statuses=True)
    assert len({code for code, _ in rows}) == len(rows), "a code stands twice"
    assert {code: {int(status)} for code, status in rows} == used()


def test_warnings_and_client_errors_are_documented() -> None:
    others = {code for code, _ in documented(statuses=False)}
    refusals = {code for code, _ in documented(statuses=True)}
    assert others == (noted() | of_the_client()) - refusals


def test_codes_are_snake_case_and_details_say_something() -> None:
    for code in used():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)+", code), code
    for row in DOCUMENT.read_text().splitlines():
        if row.startswith("| `"):
            assert all(len(cell.strip()) > 2 for cell in row.strip("|").split("|")), row


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or ""))
    kinds = {
        name: kind.status
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if kind.__module__ == errors.__name__
    }
    assert {name: int(status) for name, status in drawn.items()} == {
        name: status for name, status in kinds.items() if name != "IsolatorError"
    }
