"""The doors of DESIGN.md that must not exist, and the afternoon rule, checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kangaroo"
FILES = sorted(PACKAGE.rglob("*.py"))

OUTER = ("train", "search", "bench", "server", "integrations", "cli")
SHARED_BY_DRAFTERS = (
    "base",
    "settings",
    "stopping",
    "tree",
    "growing",
    "earnings",
    "offers",
    "ngrams",
    "companion",
    "depths",
    "adapter",
    "medusa_heads",
    "datastore",
)
KNOWS_NO_DRAFTER = (
    "kangaroo.model",
    "kangaroo.noise",
    "kangaroo.sampling",
    "kangaroo.verify",
    "kangaroo.drafters.stopping",
)
# Third-party packages and the only places that may import them.
CONFINED = {
    "transformers": ("kangaroo.model.tokenizer", "kangaroo.integrations", "kangaroo.bench.contenders"),
    "vllm": ("kangaroo.integrations", "kangaroo.bench.contenders"),
    "typer": ("kangaroo.cli",),
    "click": ("kangaroo.cli",),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "flask", "aiohttp", "litestar"), ("kangaroo.server",)),
}

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_POSITIONAL = 300, 60, 6, 2


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names of everything the source imports, at any level; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")
            parent = above[: len(above) - node.level + is_package] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("import_module", "importlib.import_module", "__import__"):
                yield str(node.args[0].value)


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def is_forbidden(module: str, imported: str) -> bool:
    """Whether importing this name from this module opens a door that must not exist."""
    top = imported.split(".")[0]
    if top in CONFINED:
        return not within(module, *CONFINED[top])
    if top != "kangaroo":
        return False
    room, place = (*module.split("."), "", "")[1:3]
    drafter = (*imported.split("."), "", "")[2] if within(imported, "kangaroo.drafters") else None
    is_core = room not in (*OUTER, "__main__")
    doors = [
        room == "kernels" and not within(imported, "kangaroo.errors", "kangaroo.kernels"),
        module == "kangaroo.kernels.reference" and not within(imported, "kangaroo.errors"),
        within(module, *KNOWS_NO_DRAFTER) and (drafter is not None or within(imported, "kangaroo.engine")),
        room == "drafters" and within(imported, "kangaroo.engine", "kangaroo.verify"),
        room == "drafters" and place != "" and drafter is not None and drafter not in SHARED_BY_DRAFTERS,
        room == "engine" and drafter is not None and drafter != "base",
        is_core and within(imported, *(f"kangaroo.{outer}" for outer in OUTER)),
    ]
    return any(doors)


def oversized(source: str, module: str) -> Iterator[str]:
    """What of the source is too long or takes too much, by the afternoon rule."""
    if len(source.splitlines()) > MAX_FILE_LINES:
        yield f"{module}: {len(source.splitlines())} lines"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where, arguments = f"{module}:{node.lineno} {node.name}", node.args
        # A command's parameters are its flags with their help texts; only its body counts.
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        in_cli = within(module, "kangaroo.cli")
        is_command = in_cli and any(".command" in name or ".callback" in name for name in decorators)
        first, last = (node.body[0] if is_command else node).lineno, node.end_lineno or node.lineno
        if last - first >= MAX_FUNCTION_LINES:
            yield f"{where}: {last - first + 1} lines"
        if node.name == "__exit__" or is_command:
            continue
        positional = [one.arg for one in (*arguments.posonlyargs, *arguments.args) if one.arg not in ("self", "cls")]
        if len(positional) + len(arguments.kwonlyargs) > MAX_PARAMETERS:
            yield f"{where}: {len(positional) + len(arguments.kwonlyargs)} parameters"
        if len(positional) > MAX_POSITIONAL:
            yield f"{where}: {len(positional)} positional parameters"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_forbidden_import(path: Path) -> None:
    module = module_name(path)
    names = imports(path.read_text(encoding="utf-8"), module, is_package=path.name == "__init__.py")
    assert [name for name in names if is_forbidden(module, name)] == []


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_is_readable_in_an_afternoon(path: Path) -> None:
    assert list(oversized(path.read_text(encoding="utf-8"), module_name(path))) == []


@pytest.mark.parametrize("module", ["kangaroo", "kangaroo.cli", "kangaroo.cli.app"])
def test_import_is_light(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"import {module} imports torch"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kangaroo.kernels.cpu", "import kangaroo.model.config"),
        ("kangaroo.kernels.cpu", "from ..types import Draft"),
        ("kangaroo.kernels.reference", "def f():\n    from kangaroo.kernels import cpu"),
        (
            "kangaroo.model.cache",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kangaroo.drafters.base",
        ),
        ("kangaroo.sampling", "from kangaroo import engine"),
        ("kangaroo.verify", "from kangaroo.engine.step import prefill"),
        ("kangaroo.drafters.stopping", "from . import kangaroo"),
        ("kangaroo.drafters.medusa", "from kangaroo.drafters.plain import PlainDrafter"),
        ("kangaroo.drafters.medusa", "from kangaroo.drafters import create"),
        ("kangaroo.drafters.medusa", "from kangaroo.verify import walk"),
        ("kangaroo.engine.step", "from kangaroo.drafters import kangaroo"),
        ("kangaroo.engine.step", "import importlib\nimportlib.import_module('kangaroo.drafters.kangaroo')"),
        ("kangaroo.llm", "def f():\n    import kangaroo.bench.report"),
        ("kangaroo.model.weights", "import transformers"),
        ("kangaroo.bench.report", "from transformers import AutoTokenizer"),
        ("kangaroo.bench.report", "import typer"),
        ("kangaroo.cli.main", "import fastapi.routing"),
        ("kangaroo.server", "import vllm"),
    ],
)
def test_the_check_sees_forbidden_imports(module: str, source: str) -> None:
    assert any(is_forbidden(module, name) for name in imports(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kangaroo.kernels.cpu", "from kangaroo.errors import KangarooError\nfrom kangaroo.kernels import reference"),
        ("kangaroo.drafters.kangaroo", "from kangaroo.drafters.adapter import Adapter\nfrom . import base, stopping"),
        ("kangaroo.engine.step", "from kangaroo.drafters.base import Drafter"),
        ("kangaroo.llm", "from kangaroo.drafters import kangaroo\nfrom kangaroo.engine import step"),
        ("kangaroo.bench.contenders.vllm", "import transformers, vllm, kangaroo.llm"),
        ("kangaroo.cli.main", "import typer, kangaroo.bench, clickhouse"),
    ],
)
def test_the_check_lets_allowed_imports_pass(module: str, source: str) -> None:
    assert not any(is_forbidden(module, name) for name in imports(source, module))


@pytest.mark.parametrize(
    "source",
    [
        "\n" * 301,
        "def f():\n" + "    pass\n" * 60,
        "def f(a, b, *, c, d, e, f, g): ...",
        "class A:\n    async def f(self, a, b, c): ...",
        "@app.command()\ndef f(a, b, c): ...",
    ],
)
def test_the_check_sees_what_is_too_large(source: str) -> None:
    assert len(list(oversized(source, "kangaroo.x"))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kangaroo.x", "\n" * 300),
        ("kangaroo.x", "def f():\n" + "    pass\n" * 59),
        ("kangaroo.x", "class A:\n    def f(self, a, b, *, c, d, e, f): ..."),
        ("kangaroo.cli.main", "@app.command()\ndef f(a, b, c, d, e, f, g): ..."),
        ("kangaroo.cli.main", "@app.command()\ndef f(" + "\n" * 60 + "a): ..."),
    ],
)
def test_the_check_lets_what_is_small_pass(module: str, source: str) -> None:
    assert list(oversized(source, module)) == []
