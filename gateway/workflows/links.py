"""Removes links, images and addresses from an answer, except those that were read or named by the user.

A page may instruct a model to put what it has read into an address; a front end that renders such an answer then sends
it to the owner of the host, a picture without any click. Renderers differ in what they take for a link, and a stream
is rendered while it is not complete. So the filter does not ask what is a link, but where whatever some renderer
takes for one could lead: each destination behind `](` and `]:`, each `<`, and each address in the text, with
backslashes and entities resolved as markdown-it resolves them, is replaced unless it is known. What is known is
written as it was given, without what the model added to it. Any beginning of what is sent is as safe as the whole.

Code is left as it is, except for addresses within a code span. The filter holds back only the construct that has
begun, a bounded number of characters; its time is linear in the text. Not handled: names of hosts without a scheme
and a path (they are words), and what a front end does with the content of code.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from markdown_it.common.utils import unescapeAll

from gateway.workflows.addresses import MAX_ADDRESS_CHARS, Addresses, in_markdown, split_end
from gateway.workflows.drawings import ends_command
from gateway.workflows.link_syntax import (
    IPV4,
    MAX_LINK_CHARS,
    Link,
    begins_address,
    begins_tag_that_leads,
    closing_bracket,
    end_of_address,
    ends_there,
    follows,
    host_at_end,
    is_below_domain,
    is_picture_of,
    leads_out,
    local_part,
    meaning,
    reading,
    title_closes,
    unfinished,
)
from gateway.workflows.markdown_stream import MarkdownStream, Parsed
from gateway.workflows.tables import HIDDEN

REMOVED = "[address removed]"
_MAX_ALT_CHARS = 400
"""Of a picture's description."""
_MAX_HOST_CHARS = 260
_TAG = re.compile(r"[A-Za-z/!?]")
_DOMAIN = re.compile(r"@[^\x00-,/:-@\[-^`{-\x7f]*")
_DOTS = re.compile("[\u3002\uff0e\uff61]")
"""What browsers take for a dot in a host's name."""
_LOCAL_END = frozenset('_.-+%;:&=$,"')
"""What the part of a mail address before the at sign may end with, besides letters and digits."""
_IPV6 = re.compile(r"\[[0-9A-Fa-f.]{0,4}:")
_NO_WORDS = re.compile(r"[^\w ,.;-]")
_CJK_END = re.compile("[。、，；：！？」』）】》]")
_HARMLESS = re.compile(r"#?[\w,+*=-]*")
"""A destination of one word, such as the `x` of `f[i](x)`, or a place on the same page: it names no host."""


class LinkFilter(MarkdownStream):
    """Removes links to addresses that may not be shown. `flush` returns the held text and closes open code blocks."""

    def __init__(
        self,
        addresses: Addresses,
        *,
        image_hosts: Collection[str] = (),
        less_than: str | None = "&lt;",
        prose: bool = True,
        bare: bool = True,
    ) -> None:
        """`image_hosts` are those whose pictures may be shown, `*.example.com` for all below one.

        `less_than` stands for a `<` that could begin HTML; with None, for data that may be text of any kind, only tags
        with attributes and links in angle brackets get `&lt;`. `prose` False is for values within structured data: they
        have no code spans and blocks, and what is known but was not read stays an address there. `bare` False lets
        addresses through that are in no link or picture.
        """
        self._addresses = addresses
        self._image_hosts = frozenset(image_hosts)
        self._less_than = less_than
        super().__init__(prose=prose)
        self._bare = bare
        self._removed_last = False

    def _within(self, text: str, at: int, final: bool) -> Parsed:
        removed, self._removed_last = self._removed_last, False
        if removed and text[at] in "([:":  # behind our own brackets this would be a link or a definition
            return self._pass(at, " ", " ")
        return super()._within(text, at, final)

    def _pass(self, end: int, said: str, meant: str) -> tuple[int, str]:
        self._removed_last = said.endswith(REMOVED)
        meant = "`" if said.endswith("`") else meant
        # With a colon it would be a definition.
        return super()._pass(end, said.replace(f"{REMOVED}:", f"{REMOVED} :"), meant)

    def _text(self, text: str, at: int, final: bool) -> Parsed:
        character = text[at]
        if character == "<":
            return self._angle(text, at, final)
        if character == "!":
            return self._picture(text, at, final)
        if character == "]":
            return self._bracket(text, at, final)
        if not final and unfinished(text, at):
            return None
        meant, end = meaning(text, at)
        if self._bare and meant in (":", "/", "?", "#", "@"):
            return self._address_sign(meant, text, at, end, final)
        if text.startswith("$$", at):
            self._formula, self._dollar = not self._formula, True
            return self._pass(at + 2, "$$", "$$")
        if meant == "$" and end == at + 1:
            if end == len(text) and not final:
                return None
            self._dollar = True
        if text[at] == "\\" and meant in "[](":
            self._formula = meant == "[" or (self._formula and meant != "]")
        if text[at] == "\\" and meant in "<!]":  # not every renderer knows that a backslash takes these their meaning
            return self._pass(at + 1, "" if meant == "<" else "\\", "\\")
        return self._pass(end, text[at:end], meant)

    def _checked_code(self, content: str) -> str:
        """Return a code span's content. Before its end has arrived, a renderer takes it for text."""
        within = LinkFilter(self._addresses, less_than="<", prose=False)
        checked = within(content) + within.flush()
        return checked if REMOVED in checked or "://" in content else content

    # HTML and autolinks

    def _angle(self, text: str, at: int, final: bool) -> Parsed:
        if at + 1 == len(text):
            return (at + 1, "<") if final else None
        if self._prose and not _TAG.match(text, at + 1):
            return self._pass(at + 1, "<", "<")
        window = text[at + 1 : at + 2 + MAX_ADDRESS_CHARS]
        start = window[:8].lower()
        if any(start.startswith(scheme) for scheme in ("http://", "https://")):
            end = next((n for n, character in enumerate(window) if character in "<>" or character.isspace()), None)
            if end is None and len(window) <= MAX_ADDRESS_CHARS and not final:
                return None
            if end is not None and window[end] == ">" and "`" not in window[:end]:
                behind = text[at + end + 2 : at + end + 3]
                if not behind and not final:
                    return None
                return self._pass(at + end + 2, self._shown(unescapeAll(window[:end]), behind, "<{}>"), " ")
        elif not final and any(scheme.startswith(start) for scheme in ("http://", "https://")):
            return None
        if self._less_than is not None:
            return self._pass(at + 1, self._less_than, "<")
        leads = begins_tag_that_leads(text, at, final)
        return None if leads is None else self._pass(at + 1, "&lt;" if leads else "<", "<")

    # Links, definitions and pictures

    def _bracket(self, text: str, at: int, final: bool) -> Parsed:
        if at + 1 == len(text) and not final:
            return None
        following = text[at + 1 : at + 2]
        if following not in ("(", ":") or not following:
            return self._pass(at + 1, "]", "]")
        link = Link.read(text, at + 2, final, titled=following == "(")
        if link is None:
            return None
        if not link.ok:
            if following == ":":
                return self._pass(at + 2, "]\\:" if link.broken or link.angled else "]:", " ")
            return self._pass(at + 2, "](" if link.empty else "] (", " ")
        if following == ":":
            return self._definition(text, at, link, final)
        if link.end is None:
            self._spans = False  # what some renderer takes for a title may hold a backtick
        if _HARMLESS.fullmatch(link.destination) or not (self._prose or leads_out(link.destination)):
            if link.end is None or not self._prose:
                # What stands behind it is text, in which an angle bracket is escaped, and then a part of an address.
                return self._pass(at + 2, "] (" if link.angled and self._prose else "](", " ")
            return self._pass(link.end, f"]({link.destination})", " ")
        end, closing = (link.destination_end, "") if link.end is None else (link.end, ")")
        url = self._addresses.live(link.destination)
        if url is not None:
            ends = ends_there(text, end, final)
            # Without a bracket that it belongs to, this is an address in the text, and what follows a part of it.
            target = in_markdown(url) if ends else f"<{in_markdown(url)}>"
            return None if ends is None else self._pass(end, f"]({target}{closing}", " ")
        if self._mentioned(link.destination, ""):
            return self._pass(end, f"] ({self._shown(link.destination)}{closing}", " ")
        return self._pass(end, f"]({REMOVED}{closing}", " ")

    def _definition(self, text: str, at: int, link: Link, final: bool) -> Parsed:
        end = text.find("\n", link.destination_end, link.destination_end + MAX_LINK_CHARS)
        more = end < 0 and not final and len(text) < link.destination_end + MAX_LINK_CHARS
        if more and not text[link.destination_end :].strip():
            return None
        rest = text[link.destination_end : end if end >= 0 else link.destination_end + MAX_LINK_CHARS].strip()
        words = bool(rest) and rest[0] not in "\"'("
        destination = link.destination
        closed = title_closes(text, link.destination_end, final)
        if closed is None:
            return None
        # Of a fence in the next line some renderers make the destination.
        if not closed or (words and link.angled) or destination.startswith(("```", "~~~")):
            return self._pass(at + 2, "]\\:", " ")
        url = self._addresses.live(destination)
        if url is not None and leads_out(destination):
            ends = ends_there(text, link.destination_end, final)
            target = in_markdown(url) if ends else f"<{in_markdown(url)}>"
            said = f"{text[at : link.destination_start]}{target}"
            return None if ends is None else self._pass(link.destination_end, said, " ")
        plain = not leads_out(destination) and not set(destination) & set("/\\?")
        if plain or (words and not leads_out(destination)):
            return self._pass(at + 2, "]:", "]")
        return self._pass(link.destination_end, f"{text[at : link.destination_start]}{REMOVED}", " ")

    def _picture(self, text: str, at: int, final: bool) -> Parsed:
        if at + 1 == len(text):
            return (at + 1, "!") if final else None
        if text[at + 1] != "[":
            return self._pass(at + 1, "!", "!")
        window = text[at + 1 : at + 1 + _MAX_ALT_CHARS]  # from its opening bracket on
        whole = final or len(window) == _MAX_ALT_CHARS
        closing = closing_bracket(window) if "]" in window else None
        if closing is None or closing + 1 == len(window):
            return self._pass(at + 1, "! ", " ") if whole else None
        following = window[closing + 1]
        if following == "(" and not self._tail.endswith("\\") and "`" not in window[:closing]:
            link = Link.read(text, at + closing + 3, final, titled=True)
            if link is None:
                return None
            if link.ok and link.end is not None and is_picture_of(link.destination, self._image_hosts):
                description = _NO_WORDS.sub(" ", window[1:closing])
                return self._pass(link.end, f"![{description}]({in_markdown(link.destination)})", " ")
        gap = " " if self._tail.endswith("!") else ""
        return self._pass(at + 1, gap if following in "([" else "! ", " ")

    # Addresses in the text

    def _word(self, text: str, run: re.Match[str], final: bool) -> Parsed:
        """Take a word, which may be how an address begins."""
        at, word = run.start(), run[0].lower()
        if not self._bare:
            return self._pass(run.end(), run[0], run[0])
        begins = not self._tail[-1:].isalnum() or not self._tail[-1:].isascii()
        command = ends_command(self._tail, text, run, final)
        if command is None:
            return None
        if command:
            return self._pass(run.end(), f" {run[0]}", f" {run[0]}")
        if self._tail.lower().endswith("www."):  # its beginning was sent with the word before it
            return self._removed(text, at, final)
        if (
            begins
            and run.end() == len(text)
            and not final
            and any(s.startswith(word) for s in ("https", "http", "www"))
        ):
            return None
        if begins and word in ("http", "https", "www"):
            sign = "." if word == "www" else "://"
            found = follows(text, run.end(), sign, final)
            if found is None:
                return None
            if found:
                return self._address(text, at, run.end(), final)
        if self._tail.endswith("."):
            return self._label(text, run, final)
        return self._pass(run.end(), run[0], run[0])

    def _label(self, text: str, run: re.Match[str], final: bool) -> Parsed:
        """Take a word behind a dot, which may end a host's name. Some renderers make links of names alone, and browsers
        look up the hosts of links: a name below a domain reveals its text to the domain's owner."""
        if run.end() == len(text) and not final:
            return None if len(run[0]) < _MAX_HOST_CHARS else self._pass(run.end(), run[0], run[0])
        name = host_at_end(self._tail) + run[0]
        known = not is_below_domain(name) or self._addresses.has_host(name)
        return self._pass(run.end(), run[0] if known else f"{HIDDEN}{run[0]}", run[0])

    def _address(self, text: str, at: int, start: int, final: bool) -> Parsed:
        """Take the address that begins at `at`; what leads nowhere is behind `start`."""
        rest = end_of_address(text, start, final)
        if rest is None:
            return None
        cut = _CJK_END.search(text, start, rest)  # a sentence ends there, without a space
        if cut and (cut.end() < rest or self._addresses.given(unescapeAll(text[at : cut.start()])) is not None):
            rest = cut.start()
        written = text[at:rest]
        bare, end = split_end(unescapeAll(written))
        if not bare[start - at :].strip(":/."):
            return self._pass(rest, written, written)  # a scheme and nothing else
        url = self._addresses.live(bare) if self._prose else self._addresses.given(bare)
        if url is None:
            return self._pass(rest, self._shown(bare, text[rest : rest + 1]) + end, " ")
        ends = ends_there(text, rest, final)
        if ends is None:
            return None
        if ends:
            return self._pass(rest, in_markdown(url) + end, " ")
        if text[rest:] == "]" and not final:
            return None
        if text.startswith("](", rest) and self._tail.endswith("[") and not self._tail.endswith("\\["):
            link = Link.read(text, rest + 2, final, titled=True)
            if link is None:
                return None
            target = self._addresses.live(link.destination) if link.end is not None else None
            if link.end is not None and target is not None:
                return self._pass(link.end, f"{in_markdown(url)}]({in_markdown(target)})", " ")
        # What follows without a space would be taken for a part of the address.
        shown = self._unescaped(f"<{in_markdown(url)}>") if self._prose else self._removal()
        return self._pass(rest, shown + end, " ")

    def _address_sign(self, sign: str, text: str, at: int, end: int, final: bool) -> Parsed:
        """Take a character that may stand within an address whose beginning was sent already."""
        if sign == "@":
            return self._at_sign(text, at, end, final)
        window, ends, whole = reading(text, at, 4 if sign == ":" else 2, final)
        if window == "//":
            window, ends, whole = reading(text, at, _MAX_HOST_CHARS, final, "/?#")
        if len(window) == 1 and not whole:
            return None
        if sign == ":":
            if window.startswith(":/") and len(window) < 4 and not whole:
                return None
            before = self._tail.lower()
            if before.endswith("mailto"):
                window, _, whole = reading(text, at, _MAX_HOST_CHARS, final, "?,;!\"'()[]<>&`|*")
                own = self._addresses.has_email(window[1:].rstrip("?,;!\"'()[]<>&`|*._"))
                return self._pass(end, ":" if own else ": ", ":" if own else ": ") if whole else None
            web = before.endswith(("http", "https", "ftp", "file"))
            if window.startswith("://"):
                if len(window) > 3 and web:
                    return self._removed(text, at, final)
                return self._pass(ends[2], text[at : ends[2]], "://")
            if web and (window[1:2].isalnum() or window[1:2] in ("[", "/", "\\")):  # browsers add the slashes
                return self._pass(end, ": ", ": ")
        elif window.startswith("//") and not self._tail.endswith((":", "/")):
            host = window[2:].split("/", 1)[0].split("?", 1)[0].split("#", 1)[0]
            if len(host) == len(window) - 2 and not whole:
                return None
            if "." in host or host.lower().startswith("localhost") or _IPV6.match(host):
                return self._removed(text, at, final)
        if len(window) > 1 and (sign != ":" or window[1].isdigit()) and begins_address(self._tail, sign, window[1]):
            return self._removed(text, at, final, known_as=self._tail.lstrip("([{*_~\"'"))
        return self._pass(end, text[at:end], sign)

    def _at_sign(self, text: str, at: int, end: int, final: bool) -> Parsed:
        """Take an at sign, which may be within a mail address."""
        if not self._tail[-1:].isalnum() and self._tail[-1:] not in _LOCAL_END:
            return self._pass(end, text[at:end], "@")
        window, _, whole = reading(text, at, _MAX_HOST_CHARS, final, "@/?#:,;!\"'()[]<>&`|*")
        domain = _DOMAIN.match(window)
        if not domain or (domain.end() == len(window) and not whole):
            return None
        name = _DOTS.sub(".", domain[0][1:]).rstrip(".-_")
        own = self._addresses.has_email(f"{local_part(self._tail)}@{name}")
        version = name.replace(".", "").isdigit() and not IPV4.fullmatch(name)
        if "." in name and not version and not own:
            return self._pass(end, "(at)", " ")
        return self._pass(end, text[at:end], "@")

    def _removed(self, text: str, at: int, final: bool, known_as: str = "") -> Parsed:
        """Take the rest of an address whose beginning was sent already. `known_as` is that beginning."""
        rest = end_of_address(text, at, final)
        if rest is None:
            return None
        bare, end = split_end(unescapeAll(text[at:rest]))
        whole = f"{known_as}{bare}"
        if known_as and self._addresses.live(whole) in (f"https://{whole}", whole) and ends_there(text, rest, final):
            return self._pass(rest, text[at:rest], " ")
        return self._pass(rest, self._removal() + end, " ")

    def _shown(self, address: str, behind: str = "", form: str = "{}") -> str:
        """The text for an address: itself as it was given, or a note that it was removed.

        `behind` is the character that follows.
        """
        url = self._addresses.live(address)
        if url is not None:
            return self._unescaped(form.format(in_markdown(url)))
        if self._mentioned(address, behind):
            given = in_markdown(self._addresses.given(address) or "")
            return self._unescaped(f"`{given}`") if self._prose else given
        return self._removal()

    def _mentioned(self, address: str, behind: str) -> bool:
        """Whether an address was found but not read: then it may be shown, but not as a link."""
        if self._addresses.given(address) is None:
            return False
        return not self._prose or (self._spans and behind != "`" and not self._tail.endswith("`"))

    def _unescaped(self, construct: str) -> str:
        """Return a construct of our own so that a backslash before it does not take its meaning."""
        return f" {construct}" if self._tail.endswith("\\") else construct

    def _removal(self) -> str:
        """The replacement of an address. After an exclamation mark, brackets would make an image."""
        return f" {REMOVED}" if self._tail.endswith(("!", ".", "/", ":")) else REMOVED
