"""No text of a statement depends on anything but the source: what a request says goes in as a parameter.

Every statement that is given to the driver is followed to where its text comes from. Text, and constants of
our modules made of such text, are fixed. Whatever else there is stands in `REASONED`, with why nobody can
write there.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeGuard

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATEMENTS = frozenset(
    {"execute", "executemany", "fetch", "fetchrow", "fetchval", "fetchmany", "prepare", "cursor"}
)
COPIES = frozenset({"copy_from_query", "copy_records_to_table", "copy_to_table", "copy_from_table"})
# What the driver calls the text of a statement; None is what two stars unfold.
TEXTS = frozenset({"query", "command", None})
_CONSTANT = re.compile(r"_*[A-Z][A-Z0-9_]*")

# By file and function: how many of its statements are not fixed, and why nobody can write in them.
REASONED: dict[str, tuple[int, str]] = {
    "billing/books.py:open_books": (
        1,
        "columns by the names of a dataclass's fields, and expressions of the module",
    ),
    "billing/holds.py:open_with_holds": (1, "the same columns of the books"),
    "billing/invariants.py:_ask": (2, "an invariant's own text, and a number of milliseconds"),
    "scheduler/store/endings.py:_rows_of_jobs": (1, "one of two conditions that its only caller writes"),
    "scheduler/store/migrate.py:_apply": (1, "a number of milliseconds"),
    "scheduler/store/migrate.py:_apply_once": (4, "the files of this package, and a number of milliseconds"),
    "scheduler/store/past_jobs.py:_make_month": (
        1,
        "a name and bounds made of a month's number: DDL has no parameters",
    ),
}


class Source:
    """One module of ours."""

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.name = str(path.relative_to(ROOT))
        self.tree = ast.parse(path.read_text() if text is None else text)
        self._assigned: dict[str, ast.expr] = {}
        self._imported: dict[str, tuple[str, str]] = {}
        given = Counter(node.id for node in ast.walk(self.tree) if _is_given_a_value(node))
        given.update(node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg))
        # A constant is given its value once, and nothing else in the module has its name.
        self._changed = {name for name, times in given.items() if times > 1}
        for node in self.tree.body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self._assigned[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self._assigned[name] = value
                case ast.ImportFrom(module=str() as module, names=names) if module.startswith(
                    ("billing", "scheduler")
                ):
                    self._imported |= {alias.asname or alias.name: (module, alias.name) for alias in names}

    def statements(self) -> Iterator[tuple[str, ast.expr]]:
        """Yield each text that is given to the driver, after the function that gives it."""
        for function, call in _calls(self.tree, ""):
            if not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in STATEMENTS:
                yield from ((function, text) for text in call.args[:1])
                yield from ((function, given.value) for given in call.keywords if given.arg in TEXTS)
            elif call.func.attr in COPIES:
                for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                    yield function, argument

    def is_fixed(self, expression: ast.expr) -> bool:
        """Return whether a text depends on nothing but the source."""
        match expression:
            case ast.Constant():
                return True
            case ast.JoinedStr(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts):
                return all(self.is_fixed(part) for part in parts)
            case ast.FormattedValue(value=value):
                return self.is_fixed(value)
            case ast.BinOp(left=left, op=ast.Add() | ast.Mult() | ast.Pow(), right=right):
                return self.is_fixed(left) and self.is_fixed(right)
            case ast.IfExp(body=body, orelse=otherwise):
                return self.is_fixed(body) and self.is_fixed(otherwise)
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join"), args=[joined]):
                return self.is_fixed(joined)
            case ast.Name(id=name) if _CONSTANT.fullmatch(name):
                return self._is_fixed_name(name)
            case _:
                return False

    def _is_fixed_name(self, name: str) -> bool:
        if name in self._changed:
            return False
        if name in self._imported:
            module, there = self._imported[name]
            origin = module_of_ours(module)
            return origin is not None and origin._is_fixed_name(there)
        value = self._assigned.get(name)
        return value is not None and self.is_fixed(value)


def _is_given_a_value(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)


@cache
def module_of_ours(name: str) -> Source | None:
    path = ROOT / Path(*name.split("."))
    found = next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)
    return None if found is None else Source(found)


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        within = child.name if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(child, ast.Call):
            yield within, child
        yield from _calls(child, within)


@cache
def sources() -> list[Source]:
    paths = [path for package in ("billing", "scheduler") for path in sorted((ROOT / package).rglob("*.py"))]
    return [Source(path) for path in paths if "/v1/" not in str(path)]


def test_every_statement_is_fixed_or_has_its_reason() -> None:
    found: dict[str, list[str]] = {}
    for source in sources():
        for function, text in source.statements():
            if not source.is_fixed(text):
                found.setdefault(f"{source.name}:{function}", []).append(ast.unparse(text))
    unknown = {place: texts for place, texts in found.items() if len(texts) > REASONED.get(place, (0, ""))[0]}
    assert unknown == {}, "give what varies as a parameter, or say in REASONED why nobody can write there"


def test_statements_are_found() -> None:
    assert sum(1 for source in sources() for _ in source.statements()) > 200


@pytest.mark.parametrize(
    "text",
    [
        'await connection.fetch(f"SELECT {name}")',
        'await connection.fetch("SELECT " + name)',
        'await connection.fetch("SELECT %s" % name)',
        'await connection.fetch("SELECT {}".format(name))',
        'await connection.fetch(" ".join(["SELECT", name]))',
        'await connection.fetch(f"SELECT {request.name!r}")',
        'await connection.fetch(f"SELECT {_given}")',
        'await connection.fetch("SELECT 1" if name else name)',
        "await connection.execute(name)",
        "await connection.execute(statement())",
        "await self._connection.fetchval(_UNKNOWN)",
        "await connection.copy_records_to_table(name, records=[])",
        "await connection.fetch(query=name)",
        "await connection.executemany(args=[], command=name)",
        "await connection.fetch(**name)",
        "await connection.fetch(*name)",
        "await connection.fetch(_OF_A_REQUEST)",
        "await connection.fetch(_TWICE)",
        "await connection.fetch(_NOT_THERE)",
    ],
)
def test_a_statement_that_a_request_can_write_in_is_found(text: str) -> None:
    program = (
        "from scheduler.frontdoor.auth import ROLE_NEEDED as _OF_A_REQUEST\n"
        "from scheduler.store.jobs import _NOT_THERE\n"
        f'_TWICE = "SELECT 1"\nasync def f(name):\n    {text}\ndef g(_TWICE):\n    pass\n'
    )
    source = Source(ROOT / "scheduler" / "made_up.py", program)
    assert [function for function, found in source.statements() if not source.is_fixed(found)] == ["f"]


@pytest.mark.parametrize(
    "text",
    [
        'await connection.fetch("SELECT $1", name)',
        'await connection.fetch(f"SELECT {_COLUMNS} FROM t WHERE name = $1", name)',
        'await connection.fetch(f"SELECT {_ALL} " + "LIMIT 1")',
        'await connection.fetch(query=f"SELECT {_ALL}")',
        'await connection.fetch(_OF_ANOTHER_MODULE + " WHERE name = $1", name)',
    ],
)
def test_a_statement_with_parameters_is_none(text: str) -> None:
    program = (
        "from scheduler.store.jobs import _SELECT as _OF_ANOTHER_MODULE\n"
        '_LIST = ("a", "b")\n_COLUMNS = ", ".join(_LIST)\n_ALL = f"{_COLUMNS}"\n'
        f"async def f(name):\n    {text}\n"
    )
    source = Source(ROOT / "scheduler" / "made_up.py", program)
    assert all(source.is_fixed(found) for _, found in source.statements())
