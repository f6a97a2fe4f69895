"""Functions of the package by name, the calls in them, and changes to them in memory.

Names outlive a formatter, a rename of a local and a move of lines. A name that no longer fits is an error.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import pathlib
import pkgutil
import sys
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

Change: TypeAlias = Callable[[pytest.MonkeyPatch], None]
"""Changes the package, until the patch is undone."""


def call_at(frame: types.FrameType) -> str:
    """The call that a frame is in: `module.function: call number`, counted among the function's calls of that name."""
    code = frame.f_code
    calls = _calls(_definition(code))
    begin, end, first, last = list(code.co_positions())[frame.f_lasti // 2]
    # The end of a `with` statement is at the place of all of the statement.
    withs = [node for node in ast.walk(_definition(code)) if isinstance(node, ast.With)]
    closing = [each.items[0].context_expr for each in withs if (each.lineno, each.col_offset) == (begin, first)]
    [current] = closing or [call for call in calls if (call.end_lineno, call.end_col_offset) == (end, last)]
    number = [call for call in calls if _name(call) == _name(current)].index(current) + 1
    module = frame.f_globals["__name__"].removeprefix("keras_ckpt.")
    return f"{module}.{code.co_qualname}: {_name(current)} {number}"


def without(function: str, *calls: str) -> Change:
    """Removes the statements in which calls are: `sync` or `sync 1` is the first call of that name."""

    def edit(definition: ast.FunctionDef) -> None:
        found = [_find(definition, call) for call in calls]
        for call in found:
            block, index = _statement(definition, call)
            block[index] = ast.Pass()

    return _edited(function, edit)


def swapped(function: str, first: str, second: str) -> Change:
    """Swaps the statements in which two calls are."""

    def edit(definition: ast.FunctionDef) -> None:
        one, other = _find(definition, first), _find(definition, second)
        for block in _blocks(definition):
            places = [[index for index, each in enumerate(block) if call in ast.walk(each)] for call in (one, other)]
            if all(places) and places[0] != places[1]:
                (i,), (j,) = places
                block[i], block[j] = block[j], block[i]
                return
        raise LookupError(f"{function}: {first} and {second} are in no two statements of a block")

    return _edited(function, edit)


def repeated(function: str, call: str) -> Change:
    """Tries the statement in which a call is, ignores an `OSError`, and runs the statement again."""

    def edit(definition: ast.FunctionDef) -> None:
        block, index = _statement(definition, _find(definition, call))
        handler = ast.ExceptHandler(ast.Name("OSError", ast.Load()), None, [ast.Pass()])
        block.insert(index, ast.Try([block[index]], [handler], [], []))

    return _edited(function, edit)


def replaced(function: str, new: Callable[..., Any]) -> Change:
    """Replaces a function by another, which is called with the original before its arguments."""

    def change(patch: pytest.MonkeyPatch) -> None:
        owner, _, name = function.rpartition(".")
        original = _resolve(function)

        @functools.wraps(new)
        def call(*arguments: Any, **named: Any) -> Any:
            return new(original, *arguments, **named)

        patch.setattr(_resolve(owner), name, call)
        for module in [module for name, module in sys.modules.items() if name.startswith("keras_ckpt.")]:
            for imported in [imported for imported, value in vars(module).items() if value is original]:
                patch.setattr(module, imported, call)

    return change


def _edited(function: str, edit: Callable[[ast.FunctionDef], None]) -> Change:
    def change(patch: pytest.MonkeyPatch) -> None:
        # The code is replaced, not the function: modules that have imported the function change too.
        original = inspect.unwrap(_resolve(function))
        definition = copy.deepcopy(_definition(original.__code__))
        edit(definition)
        patch.setattr(original, "__code__", _compiled(definition, original))

    return change


def _resolve(name: str) -> Any:
    return pkgutil.resolve_name(f"keras_ckpt.{name}")


def _compiled(definition: ast.FunctionDef, original: types.FunctionType) -> types.CodeType:
    definition.decorator_list = []
    module = ast.fix_missing_locations(ast.Module([definition], []))
    flags = __future__.annotations.compiler_flag
    namespace: dict[str, Any] = {}
    exec(compile(module, original.__code__.co_filename, "exec", flags), original.__globals__, namespace)
    return namespace[definition.name].__code__.replace(co_qualname=original.__qualname__)


@functools.cache
def _definition(code: types.CodeType) -> ast.FunctionDef:
    """The definition of a function; a change to it has the line of its `def` as its first."""
    module = ast.parse(pathlib.Path(code.co_filename).read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            if code.co_firstlineno in lines:
                return node
    raise LookupError(f"{code.co_filename} has no function {code.co_name} at line {code.co_firstlineno}")


def _calls(definition: ast.FunctionDef) -> list[ast.Call]:
    """The calls in a function, in the order of its text."""
    found = [node for node in ast.walk(definition) if isinstance(node, ast.Call)]
    return sorted(found, key=lambda call: (call.func.end_lineno, call.func.end_col_offset))


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _find(definition: ast.FunctionDef, call: str) -> ast.Call:
    name, _, number = call.partition(" ")
    found = [each for each in _calls(definition) if _name(each) == name]
    if len(found) < int(number or 1):
        raise LookupError(f"{definition.name} has no call {call}")
    return found[int(number or 1) - 1]


def _blocks(definition: ast.FunctionDef) -> list[list[ast.stmt]]:
    """The lists of statements in a function."""
    lists = (getattr(node, name, None) for node in ast.walk(definition) for name in ("body", "orelse", "finalbody"))
    return [block for block in lists if isinstance(block, list)]


def _statement(definition: ast.FunctionDef, call: ast.Call) -> tuple[list[ast.stmt], int]:
    """The innermost statement that a call is in: its block, and its place there."""
    found = [
        (block, index)
        for block in _blocks(definition)
        for index, statement in enumerate(block)
        if call in ast.walk(statement)
    ]
    return found[-1]
