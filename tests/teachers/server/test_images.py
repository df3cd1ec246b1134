"""Rows with images, scored by a server."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from teachers.contract import CHECKPOINT, mesh_of, read_signal
from teachers.fake_server import FakeServer
from teachers.vision_rows import image, image_folder, image_sample, processing_of, vision_log_probs, vision_teacher
from vision_checkpoints import vision_tokenizer

from megatron_gkd.data.vision.data_uri import as_data_uri
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.processor import PixelLimits
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer
from megatron_gkd.teachers.server.response import ScoreRequest
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

K = 6
PROBES = tokenizer_probes(vision_tokenizer())


@pytest.fixture(scope="module")
def processing():
    return processing_of(vision_teacher())


@pytest.fixture
def fake(processing) -> Iterator[FakeServer]:
    with FakeServer(vision_teacher(), processing=processing) as server:
        yield server


def rows(processing):
    first, second = image(16, 24), image(32, 16, seed=1)
    return [
        image_sample(processing, 3, first, 4, second, 2, seed=1),
        image_sample(processing, 5, seed=2),
        image_sample(processing, 2, second, 1, seed=3),
    ]


def connect(fake: FakeServer, processing, max_length: int = 256) -> TeacherServer:
    server = TeacherServer(
        fake.url, open_client(10.0, 4), TeacherRequirements(K, max_length, PROBES, images=processing)
    )
    server.handshake(max_downtime=5.0)
    return server


def test_a_row_is_scored_as_by_transformers(fake, processing):
    server = connect(fake, processing)
    for row in rows(processing):
        scores = server.score(ScoreRequest.from_sample(row, processing))
        best = vision_log_probs(vision_teacher(), row).topk(K)
        found = torch.from_numpy(scores.log_probs).double().sort(-1, descending=True).values
        torch.testing.assert_close(found, best.values, atol=1e-5, rtol=0)
    assert fake.generations == 1 + 2  # the handshake's, and a row of text goes the other way


def test_a_server_without_the_route_is_refused_where_rows_have_images(fake, processing):
    fake.enable_scale_out = False
    connect(fake, None)
    with pytest.raises(UserError, match=f"^{fake.url}: has no route for rows with images; .* --enable-scale-out"):
        connect(fake, processing)


def test_a_server_of_a_text_model_is_refused_where_rows_have_images(processing):
    with FakeServer(CHECKPOINT(), tokenizer=vision_tokenizer()) as fake, pytest.raises(UserError, match="multimodal"):
        connect(fake, processing)


def test_an_image_that_no_sequence_has_room_for_is_no_reason_to_refuse(fake, processing):
    connect(fake, processing, max_length=40)
    assert fake.generations == 0


def test_other_pixel_limits_are_refused_at_the_start(fake, processing):
    fake.processing = processing_of(vision_teacher(), PixelLimits(max_pixels=32 * 32))
    message = (
        r"makes \d+ tokens of a sequence with images of 64x64 pixels, of which the student's processor makes \d+; "
    )
    options = re.escape("""'{"size": {"longest_edge": 4096, "shortest_edge": 64}}'""")
    with pytest.raises(UserError, match=f"^{fake.url}: {message}.*data.max_pixels; .*--mm-processor-kwargs {options}"):
        connect(fake, processing)


def test_requests_for_one_text_and_other_images_have_other_keys(processing):
    row = image_sample(processing, 3, image(16, 24), 2)
    other = replace(row, images=(image(16, 24, seed=7),))
    assert (row.input_ids == other.input_ids).all()
    assert ScoreRequest.from_sample(row, processing).key != ScoreRequest.from_sample(other, processing).key


def images_that_readers_turn() -> list[Image]:
    """An image that its header turns, and one with transparent pixels."""
    folder = image_folder()
    upright = PIL.Image.fromarray(np.random.default_rng(3).integers(0, 255, (16, 24, 3), dtype=np.uint8))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    upright.save(folder / "turned.png", exif=turned)
    transparent = upright.convert("RGBA")
    transparent.putalpha(100)
    transparent.save(folder / "transparent.png")
    return [ImageStore(folder).resolve(name) for name in ("turned.png", "transparent.png")]


def test_an_image_is_sent_as_its_file_unless_readers_differ_in_what_it_shows():
    images, sizes = [image(), *images_that_readers_turn()], [(24, 16), (16, 24), (24, 16)]
    for one, is_file, size in zip(images, (True, False, False), sizes, strict=True):
        content = base64.b64decode(as_data_uri(one).partition(",")[2])
        with open(one.location, "rb") as file:
            assert (content == file.read()) == is_file
        with PIL.Image.open(io.BytesIO(content)) as sent:
            assert sent.mode == "RGB" and sent.size == size and not sent.getexif()


def score_rows(rank, world_size, url, student, samples):
    from megatron_gkd.data.microbatch import collate
    from megatron_gkd.teachers.server.teacher import ServerTeacher, TeacherServerOptions

    processing = processing_of(student)
    with mesh_of({"parallel": {"tensor_model_parallel_size": world_size}}) as mesh:
        options = TeacherServerOptions((url,), k=K, max_length=128, has_images=True, max_downtime=5.0)
        teacher = ServerTeacher(mesh, vision_tokenizer(), 301, options, processing)
        teacher.begin(samples)
        whole = collate(samples, pad_multiple=mesh.layout.pad_multiple)
        (entries,) = read_signal(teacher.score([whole])[0], whole, mesh)
        return entries.values


def test_the_teacher_sends_images(fake, processing, gloo_world):
    expected = torch.cat([vision_log_probs(vision_teacher(), row) for row in rows(processing)]).topk(K).values.float()
    for values in gloo_world(2).run(score_rows, fake.url, vision_teacher(), rows(processing)):
        torch.testing.assert_close(values.sort(-1, descending=True).values, expected, atol=1e-5, rtol=0)
