"""The head of an HTTP/1.1 request: from bytes to a `Head`, or to a `Refusal`. RFC 9112 and 9110 are the source.

A head that two parsers could read differently is refused. Nothing is repaired: no bare line feeds, no folded lines, no
lists of lengths. What is refused, and why, is in `_RULES`; what a line may look like is in the patterns above it. The
connection closes after every refusal, so that nothing behind a doubtful head is read as a request.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

MAX_HEAD_BYTES = 65_536
"""Of the request line and all fields. Common proxies take 8 to 32 KiB."""
MAX_FIELDS = 256
"""Fields of one head. The SDKs send about 25; Apache takes 100."""

_TOKEN = b"!#$%&'*+.^_`|~0123456789-" + bytes(range(65, 91)) + bytes(range(97, 123))
_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/([0-9])\.([0-9])")
_ABSOLUTE_FORM = re.compile(rb"(?i:https?)://([^/?#]*)([^#]*)")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]+|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._~-]+)?\])(?::[0-9]{0,5})?")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ENCODED_CONTROL = re.compile(rb"%(?:[01][0-9A-Fa-f]|7[Ff])")
_CR = 0x0D
_ENCODED_SLASH = re.compile(r"%2[Ff]")

SINGLE_FIELDS = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect", b"authorization", b"x-api-key"))
"""Fields that decide where a message ends, where it goes and who sent it. A second one is refused, and so
is one in a trailer."""


class Refusal(Exception):
    """What was sent is no request that can be served. The connection is to close after one answer."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_http") -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code


@dataclass(slots=True)
class Head:
    """A head. `headers` has lower-case names and values without the white space around them."""

    method: str
    target: bytes
    major: int
    minor: int
    headers: list[tuple[bytes, bytes]]
    single: dict[bytes, bytes] = field(default_factory=dict)
    """The values of SINGLE_FIELDS."""
    connection: set[bytes] = field(default_factory=set)
    """The options of Connection, in lower case."""
    authority: bytes | None = None
    """Of a target in absolute form; it is in `headers` as the host."""
    raw_path: bytes = b""
    query: bytes = b""

    @property
    def persistent(self) -> bool:
        """Whether another request may follow. HTTP/1.0 has one request per connection."""
        return self.minor > 0 and b"close" not in self.connection

    @property
    def chunked(self) -> bool:
        return b"transfer-encoding" in self.single

    @property
    def length(self) -> int:
        """Bytes of a body that is not chunked."""
        return int(self.single.get(b"content-length", b"0"))

    @property
    def expects_continue(self) -> bool:
        return self.minor > 0 and b"expect" in self.single

    @property
    def path(self) -> str:
        """The path, percent-decoded except for slashes: `%2F` is part of a name, and must not make another route."""
        path = self.raw_path.decode("ascii")
        return unquote(_ENCODED_SLASH.sub("%252F", path)) if "%" in path else path


@dataclass(frozen=True, slots=True)
class Rule:
    """One reason to refuse a head whose lines are well formed."""

    broken: Callable[[Head], bool]
    message: str
    source: str
    status: int = 400
    code: str = "invalid_http"


_RULES = (
    Rule(
        lambda head: head.major != 1,
        "This server speaks HTTP/1.1 and HTTP/1.0.",
        "RFC 9110, 15.6.6; the preface of HTTP/2 is such a head",
        505,
        "http_version_not_supported",
    ),
    Rule(
        lambda head: head.minor > 0 and b"host" not in head.single,
        "The request has no Host header.",
        "RFC 9112, 3.2",
    ),
    Rule(
        lambda head: b"host" in head.single and _HOST.fullmatch(head.single[b"host"]) is None,
        "The Host header is not 'name' or 'name:port'.",
        "RFC 9112, 3.2",
    ),
    Rule(
        lambda head: head.authority is not None and _HOST.fullmatch(head.authority) is None,
        "The request target's host is not 'name' or 'name:port'.",
        "RFC 9110, 4.2.1 and 4.2.4: no empty host, no user information",
    ),
    Rule(
        lambda head: head.raw_path[:1] != b"/" and (head.target != b"*" or head.method != "OPTIONS"),
        "The request target must be a path that begins with '/', or an http URL.",
        "RFC 9112, 3.2: authority-form is for CONNECT alone, which is not served, and '*' for OPTIONS",
    ),
    Rule(
        lambda head: b"#" in head.target,
        "The request target must not have a fragment.",
        "RFC 9112, 3.2",
    ),
    Rule(
        lambda head: b"%" in head.raw_path and _ENCODED_CONTROL.search(head.raw_path) is not None,
        "The request target's path must not have encoded control characters.",
        "RFC 3986, 7.3",
    ),
    Rule(
        lambda head: b"transfer-encoding" in head.single and b"content-length" in head.single,
        "A request has either Content-Length or Transfer-Encoding, not both.",
        "RFC 9112, 6.3: may be refused",
    ),
    Rule(
        lambda head: b"transfer-encoding" in head.single and head.minor == 0,
        "HTTP/1.0 has no Transfer-Encoding.",
        "RFC 9112, 6.1",
    ),
    Rule(
        lambda head: head.single.get(b"transfer-encoding", b"chunked").lower() != b"chunked",
        "Transfer-Encoding must be 'chunked' and nothing else.",
        "RFC 9112, 6.1",
        501,
        "unsupported_transfer_encoding",
    ),
    Rule(
        lambda head: _LENGTH.fullmatch(head.single.get(b"content-length", b"0")) is None,
        "Content-Length must be one decimal number of at most 18 digits.",
        "RFC 9110, 8.6: lists, signs and overflows may be refused",
    ),
    Rule(
        lambda head: head.minor > 0 and head.single.get(b"expect", b"100-continue").lower() != b"100-continue",
        "Expect must be '100-continue'.",
        "RFC 9110, 10.1.1",
        417,
        "expectation_failed",
    ),
)
"""Looked at in this order. An Upgrade is none of them: it is ignored, and the body read as the body (RFC 9110, 7.8)."""


class HeadReader:
    """Takes one head off the front of a connection's bytes, in whatever pieces they come."""

    def __init__(self) -> None:
        self.begun = False
        """A byte of the head has come. An empty line in front of it is none."""
        self._seen_bytes = 0
        """Of the buffer; already searched for faults and for the end."""
        self._line_read = False
        self._blank_skipped = False

    def take(self, buffer: bytearray) -> Head | None:
        """Remove a head from `buffer` and return it, or None where it is incomplete. Raises Refusal."""
        if buffer.startswith(b"\r\n"):  # RFC 9112, 2.2: one is ignored, for clients that end a body with it
            if self._blank_skipped:
                raise Refusal("A request must not begin with several empty lines.")
            self._blank_skipped = True
            self._seen_bytes = 0
            del buffer[:2]
        self.begun = self.begun or bytes(buffer[:2]) not in (b"", b"\r")
        end = buffer.find(b"\r\n\r\n", max(self._seen_bytes - 3, 0))
        head_bytes = len(buffer) if end < 0 else end + 4
        if has_fault(buffer, self._seen_bytes, head_bytes):
            raise Refusal("The request's head has a control character, or a line break that is not CRLF.")
        if head_bytes > MAX_HEAD_BYTES:
            message = f"The request's headers are larger than the limit of {MAX_HEAD_BYTES} bytes."
            raise Refusal(message, 431, "headers_too_large")
        if end < 0:
            self._read_line_early(buffer)
            self._seen_bytes = len(buffer)
            return None
        lines = bytes(buffer[:end]).split(b"\r\n")
        del buffer[:head_bytes]
        return _parse(lines)

    def _read_line_early(self, buffer: bytearray) -> None:
        """Refuse a wrong request line at once: who speaks HTTP/0.9 sends no more and waits."""
        if not self._line_read and (end := buffer.find(b"\r\n", max(self._seen_bytes - 1, 0))) >= 0:
            _parse_request_line(bytes(buffer[:end]))
            self._line_read = True


def _parse(lines: list[bytes]) -> Head:
    head = _parse_request_line(lines[0])
    if len(lines) - 1 > MAX_FIELDS:
        raise Refusal(f"The request has more than {MAX_FIELDS} headers.", 431, "headers_too_large")
    for line in lines[1:]:
        name, value = parse_field(line)
        head.headers.append((name, value))
        if name in SINGLE_FIELDS:
            if name in head.single:
                raise Refusal(f"The request has more than one {name.decode().title()} header.")
            head.single[name] = value
        elif name == b"connection":
            head.connection.update(option.strip(b" \t").lower() for option in value.split(b","))
    _split_target(head)
    for rule in _RULES:
        if rule.broken(head):
            raise Refusal(rule.message, rule.status, rule.code)
    return head


def _parse_request_line(line: bytes) -> Head:
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise Refusal(
            "The request line is not 'METHOD target HTTP/1.1', in ASCII and with one space between the parts."
        )
    method, target, major, minor = match.groups()
    return Head(method.decode(), target, int(major), int(minor), [])


def parse_field(line: bytes) -> tuple[bytes, bytes]:
    """Return a field's name in lower case and its value. Raises Refusal, also for a folded line."""
    name, colon, value = line.partition(b":")
    if not colon or not name or name.translate(None, _TOKEN):
        raise Refusal("A header line is not 'name: value': the name has odd characters or space around it.")
    return name.lower(), value.strip(b" \t")


def has_fault(data: bytearray, start: int, end: int) -> bool:
    """Whether `data[start:end]`, of a head or a trailer, has a control character or a line break that is not
    CRLF. A CR at either side of the slice may belong to a CRLF."""
    start -= start > 0 and data[start - 1] == _CR
    breaks = data.count(b"\r\n", start, end)
    returns = data.count(b"\r", start, end)
    returns -= end > start and data[end - 1] == _CR
    return not breaks == returns == data.count(b"\n", start, end) or _CONTROL.search(data, start, end) is not None


def check_trailer(section: bytes) -> None:
    """Check the lines of a trailer, which is then dropped: no field of it means anything here. Raises Refusal."""
    for line in section.split(b"\r\n"):
        name, _ = parse_field(line)
        if name in SINGLE_FIELDS:
            raise Refusal(f"{name.decode().title()} must not be in a trailer.")


def _split_target(head: Head) -> None:
    """Set path and query. An absolute target's host replaces the Host header, or is one (RFC 9112, 3.2.2)."""
    target = head.target
    if target[:1] != b"/" and (match := _ABSOLUTE_FORM.fullmatch(target)):
        head.authority, target = match.groups()
        if target[:1] != b"/":
            target = b"/" + target
        head.headers = [(b"host", head.authority), *(line for line in head.headers if line[0] != b"host")]
    head.raw_path, _, head.query = target.partition(b"?")
