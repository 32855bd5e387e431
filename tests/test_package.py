"""The package as users get it: cheap to import, the same from everywhere, and a clean wheel."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tossup

ROOT = Path(__file__).parents[1]
FLOORS = ("kernels", "autotune", "supernet")


def python(code: str, cwd: Path, *options: str) -> str:
    """What `code` prints in an interpreter of its own, started in `cwd`."""
    command = [sys.executable, *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what packaging reads, links included, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("tossup", *FLOORS):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skip)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def test_every_public_name_resolves():
    for name in tossup.__all__:
        assert getattr(tossup, name) is not None
        assert name in dir(tossup)
    with pytest.raises(AttributeError, match="'tossup' has no attribute 'nothing'"):
        _ = tossup.nothing


def test_type_checkers_see_the_public_names():
    tree = ast.parse((ROOT / "tossup/__init__.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == tossup._MODULES


def test_importing_tossup_is_cheap():
    code = (
        "import sys, tossup; print(*sorted({'torch', 'numpy', 'triton', 'numba'} & {*sys.modules}))"
    )
    assert python(code, ROOT) == ""


def test_the_ground_floor_imports_neither_numba_nor_triton_nor_the_floors_above():
    names = [name for name, module in tossup._MODULES.items() if module.startswith("kernels.")]
    heavy = "{'numba', 'pydantic', 'yaml', 'tossup.supernet', 'tossup.autotune'}"
    code = f"""
import sys
from tossup import {", ".join(names)}
print(*sorted({heavy} & {{*sys.modules}}))
"""
    assert python(code, ROOT) == ""


def test_the_wheel_holds_every_module_and_nothing_else(wheel, checkout):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = [file for floor in FLOORS for file in (checkout / floor).rglob("*.py")]
    expected = {f"tossup/{file.relative_to(checkout)}" for file in modules}
    package = {name for name in held if name.startswith("tossup/")}
    about = f"tossup-{tossup.__version__}.dist-info/"
    assert {name for name in package if name.endswith(".py")} == {"tossup/__init__.py", *expected}
    assert all(name.endswith((".py", ".json")) for name in package)
    assert all(name.startswith(about) for name in held - package)


def test_checkout_editable_install_and_wheel_import_the_same(
    checkout, installed, tmp_path, tmp_path_factory
):
    editable = tmp_path_factory.mktemp("editable")
    options = ("--no-deps", "--no-build-isolation", "--target", editable)
    pip("install", *options, "--editable", checkout)

    def names_and_place(folder: Path) -> tuple[str, str]:
        code = f"""
import site; site.addsitedir({str(folder)!r})
import tossup, importlib.util
print(tossup.__version__, *tossup.__all__)
print(importlib.util.find_spec("tossup.kernels.backend").origin)
"""
        names, place = python(code, tmp_path, "-I", "-S").splitlines()
        return names, place

    copies = {folder: names_and_place(folder) for folder in (checkout, editable, installed)}
    names = " ".join((tossup.__version__, *tossup.__all__))
    for folder, root in ((checkout, checkout), (editable, checkout), (installed, installed)):
        assert copies[folder] == (names, str(root / "tossup/kernels/backend.py"))


def test_llama_runs_from_the_checkout_beside_hugging_faces_kernels(installed):
    code = f"""
import sys; sys.path.insert(1, {str(installed)!r})
import kernels, torch, tossup
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32)
config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
logits = LlamaForCausalLM(config)(torch.zeros(1, 4, dtype=torch.long)).logits
print(callable(kernels.get_kernel), logits.shape == (1, 4, 32))
"""
    assert python(code, ROOT) == "True True"
