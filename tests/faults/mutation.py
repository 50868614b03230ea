"""Changes a function of the product in this process: one piece of its source, exactly as named."""

import __future__

import importlib
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import NamedTuple

_FUTURE_FLAGS = __future__.annotations.compiler_flag


class Mutation(NamedTuple):
    """``place`` is ``module:Class.method`` or ``module:function``; ``old`` becomes ``new``."""

    place: str
    old: str
    new: str


def mutate(mutation: Mutation) -> None:
    """Replaces the code of the function, for everybody who holds it, for good.

    LookupError unless the function is there, and has ``old`` in it exactly once: the product has
    moved, and the mutation has to follow.
    """
    function = _function(mutation.place)
    source = textwrap.dedent(inspect.getsource(function))
    if (found := source.count(mutation.old)) != 1:
        raise LookupError(
            f"{mutation.place} has {found} times, not once, what is to be changed: {mutation.old!r}"
        )
    flags = function.__code__.co_flags & _FUTURE_FLAGS
    text = source.replace(mutation.old, mutation.new)
    module = compile(text, inspect.getsourcefile(function) or "?", "exec", flags, True)
    code = next(
        const
        for const in module.co_consts
        if isinstance(const, CodeType) and const.co_name == function.__name__
    )
    if code.co_freevars != function.__code__.co_freevars:
        raise LookupError(f"{mutation.place} has become a closure, which cannot be changed")
    function.__code__ = code


def _function(place: str) -> FunctionType:
    module_name, _, path = place.partition(":")
    found: object = importlib.import_module(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, FunctionType):
        raise LookupError(f"{place} is no function (any more)")
    return found
