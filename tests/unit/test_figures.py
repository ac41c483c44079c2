"""Figures of an answer: which are found in reports, which are taken out, and where markers go."""

from __future__ import annotations

import random

import pytest

from gateway.workflows.figure_filter import REMOVED, FigureFilter
from gateway.workflows.figures import Figures
from gateway.workflows.number_words import word_value


def figures() -> Figures:
    """Two reports: one of sessions by page and country, one of a rate."""
    known = Figures(reports={1, 2}, most_rows=12)
    for value in (12_345, 980, 41, 0.5, 7.26):
        known.add(value, 1)
    known.add(42.11, 1, percent=True)
    known.add(8.4, 2, percent=True)
    known.add(3_456_789, 2)
    known.add(125.4, 2)
    known.add_days("2024-05-01", "2024-05-28", 1)
    known.add_text("/blog/10-tips-2023", 1)
    known.add_text("20240503", 1)
    known.add_text("iOS 17.2.1", 2)
    known.add_text("13:00", 2)
    known.add_all("Did we reach 5,000 sessions or 20 % in the last 90 days?")
    return known


def through(text: str, size: int = 10**6) -> str:
    filtered = FigureFilter(figures())
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    return "".join([*map(filtered, pieces), filtered.flush()])


@pytest.mark.parametrize(
    "figure",
    [
        *("12,345", "12345", "12 345", "12\u202f345", "12.345", "12'345", "$12,345", "12,345.0"),
        *("12.3k", "12.3 thousand", "12,300", "12,350", "12,000", "1.2万", "about 980", "41", "41.0", "7.3", "7"),
        *("3,456,789", "3.46 million", "3.5M", "3.5 mn", "3 456 789", "3.456.789", "346万"),
        *("42.11%", "42.1 %", "42%", "42 per cent", "42.1 percent", "42.11", "8.4 percentage points", "8.4pp"),
        *("twelve thousand three hundred forty-five", "forty-one", "nine hundred and eighty"),
        *("125 seconds", "2 min 5 s", "2m 5s", "2 minutes and 5 seconds"),
        *("980", "-980", "(980)", "980/41", "41–980", "about 40", "almost 1,000"),
    ],
)
def test_figure_of_a_report_passes(figure: str) -> None:
    said = through(f"It was {figure}")
    assert figure in said
    assert REMOVED not in said
    assert "[R" in said


@pytest.mark.parametrize(
    "figure",
    [
        *("12,346", "12,400", "13,000", "10,000", "1,234", "123,450", "981", "42", "43", "3", "0", "1", "100"),
        *("12.4k", "12.3M", "12.3 million", "12k5", "3.6M", "4 million", "35万"),
        *("41%", "980 percent", "43%", "40%", "100%", "0.5 %", "5%", "12.345%"),
        *("twelve thousand", "forty-two", "a million", "two hundred", "ten percent", "eleven"),
        *("3 min 5 s", "14:00", "17.2.2", "1.2.3.4", "USD500", "€99", "approx7000", "10", "tips 2022"),
        *("12１", "٤٢"),  # digits of other scripts are digits
    ],
)
def test_figure_that_no_report_holds_is_taken_out(figure: str) -> None:
    said = through(f"It was {figure} in all")
    assert REMOVED in said
    assert figure not in said


@pytest.mark.parametrize(
    "text",
    [
        "1. Sessions\n2) Users\n- 3. Pages\n## 4. Summary\n**5.** Next\n",
        "GA4, B2B, Q3 and H1 are names.",
        "Both of them, and three of ten.",
        "The top 5 pages, the first 3, and the 2nd.",
        "Over the last 28 days, that is 4 weeks.",
        "From 1 May 2024 to 28 May 2024.",
        "On 2024-05-03, on May 3, on the 3rd of May, in May 2024, in 2024, on 5月3日, 2024年5月.",
        "Your goal of 5,000 or 20 % in 90 days.",
        "Report 2 says more.",
        "No figures at all; e.g. nothing, vs. nothing.",
    ],
)
def test_what_needs_no_report_passes_without_a_marker(text: str) -> None:
    assert through(text) == text


@pytest.mark.parametrize(
    "text", ["On 3 June 2024.", "On 2023-05-03.", "In 2019.", "On May 29.", "In June 2024.", "6月3日"]
)
def test_day_that_no_report_is_about_is_taken_out(text: str) -> None:
    assert REMOVED in through(text)


def test_texts_of_reports_pass_as_they_are() -> None:
    assert through("See /blog/10-tips-2023 on iOS 17.2.1 at 13:00.") == (
        "See /blog/10-tips-2023 on iOS 17.2.1 at 13:00 [R1][R2]."
    )
    assert REMOVED in through("See /blog/11-tips-2023.")


def test_sentence_gets_the_markers_it_lacks() -> None:
    for text, said in (
        ("We had 980 sessions.", "We had 980 sessions [R1]."),
        ("We had 980 sessions [R1].", "We had 980 sessions [R1]."),
        ("We had 980 sessions. [R1] Then 41.", "We had 980 sessions. [R1] Then 41 [R1]."),
        ("We had 980 sessions [R2].", "We had 980 sessions [R2] [R1]."),
        ("Of 980, 8.4% left. Fine.", "Of 980, 8.4% left [R1][R2]. Fine."),
        ("Of 980 [R1, R2], 8.4% left.", "Of 980 [R1, R2], 8.4% left."),
        ("Made up [R7], and [R1, R9].", "Made up, and [R1]."),
        ("**980** sessions!\n", "**980** sessions [R1]!\n"),
        ("- 980 sessions\n- 41 users\n", "- 980 sessions [R1]\n- 41 users [R1]\n"),
        ("| Sessions | 980 |\n|---|---|\n", "| Sessions | 980 [R1] |\n|---|---|\n"),
        ("セッションは980回でした。次は41です。", "セッションは980回でした [R1]。次は41です [R1]。"),
        ("It was 980, e.g. on Monday. So.", "It was 980, e.g. on Monday [R1]. So."),
    ):
        assert through(text) == said


def test_filter_says_the_same_of_a_stream_cut_anywhere() -> None:
    text = (
        "## 1. Summary\n\nWe had 12,345 sessions, i.e. 42.1% more. [R1] Users: 3.46 million, not 4 million!\n"
        "1. On 2024-05-03 it was 980.\n2. On 3 June 2024 it was 981 (see /blog/10-tips-2023).\n"
        "| a | 41 |\n\n5,000 was the goal. Bounce: 8.4 percentage points; 9.9 % [R7]. 最後は980回。"
    )
    whole = through(text)
    assert whole.count(REMOVED) == 4
    for size in (1, 2, 3, 5, 7, 11, 50):
        assert through(text, size) == whole
    shuffled = random.Random(7)
    for _ in range(50):
        filtered, rest, out = FigureFilter(figures()), text, []
        while rest:
            cut = shuffled.randint(1, 30)
            out.append(filtered(rest[:cut]))
            rest = rest[cut:]
        assert "".join([*out, filtered.flush()]) == whole


def test_filter_holds_no_more_than_a_sentence() -> None:
    filtered = FigureFilter(figures())
    assert filtered("We had 98") == ""
    assert filtered("0 sessions. ") == ""
    assert filtered("T") == "We had 980 sessions [R1]. "
    assert filtered("word " * 200).startswith("Tword word")
    assert filtered.removed == 0


def test_number_words_have_values() -> None:
    for words, value in (
        ("twelve", 12),
        ("a hundred", 100),
        ("nineteen hundred", 1900),
        ("two million three hundred thousand and four", 2_300_004),
        ("ninety-nine", 99),
    ):
        assert word_value(words) == value
