"""Rows with images, from the file to the sample."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import datasets
import httpx
import numpy as np
import PIL.Image
import pytest
from vision_checkpoints import END_ID, IMAGE_ID, START_ID, vision_processor, vision_tokenizer, write_image

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.prompt import PromptLimits, extract_prompt, prompt_length
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.data.vision.files import ImageStore, load_image
from megatron_gkd.data.vision.processor import PixelLimits, open_processing
from megatron_gkd.errors import RunStopped

FAMILIES = ("qwen2_5_vl", "glm4v", "internvl")


@pytest.fixture
def build(folder_of, section, write_jsonl):
    """`build(rows, family, **options of the section)`: the data set of these rows, and its report."""

    def make(rows, family="qwen2_5_vl", *, limits=None, row_options=None, name="train.jsonl", **options):
        path = rows if isinstance(rows, Path) else write_jsonl(rows, name)
        images = open_processing(folder_of(family), limits)
        row_options = replace(row_options or RowOptions(vocab_size=301), images=images)
        return build_dataset(section(path, **options), "train", vision_tokenizer(family), row_options)

    return make


@pytest.fixture
def image(tmp_path):
    return lambda *size, seed=0: str(write_image(tmp_path / "images", *size, seed=seed))


def row_of(*contents, **keys) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)], **keys}


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_processor(family, build, image, tmp_path):
    images = [image(16, 24), image(40, 12, seed=1)]
    row = row_of("<image>w1 w2<image>", "w3 w4", "w5", "w6", images=images)
    dataset, _ = build([row], family)
    (sample,) = dataset
    processor = vision_processor(family)
    parts = [{"type": "image"}, {"type": "text", "text": "w1 w2"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}, *row["messages"][1:]]
    store = ImageStore(tmp_path)
    expected = processor(
        text=[processor.apply_chat_template(messages, tokenize=False)],
        images=[load_image(store.resolve(path)) for path in images],
        return_tensors="np",
    )["input_ids"][0]
    assert np.array_equal(sample.input_ids, expected[: len(sample.input_ids)])
    assert set(expected[len(sample.input_ids) :]) <= {289}  # the line break after the last turn
    # Labels: w6 and the end of its turn.
    assert sample.labels[sample.labels != IGNORED_LABEL].tolist() == [10, 2]
    trained = np.flatnonzero(sample.labels != IGNORED_LABEL)
    assert np.array_equal(sample.labels[trained], sample.input_ids[trained + 1])
    assert sample.images == tuple(store.resolve(path) for path in images)
    assert len(dataset.num_patches) == 1 and dataset.num_patches[0] > 0
    assert dataset.lengths.tolist() == [len(sample.input_ids)]


def test_all_turns_are_trained_on_around_images(build, image, trained_text):
    row = row_of("<image>w1", "w2 w3", "w4<image>", "w5", images=[image(16, 24), image(16, 16)])
    (sample,) = build([row], loss_scale="default")[0]
    assert trained_text(vision_tokenizer(), sample.labels) == "w2 w3 <|im_end|>|w5 <|im_end|>"
    assert (sample.input_ids == IMAGE_ID).sum() == 6 + 4
    assert len(extract_prompt(sample)) == prompt_length(sample.labels)


def test_no_token_of_an_image_is_trained_on(build, image):
    row = row_of("<image>w1", "w2 w3", "w4<image>w6", "w5", images=[image(16, 24), image(16, 16)])
    row["messages"][1]["loss"] = 2
    (sample,) = build([row], loss_scale="all")[0]
    following, labels, of_images = sample.input_ids[1:], sample.labels[:-1], [START_ID, IMAGE_ID, END_ID]
    assert (labels == np.where(np.isin(following, of_images), IGNORED_LABEL, following)).all()
    (turns,) = build([row], loss_scale="default")[0]
    first = turns.label_positions[turns.label_weights[turns.label_positions] == 2]
    assert len(first) == 3 and np.flatnonzero(sample.label_weights == 2).tolist() == first.tolist()
    assert set(sample.label_weights[sample.label_positions].tolist()) == {1, 2}
    assert extract_prompt(sample).tolist() == extract_prompt(turns).tolist()


def test_ways_to_write_an_image(build, image, monkeypatch, tmp_path):
    path = Path(image(16, 24))
    content = path.read_bytes()
    fetched = []

    def get(url, **_):
        fetched.append(url)
        return httpx.Response(200, content=content, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    references = [str(path), "images/" + path.name, path.as_uri(), uri, "https://host/a.png"]
    parts = [{"type": "image", "image": reference} for reference in references]
    parts.append({"type": "image_url", "image_url": {"url": uri}})
    dataset, _ = build([row_of([part, {"type": "text", "text": "w1"}], "w2") for part in parts])
    samples = list(dataset)
    assert len({sample.images[0].digest for sample in samples}) == 1
    assert all(load_image(sample.images[0]).size == (24, 16) for sample in samples)
    assert all(Path(sample.images[0].location).is_absolute() for sample in samples)
    build([row_of([parts[4], {"type": "text", "text": "w9"}], "w2")], name="other.jsonl")
    assert fetched == ["https://host/a.png"]
    assert sorted(file.name for file in (tmp_path / "cache" / "images").rglob("*") if file.is_file()) == sorted(
        Path(samples[i].images[0].location).name for i in (3, 4)
    )


def test_parquet_with_embedded_images(build, image, tmp_path):
    content = Path(image(16, 24)).read_bytes()
    plain = {"bytes": content, "path": None}
    rows = {"messages": [row_of("<image>w1", "w2")["messages"]], "images": [[plain]]}
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    for name, table in {
        "plain": datasets.Dataset.from_dict(rows),
        "typed": datasets.Dataset.from_dict(rows, features=features),
    }.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        table.save_to_disk(tmp_path / f"{name}-folder")
    for source in ("plain.parquet", "typed.parquet", "plain-folder", "typed-folder"):
        ((sample,), _) = build(tmp_path / source)
        assert (sample.images[0].height, sample.images[0].width) == (16, 24)
        assert Path(sample.images[0].location).read_bytes() == content


def test_rows_of_one_text_and_other_images_differ(build, image):
    def digest(seed: int) -> tuple[str, np.ndarray]:
        rows = [row_of("<image>w1", "w2", images=[image(16, 24, seed=seed)])]
        dataset, _ = build(rows, name=f"{seed}.jsonl")
        return dataset[0].images[0].digest, dataset[0].input_ids

    (first, first_ids), (second, second_ids) = digest(0), digest(1)
    assert first != second and np.array_equal(first_ids, second_ids)


def test_the_shards_digest_has_the_images(build, image, tmp_path):
    digests = set()
    for seed in (0, 1):
        build([row_of("<image>w1", "w2", images=[image(16, 24, seed=seed)])], name=f"{seed}.jsonl")
    for report in (tmp_path / "cache").glob("*/report.json"):
        digests.add(json.loads(report.read_text())["digest"])
    assert len(digests) == 2


def test_other_limits_are_another_cache(build, image):
    path = image(40, 40)
    rows = [row_of("<image>w1", "w2", images=[path])]
    (free,), (limited,) = build(rows)[0], build(rows, limits=PixelLimits(max_pixels=256))[0]
    assert (free.input_ids == IMAGE_ID).sum() == 25 and (limited.input_ids == IMAGE_ID).sum() == 4


def test_text_rows_beside_images(build, image):
    dataset, _ = build([row_of("w1", "w2"), row_of("<image>w1", "w2", images=[image(16, 24)])])
    assert dataset[0].images == () and len(dataset[1].images) == 1
    assert dataset.num_patches.tolist() == [0, 24]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (row_of("<image>w1", "w2"), "number of images: 1 times <image>"),
        (row_of("<image>w1", "w2", images=["no.png"]), "unreadable image: no.png: No such file or directory"),
        (
            row_of("<image>w1", "w2", images=["train.jsonl"]),
            "unreadable image: train.jsonl: not an image of a kind that Pillow reads",
        ),
        (
            row_of("<image>w1", "w2", images=["data:image/png;base64,!"]),
            "unreadable image: data:image/png;base64,!: not",
        ),
        (row_of("<image>w1", "w2", images=["a\0.png"]), r"unreadable image: a\x00.png: embedded null byte"),
        (row_of("<image>w1", "w2", images=["\ud800.png"]), r"unreadable image: \ud800.png: 'utf-8' codec can't encode"),
        (
            row_of("<image>w1", "w2", images=["~no-such-user/a"]),
            "unreadable image: ~no-such-user/a: Could not determine",
        ),
        (row_of("<image>w1", "w2", images=["file://[a"]), "unreadable image: file://[a: Invalid IPv6 URL"),
        (row_of("<image>w1", "w2", images=["data:image/png;base64,\ud800"]), "unreadable image: data:image/png;base64"),
        (row_of("<image>w1", "w2", images=["data:"]), "unreadable image: data:: a data URI is data:image/png;base64"),
        (row_of("w1<|image_pad|>", "w2"), "placeholder in a text: '<|image_pad|>' stands for an image"),
        (row_of("w1", "w2<|vision_start|>"), "placeholder in a text: '<|vision_start|>' stands for an image"),
        ({"prompt": "w1 <|video_pad|>", "response": "w2"}, "placeholder in a text: '<|video_pad|>' stands for"),
        (row_of("w1", "w2", teacher_prompt="<|image_pad|>"), "placeholder in a text"),
        (
            {"prompt_token_ids": [5, IMAGE_ID], "response_token_ids": [6]},
            "number of images: the token ids have tokens of",
        ),
        ({"prompt_token_ids": [5], "response_token_ids": [IMAGE_ID]}, "number of images: the token ids have tokens of"),
        (
            row_of("w1", "w2", chat_template_kwargs={"messages": []}),
            "chat template: ",
        ),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(row, problem, build, tmp_path):
    with pytest.raises(RunStopped) as error:
        build([row_of("w1", "w2"), row])
    assert str(error.value).startswith(f"{tmp_path}/train.jsonl, line 2: {problem}")
    assert "\n" not in str(error.value)


class Downloads:
    """In place of `httpx.get`: each call takes the next of `results`, a status or an error; then all are `content`."""

    def __init__(self, results, content=b""):
        self.results, self.content, self.calls = list(results), content, 0

    def __call__(self, url, **_):
        request = httpx.Request("GET", url)
        result = self.results[self.calls] if self.calls < len(self.results) else 200
        self.calls += 1
        if isinstance(result, int):
            return httpx.Response(result, content=self.content, request=request)
        raise result("it is gone", request=request)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts, which are not made."""
    made = []
    monkeypatch.setattr("megatron_gkd.data.vision.files.time.sleep", made.append)
    return made


@pytest.mark.parametrize(
    ("results", "calls", "problem"),
    [
        ([404], 1, "Client error '404"),
        ([httpx.UnsupportedProtocol], 1, "it is gone"),
        ([503] * 3, 3, "Server error '503"),
        ([httpx.ConnectError] * 3, 3, "it is gone"),
        ([503, 404], 2, "Client error '404"),
    ],
)
def test_a_failed_download_is_one_line(results, calls, problem, build, monkeypatch, pauses):
    downloads = Downloads(results)
    monkeypatch.setattr(httpx, "get", downloads)
    with pytest.raises(
        RunStopped, match=f"line 1: unreadable image: http://h/a.png: cannot be fetched: {problem}"
    ) as error:
        build([row_of("<image>w1", "w2", images=["http://h/a.png"])])
    assert downloads.calls == calls and len(pauses) == calls - 1 and "\n" not in str(error.value)


@pytest.mark.parametrize("results", [[429], [500, httpx.ReadTimeout], [httpx.RemoteProtocolError, 503]])
def test_a_download_that_fails_for_a_while_is_tried_again(results, build, image, monkeypatch, pauses):
    downloads = Downloads(results, Path(image(16, 24)).read_bytes())
    monkeypatch.setattr(httpx, "get", downloads)
    dataset, _ = build([row_of("<image>w1", "w2", images=["http://h/a.png"])])
    assert load_image(dataset[0].images[0]).size == (24, 16)
    assert downloads.calls == len(results) + 1 and pauses == sorted(pauses) and 0 not in pauses


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_a_bad_row_although_it_has_a_header(kind, build, tmp_path):
    encoded = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(encoded, kind)
    content = encoded.getvalue()
    row = row_of("<image>w1", "w2", images=["a.img"])
    (tmp_path / "a.img").write_bytes(content)
    assert len(build([row])[0]) == 1
    (tmp_path / "a.img").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunStopped, match=r"line 1: unreadable image: a\.img: not an image: .*truncated"):
        build([row], name="other.jsonl")


def test_a_template_that_writes_no_placeholder_is_a_bad_row(build, image, folder_of, section, write_jsonl):
    tokenizer = vision_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|>", "")
    path = write_jsonl([row_of("<image>w1", "w2", images=[image(16, 24)])])
    options = RowOptions(vocab_size=301, images=open_processing(folder_of("qwen2_5_vl")))
    with pytest.raises(
        RunStopped, match="chat template: it writes 0 placeholders of images for a row that has 1 images"
    ):
        build_dataset(section(path), "train", tokenizer, options)


def test_two_images_side_by_side_are_a_bad_row(build, image, folder_of, section, write_jsonl):
    tokenizer = vision_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
    )
    path = write_jsonl([row_of("<image><image>w1", "w2", images=[image(16, 24)] * 2)])
    options = RowOptions(vocab_size=301, images=open_processing(folder_of("qwen2_5_vl")))
    with pytest.raises(RunStopped, match="chat template: it writes nothing between two images"):
        build_dataset(section(path), "train", tokenizer, options)


def test_token_ids_with_images(build, image):
    tokens = [START_ID, *[IMAGE_ID] * 6, END_ID]
    row = {"prompt_token_ids": [5, *tokens, 6], "response_token_ids": [7, 2], "images": [image(16, 24)]}
    ((sample,), _) = build([row])
    assert sample.input_ids.tolist() == [5, *tokens, 6, 7, 2] and len(sample.images) == 1
    for wrong in ([5, *tokens[:-2], END_ID, 6], [5, *tokens, IMAGE_ID]):
        with pytest.raises(RunStopped, match="line 1: number of images: the token ids have"):
            build([row | {"prompt_token_ids": wrong}])


class TestTruncation:
    """The prompt has 3 tokens, an image of 8 (with its ends), and w1 to w6; the response w7 to w9."""

    def rows(self, image) -> list[dict]:
        long = row_of("<image>w1 w2 w3 w4 w5 w6", "w7 w8 w9", images=[image(16, 24)])
        return [long, row_of("w1", "w2")]

    def build(self, build, image, max_length, **options) -> tuple[TokenizedDataset, DataReport]:
        return build(self.rows(image), max_length=max_length, **options)

    def test_left_drops_a_row_whose_image_it_would_cut(self, build, image):
        whole = self.build(build, image, 64)[0][0]
        dataset, report = self.build(build, image, len(whole.input_ids) - 1, truncation_strategy="left")
        assert len(dataset[0].input_ids) == len(whole.input_ids) - 1 and len(dataset[0].images) == 1
        dataset, report = self.build(build, image, len(whole.input_ids) - 6, truncation_strategy="left")
        assert len(dataset) == 2 and len(dataset[0].images) == 1, "an image that begins the first turn stays"
        rows = [row_of("w1<image>w2 w3 w4 w5 w6", "w7 w8 w9", images=[image(16, 24)]), row_of("w1", "w2")]
        dataset, report = build(rows, max_length=len(whole.input_ids) - 6, truncation_strategy="left")
        assert len(dataset) == 1 and dataset[0].images == ()
        assert report.dropped == {"too long, and truncation would cut an image off": 1}

    def test_right_keeps_a_row_whose_image_it_does_not_reach(self, build, image):
        whole = self.build(build, image, 64)[0][0]
        dataset, _ = self.build(build, image, len(whole.input_ids) - 2, truncation_strategy="right")
        assert len(dataset) == 2 and len(dataset[0].images) == 1

    def test_right_drops_a_row_whose_last_prompt_is_gone_with_its_image(self, build, image):
        row = row_of("w1", "w2", "<image>w3 w4 w5", "w6", images=[image(16, 24)])
        whole = build([row, row_of("w1", "w2")], loss_scale="default")[0][0]
        cut = len(whole.input_ids) - 7  # inside w3 w4 w5, behind the image
        dataset, report = build(
            [row, row_of("w1", "w2")], loss_scale="default", max_length=cut, truncation_strategy="right"
        )
        assert len(dataset) == 1 and report.dropped == {"too long, and truncation would cut an image off": 1}

    def test_a_shortened_prompt_keeps_its_image(self, build, image):
        whole = self.build(build, image, 64)[0][0]
        length = prompt_length(whole.labels)
        for missing, used in ((1, 2), (6, 1)):
            limits = RowOptions(vocab_size=301, prompt_limits=PromptLimits(length - missing, 64))
            dataset, report = self.build(build, image, 64, truncation_strategy="left", row_options=limits)
            assert (len(dataset), report.shortened) == (used, used - 1)


class TestTeacherPrompt:
    def test_the_teacher_reads_its_own_images(self, build, image):
        row = row_of("<image>w1", "w2 w3", images=[image(16, 24)], teacher_prompt="w9<image><image>")
        row |= {"teacher_images": [image(16, 24), image(40, 40, seed=1)]}
        dataset, _ = build([row, row_of("w1", "w2")])
        sample, view = dataset[0], teacher_view(dataset[0])
        assert (len(sample.images), len(sample.teacher_images)) == (1, 2)
        assert view.images == sample.teacher_images and (view.input_ids == IMAGE_ID).sum() == 6 + 25
        assert np.array_equal(view.labels[view.label_positions], sample.labels[sample.label_positions])
        assert dataset.num_patches.tolist() == [24 + 100, 0]
        assert dataset[1].teacher_images is None

    def test_the_rows_images_stay_in_front_of_a_text(self, build, image):
        row = row_of("w0", "w0", "<image>w1", "w2", images=[image(16, 24)], teacher_prompt="w9")
        (sample,) = build([row], loss_scale="default")[0]
        assert sample.teacher_images == sample.images
        text = vision_tokenizer().decode(sample.teacher_prompt)
        assert text.index("<|vision_end|>") < text.index("w9")


def test_the_report_counts_images(build, image):
    rows = [row_of("<image>w1<image>", "w2", images=[image(16, 24), image(16, 16)]), row_of("w1", "w2")]
    assert build(rows)[1].summary() == "2 of 2 rows used, with 2 images"


def test_a_size_that_the_processor_refuses_is_a_bad_row(build, image):
    path = image(4, 1000)
    with pytest.raises(
        RunStopped, match=r"line 1: unreadable image: .*4x1000-0\.png: 4x1000: absolute aspect ratio must"
    ):
        build([row_of("<image>w1", "w2", images=[path])])
