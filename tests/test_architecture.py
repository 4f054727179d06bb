"""Rules over the source itself: imports go one way, files stay short, nothing names a machine."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ir", "cost_model", "codegen", "passes", "tools")
HOMES = {"triton": "codegen/triton", "tvm": "codegen/tvm"}
MAX_LINES = 400
TEXT_SUFFIXES = {".py", ".toml", ".md", ".txt", ".yaml", ".yml", ".json", ".cfg", ".in", ""}
SKIPPED = {"build", "dist", "__pycache__", "node_modules"}
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch|conda\.anaconda"
)
HOME = re.compile(r"(?:/home|/Users)/[A-Za-z]|/root\b/")


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def project_files() -> Iterator[Path]:
    """Every text file of the project, each once: links, caches and environments are left out."""
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts[:-1])
        generated = hidden or SKIPPED.intersection(parts) or parts[0].endswith(".egg-info")
        linked = any((ROOT.joinpath(*parts[: i + 1])).is_symlink() for i in range(len(parts)))
        if path.is_file() and not generated and not linked and path.suffix in TEXT_SUFFIXES:
            yield path


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, at any depth, also by `import_module("literal")`.

    `from a.b import c` yields `a.b.c`: c may be a module.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{node.module or ''}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            match called, node.args[0]:
                case (("import_module" | "__import__"), ast.Constant(value=str(module))):
                    yield node.lineno, module


def wrong_imports(folder: str, where: str, source: str) -> list[str]:
    """The imports in `source`, a file at `where` under `folder`, that break a rule."""
    allowed = FOLDERS[: FOLDERS.index(folder) + 1]
    wrong = []
    for line, module in imported_modules(ast.parse(source)):
        top, _, rest = module.partition(".")
        if top == "ridgeline" and rest.split(".")[0] in FOLDERS:
            if rest.split(".")[0] not in allowed:
                wrong.append(f"{where}:{line} imports {module}; allowed: {', '.join(allowed)}")
        elif top == "ridgeline" and folder != "tools":
            wrong.append(f"{where}:{line} imports {module}, which stands above all folders")
        elif top in HOMES and not where.startswith(HOMES[top] + "/"):
            wrong.append(f"{where}:{line} imports {module}; only {HOMES[top]} may")
    return wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder: str) -> None:
    wrong = []
    for path in sources(folder):
        wrong += wrong_imports(folder, path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("ir/a.py", "from ridgeline.passes import norm"),
        ("ir/a.py", "from ridgeline import cost_model"),
        ("cost_model/a.py", "def f():\n    import ridgeline.codegen.tvm"),
        ("codegen/a.py", "import importlib\nimportlib.import_module('ridgeline.tools')"),
        ("codegen/a.py", "def f():\n    import triton.language as tl"),
        ("codegen/triton/a.py", "from tvm import tir"),
        ("passes/a.py", "from ridgeline import optimize"),
    ],
)
def test_a_wrong_import_is_seen(where: str, source: str) -> None:
    assert wrong_imports(where.partition("/")[0], where, source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        (
            "tools/a.py",
            "import ridgeline\nfrom ridgeline.passes import norm",
        ),
        ("codegen/triton/a.py", "import triton\nfrom ridgeline.codegen import triton"),
        ("codegen/a.py", "from ridgeline.codegen.triton import compile"),
        ("codegen/tvm/a.py", "from tvm import tir"),
    ],
)
def test_a_right_import_passes(where: str, source: str) -> None:
    assert wrong_imports(where.partition("/")[0], where, source) == []


def test_import_is_light() -> None:
    """`import ridgeline` needs no kernel compiler and no model library."""
    heavy = "{'tvm', 'triton', 'transformers'}"
    code = f"import sys, ridgeline; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_free_sizes_are_read_in_one_place() -> None:
    """What counts a captured size by itself counts wrongly at the sizes of `ridgeline.ir.sizes`."""
    allowed = {"ir/sizes.py", "passes/certify.py"}
    for folder in FOLDERS:
        for path in sources(folder):
            where = path.relative_to(ROOT).as_posix()
            assert where in allowed or ".node.hint" not in path.read_text(), where


def test_files_stay_short() -> None:
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in project_files()
        if path.suffix == ".py"
    }
    assert lengths
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


def test_nothing_names_a_registry_or_a_home() -> None:
    found = []
    for path in project_files():
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            if REGISTRY.search(line) or HOME.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
