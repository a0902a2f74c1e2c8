"""The glossary leads into the code, old identifiers are gone, and docstrings use nouns."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama32"
FILES = sorted(PACKAGE.rglob("*.py"))
GLOSSARY = ROOT / "docs" / "glossary.md"
BODY, _, APPENDIX = GLOSSARY.read_text("utf-8").partition("\n## Renamed identifiers\n")

# Words of everyday English that a local variable may have without its former, private meaning.
COMMON = set(
    "rows read step cut free draw place mark keep by take hold drop turns others room look".split()
)
PRONOUNS = set(
    "it its this that those these which what one ones none other others there such so they them "
    "whose".split()
)
PER_PACKAGE, PER_FILE = 5, 8  # pronouns per 100 words of docstrings
SHORT = 40  # words: a file with fewer is not counted alone


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def resolve(dotted: str) -> None:
    """Import and look up a dotted path; raises where there is no such thing."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            is_field = part in getattr(found, "__annotations__", {})
            if is_field and not hasattr(found, part):
                return  # a field without a default, or an attribute that only annotations declare
            found = getattr(found, part)
        return
    raise ModuleNotFoundError(dotted)


def references(text: str) -> list[str]:
    """Targets of the API cross-references in a page."""
    return sorted(set(re.findall(r"\]\[(llama32[\w.]*)\]", text)))


@pytest.mark.parametrize("dotted", references(BODY))
def test_every_reference_leads_into_the_code(dotted):
    resolve(dotted)


def test_every_term_has_a_meaning_and_a_reference():
    terms = re.findall(r"^- \*\*(.+?)\*\*(.*)$", BODY, re.M)
    assert len(terms) > 60
    for term, meaning in terms:
        assert meaning.startswith(": "), term
        assert references(meaning), term
    names = [name for term, _ in terms for name in term.split(", ")]
    assert len(set(names)) == len(names)


class Row(NamedTuple):
    """A line of the appendix. `still` are the definitions that may keep the old word, `kinds` the
    kinds of names that may: "any parameter", "any local"."""

    before: str
    now: str
    still: tuple[str, ...]
    kinds: tuple[str, ...]


def appendix() -> list[Row]:
    cells = [line.strip("|").split("|") for line in APPENDIX.splitlines() if line.startswith("| `")]
    return [
        Row(
            before.strip(" `"),
            now.strip(" `"),
            tuple(re.findall(r"`([^`]+)`", still)),
            tuple(re.findall(r"any (\w+)", still)),
        )
        for before, now, still in cells
    ]


class Definition(NamedTuple):
    """A name that the package gives to something."""

    name: str  # dotted, from the room on
    kind: str  # "definition", "parameter", "attribute", "variable" or "local"
    where: str


class Definitions(ast.NodeVisitor):
    """Collects the definitions of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scope = [module_name(path)]
        self.kind = "variable"  # of an assignment in the present scope
        self.found: list[Definition] = []
        self.visit(ast.parse(path.read_text("utf-8")))

    def add(self, name: str, kind: str, node: ast.AST, scope: list[str] | None = None) -> None:
        dotted = ".".join([*(self.scope if scope is None else scope), name]).lstrip(".")
        where = f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        self.found.append(Definition(dotted, kind, where))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.add(node.name, "definition", node)
        self._inside(node, "variable")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.add(node.name, "definition", node)
        self._inside(node, "local")

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.add(argument.arg, "local", argument)
        self.visit(node.body)

    def visit_arg(self, node: ast.arg) -> None:
        self.add(node.arg, "parameter", node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.add(node.id, self.kind, node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        before, self.kind = self.kind, "local"
        self.visit(node.target)
        self.kind = before
        for part in (node.iter, *node.ifs):
            self.visit(part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
        if isinstance(node.ctx, ast.Store) and is_own:
            self.add(node.attr, "attribute", node, self.scope[:-1])
        self.generic_visit(node)

    def _inside(self, node: ast.AST, kind: str) -> None:
        before, self.kind = self.kind, kind
        self.scope.append(node.name)  # pyright: ignore[reportAttributeAccessIssue]
        self.generic_visit(node)
        self.scope.pop()
        self.kind = before


@cache
def definitions() -> dict[str, list[Definition]]:
    """All definitions of the package, by their last name."""
    found: dict[str, list[Definition]] = {}
    for path in FILES:
        for definition in Definitions(path).found:
            found.setdefault(definition.name.rpartition(".")[2], []).append(definition)
    return found


def leftovers(old: str, rows: list[Row]) -> Iterator[Definition]:
    """Definitions of an old identifier that the appendix does not allow."""
    still = {name for row in rows for name in row.still}
    kinds = {kind for row in rows for kind in row.kinds} | ({"local"} if old in COMMON else set())
    for definition in definitions().get(old, ()):
        is_allowed = any(f".{definition.name}".endswith(f".{name}") for name in still)
        if definition.kind not in kinds and not is_allowed:
            yield definition


def old_identifiers() -> dict[str, list[Row]]:
    """Every old identifier, with the rows that rename one of this name."""
    found: dict[str, list[Row]] = {}
    for row in appendix():
        if not row.before.endswith(".py"):
            found.setdefault(row.before.rpartition(".")[2], []).append(row)
    return found


@pytest.mark.parametrize("old", sorted(old_identifiers()))
def test_an_old_identifier_is_defined_nowhere(old):
    found = [f"{one.where} {one.kind} {one.name}" for one in leftovers(old, old_identifiers()[old])]
    assert not found, "\n".join(found)


def test_what_still_means_something_exists():
    known = [f".{one.name}" for found in definitions().values() for one in found]
    for row in appendix():
        if not row.before.endswith(".py"):
            for name in row.still:
                assert any(dotted.endswith(f".{name}") for dotted in known), f"{row.before}: {name}"


def test_the_appendix_names_what_there_is_now():
    known = {one.name for found in definitions().values() for one in found}
    rows = appendix()
    assert len(rows) > 300
    assert len({row.before for row in rows}) == len(rows)
    for row in rows:
        if row.before.endswith(".py"):
            assert (PACKAGE / row.now).is_file(), row
            assert row.before in row.still or not (PACKAGE / row.before).exists(), row
        else:
            assert row.now in known, row


def words_and_pronouns(path: Path) -> tuple[int, int]:
    """Of all docstrings in a file."""
    text = ""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text += f"{ast.get_docstring(node) or ''}\n"
    words = re.findall(r"[a-z']+", text.lower())
    return len(words), sum(word in PRONOUNS for word in words)


def test_docstrings_use_nouns():
    counts = [words_and_pronouns(path) for path in FILES]
    words, pronouns = (sum(column) for column in zip(*counts, strict=True))
    assert 100 * pronouns <= PER_PACKAGE * words, f"{100 * pronouns / words:.1f} per 100"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_docstrings_of_a_file_use_nouns(path):
    words, pronouns = words_and_pronouns(path)
    assert words <= SHORT or 100 * pronouns <= PER_FILE * words, f"{100 * pronouns / words:.1f}"
