"""Pictures in a chat: where the model takes them, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.browser.scripted_gateway import FAST
from tests.support.browser.visit import Visit, expect
from tests.support.pictures import data_url, picture

pytestmark = pytest.mark.slow  # starts a gateway of its own

RED = picture("red")
_GIVE = """
([box, bytes, kind]) => {
  const file = new File([new Uint8Array(bytes)], "red.png", { type: "image/png" });
  const data = new DataTransfer();
  data.items.add(file);
  const event = kind === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  box.dispatchEvent(event);
}
"""


def _file(name: str, content: bytes = RED, media_type: str = "image/png") -> dict[str, Any]:
    return {"name": name, "mimeType": media_type, "buffer": content}


def _attach(opened: Visit, *files: dict[str, Any]) -> Any:
    """Choose files as a user does. Returns the list of what will be sent."""
    with opened.page.expect_file_chooser() as chooser:
        opened.page.get_by_role("button", name="Attach pictures").click()
    chooser.value.set_files(list(files))
    return opened.page.get_by_role("list", name="Pictures to send").get_by_role("listitem")


def test_picture_goes_to_the_model_and_stays_in_the_conversation(stage: Visit) -> None:
    chosen = _attach(stage, _file("red.png"), _file("blue.png", picture("blue")))
    expect(chosen).to_have_count(2)
    stage.page.get_by_role("button", name="Remove blue.png").click()
    expect(chosen).to_have_count(1)
    with stage.page.expect_request("**/v1/chat/completions") as sent:
        stage.ask("What is this?")

    parts = sent.value.post_data_json["messages"][-1]["content"]
    assert parts == [
        {"type": "image_url", "image_url": {"url": data_url(RED)}},
        {"type": "text", "text": "What is this?"},
    ]
    expect(stage.answer().locator(".prose")).to_have_text("You said: What is this?")
    expect(stage.page.locator(".question").get_by_role("img", name="Picture 1 of the message")).to_be_visible()
    expect(chosen).to_have_count(0)
    with stage.page.expect_request("**/v1/chat/completions") as again:
        stage.ask("And now?")
    assert again.value.post_data_json["messages"][0]["content"] == parts
    stage.answer(1)


def test_model_that_takes_no_pictures_is_offered_none(stage: Visit) -> None:
    chosen = _attach(stage, _file("red.png"))
    expect(chosen).to_have_count(1)
    stage.choose(FAST)

    expect(stage.page.get_by_role("button", name="Attach pictures")).to_be_hidden()
    expect(chosen).to_have_count(0)


@pytest.mark.parametrize(("kind", "place"), [("paste", "#message"), ("drop", ".composer .box")])
def test_picture_can_be_pasted_and_dropped(stage: Visit, kind: str, place: str) -> None:
    box = stage.page.locator(place).element_handle()
    stage.page.evaluate(_GIVE, [box, list(RED), kind])

    expect(stage.page.get_by_role("button", name="Remove red.png")).to_be_visible()


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (_file("words.txt", b"words", "text/plain"), "words.txt is not a PNG, JPEG, WebP or GIF picture."),
        (_file("huge.png", RED + bytes(5 * 1024 * 1024)), "huge.png is larger than 5 MiB."),
    ],
    ids=["words", "huge"],
)
def test_file_that_can_not_be_sent_is_told(stage: Visit, file: dict[str, Any], message: str) -> None:
    chosen = _attach(stage, file)

    expect(stage.talk.get_by_role("alert")).to_have_text(message)
    expect(chosen).to_have_count(0)
