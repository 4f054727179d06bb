"""The package installs as wheel, as wheel built from the sdist, and editable, and is whole."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ir", "cost_model", "codegen", "passes", "tools")
DATA = ("cost_model/targets/*.toml", "tools/data/*")

PROBE = """
import importlib.metadata, importlib.resources, json, pathlib
import ridgeline, ridgeline.ir, ridgeline.cost_model, ridgeline.codegen
import ridgeline.passes, ridgeline.tools
root = importlib.resources.files("ridgeline")
here = pathlib.Path(ridgeline.__file__).parent
entries = importlib.metadata.distribution("ridgeline").entry_points
print(json.dumps({
    "root": str(here),
    "version": ridgeline.__version__,
    "metadata": importlib.metadata.version("ridgeline"),
    "data": sorted(
        f"{folder}/{item.name}"
        for folder in ("cost_model/targets", "tools/data")
        for item in (root / folder).iterdir()
    ),
    "files": sorted(
        path.relative_to(here).as_posix()
        for folder in ("ir", "cost_model", "codegen", "passes", "tools")
        for path in (here / folder).rglob("*.py")
    ),
    "typed": (root / "py.typed").is_file(),
    "entries": sorted(f"{e.group}: {e.name} = {e.value}" for e in entries),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run without this process's PYTHONPATH: what is installed must be enough."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, since a build leaves its traces beside them."""
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".hypothesis"
    )
    copy = tmp_path_factory.mktemp("checkout") / "any-name"
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def artifacts(checkout: Path) -> dict[str, Path]:
    """What pip is given, by way of installing."""
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--outdir", "dist/direct", cwd=checkout)
    # Neither --sdist nor --wheel: the wheel is then built from the sdist.
    run(*build, "--outdir", "dist/sdist", cwd=checkout)
    [direct] = (checkout / "dist/direct").glob("*.whl")
    [from_sdist] = (checkout / "dist/sdist").glob("*.whl")
    return {"wheel": direct, "sdist": from_sdist, "editable": checkout}


def install(artifact: Path, folder: Path) -> Path:
    """Install `artifact` alone into a new environment that borrows our dependencies."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    # A folder named in a .pth file is searched, but .pth files inside it are not read: an
    # editable ridgeline of the running environment stays invisible.
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(borrowed) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    offline = ("--no-index", "--no-build-isolation")
    # --ignore-installed: pip would otherwise see the borrowed ridgeline and leave or remove it.
    if artifact.is_dir():
        run(*pip, *offline, "--ignore-installed", "--editable", artifact, cwd=folder)
    else:
        run(*pip, *offline, "--ignore-installed", artifact, cwd=folder)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("way", ["wheel", "sdist", "editable"])
def test_installed_package_is_whole(
    way: str, artifacts: dict[str, Path], checkout: Path, tmp_path: Path
) -> None:
    python = install(artifacts[way], tmp_path / "venv")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = json.loads(run(python, "-c", PROBE, cwd=elsewhere))

    home = checkout if way == "editable" else tmp_path / "venv"
    assert Path(found["root"]).is_relative_to(home.resolve())
    assert found["version"] == found["metadata"]
    assert found["typed"]
    data = sorted(p.relative_to(checkout).as_posix() for g in DATA for p in checkout.glob(g))
    assert data
    assert found["data"] == data
    files = sorted(
        path.relative_to(checkout).as_posix()
        for folder in FOLDERS
        for path in (checkout / folder).rglob("*.py")
    )
    assert found["files"] == files
    assert found["entries"] == [
        "console_scripts: ridgeline = ridgeline.tools.cli:main",
        "torch_dynamo_backends: ridgeline = ridgeline.tools.plugin:backend",
    ]
    assert (tmp_path / "venv" / "bin" / "ridgeline").is_file()


@pytest.mark.slow
def test_sdist_can_be_tested(artifacts: dict[str, Path]) -> None:
    """The sdist holds what `make test` needs."""
    [sdist] = artifacts["sdist"].parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "constraints.txt", "pyproject.toml", "LICENSE", "tests/test_packaging.py"}
    assert wanted <= names
