"""How the files depend on each other: one way, also in lazy imports; all of them are installed.

Run: pytest tests/test_imports.py
"""

import ast
import tomllib

import pytest
from commands import ROOT

FOLDERS = ("baselines", "experiments", "families", "pictures", "support", "teachers", "tools")


def modules() -> dict[str, str]:
    """{module: text} of every file at the top and in the folders."""
    paths = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))]
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}
    return {name.removesuffix(".__init__"): text for name, text in names.items()}


def imported(text: str, known) -> set[str]:
    """Which of the project's modules a file imports, wherever the line stands."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "from . import: say which folder"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            found |= inside or {node.module}
    return found & set(known)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; [] if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if ring := visit(other, [*path, module]):
                return ring
        done.add(module)
        return []

    return next((ring for module in sorted(graph) if (ring := visit(module, []))), [])


def graph() -> dict[str, set[str]]:
    texts = modules()
    return {name: imported(text, texts) for name, text in texts.items()}


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    known = {"x", "folder.y", "folder"}
    lazy = "import os\ndef f():\n    from folder import y\n    import x"
    assert imported(lazy, known) == {"folder.y", "x"}


def test_files_import_one_another_one_way_alone():
    """Neither at the top, nor in functions, nor for types alone."""
    found = graph()
    assert (
        len(found) > 30 and "moe" in found["models"] and "support.files" in found["pictures.curves"]
    )
    assert circle(found) == []


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ("router", {"moe", "models"}),
        ("envs", {"collect", "data"}),
        ("models", {"ad", "dpt", "train", "evaluate"}),
        ("methods", {"ad", "dpt", "policies"}),
        ("evaluate", {"train", "collect"}),
    ],
)
def test_the_paper_is_read_upwards(below, above):
    """A file needs no file that is read after it, whatever lies between."""
    needs, todo, found = set(), [below], graph()
    while todo:
        new = found[todo.pop()] - needs
        needs |= new
        todo += new
    assert not needs & above


def test_all_of_it_is_installed():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(tools["py-modules"]) == sorted(p.stem for p in ROOT.glob("*.py"))
    assert sorted(tools["packages"]) == sorted(FOLDERS)
