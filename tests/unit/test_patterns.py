"""Every regular expression of the tree runs in linear time: text from outside may be of any length.

Patterns are found by importing every module and looking into its values, classes and functions; the source is read as
well, because a pattern that is given to a function of `re` as text is compiled where nobody finds it. Each pattern gets
baits that grow, made of its own parts: repeats of each literal and class, and near matches.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import random
import re
import time
import types
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from re import _parser  # the only thing that knows what a pattern is made of
from typing import Any

import pytest

import engine
import gateway

ROOT = Path(__file__).parents[2]
_MODEL_LIBRARIES = frozenset({"torch", "transformers", "vllm"})
_FUNCTIONS = frozenset({"match", "search", "fullmatch", "split", "sub", "subn", "findall", "finditer"})
_USES = ("match", "fullmatch", "search", "findall")  # `sub` and `split` search as `findall` does
_LENGTHS = (24, 2_000, 8_000, 32_000)
"""Characters of a bait; the first is for patterns that take exponential time."""
_QUICK_S = 0.0003
"""What takes less for 2,000 characters is linear: quadratic time is at least 1 ms, of steps of half a nanosecond."""
_FLOOR_S = 0.005
_MOST_GROWTH = 8.0
"""From 2,000 to 8,000 characters, or from there to 32,000. Linear time grows by 4, quadratic by 16."""
_TRIES = 3
_MAX_BAITS = 150


def sources() -> dict[str, ast.Module]:
    """Return the source of every module, by the module's name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for package in (gateway, engine)
        for path in (ROOT / package.__name__).glob("**/*.py")
    }


SOURCES = sources()


def needs_a_model_library(source: ast.Module) -> bool:
    """Tell whether importing a module imports what is not installed everywhere, and takes seconds."""
    names = [alias.name for node in source.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in source.body if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] in _MODEL_LIBRARIES for name in names)


def calls(source: ast.AST, functions: Collection[str], modules: Collection[str] = ("re", "re2")) -> list[int]:
    """Return the lines on which functions of `modules` are called, by their names."""
    return [
        node.lineno
        for node in ast.walk(source)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in modules
        and node.func.attr in functions
    ]


def patterns_in(value: Any, seen: set[int], depth: int = 0) -> Iterator[re.Pattern[Any]]:
    """Yield the patterns in a value: in containers, attributes of our own classes and instances, defaults, closures."""
    if id(value) in seen or depth > 6:
        return
    seen.add(id(value))
    inner: Iterator[Any] = iter(())
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        inner = itertools.chain(value, value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner = iter(value)
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell is not None]
        inner = itertools.chain(value.__defaults__ or (), (value.__kwdefaults__ or {}).values(), cells)
    elif type(value).__module__.partition(".")[0] in ("gateway", "engine"):
        names = getattr(type(value), "__slots__", ())
        inner = itertools.chain(vars(value).values() if hasattr(value, "__dict__") else (), _attributes(value, names))
    elif isinstance(value, type) and value.__module__.partition(".")[0] in ("gateway", "engine"):
        inner = iter([attribute for name, attribute in vars(value).items() if not name.startswith("__pydantic")])
    for one in inner:
        yield from patterns_in(one, seen, depth + 1)


def _attributes(value: Any, names: Any) -> list[Any]:
    return [getattr(value, name, None) for name in ((names,) if isinstance(names, str) else names)]


def all_patterns() -> dict[str, re.Pattern[Any]]:
    found: dict[str, re.Pattern[Any]] = {}
    seen: set[int] = set()
    for module_name, source in SOURCES.items():
        if needs_a_model_library(source) or module_name.endswith("__main__"):
            continue
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            for pattern in patterns_in(value, seen):
                found[f"{module.__name__}.{name} {str(pattern.pattern)[:40]!r}"] = pattern
    return found


# What a pattern is made of.


def _characters(node: Any) -> str:
    """Return some characters that one step of a pattern takes, or nothing where it takes none by itself."""
    op, value = node
    name = str(op)
    if name == "LITERAL":
        return chr(value)
    if name == "NOT_LITERAL":
        return "".join(char for char in "x 1\n" if ord(char) != value)
    if name == "ANY":
        return "x 1."
    if name == "IN":
        return _members(value)
    if name == "CATEGORY":
        return _category(str(value))
    return ""


def _members(items: Any) -> str:
    negated = str(items[0][0]) == "NEGATE"
    chars = ""
    for op, value in items[1:] if negated else items:
        name = str(op)
        if name == "LITERAL":
            chars += chr(value)
        elif name == "RANGE":
            chars += chr(value[0]) + chr(value[1])
        elif name == "CATEGORY":
            chars += _category(str(value))
    if not negated:
        return chars
    return "".join(char for char in 'x 1\n"<[(' if char not in chars)


def _category(name: str) -> str:
    return {
        "CATEGORY_DIGIT": "1",
        "CATEGORY_NOT_DIGIT": "x ",
        "CATEGORY_SPACE": " \n",
        "CATEGORY_NOT_SPACE": "x1.",
        "CATEGORY_WORD": "a1_",
        "CATEGORY_NOT_WORD": " .-",
    }.get(name, "")


def _steps(parsed: Any) -> Iterator[Any]:
    """Yield every step of a pattern, those inside groups and repeats included."""
    for op, value in parsed:
        yield op, value
        for part in _inner(value):
            yield from _steps(part)


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, _parser.SubPattern):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _inner(one)


def _sample(parsed: Any, repeats: int = 1, pick: int = 0) -> str:
    """Return a text that a pattern is likely to match, with `repeats` of what may repeat."""
    text = ""
    for node in parsed:
        op, value = node
        name = str(op)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            text += _sample(inner, repeats, pick) * min(max(least, repeats), int(most))
        elif name == "SUBPATTERN":
            text += _sample(value[-1], repeats, pick)
        elif name == "ATOMIC_GROUP":
            text += _sample(value, repeats, pick)
        elif name == "BRANCH":
            text += _sample(value[1][pick % len(value[1])], repeats, pick)
        elif chars := _characters(node):
            text += chars[pick % len(chars)]
    return text


def baits(pattern: re.Pattern[Any]) -> list[Callable[[int], str]]:
    """Return functions from a length to a text of about that length."""
    parsed = _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)
    units = list(dict.fromkeys(char for node in _steps(parsed) for char in _characters(node)))
    samples = list(dict.fromkeys(_sample(parsed, repeats, pick) for repeats in (1, 2, 3) for pick in range(3)))
    heads = ["", *samples, *(text[:length] for text in samples for length in (1, 2, len(text) // 2, len(text) - 1))]
    repeated = [*units, *samples, *(text[:-1] for text in samples), *(text[: len(text) // 2] for text in samples)]
    repeated += [a + b for a, b in itertools.permutations(units, 2)]
    rng = random.Random(str(pattern.pattern))
    # What repeats one character behind a whole match, and ends in what does not match, finds most of them.
    likely = list(itertools.product(units, ["", *samples], ["\nx", "\x00"]))
    others = list(itertools.product(dict.fromkeys(repeated), dict.fromkeys(heads), ["", "\x00", "\n", "x", "\nx", "!"]))
    chosen = [*_some(likely, rng), *_some(others, rng)]
    return [partial(_bait, unit, head, tail) for unit, head, tail in chosen if unit]


def _some(values: list[tuple[str, str, str]], rng: random.Random) -> list[tuple[str, str, str]]:
    return values if len(values) <= _MAX_BAITS else rng.sample(values, _MAX_BAITS)


def _bait(unit: str, head: str, tail: str, length: int) -> str:
    return head + unit * (length // len(unit)) + tail


def _seconds(use: Callable[[Any], Any], text: Any) -> float:
    started = time.thread_time()  # what neighbours do is not in it
    use(text)
    return time.thread_time() - started


def _superlinear(use: Callable[[Any], Any], texts: list[Any]) -> bool:
    tiny, short, *longer = texts
    if _seconds(use, tiny) > _FLOOR_S and min(_seconds(use, tiny) for _ in range(_TRIES)) > _FLOOR_S:
        return True
    if _seconds(use, short) < _QUICK_S or (before := min(_seconds(use, short) for _ in range(_TRIES))) < _QUICK_S:
        return False
    for text in longer:
        took = _seconds(use, text)
        if took > _MOST_GROWTH * before:
            took = min(took, *(_seconds(use, text) for _ in range(_TRIES)))
        if took > _FLOOR_S:
            return took > _MOST_GROWTH * before
        before = took
    return False


def worst_growth(pattern: re.Pattern[Any]) -> str | None:
    """Return a use and a bait for which a pattern takes more than linear time, or None."""
    for make in baits(pattern):
        texts: list[Any] = [make(length) for length in _LENGTHS]
        if isinstance(pattern.pattern, bytes):
            texts = [text.encode(errors="replace") for text in texts]
        for name in _USES:
            if _superlinear(getattr(pattern, name), texts):
                return f"{name} of {texts[1][:60]!r}..."
    return None


@pytest.mark.slow
def test_patterns_take_linear_time() -> None:
    patterns = all_patterns()
    assert len(patterns) > 30
    assert any("gateway.conversations.sessions" in name for name in patterns)

    slow = {name: worst for name, pattern in patterns.items() if (worst := worst_growth(pattern)) is not None}
    assert slow == {}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?:a+)+$",
        r"\n\n## S(?:\n\n\[\d+\] [^\n]*)+\s*$",
        r"\s+$",
        r"a.*b.*c",
        r"x*y",
        r"^(a)[ \t]*:[ \t]*(.*?)[ \t]*$",
    ],
)
def test_pattern_that_is_not_linear_is_found(pattern: str) -> None:
    assert worst_growth(re.compile(pattern)) is not None


def test_no_pattern_is_compiled_on_the_fly() -> None:
    """A pattern given as text to a function of `re` would not be found, and is compiled again and again."""
    inline = {name: lines for name, source in SOURCES.items() if (lines := calls(source, _FUNCTIONS))}

    assert inline == {}


def test_patterns_are_compiled_where_they_are_found() -> None:
    """`re.compile` stands at the top of a module or a class, and of none that is not imported here.

    RE2 takes linear time whatever the pattern is, so it may compile those of clients.
    """
    hidden = {}
    for name, source in SOURCES.items():
        functions = [node for node in ast.walk(source) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        places: list[ast.AST] = [source] if needs_a_model_library(source) else [*functions]
        if lines := sorted({line for place in places for line in calls(place, ("compile",), ("re",))}):
            hidden[name] = lines
    hidden.pop("engine.demo.train", None)  # not served

    assert hidden == {}
