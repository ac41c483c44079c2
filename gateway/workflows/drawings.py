"""Blocks of code that front ends draw in place of showing them: diagrams, charts, formulas, SVG.

A picture, a link or a style sheet in one of them leads out of the page as one in the text does, most of them without
a click. They are read line by line: a line with anything that could name an address is replaced by a comment. Not
handled: languages that a front end runs (`html`, `jsx`, `javascript`). A program can put any address together, so a
page that runs them has to keep them off the network.
"""

from __future__ import annotations

import re

MAX_LINE_CHARS = 4000
"""A longer line is taken out."""
_REMOVED = "address removed"
_ADDRESS = (
    r"//|\\[xuU]?[0-9A-Fa-f]|\\/|url\s*\(|@import|\b(?:href|img|src|javascript|data)\b\s*+['\"]?\s*+[:=(]|&#?\w+;"
)
_TEX_COMMANDS = ("href", "url", "includegraphics", "style", "class", "cssId", "require", "mmlToken", "html")
_TAGS = r"<(?!/?(?:br|b|i|u|s|em|strong|sub|sup|code|small)\s*/?>)[A-Za-z/!?]"
_MERMAID = re.compile(rf"{_ADDRESS}|\\\\|{_TAGS}|#\w+;|\bhref\b|\bimg\b|(?:^|;)\s*(?:click|links?)\b|\bmailto:", re.I)
_DOT = re.compile(rf"{_ADDRESS}|\\\\|{_TAGS}|\b(?:\w*url|\w*href|image|shapefile|stylesheet|imagepath)\b\s*=", re.I)
_PLANT_UML = re.compile(rf"{_ADDRESS}|\\\\|{_TAGS}|!(?:include|import)|\[\[|<\$|<&", re.I)
_DATA = re.compile(rf"{_ADDRESS}|\\\\|\b\w*url\b|{_TAGS}", re.I)
_SVG = re.compile(
    r"(?<!http:)(?<!https:)//|https?:(?!//www\.w3\.org/[\w/.#-]*[\"'])|\\|url\s*\((?!\s*#)|@import|&#?\w+;"
    r"|<(?:image|use|script|foreignObject|style|a|feImage|iframe|animate|set)\b|\bon\w+\s*=|\bhref\b|\bsrc\b",
    re.I,
)
_FORMULA = re.compile(rf"//|\\(?:{'|'.join(_TEX_COMMANDS)})|\\(?:def|let|newcommand|csname)", re.I)

_LANGUAGES: dict[str, tuple[re.Pattern[str], str]] = {
    "mermaid": (_MERMAID, "%% {}"),
    "svg": (_SVG, "<!-- {} -->"),
    **dict.fromkeys(("dot", "graphviz", "gv", "d2", "nomnoml", "flowchart", "flow", "sequence"), (_DOT, "// {}")),
    **dict.fromkeys(("plantuml", "puml", "uml"), (_PLANT_UML, "' {}")),
    **dict.fromkeys(("math", "katex", "mathjax"), (_FORMULA, "% {}")),
    **dict.fromkeys(
        ("vega", "vega-lite", "vegalite", "echarts", "chart", "chartjs", "plotly", "geojson", "topojson", "wavedrom"),
        (_DATA, ""),
    ),
    **dict.fromkeys(("markmap", "mindmap"), (re.compile(rf"{_ADDRESS}|\\\\|{_TAGS}|\]\s*[(:\[]", re.I), "")),
}
_LETTERS = re.compile(r"[A-Za-z]+")
_MAX_SPACE_CHARS = 80
_SPACE = re.compile(rf"\s{{0,{_MAX_SPACE_CHARS}}}")
_LANGUAGE = re.compile(r"[\w+-]{1,40}")


def is_drawn(info: str) -> bool:
    """Whether front ends draw a block with this info string."""
    return _language(info) in _LANGUAGES


def checked_line(info: str, line: str) -> str:
    """Return a line of such a block, or a comment in its place where it could name an address."""
    hazards, comment = _LANGUAGES[_language(info)]
    return comment.format(_REMOVED) if len(line) > MAX_LINE_CHARS or hazards.search(line) else line


def ends_command(before: str, text: str, word: re.Match[str], final: bool) -> bool | None:
    """Whether a word ends the name of a command of TeX that makes a link, loads something or styles, and an
    argument follows; None if that is not known yet. `before` is the visible text before it."""
    _, backslash, name = before.rpartition("\\")
    letters = _LETTERS.match(word[0])
    if not backslash or letters is None or not (name.isalpha() or not name):
        return False
    name += letters[0]
    if word.end() == len(text) and not final:
        return None if any(command.startswith(name) for command in _TEX_COMMANDS) or name.startswith("html") else False
    if not (name in _TEX_COMMANDS or name.startswith("html")):
        return False
    start = min(word.start() + len(letters[0]), len(text))
    space = _SPACE.match(text, start)
    assert space is not None  # it may be empty
    behind = text[space.end() : space.end() + 1]
    if not behind:
        return False if final or len(space[0]) == _MAX_SPACE_CHARS else None
    return behind in "{[%&"


def _language(info: str) -> str:
    found = _LANGUAGE.match(info.lstrip(" \t{.:"))
    return found[0].lower() if found else ""
