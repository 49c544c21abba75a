"""The directions of dependency: nodes -> tadsr <- training, and what each layer may import or call."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.layers import PAGE, drawn, imports, layers

REPOSITORY = Path(__file__).resolve().parent.parent
METHOD_PACKAGES = {"torch", "numpy", "PIL", "safetensors"}
REQUIREMENTS = {"psutil", "scipy"}  # in ComfyUI's requirements.txt, the oldest supported version's too
COMFYUI_MODULES = {
    *("comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfy_config", "comfy_kitchen"),
    *("folder_paths", "nodes", "execution", "server", "node_helpers", "latent_preview"),
}
OWN_PACKAGES = {"tadsr", "training", "nodes", "host", "benchmarks", "scripts", "tests"}
COMMANDS = {"convert.py", "tagger_weights.py"}  # of tadsr/; they print what they did
FORBIDDEN_CALLS = {"cuda", "empty_cache", "manual_seed", "seed_all", "urlopen", "urlretrieve"}


@dataclass(frozen=True)
class Import:
    """One import statement: the top-level package, how far up it is relative, and where it stands."""

    package: str
    level: int
    in_function: bool
    where: str


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        where = f"{file.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name.split(".")[0], 0, id(node) in nested, where)
        elif isinstance(node, ast.ImportFrom):
            yield Import((node.module or "").split(".")[0], node.level, id(node) in nested, where)


def files_of(folder: str) -> list[Path]:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files, f"{folder}/ has no Python files: this test looks at the wrong place"
    return files


def all_imports(folder: str) -> list[tuple[Path, Import]]:
    return [(file, found) for file in files_of(folder) for found in imports_of(file)]


def is_standard(package: str) -> bool:
    return package in sys.stdlib_module_names


def leaves(file: Path, folder: str, level: int) -> bool:
    """Returns whether a relative import of this level points outside `folder`."""
    return level > len(file.relative_to(REPOSITORY / folder).parts)


def test_tadsr_imports_only_the_method_packages() -> None:
    for file, found in all_imports("tadsr"):
        if found.level:
            assert not leaves(file, "tadsr", found.level), f"{found.where}: tadsr/ imports from outside itself"
            continue
        allowed = is_standard(found.package) or found.package in METHOD_PACKAGES
        late_diffusers = found.package == "diffusers" and found.in_function
        assert allowed or late_diffusers, (
            f"{found.where}: tadsr/ imports {found.package}; allowed are the standard library, "
            f"{sorted(METHOD_PACKAGES)}, relative imports, and diffusers inside a function"
        )


def test_nodes_import_only_what_comfyui_brings() -> None:
    for file, found in all_imports("nodes"):
        if found.level:
            reaches_out = leaves(file, "nodes", found.level)
            assert not reaches_out or found.package == "tadsr", (
                f"{found.where}: nodes/ may import relatively from nodes/ and tadsr/ only, not {found.package!r}"
            )
            continue
        allowed = is_standard(found.package) or found.package in METHOD_PACKAGES | REQUIREMENTS | COMFYUI_MODULES
        assert allowed and found.package not in OWN_PACKAGES - {"nodes"}, (
            f"{found.where}: nodes/ imports {found.package}; a pack is loaded by path, so its own modules are "
            "imported relatively, and nothing is used that ComfyUI does not bring"
        )


@pytest.mark.parametrize("folder", ["training", "host", "benchmarks", "scripts"])
def test_only_nodes_name_comfyui(folder: str) -> None:
    for _, found in all_imports(folder):
        assert found.level or found.package not in COMFYUI_MODULES, (
            f"{found.where}: {found.package} is ComfyUI's, and only nodes/ and tests may name it"
        )


def test_training_reaches_tadsr_absolutely_and_never_the_nodes() -> None:
    for file, found in all_imports("training"):
        assert not leaves(file, "training", found.level), f"{found.where}: outside training/, import absolutely"
        allowed = found.package not in OWN_PACKAGES - {"tadsr", "training"}
        assert found.level or allowed, f"{found.where}: training/ imports {found.package}; allowed: tadsr, and itself"


def test_contributing_s_layers_are_the_imports_and_each_knows_only_those_above() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert drawn(text) == text, "run scripts/layers.py"
    above: list[str] = []
    for name, _ in layers(text):
        assert imports(name) <= set(above), f"{name} imports what stands below it: {imports(name) - set(above)}"
        above.append(name)
    folders = {
        f"{package}/{folder.name}"
        for package in ("nodes", "training")
        for folder in (REPOSITORY / package).iterdir()
        if any(folder.glob("*.py"))
    }
    assert folders <= set(above), f"CONTRIBUTING.md lacks {folders - set(above)}"


def test_the_root_names_comfyui_only_when_asked() -> None:
    for found in imports_of(REPOSITORY / "__init__.py"):
        heavy = found.package in COMFYUI_MODULES | METHOD_PACKAGES
        assert found.in_function or not heavy, f"{found.where}: import {found.package} inside comfy_entrypoint"


def test_the_method_leaves_device_and_random_state_alone() -> None:
    for file in files_of("tadsr"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            where = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
            if isinstance(node.func, ast.Attribute):
                seeds_own_generator = node.func.attr == "manual_seed" and not is_torch(node.func.value)
                assert node.func.attr not in FORBIDDEN_CALLS or seeds_own_generator, (
                    f"{where}: .{node.func.attr}() belongs in nodes/ or training/"
                )
            elif isinstance(node.func, ast.Name) and file.name not in COMMANDS:
                assert node.func.id != "print", f"{where}: tadsr/ does not print"


def is_torch(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "torch"


def test_both_commands_start_with_the_standard_library_alone() -> None:
    """-I -S: no site-packages, so an import of anything that is not the standard library fails."""
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); import quickstart, runtests"
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
