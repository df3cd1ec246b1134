"""Images in rows as they are written."""

from __future__ import annotations

import pytest

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.row_forms import Conversation, TokenIds
from megatron_gkd.data.rows import parse_row

IMAGE = {"type": "image"}
ANSWER = {"role": "assistant", "content": "fine"}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def user(content) -> dict:
    return {"role": "user", "content": content}


def parse(row) -> Conversation | TokenIds:
    return parse_row(row, reads_images=True)


@pytest.mark.parametrize(
    ("part", "reference"),
    [
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "http://host/a.png"}, "http://host/a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "data:image/png;base64,AA=="),
        ({"type": "image_url", "image_url": "a.png"}, "a.png"),
        ({"type": "image", "image": {"bytes": b"x", "path": "a.png"}}, b"x"),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "a.png"),
    ],
)
def test_content_parts(part, reference):
    row = parse({"messages": [user([text("a"), part, text("b")]), ANSWER]})
    assert row.messages == [user([text("a"), IMAGE, text("b")]), ANSWER]
    assert row.images == (reference,)


def test_tags_take_the_columns_images_in_order():
    row = parse({"messages": [user("<image>a<image> b"), ANSWER, user("c<image>"), ANSWER], "images": ["1", "2", "3"]})
    assert row.messages[0]["content"] == [IMAGE, text("a"), IMAGE, text(" b")]
    assert row.messages[2]["content"] == [text("c"), IMAGE]
    assert row.images == ("1", "2", "3")


def test_parts_without_a_reference_take_the_columns_images():
    row = parse(
        {"messages": [user([IMAGE, text("a"), {**IMAGE, "image": "own"}, IMAGE]), ANSWER], "images": ["1", "2"]}
    )
    assert row.images == ("1", "own", "2")


def test_images_of_removed_messages_are_removed():
    row = parse({"messages": [user("<image>a"), ANSWER, user("<image>b")], "images": ["1", "2"]})
    assert row.messages == [user([IMAGE, text("a")]), ANSWER] and row.images == ("1",)


def test_parts_of_text_alone_are_text():
    parts = [text("a "), text("b")]
    for reads_images in (False, True):
        row = parse_row({"messages": [user(parts), {**ANSWER, "content": parts}]}, reads_images=reads_images)
        assert row == Conversation([user("a b"), {**ANSWER, "content": "a b"}])


def test_a_tag_is_text_for_a_text_model():
    row = parse_row({"messages": [user("<image>"), ANSWER]})
    assert row == Conversation([user("<image>"), ANSWER])


TWO_TURNS = {"messages": [user("<image>q"), ANSWER, user("<image>r<image>"), ANSWER], "images": ["1", "2", "3"]}


class TestTeacherPrompt:
    def for_teacher(self, **keys) -> tuple[object, tuple[str, ...]]:
        row = parse(TWO_TURNS | keys).for_teacher()
        assert row.messages[0] == user([IMAGE, text("q")]) and row.teacher_prompt is None
        return row.messages[2]["content"], row.images

    def test_text_keeps_the_messages_images_in_front_of_it(self):
        assert self.for_teacher(teacher_prompt="t") == ([IMAGE, IMAGE, text("t")], ("1", "2", "3"))

    def test_tags_take_the_messages_images(self):
        assert self.for_teacher(teacher_prompt="<image>t<image>") == ([IMAGE, text("t"), IMAGE], ("1", "2", "3"))
        with pytest.raises(BadRow, match="number of images: 1 times <image> in the texts, but 2 images in `images`"):
            self.for_teacher(teacher_prompt="t<image>")

    def test_tags_take_a_column_of_their_own(self):
        found = self.for_teacher(teacher_prompt="<image>t", teacher_images=["4"])
        assert found == ([IMAGE, text("t")], ("1", "4"))
        with pytest.raises(BadRow, match="number of images: 0 times <image> in the texts, but 1 images in `teacher_im"):
            self.for_teacher(teacher_prompt="t", teacher_images=["4"])

    def test_parts_have_their_own_images(self):
        prompt = [{**IMAGE, "image": "4"}, text("t"), {**IMAGE, "image": "5"}]
        assert self.for_teacher(teacher_prompt=prompt) == ([IMAGE, text("t"), IMAGE], ("1", "4", "5"))

    def test_a_row_without_images(self):
        row = parse({"messages": [user("q"), ANSWER], "teacher_prompt": [{**IMAGE, "image": "4"}, text("t")]})
        assert row.images == ()
        assert row.for_teacher().images == ("4",)
        assert parse({"messages": [user("q"), ANSWER], "teacher_prompt": "t"}).for_teacher().messages[0] == user("t")

    def test_token_ids(self):
        row = {"prompt_token_ids": [1], "response_token_ids": [2], "images": ["1"], "teacher_prompt_token_ids": [3]}
        assert parse(row).images == parse(row).for_teacher().images == ("1",)
        assert parse(row | {"teacher_images": ["2"]}).for_teacher() == TokenIds([3], [2], images=("2",))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user("<image>a"), ANSWER]},
            "number of images: 1 times <image> in the texts, but 0 images in `im",
        ),
        (
            {"messages": [user("a"), ANSWER], "images": ["1"]},
            "number of images: 0 times <image> in the texts, but 1 ima",
        ),
        (
            {"messages": [user([IMAGE]), ANSWER]},
            "number of images: 1 times <image> in the texts, but 0 images in `image",
        ),
        (
            {"messages": [user("a"), {**ANSWER, "content": "<image>"}], "images": ["1"]},
            r"misplaced image: messages[1].content (assistant) has an image",
        ),
        (
            {"prompt": "<image>a", "response": "b", "images": ["1"]},
            "misplaced image: plain text has no place for images",
        ),
        ({"prompt": "a", "response": "b", "images": ["1"]}, "misplaced image: plain text has no place for images"),
        (
            {"messages": [user("a"), ANSWER], "teacher_images": ["1"]},
            "misplaced image: teacher_images are those of teacher_prompt",
        ),
        (
            {"messages": [user([{"type": "video", "video": "a"}]), ANSWER]},
            "video: messages[0].content[0]: the student reads no videos; models",
        ),
        ({"messages": [user("a"), ANSWER], "videos": ["a"]}, "video: videos: the student reads no videos; models"),
        (
            {"messages": [user([{"type": "table"}]), ANSWER]},
            "wrong type: messages[0].content[0].type must be text, image",
        ),
        (
            {"messages": [user([{"text": "a"}]), ANSWER]},
            "wrong type: messages[0].content[0].type must be a string, but",
        ),
        ({"messages": [user([{"type": "text"}]), ANSWER]}, "wrong type: messages[0].content[0].text must be a string"),
        ({"messages": [user("a"), ANSWER], "images": 1}, "wrong type: images must be a list, but is a number"),
        (
            {"messages": [user("<image>"), ANSWER], "images": [1]},
            "wrong type: images[0] must be a string, but is a num",
        ),
        (
            {"messages": [user("<image>"), ANSWER], "images": [{}]},
            "wrong type: images[0] must have one of the keys bytes",
        ),
    ],
)
def test_a_bad_row_has_a_reason_and_a_detail(row, message):
    with pytest.raises(BadRow) as error:
        parse(row)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user([{**IMAGE, "image": "a.png"}]), ANSWER]},
        {"messages": [user("<image>"), ANSWER], "images": ["a.png"]},
        {"messages": [user("a"), ANSWER], "teacher_prompt": [{**IMAGE, "image": "a.png"}]},
        {"prompt_token_ids": [1], "response_token_ids": [2], "images": ["a.png"]},
    ],
)
def test_a_text_model_reads_no_images(row):
    with pytest.raises(BadRow, match="misplaced image: the row has images, and the student reads text alone"):
        parse_row(row)
