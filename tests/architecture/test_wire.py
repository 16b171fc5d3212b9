"""What crosses a process boundary survives pickling with every field: errors and messages.

Instances are built from the annotations with values that differ from the defaults, so a new error or
message is covered the moment it is written.
"""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import types
import typing
from typing import Any

import pytest

import cluster.reports
import engine.control
import engine.errors
import engine.messages
import engine.migration
from engine.errors import BallonetError

SCALARS: dict[type, Any] = {str: "text", int: 1, float: 0.5, bool: True, bytes: b"\x00\xff"}


def sample(hint: Any) -> Any:
    """A value of an annotated type that is not its default."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return sample(next(kind for kind in arguments if kind is not type(None)))
    if origin is typing.Literal:
        return arguments[-1]
    if origin is tuple:
        return tuple(sample(kind) for kind in arguments if kind is not Ellipsis)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(
            **{field.name: sample(hints[field.name]) for field in dataclasses.fields(hint) if field.init}
        )
    return SCALARS[hint]


def errors() -> list[type[BallonetError]]:
    """Every class of engine.errors."""
    found = [member for _, member in inspect.getmembers(engine.errors, inspect.isclass)]
    return [member for member in found if issubclass(member, BallonetError)]


def messages() -> list[type]:
    """Every dataclass of the modules that hold nothing else."""
    modules = (engine.messages, engine.control, engine.migration, cluster.reports)
    members = {
        member: None for module in modules for _, member in inspect.getmembers(module, inspect.isclass)
    }
    return [member for member in members if dataclasses.is_dataclass(member)]


def error_arguments(error: type[BallonetError]) -> dict[str, Any]:
    """Arguments for an error's constructor; of one that takes any, a message."""
    if error.__init__ is Exception.__init__:
        return {}
    hints = typing.get_type_hints(error.__init__)
    return {name: sample(hint) for name, hint in hints.items() if name != "return"}


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_errors_round_trip(error: type[BallonetError]) -> None:
    arguments = error_arguments(error)
    original = error(**arguments) if arguments else error("what happened")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert copy.args == original.args
    assert vars(copy) == vars(original)
    assert str(copy) == str(original) != ""
    assert all(getattr(copy, name) == value for name, value in arguments.items())


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.__name__)
def test_messages_round_trip(message: type) -> None:
    original = sample(message)
    assert pickle.loads(pickle.dumps(original)) == original


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.__name__)
def test_messages_are_frozen(message: type) -> None:
    original = sample(message)
    first = dataclasses.fields(message)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(original, first, None)
    hash(original)
