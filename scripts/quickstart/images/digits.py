"""Small pictures of two digits with questions about them: the data of the experiment with images.

A picture has one digit in each half, in a size, place and brightness of its own, under noise. The solution reads the
digits before it answers, and has several wordings, drawn at random: given the picture, a good model is sure of the
digits and unsure of the words. Everything is a function of the seed.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT, WIDTH = 16, 32
FONT_SIZES = (13, 19)
BRIGHTNESS = (150, 255)
NOISE = 20.0  # standard deviation, of 255

READINGS = ("{a} and {b}.", "{a}, {b}.", "{a} then {b}.", "{a} before {b}.")
SUM, NUMBER = "What is the sum of the digits?", "Which number is this?"
SUM_STEP = "{a}+{b}={answer}."
ANSWER = "The answer is {answer}."


@dataclass(frozen=True)
class Reading:
    """A picture, a question about it, and a solution.

    Attributes:
        digits: the two that are drawn, from left to right.
        seed: of everything else in the picture.
        question: SUM or NUMBER.
        solution: reads the digits, and answers; wrong if it misreads one.
        answer: the right one.
    """

    digits: tuple[int, int]
    seed: int
    question: str
    solution: str
    answer: int

    def messages(self, image: str) -> list[dict[str, Any]]:
        """Return the row, with `image` as the reference to the picture."""
        question = [{"type": "image", "image": image}, {"type": "text", "text": self.question}]
        return [{"role": "user", "content": question}, {"role": "assistant", "content": self.solution}]

    def draw(self) -> Image.Image:
        """Return the picture, grayscale, HEIGHT x WIDTH."""
        rng = random.Random(self.seed)
        picture = Image.new("L", (WIDTH, HEIGHT))
        canvas, half = ImageDraw.Draw(picture), WIDTH // 2
        for index, digit in enumerate(self.digits):
            font = _font(rng.randint(*FONT_SIZES))
            left, top, right, bottom = font.getbbox(str(digit))
            x = index * half + rng.randint(0, max(0, half - int(right - left))) - left
            y = rng.randint(0, max(0, HEIGHT - int(bottom - top))) - top
            canvas.text((x, y), str(digit), fill=rng.randint(*BRIGHTNESS), font=font)
        noise = np.random.default_rng(self.seed).normal(0, NOISE, (HEIGHT, WIDTH))
        return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _misread(rng: random.Random, digit: int, rate: float) -> int:
    """Return `digit`, or with probability `rate` another one."""
    return digit if rng.random() >= rate else rng.choice([other for other in range(10) if other != digit])


def make_reading(rng: random.Random, slips: float = 0.0) -> Reading:
    """Return a reading. Its solution misreads each digit with probability `slips`, and goes on with what it read."""
    digits = (rng.randrange(10), rng.randrange(10))
    question = rng.choice((SUM, NUMBER))
    a, b = (_misread(rng, digit, slips) for digit in digits)
    steps = [rng.choice(READINGS)] + ([SUM_STEP] if question == SUM else []) + [ANSWER]
    solution = " ".join(steps).format(a=a, b=b, answer=_answer(question, a, b))
    return Reading(digits, rng.getrandbits(32), question, solution, _answer(question, *digits))


def _answer(question: str, a: int, b: int) -> int:
    return a + b if question == SUM else 10 * a + b


def make_readings(seed: int, slips: float = 0.0) -> Iterator[Reading]:
    """Yield readings without end."""
    rng = random.Random(seed)
    while True:
        yield make_reading(rng, slips)
