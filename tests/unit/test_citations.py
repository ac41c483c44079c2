"""What an answer may name: only sources that were read, only addresses that were seen, and one list, which is ours."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tools.base import Source
from gateway.workflows.citations import AnswerFilter, Sources, normal_url


def read(*urls: str) -> Sources:
    """Return sources of which `urls` were read, and one that was only seen."""
    sources = Sources()
    sources.add(Source(url, f"About {number}", fetched=True) for number, url in enumerate(urls, 1))
    sources.add([Source("https://seen.example/page")])
    return sources


TWO = ("https://one.example/a", "https://two.example/b?x=1")


def filtered(text: str, sources: Sources | None = None, conversation: str = "") -> str:
    answer_filter = AnswerFilter(sources or read(*TWO), conversation)
    return answer_filter(text) + answer_filter.flush()


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("It is so [1].", "It is so [1]."),
        ("It is so [3].", "It is so."),
        ("It is so[2], and so [1, 9].", "It is so[2], and so [1]."),
        ("Both [1-2], all [1–9], none [7-9].", "Both [1, 2], all [1, 2], none."),
        ("Old [^1], [Source 2] [source 8], 【1†source】 【5】.", "Old [1], [2], [1]."),
        ("Zero [0], a year [2024], a box [x], a word [Source], a link [text](x).",) * 2,
        ("Code `a[7]` and `b = [8, 9]` stay.",) * 2,
        ("A stray ` does not hide [9].", "A stray ` does not hide."),
        ("```python\na[7] = [8, 9]  # https://made.up/x\n```\nBut [9].", "```python\na[7] = [8, 9]  # https://made.up/x\n```\nBut."),
    ],
)  # fmt: skip
def test_markers_name_only_what_was_read(text: str, left: str) -> None:
    assert filtered(text) == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("See https://one.example/a.", "See https://one.example/a."),
        (
            "See http://www.one.example/a/#top, or https://seen.example/page!",
            "See https://one.example/a, or `https://seen.example/page`!",
        ),
        ("See https://two.example/b?utm_source=z&x=1", "See https://two.example/b?x=1"),
        ("See https://made.up/x, or www.made.up.", "See [address removed], or [address removed]."),
        ("[Title](https://made.up/x_(y)) [T](https://one.example/a)", "[Title]([address removed]) [T](https://one.example/a)"),
        ("参照https://made.up/x。", "参照[address removed]"),
        ("In `https://made.up/x`.", "In `[address removed]`."),
        (
            "doi:10.1234/made.up, DOI: 10.5678/x and 10.9999/y",
            "[address removed], [address removed] and [address removed]",
        ),
        ("http://[bad http://a:99999/ https://", "[address removed] [address removed] https://"),
    ],
)  # fmt: skip
def test_addresses_must_have_been_seen(text: str, left: str) -> None:
    assert filtered(text) == left


def test_doi_of_a_source_may_be_named() -> None:
    sources = read("https://doi.org/10.1234/abc")
    assert filtered("See doi:10.1234/abc and 10.1234/ABC.", sources) == "See doi:10.1234/abc and 10.1234/ABC."


def test_addresses_of_the_user_may_be_repeated_whole_only() -> None:
    said = "Look at https://mine.example/page, please."
    assert filtered("https://mine.example/page https://mine.example/", conversation=said) == (
        "https://mine.example/page [address removed]"
    )


@pytest.mark.parametrize(
    "heading",
    [
        *("## Sources", "# references:", "**Sources**", "**Works cited:**"),
        *("### 5. Bibliography ###", "## 参考文献", "## Quellen"),
    ],
)
def test_lists_of_sources_are_left_out_up_to_the_next_heading(heading: str) -> None:
    heading = heading.removesuffix(" ###")
    text = f"Text.\n\n{heading}\n[1] Made up\nSmith (2021). Journal.\n\n## Limitations\nSome."
    assert filtered(text) == "Text.\n\n## Limitations\nSome."
    assert filtered(f"Text.\n{heading}\n[1] Made up") == "Text.\n"


def test_bare_list_ends_where_its_entries_do() -> None:
    assert filtered("Text.\nSources:\n[1] Made up\n2. Also\n\nIn short, yes.\n") == "Text.\nIn short, yes.\n"


@pytest.mark.parametrize("line", ["## Sources of energy", "Sources say so.", "Reference is made to it.", "- Sources:"])
def test_lines_that_only_look_like_headings_stay(line: str) -> None:
    assert filtered(f"{line}\nMore.") == f"{line}\nMore."


def test_open_block_of_code_is_closed() -> None:
    assert filtered("```\nx = 1") == "```\nx = 1\n```"
    assert filtered("```\nx = 1\n```") == "```\nx = 1\n```"


ALPHABET = st.one_of(
    st.sampled_from(
        [
            *(
                "[1]",
                "[9]",
                "[1, 9]",
                "[1-3]",
                "[^2]",
                "[Source 1]",
                "【1†x】",
                "[",
                "]",
                "1",
                "10",
                "10.1234/x",
                "doi:",
            ),
            *("https://one.example/a", "https://made.up/x_(y)z", "http://", "www.x.y", "h", "ht", "(", ")", ".", ","),
            *(
                "\n",
                "\n\n",
                "\r\n",
                " ",
                "  ",
                "`",
                "```",
                "~~~",
                "\n```\n",
                "\n## Sources\n",
                "\nSources:\n",
                "\n# X\n",
            ),
            *(
                "#",
                "##",
                "**",
                "Sources",
                "ref",
                "References",
                "sour",
                "ces",
                ":",
                "- ",
                "word",
                "參考",
                "参考文献",
                "İ",
            ),
        ]
    ),
    st.text(max_size=4),
)


@settings(max_examples=600, deadline=None)
@given(st.lists(ALPHABET, max_size=24), st.data())
def test_any_split_gives_the_same_answer(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    sources = read(*TWO)
    answer_filter = AnswerFilter(sources)
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert "".join(map(answer_filter, pieces)) + answer_filter.flush() == filtered(text, sources)


@settings(max_examples=300, deadline=None)
@given(st.lists(ALPHABET, max_size=24))
def test_what_is_left_stays_when_filtered_again(parts: list[str]) -> None:
    """Outside of code nothing that must go is put together by taking other things away."""
    text = " ".join(part for part in parts if "`" not in part and "~" not in part)
    once = filtered(text)
    assert not [number for number in (3, 9) if f"[{number}]" in once]
    assert "made.up" not in once


@pytest.mark.parametrize(
    ("text", "most_held"),
    [
        ("Rome is the capital. It has two rivers, and references are many: how, who, where, when?\n", 12),
        ("Solar power, wind power.\n- Water\n- Heat\n\n1. First\n2. Second\n", 4),
        ("It is so [1], and so [2]. See https://one.example/a for more.", 22),
    ],
)
def test_tokens_are_held_no_longer_than_they_must(text: str, most_held: int) -> None:
    answer_filter = AnswerFilter(read(*TWO))
    sent = 0
    for number, character in enumerate(text, 1):
        sent += len(answer_filter(character))
        assert number - sent <= most_held, text[sent:number]


def test_ordinary_words_pass_at_once() -> None:
    answer_filter = AnswerFilter(read(*TWO))
    tokens = ["The", " answer", " is", " forty", "-two", ",", " they", " say", ".", "\n\n", "More", " text"]
    assert [answer_filter(token) for token in tokens] == tokens


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("https://a.example/x", "http://www.a.example:80/x/#part"),
        ("https://a.example/x?b=1", "https://a.example/x?b=1&utm_campaign=z&fbclid=1"),
    ],
)
def test_same_page_has_one_normal_url(one: str, other: str) -> None:
    assert normal_url(one) == normal_url(other)


def test_passages_of_a_document_are_sources_of_their_own() -> None:
    assert normal_url("local:a.pdf#page=1") != normal_url("local:a.pdf#page=2")


def test_source_is_numbered_when_it_is_read_and_once() -> None:
    sources = Sources()
    sources.add([Source("https://a.example/"), Source("https://b.example/")])
    assert sources.number("https://a.example/") is None
    sources.add([Source("https://b.example/", fetched=True)])
    sources.add([Source("https://a.example/", fetched=True), Source("https://b.example", fetched=True)])
    assert (sources.number("https://b.example/"), sources.number("https://a.example/")) == (1, 2)


def test_listing_holds_what_the_answer_names() -> None:
    sources = read(*TWO, "local:notes/a.md#intro")
    assert [entry["number"] for entry in sources.listing("So [3], and so [1].")] == [1, 3]
    assert [entry["number"] for entry in sources.listing("Nothing named.")] == [1, 2, 3]
    assert sources.listing("[3]") == [
        {"number": 3, "title": "About 3", "url": "local:notes/a.md#intro", "domain": "local"}
    ]


def test_titles_can_break_nothing() -> None:
    sources = Sources()
    sources.add([Source("https://a.example/", "A\n## [9] <b>`x`</b>" + "y" * 300, fetched=True)])
    (entry,) = sources.listing("")
    assert entry["title"].startswith("A ## (9) ‹b›'x'‹/b›")
    assert len(entry["title"]) == 200
    assert Sources.markdown([entry]).count("\n") == 4
