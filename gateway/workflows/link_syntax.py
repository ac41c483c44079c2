"""What links of Markdown look like: destinations, titles, and how a reader sees escapes and entities.

All of it works on a text that is still growing: None says that what is there does not decide yet. Destinations and
titles are markdown-it's to read.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from markdown_it.common.utils import unescapeAll
from markdown_it.helpers import parseLinkDestination, parseLinkTitle

from gateway.workflows.addresses import ADDRESS_CHARS, MAX_ADDRESS_CHARS

MAX_LINK_CHARS = MAX_ADDRESS_CHARS + 400
"""Of a destination and its title."""
_HOST_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-"
"""Besides all that is not ASCII."""
_LOCAL_CHARS = _HOST_CHARS + "_+%"
_ENDINGS = frozenset(
    [
        "com",
        "org",
        "net",
        "edu",
        "gov",
        "mil",
        "int",
        "info",
        "biz",
        "pro",
        "web",
        "xxx",
        "aero",
        "asia",
        "coop",
        "museum",
        "name",
        "shop",
        "xyz",
        "online",
        "site",
        "dev",
        "app",
        "tech",
        "store",
        "cloud",
        "live",
        "link",
        "click",
        "top",
        "page",
        "zip",
        "mov",
        "run",
        "\u0440\u0444",
    ]
)
_FILES = frozenset("py rs sh md pl cc so ps js ts cs go hs kt rb vb tf mk ml gz vi am pm".split())  # noqa: SIM905
"""Two letters that end names of files, and abbreviations, more often than hosts."""
_REST = re.compile(ADDRESS_CHARS)
_REST_GOES_ON = re.compile(r"(?:\([^\s()<>\"`]{0,200})?\Z")
IPV4 = re.compile(r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}")
_NOT_IN_ANGLES = re.compile(r"[\n<]")
_MAX_TAG_CHARS = 70
_TAG_NAME = re.compile(rf"<[A-Za-z0-9!#$%&'*+=?^_`{{|}}~.:@-]{{1,{_MAX_TAG_CHARS}}}")
"""Of HTML, or the beginning of a link."""
_LINK_IN_ANGLES = re.compile(
    r"<(?:(?:https?|ftp|file|mailto|tel|sms|data|javascript|vbscript|blob|view-source|wss?):|[^<@:]{1,70}@)", re.I
)
_SPACE = re.compile(r"\s")
_BLANK = re.compile(r"[\x00-\x20]")
_SCHEME = re.compile(r"\A[A-Za-z][A-Za-z0-9+.-]*:")
_FAR_END = re.compile(r"[\s)]")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ENTITY_BEGINNING = re.compile(r"&(?:#[xX]?[0-9a-fA-F]{0,7}|[A-Za-z][A-Za-z0-9]{0,31})?\Z")
_PUNCTUATION = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
_MAX_SPACE_CHARS = 80


class Link:
    """What stands behind `](` or `]:`: a destination, perhaps a title, and for a link a closing parenthesis."""

    __slots__ = ("angled", "broken", "destination", "destination_end", "destination_start", "empty", "end", "ok")

    def __init__(self) -> None:
        self.ok = False
        self.angled = False
        """The destination begins with an angle bracket."""
        self.empty = False
        self.broken = False
        """Some renderer may read it as a link, and it must not be one: another begins before this destination has
        ended, or there are backticks in it, which decide elsewhere what is code."""
        self.destination = ""
        self.destination_start = self.destination_end = 0
        self.end: int | None = None
        """Behind the closing parenthesis; None where there is none."""

    @classmethod
    def read(cls, text: str, at: int, final: bool, *, titled: bool) -> Link | None:
        """The construct at `at`, None if it is not complete yet."""
        limit = min(len(text), at + MAX_LINK_CHARS)
        open_ended = limit == len(text) and limit < at + MAX_LINK_CHARS and not final
        link = cls()
        start = _behind_space(text, at, limit)
        if open_ended and (start == limit or (text[start] != "<" and not _FAR_END.search(text, start, limit))):
            return None
        link.angled = text[start : start + 1] == "<"
        space = _NOT_IN_ANGLES.search(text, start + 1, limit) if link.angled else _SPACE.search(text, start, limit)
        last = space.start() if space else limit
        nested = text.find("](", start, last)
        found = parseLinkDestination(text, start, last if nested < 0 else nested)
        reached = found.pos == nested and text[start] != "<" if found.ok else text[start : start + 1] not in (")", "\n")
        if nested >= 0 and reached:
            # One link within another's destination: to read on from each of many would be quadratic.
            link.broken = True
            return link
        if found.ok and "`" in text[start : found.pos]:
            link.broken = True
            return link
        if not found.ok:
            angle = (
                text[start : start + 1] == "<" and "\n" not in text[start:limit] and "<" not in text[start + 1 : limit]
            )
            deeper = text[start:limit].count("(") > text[start:limit].count(")") and not _space_in(text, start, limit)
            if open_ended and (angle or deeper):
                return None
            link.empty = text[start : start + 1] in (")", "")
            return link
        if found.pos == limit and open_ended:
            return None
        link.ok, link.destination = True, found.str
        link.destination_start, link.destination_end = start, found.pos
        if not titled:
            return link
        place = _behind_space(text, found.pos, limit)
        if place == limit and open_ended:
            return None
        if place > found.pos and text[place : place + 1] in ('"', "'", "("):
            blank = text.find("\n\n", place, limit)
            title = parseLinkTitle(text, place, limit if blank < 0 else blank)
            if not title.ok:
                return None if open_ended and blank < 0 else link
            if "`" in text[place : title.pos]:
                return link
            place = _behind_space(text, title.pos, limit)
            if place == limit and open_ended:
                return None
        if text[place : place + 1] == ")":
            link.end = place + 1
        return link


def _behind_space(text: str, at: int, limit: int) -> int:
    """The end of white space. After a line's end, quotation marks belong to it."""
    newline = False
    limit = min(limit, at + _MAX_SPACE_CHARS)
    while at < limit and (text[at] in " \t\r\n" or (newline and text[at] == ">")):
        newline = newline or text[at] == "\n"
        at += 1
    return at


def _space_in(text: str, start: int, end: int) -> bool:
    return _SPACE.search(text, start, end) is not None


def title_closes(text: str, at: int, final: bool) -> bool | None:
    """Whether what follows a definition's destination is no title, or one that ends on its line; None to wait.

    CommonMark ends a title where a block of code begins, other renderers (marked, mistune) read on to its closing
    quote and so disagree about which lines are code.
    """
    limit = min(len(text), at + MAX_LINK_CHARS)
    open_ended = limit == len(text) and not final
    end = text.find("\n", at, limit)
    start = at + len(text[at : limit if end < 0 else end]) - len(text[at : limit if end < 0 else end].lstrip())
    if end >= 0 and start == end:
        following = text[end + 1 : limit].lstrip(" \t>")
        return (None if open_ended else True) if not following else following[0] not in "\"'("
    if text[start : start + 1] not in ('"', "'", "(") or start == limit:
        return None if start == limit and open_ended else True
    if end < 0 and open_ended:
        return None
    return parseLinkTitle(text, start, limit if end < 0 else end).ok


def closing_bracket(text: str) -> int | None:
    """The end of the bracket that `text` begins with. An image's description ends with its paragraph."""
    depth, at = 0, 0
    while at < len(text):
        character = text[at]
        if character == "\\":
            at += 1
        elif character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if not depth:
                return at
        elif text.startswith("\n\n", at):
            return None
        at += 1
    return None


def begins_tag_that_leads(text: str, at: int, final: bool) -> bool | None:
    """Whether what begins at `at` is a tag with attributes, one whose content loads something, or a link in
    angle brackets; None to wait."""
    name = _TAG_NAME.match(text, at)
    if name is None:
        return False
    if name.end() == len(text) and not final and len(name[0]) <= _MAX_TAG_CHARS:
        return None
    if name[0][1:].lower() in ("script", "style", "base", "svg", "math") or _LINK_IN_ANGLES.match(name[0]):
        return True
    behind = text[name.end() : name.end() + 2]
    if not name[0][1].isalpha():
        return False
    if behind == "/" and not final:
        return None
    return behind[:1].isspace() or (behind[:1] == "/" and behind != "/>")


def is_picture_of(destination: str, hosts: Collection[str]) -> bool:
    """Whether a destination is an address of one of these hosts and spelled in one way only."""
    if not hosts or not destination.isprintable() or set(destination) & set(" \\"):
        return False
    try:
        parts = urlsplit(destination)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or "@" in parts.netloc or port not in (None, 80, 443):
        return False
    return host in hosts or any(f"*.{host.split('.', n)[-1]}" in hosts for n in range(1, host.count(".") + 1))


def leads_out(destination: str) -> bool:
    """Whether a browser could take a destination for another host, or for more than an address."""
    bare = _BLANK.sub("", destination)
    return bare[:2].replace("\\", "/") == "//" or _SCHEME.match(bare) is not None


def meaning(text: str, at: int) -> tuple[str, int]:
    """Return the character that a reader sees at `at`, and where it ends in the source."""
    character = text[at]
    if character == "\\" and text[at + 1 : at + 2] in _PUNCTUATION:
        return text[at + 1], at + 2
    if character == "&" and (entity := _ENTITY.match(text, at)):
        return unescapeAll(entity[0]), entity.end()
    return character, at + 1


def unfinished(text: str, at: int) -> bool:
    """Whether an escape or an entity has only begun at the end of `text`."""
    return text[at:] == "\\" or (text[at] == "&" and _ENTITY_BEGINNING.match(text, at) is not None)


def reading(text: str, at: int, most: int, final: bool, until: str = "") -> tuple[str, list[int], bool]:
    """The visible text from `at` to the next white space, at most so many characters.

    Behind the second one, those in `until` end it as well, and are still in it.

    Also where each of them ends in the source, and whether more text could not add to it.
    """
    seen: list[str] = []
    ends: list[int] = []
    while at < len(text) and len(seen) < most:
        if unfinished(text, at) and not final:
            return "".join(seen), ends, False
        meant, at = meaning(text, at)
        if meant.isspace():
            return "".join(seen), ends, True
        seen.append(meant[:1])
        ends.append(at)
        if len(seen) > 2 and seen[-1] in until:
            return "".join(seen), ends, True
    return "".join(seen), ends, final or len(seen) == most


def follows(text: str, at: int, sign: str, final: bool) -> bool | None:
    """Whether `sign` follows, as a reader sees it; None where it is not there yet."""
    window, _, whole = reading(text, at, len(sign), final)
    if window == sign:
        return True
    return None if not whole and sign.startswith(window) else False


def ends_there(text: str, at: int, final: bool) -> bool | None:
    """Whether every renderer takes an address to end at `at`, None if that is not known yet."""
    behind = text[at : at + 20]
    rest = behind.lstrip(").,;:!?*_~")
    if not rest:
        return True if final else (None if len(behind) < 20 else False)
    return rest[0] in " \t\n"  # other white space is a part of the address to cmark


def begins_address(text: str, sign: str, behind: str) -> bool:
    """Whether a text ends with a host, which a sign and what stands behind that make an address. A number
    behind the slash of an IPv4 address is the size of a network."""
    number = sign == "/" and behind.isdigit()
    return _ends_with_host(text) or (not number and IPV4.fullmatch(host_at_end(text)) is not None)


def _ends_with_host(text: str) -> bool:
    name, dot, ending = host_at_end(text).lower().rpartition(".")
    if not dot or not name.strip(".-"):
        return False
    return _is_ending(ending) and ending not in _FILES


def is_below_domain(name: str) -> bool:
    """Whether a name is that of a host below a domain, whose owner learns of each name that is looked up."""
    above, dot, ending = name.strip(".-").lower().rpartition(".")
    return bool(dot) and "." in above and _is_ending(ending) and not above.replace(".", "").isdigit()


def _is_ending(ending: str) -> bool:
    return ending in _ENDINGS or (len(ending) == 2 and ending.isascii() and ending.isalpha())


def host_at_end(text: str) -> str:
    """Return the name of a host, if it is one, that a text ends with."""
    start = len(text)
    while start and (text[start - 1] in _HOST_CHARS or (text[start - 1] > "\x7f" and not text[start - 1].isspace())):
        start -= 1
    return text[start:]


def local_part(text: str) -> str:
    """Return the beginning of a mail address that a text ends with."""
    return _end_of(text, _LOCAL_CHARS)


def _end_of(text: str, characters: str) -> str:
    """Return the end of a text that consists of these characters."""
    return text[len(text.rstrip(characters)) :]


def end_of_address(text: str, at: int, final: bool) -> int | None:
    """The end of an address, None if it may continue."""
    limit = at + MAX_ADDRESS_CHARS
    rest = _REST.match(text, at, limit)
    end = at if rest is None else rest.end()
    if not final and len(text) < limit and _REST_GOES_ON.match(text, end):
        return None
    return end
