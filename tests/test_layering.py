"""Text flows down, one room after the other, and never back up: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_train"
BASE = {"config", "config_help", "sections", "setting_types", "errors", "storage", "worker"}
ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "worker": set(),
    "setting_types": set(),
    "sections": {"setting_types"},
    "command_options": set(),
    "config": {"sections", "setting_types"},
    "config_help": {"config", "setting_types"},
    "yaml_file": {"errors", "storage"},
    "config_file": BASE | {"yaml_file"},
    "data": BASE | {"data"},
    "model": BASE | {"model"},
    "runtime": BASE | {"runtime"},
    "training": BASE | {"data", "model", "runtime", "training"},
    "bench": BASE | {"data", "model", "runtime", "training", "bench"},
    "study": BASE | {"config_file", "yaml_file", "data", "model", "runtime", "training", "study"},
    "commands": BASE | {"command_options", "config_file", "data", "model", "runtime", "training", "study", "bench"},
    "__main__": BASE | {"commands"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported(tree: ast.AST) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in froms), "imports are absolute"
    return names | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    rooms = {name.split(".")[1] for name in imported(ast.parse(path.read_text())) if name.startswith("dist_train.")}
    if room != "__init__":
        assert rooms <= ALLOWED[room], f"{path} imports {rooms - ALLOWED[room]}"


def test_package_files_are_empty_and_commands_import_rooms_inside() -> None:
    assert all(path.read_text() == "" for path in FILES if path.name == "__init__.py")
    top = [node for node in ast.parse((PACKAGE / "commands.py").read_text()).body if isinstance(node, ast.ImportFrom)]
    modules = {str(node.module) for node in top if str(node.module).startswith("dist_train.")}
    assert modules <= {"dist_train.config", "dist_train.config_file", "dist_train.errors", "dist_train"}


def test_only_runtime_knows_processes_and_one_file_of_it_each_way_to_share_the_work() -> None:
    for path in FILES:
        names = imported(ast.parse(path.read_text()))
        assert path.name == "sharding.py" or not any("fully_shard" in name for name in names)
        assert path.name == "parallel.py" or not any("DistributedDataParallel" in name for name in names)
        assert path.parent.name == "runtime" or not any("torch.distributed" in name for name in names)


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("training.trainer", ["datasets", "pyarrow", "pandas", "matplotlib", "scipy"]),
        ("study.plots", ["torch", "scipy"]),
    ],
)
def test_what_every_run_loads_needs_nothing_that_only_other_commands_do(module: str, others: list[str]) -> None:
    code = (
        f"import sys; import dist_train.{module}; "
        f"sys.exit(str([other for other in {others} if other in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr.strip() == ""
