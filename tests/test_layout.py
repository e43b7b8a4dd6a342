"""Imports go one way, and importing costs little."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jaxtune").rglob("*.py"))

# Lowest first; a module may import its own level and those before it.
LEVELS = (
    {"errors", "cli", "config", "tree", "locks", "disk", "functions", "gpu"},
    {"model", "data"},
    {"parallel", "distributed", "faults", "kernels", "peft", "objectives", "moments", "optim", "schedules", "metrics"}
    | {"plan_report", "plan_search", "plan_targets"},
    {"convert", "checkpoint", "compilation", "background", "picture", "runlog", "runfolder", "in_backward", "step", "generation"},
    {"loop", "report", "generate", "reference", "teacher", "folds", "score", "best_of", "losses", "rewards", "rollout", "on_policy"},
    {"train", "sweep", "startup", "loftq", "eva", "evaluate", "export", "plan", "costs", "shapes", "serving", "serve"},
    {"__main__", "__init__"},
)
# Folders of one level that may not import each other, and what the numerical core may import.
STRANGERS = ({"model", "data"}, {"peft", "objectives"})
CORE = {"model", "peft", "objectives"}
CORE_PACKAGES = {"jax", "flax", "optax", "numpy"}


def level(part: str) -> int:
    found = [number for number, parts in enumerate(LEVELS) if part in parts]
    assert found, f"jaxtune/{part} has no level in tests/test_layout.py: add it where it belongs"
    return found[0]


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT / "jaxtune")
    # the commands inside data/ and convert/ are above the library they belong to
    return "__main__" if relative.name == "__main__.py" else relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, at any nesting depth, as a dotted name; `from jaxtune import data` is jaxtune.data."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports relatively; write the full name"
            module = node.module or ""
            names |= {f"jaxtune.{alias.name}" for alias in node.names} if module == "jaxtune" else {module}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    part = part_of(path)
    for name in imports(path):
        package, _, rest = name.partition(".")
        if package == "jaxtune" and rest:
            other = rest.split(".")[0]
            assert level(other) <= level(part), f"{part} imports {name}, which stands above it"
            assert other == part or not any({part, other} <= pair for pair in STRANGERS), f"{part} imports {name}, which it may not know of"
        elif part in CORE and package not in sys.stdlib_module_names:
            assert package in CORE_PACKAGES, f"{part} imports {name}; the core is made of {', '.join(sorted(CORE_PACKAGES))}"


def test_the_levels_name_what_there_is():
    there = {part_of(path) for path in SOURCES}
    named = set().union(*LEVELS)
    assert there <= named
    assert sum(map(len, LEVELS)) == len(named)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_of_a_size_to_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long"


def test_goldens_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "tests" / "goldens").iterdir()}
    assert {name: size for name, size in sizes.items() if size > 200_000} == {}


def test_importing_is_quick_and_starts_no_device():
    program = """
import sys, time
start = time.perf_counter()
import jaxtune
took = time.perf_counter() - start
assert "torch" not in sys.modules
import jaxtune.config, jaxtune.errors, jaxtune.cli
assert "jax" not in sys.modules, "a mistake in a config is told before jax is loaded"
import jaxtune.model, jaxtune.peft, jaxtune.objectives, jaxtune.optim, jaxtune.step
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was started"
print(took)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.0


def test_the_public_names_are_there():
    program = "import jaxtune as jt\nfor name in dir(jt): getattr(jt, name)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
