"""The house rules, held by reading the source: floors, sizes, and what is forbidden where."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llama32"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports go down only: a module may import those on lower floors, never its own or a higher one.
FLOORS = (
    ("files", "bpe", "settings", "stored", "calls", "tools", "adapt.__init__", "bench.__init__"),
    ("adapt.quantized", "config", "attention", "batch", "tokenizer", "sampling", "stopping"),
    ("rope", "paged", "chat", "guides", "adapt.packed"),
    ("flash", "model", "adapt.packed_int", "adapt.fused"),
    ("cache", "train.documents"),
    ("adapt.tied", "adapt.packed_gpu", "adapt.trace", "adapt.sharded"),
    ("adapt.lora", "adapt.quantize", "adapt.optimize", "int8_cache"),
    ("layouts",),
    ("checkpoint", "generate", "adapt.peft", "train.__init__", "train.data", "train.recipe"),
    ("download", "saving", "train.loop", "train.examples"),
    ("hub", "train.curve"),
    ("engine.__init__", "engine.pages", "engine.prefix"),
    ("engine.request",),
    ("engine.stats",),
    ("engine.scheduler", "engine.settings"),
    ("engine.lookup", "engine.memory", "engine.rows", "engine.speculation"),
    ("engine.drawing",),
    ("engine.runner",),
    ("engine.draft", "engine.engine"),
    ("engine.asynchronous", "progress", "transcript"),
    ("stream",),
    ("llm",),
    ("evaluate", "loading", "train.finetune"),
    ("adapt.parallel",),
    ("serve.__init__", "serve.settings", "serve.schemas", "serve.errors", "serve.metrics"),
    ("serve.limits", "serve.prompts", "serve.replies", "serve.watch"),
    ("serve.service",),
    ("serve.answering",),
    ("serve.app",),
    ("serve.server",),
    ("bench.turns", "bench.gguf", "bench.plan", "harness"),
    ("bench.contenders", "bench.run"),
    ("bench.worker", "bench.report"),
    ("__init__", "info", "terminal"),
    ("options",),
    ("dialog", "bench.command", "train.command"),
    ("__main__",),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

PLANS = ("pages", "prefix", "request", "scheduler", "settings", "speculation", "lookup", "stats")
NO_TORCH = ("config", "files", "settings", "stopping", "bpe", "tokenizer", "chat")
NO_TORCH += ("calls", "tools", "guides")
NO_TORCH += tuple(f"engine.{module}" for module in PLANS)

# Where code that is not ours runs, or a thread ends: what it raises is carried to its owner.
CARRIES_ERRORS = ("engine.engine", "engine.asynchronous", "tools")


def name(path: Path) -> str:
    """As in an import, without the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def modules_of_ours(path: Path) -> set[str]:
    dotted = {full for full in imported(path) if full.split(".")[0] == "llama32"}
    known = {full.removeprefix("llama32.") for full in dotted}
    known |= {full.rpartition(".")[0] for full in known}
    return known & FLOOR.keys() | ({"__init__"} if dotted and not known & FLOOR.keys() else set())


def test_every_file_has_a_floor():
    assert {name(path) for path in FILES} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_only_go_down(path):
    for module in modules_of_ours(path):
        assert FLOOR[module] < FLOOR[name(path)], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_stay_small(path):
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) <= 300
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"  # pyright: ignore


def test_the_heart_can_be_read_in_one_sitting():
    assert len((PACKAGE / "model.py").read_text().splitlines()) <= 200
    assert len((PACKAGE / "generate.py").read_text().splitlines()) <= 130


@pytest.mark.parametrize(
    ("part", "limit"),
    [
        ("llama32", 5850),  # the model, its checkpoints and its command line
        ("engine", 2050),
        ("adapt", 2200),
        ("bench", 900),
        ("serve", 1750),
        ("train", 950),
    ],
)
def test_each_part_of_the_house_keeps_its_size(part, limit):
    own = [path for path in FILES if path.parent.name == part]
    assert sum(len(path.read_text("utf-8").splitlines()) for path in own) <= limit


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_forbidden_is_used(path):
    for node in ast.walk(parse(path)):
        assert not isinstance(node, ast.Global | ast.Nonlocal), f"{path}:{node.lineno}: global"
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            allowed = caught == "Exception" and name(path) in CARRIES_ERRORS
            caught_all = caught in ("everything", "Exception", "BaseException")
            assert allowed or not caught_all, f"{path}: {caught}"
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if name(path) != "engine.runner":
                assert dotted not in ("torch.compile", "torch.cuda.CUDAGraph", "torch.cuda.graph")
            assert path.stem == "__main__" or not dotted.startswith(("os.environ", "os.getenv"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.func.id}"


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_needs_no_tensors_imports_no_torch(module):
    names = imported(PACKAGE.joinpath(*module.split(".")).with_suffix(".py"))
    assert not {name for name in names if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_module_and_public_name_is_explained(path):
    tree = parse(path)
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"
