"""Videos in rows: their frames, tokens, positions and pixels."""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import video_golden
from PIL import Image as Pillow
from vision_checkpoints import VIDEO_ID, vision_tokenizer

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.report import IMAGE_CUT
from megatron_gkd.data.rows import parse_row
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer
from megatron_gkd.data.vision.comparison import is_same_processing
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image, Video, from_record, to_record
from megatron_gkd.data.vision.processor import PixelLimits, open_processing
from megatron_gkd.data.vision.video_files import VideoReference, load_frames, resolve_video
from megatron_gkd.errors import UserError

ANSWER = {"role": "assistant", "content": "w9"}


def write_frames(folder, number: int, height: int, width: int, name: str = "f") -> tuple[str, ...]:
    frames = video_golden.make_frames(number, height, width)
    for index, frame in enumerate(frames):
        Pillow.fromarray(frame).save(folder / f"{name}{index}.png")
    return tuple(f"{name}{index}.png" for index in range(number))


def write_animation(folder, name: str, number: int = 10, milliseconds: int = 100) -> np.ndarray:
    """Write an animated image without loss, and return its frames."""
    frames = np.stack([np.full((16, 24, 3), 20 * index + 5, dtype=np.uint8) for index in range(number)])
    images = [Pillow.fromarray(frame) for frame in frames]
    options = {"lossless": True} if name.endswith("webp") else {}
    images[0].save(folder / name, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, **options)
    return frames


def every_frame(number: int, fps: float, reference: VideoReference) -> range:
    return range(number)


@pytest.mark.parametrize("family", video_golden.FAMILIES)
def test_tokens_positions_and_pixels_are_those_of_the_processor(family, folder_of, tmp_path, monkeypatch):
    """The expected values are of transformers' processors with torchvision."""
    expected = json.loads(video_golden.FILE.read_text())[family]
    processing = open_processing(folder_of(family))
    store = ImageStore(tmp_path)
    videos = []
    for number, (frames, height, width, fps) in enumerate(video_golden.VIDEOS):
        paths = write_frames(tmp_path, frames, height, width, f"v{number}-")
        videos.append(resolve_video(store, VideoReference(paths, fps), processing.videos.sample))
    assert [list(processing.videos.grid(video)) for video in videos] == expected["grids"]
    text = "".join("w1 <|vision_start|><|video_pad|><|vision_end|>" for _ in videos) + " w2"
    rest = iter(videos)
    ids = []
    for token in vision_tokenizer(family)(text)["input_ids"]:
        ids += processing.tokens(next(rest)) if token == VIDEO_ID else [token]
    assert video_golden.count_runs(ids) == expected["ids"]
    positions = processing.positions(np.array(ids), videos)
    assert video_golden.summarize(torch.from_numpy(positions)) == expected["positions"]
    pixels = processing.pixels(videos)
    assert pixels["video_grid_thw"].tolist() == expected["grids"]
    found = video_golden.summarize(pixels["pixel_values_videos"])
    assert found["shape"] == expected["pixels"]["shape"] and pixels["pixel_values_videos"].dtype == torch.float32
    assert found["picked"] == pytest.approx(expected["pixels"]["picked"], abs=1e-5)
    assert found["weighted"] == pytest.approx(expected["pixels"]["weighted"], abs=1e-5)
    assert [processing.num_patches(video) for video in videos] == [np.prod(grid) for grid in expected["grids"]]

    # The tokenizer of the tests does not know times: their text is compared instead.
    monkeypatch.setattr(processing.videos, "_encode", lambda text: [1000 + ord(letter) for letter in text])
    names = {292: "<|vision_start|>", 291: "<|video_pad|>", 293: "<|vision_end|>"}
    for video, replaced in zip(videos, expected["texts"], strict=True):
        assert "".join(names.get(id_) or chr(id_ - 1000) for id_ in processing.tokens(video)) == replaced


@pytest.mark.parametrize("family", video_golden.FAMILIES)
def test_the_frames_that_are_read_are_those_of_the_processor(family, folder_of):
    expected = json.loads(video_golden.FILE.read_text())[family]["sampled"]
    videos = open_processing(folder_of(family)).videos
    for (number, fps, wanted), frames in zip(video_golden.SAMPLED, expected, strict=True):
        assert videos.sample(number, fps, VideoReference("a", wanted)) == frames
    assert len(videos.sample(100, 10.0, VideoReference("a", max_frames=6))) == 6


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_animated_images_are_videos(name, tmp_path):
    frames = write_animation(tmp_path, name)
    store = ImageStore(tmp_path)
    video = resolve_video(store, VideoReference(name), lambda number, fps, reference: (0, 4, number - 1))
    assert (video.num_frames, video.fps, video.height, video.width) == (10, 10.0, 16, 24)
    assert video.frames == (0, 4, 9) and np.array_equal(load_frames(video), frames[[0, 4, 9]])
    assert from_record(to_record(video)) == video
    other = resolve_video(store, VideoReference(name), lambda number, fps, reference: (0, 5, number - 1))
    assert other.digest != video.digest


def test_other_files_need_a_decoder(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"no image")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadRow, match=r"a.mp4: it is no animated image, and other videos need the package av"):
        resolve_video(ImageStore(tmp_path), VideoReference("a.mp4"), every_frame)


def test_other_files_are_decoded_by_av(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"no image")
    frames = video_golden.make_frames(6, 16, 24)

    class Container:
        streams = SimpleNamespace(video=[SimpleNamespace(average_rate=Fraction(3), guessed_rate=None)])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def decode(self, stream):
            return iter([SimpleNamespace(to_ndarray=lambda format, frame=frame: frame) for frame in frames])

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda file: Container()))
    video = resolve_video(ImageStore(tmp_path), VideoReference("a.mp4"), lambda *_: (1, 5))
    assert (video.fps, video.num_frames, video.height, video.width) == (3.0, 6, 16, 24)
    assert np.array_equal(load_frames(video), frames[[1, 5]])


def test_a_list_of_frames(tmp_path):
    store = ImageStore(tmp_path)
    paths = write_frames(tmp_path, 3, 16, 24)
    video = resolve_video(store, VideoReference(paths), every_frame)
    assert video.fps == video.sampled_fps == 2.0 and video.frames == (0, 1, 2)
    assert np.array_equal(load_frames(video), video_golden.make_frames(3, 16, 24))
    assert resolve_video(store, VideoReference(paths, 1.0), every_frame).digest != video.digest
    with pytest.raises(BadRow, match=r"unreadable video: .*f0.png: the frames have several sizes: 8x8, 16x24"):
        resolve_video(store, VideoReference((*paths, *write_frames(tmp_path, 1, 8, 8, "g"))), every_frame)
    Pillow.new("RGB", (24, 16)).save(tmp_path / "f1.png")
    with pytest.raises(UserError, match="the video has changed since"):
        load_frames(video)
    (tmp_path / "f1.png").unlink()
    with pytest.raises(UserError, match=r"f1.png: No such file"):
        load_frames(video)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"messages": [{"role": "user", "content": "<video>w1<image>"}, ANSWER], "videos": ["v"], "images": ["i"]},
            "vi",
        ),
        (
            {"messages": [{"role": "user", "content": "<image><video>"}, ANSWER], "videos": [["f"]], "images": ["i"]},
            "il",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "video", "video": "v"}, {"type": "video_url", "video_url": {"url": "v"}}],
                    },
                    ANSWER,
                ]
            },
            "vv",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": ["f", "f"]}]}, ANSWER]}, "L"),
    ],
)
def test_forms_of_rows(row, expected):
    names = {"v": VideoReference("v"), "i": "i", "l": VideoReference(("f",)), "L": VideoReference(("f", "f"))}
    parsed = parse_row(row, reads_images=True, reads_videos=True)
    assert parsed.images == tuple(names[name] for name in expected)
    kinds = [part["type"] for part in parsed.messages[0]["content"] if part["type"] != "text"]
    assert kinds == ["image" if name == "i" else "video" for name in expected]


def test_options_of_a_video():
    part = {"type": "video", "video": "v", "fps": 4, "max_frames": 8}
    parsed = parse_row(
        {"messages": [{"role": "user", "content": [part]}, ANSWER]}, reads_images=True, reads_videos=True
    )
    assert parsed.images == (VideoReference("v", 4.0, 8),)


def test_a_teacher_prompt_takes_the_messages_videos():
    row = {"messages": [{"role": "user", "content": "<video>w1"}, ANSWER], "videos": ["v"]}
    for prompt in ("w2", "w2<video>", [{"type": "video"}]):
        parsed = parse_row(row | {"teacher_prompt": prompt}, reads_images=True, reads_videos=True).for_teacher()
        assert parsed.images == (VideoReference("v"),)
        assert {"type": "video"} in parsed.messages[0]["content"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "<video>"}, ANSWER]},
            "number of images: 1 times <video> in the texts, but 0 vi",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": []}]}, ANSWER]},
            "wrong type: messages[0].content[0].video is a list of frames, and is empty",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": "v", "fps": 0}]}, ANSWER]},
            "wrong type: messages[0].content[0].video: fps must be a positive number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "video", "video": ["f"], "max_frames": 2}]}, ANSWER]},
            "wrong type: messages[0].content[0].video: max_frames is for files",
        ),
        (
            {"prompt_token_ids": [1], "response_token_ids": [2], "videos": ["v"]},
            "video: rows of token ids have no videos",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {**ANSWER, "content": "<video>"}], "videos": ["v"]},
            "misplaced image",
        ),
        ({"prompt": "a", "response": "b", "videos": ["v"]}, "misplaced image: plain text has no place"),
    ],
)
def test_a_bad_row_has_a_reason_and_a_detail(row, message):
    with pytest.raises(BadRow) as error:
        parse_row(row, reads_images=True, reads_videos=True)
    assert str(error.value).startswith(message)


def tokenize(folder, processing, *rows, **changes):
    section = DataSection(dataset=["rows.jsonl"], max_length=changes.pop("max_length", 256), **changes)
    tokenizer = RowTokenizer(vision_tokenizer(), True, section, RowOptions(images=processing), ImageStore(folder))
    return tokenizer({"text": [json.dumps(row) for row in rows]})


def test_a_row_with_an_image_and_videos(folder_of, tmp_path):
    write_animation(tmp_path, "a.gif")
    paths = write_frames(tmp_path, 4, 16, 24)
    content = "<video>w1<image><video>w2"
    row = {
        "messages": [{"role": "user", "content": content}, ANSWER],
        "videos": ["a.gif", list(paths)],
        "images": [paths[0]],
    }
    processing = open_processing(folder_of("qwen2_5_vl"))
    columns = tokenize(tmp_path, processing, row)
    assert columns["error"] == [""] and columns["num_videos"] == [2]
    images = [from_record(record) for record in columns["images"][0]]
    assert [type(image) for image in images] == [Video, Image, Video]
    assert columns["num_patches"] == [sum(processing.num_patches(image) for image in images)]
    pixels = processing.pixels(images)
    assert pixels["video_grid_thw"].tolist() == [[2, 4, 6], [2, 4, 6]] and pixels["image_grid_thw"].tolist() == [
        [1, 4, 6]
    ]
    ids = np.array(columns["input_ids"][0])
    assert (ids == VIDEO_ID).sum() == 24 and (ids == processing.placeholder_id).sum() == 6
    assert processing.positions(ids, images).shape == (3, len(ids))
    cut = tokenize(tmp_path, processing, row, max_length=len(ids) - 8, truncation_strategy="left")
    assert cut["dropped"] == [IMAGE_CUT]


@pytest.mark.parametrize("family", ["glm4v", "internvl"])
def test_other_families_refuse_videos(family, folder_of, tmp_path):
    processing = open_processing(folder_of(family))
    row = {"messages": [{"role": "user", "content": "w1"}, ANSWER], "videos": ["a.gif"]}
    assert tokenize(tmp_path, processing, row)["error"] == [
        "video: videos: the student reads no videos; models of the kinds Qwen2-VL to Qwen3.5 do"
    ]


def test_too_few_frames_and_too_small_ones(folder_of, tmp_path):
    write_animation(tmp_path, "one.gif", 1)
    row = {"messages": [{"role": "user", "content": "<video>w1"}, ANSWER], "videos": ["one.gif"]}
    found = tokenize(tmp_path, open_processing(folder_of("qwen2_5_vl")), row)["error"]
    assert found == ["unreadable video: one.gif: it has 1 frames; 2 are the fewest that the model reads"]
    paths = write_frames(tmp_path, 2, 4, 4)
    found = tokenize(tmp_path, open_processing(folder_of("qwen3_vl")), row | {"videos": [list(paths)]})["error"]
    assert found[0].startswith("unreadable video: ") and "4x4: height:4 or width:4 must be larger" in found[0]


def test_settings_of_the_video_processor_count(folder_of, tmp_path):
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(folder_of("qwen3_vl"), folder)
    keys = json.loads((folder / "preprocessor_config.json").read_text())
    keys["size"] = {"shortest_edge": 64, "longest_edge": 4 * 8 * 8}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(keys))
    mine, other = open_processing(folder_of("qwen3_vl")), open_processing(folder)
    assert not is_same_processing(mine, other) and is_same_processing(mine, open_processing(folder_of("qwen3_vl")))
    video = Video("", 32, 32, "", (0, 1, 2, 3), 2.0, 4)
    assert mine.videos.grid(video) == (2, 8, 8) and other.videos.grid(video) == (2, 2, 2)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(keys | {"do_resize": False}))
    with pytest.raises(UserError, match="its video processor has do_resize = False; only True is supported"):
        open_processing(folder, PixelLimits()).settings  # noqa: B018
