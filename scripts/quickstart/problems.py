"""Arithmetic word problems with worked solutions: the quickstart's data.

A problem tells a story about one quantity, which starts as a count or as a product ("4 boxes with 6 pens each") and
then grows or shrinks once or twice. The solution does one calculation a sentence. Each sentence has several wordings,
drawn at random, as natural text has: given the problem, a good model is sure of the numbers and unsure of the words.
Everything is a function of the seed.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Carla", "David", "Elena", "Felix", "Grace", "Hugo")
OBJECTS = ("apples", "balls", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones")
CONTAINERS = ("bags", "baskets", "boxes", "jars")

START = ("{name} has {n} {things}.", "{name} starts with {n} {things}.")
START_PRODUCT = (
    "{name} has {k} {containers} with {n} {things} each.",
    "{name} fills {k} {containers} with {n} {things} each.",
)
CHANGES = {
    "+": (
        "{other} gives {name} {n} more.",
        "Then {name} buys {n} more {things}.",
        "{name} finds another {n} {things}.",
    ),
    "-": (
        "{name} gives {n} of them to {other}.",
        "Then {name} loses {n} {things}.",
        "{name} sells {n} of the {things}.",
    ),
}
QUESTIONS = ("How many {things} does {name} have now?", "How many {things} are left?")
STEPS = (
    "{calc}.",
    "So {name} has {calc} {things}.",
    "There are {calc} {things}.",
    "Now there are {calc}.",
    "This gives {calc}.",
)
ANSWER = "The answer is {answer}."

HINT = "{question} Hint: {calculations}."

_CALCULATION = re.compile(r"\d+[-+*]\d+=\d+")
_ANSWER = re.compile(r"The answer is (-?\d+)\.")


@dataclass(frozen=True)
class Problem:
    question: str
    solution: str
    answer: int

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.solution}]

    def question_with_hint(self) -> str:
        """Return the question with the solution's calculations, without its words."""
        return HINT.format(question=self.question, calculations=", ".join(_CALCULATION.findall(self.solution)))


def extract_answer(text: str) -> int | None:
    """Return the number in the last "The answer is N." of `text`, or None."""
    found = _ANSWER.findall(text)
    return int(found[-1]) if found else None


def _start(rng: random.Random) -> tuple[int, int | None, int]:
    """Return quantity, factor and count: a product of the last two, or a plain count (factor None)."""
    if rng.random() < 0.5:
        n = rng.randint(10, 30)
        return n, None, n
    k, n = rng.randint(2, 5), rng.randint(2, 9)
    return k * n, k, n


def _change(rng: random.Random, quantity: int) -> tuple[str, int, int]:
    """Return operator, operand and the new quantity, which is positive."""
    n = rng.randint(1, 9)
    if n < quantity and rng.random() < 0.5:
        return "-", n, quantity - n
    return "+", n, quantity + n


def _slip(rng: random.Random, result: int, rate: float) -> int:
    """Return `result`, or with probability `rate` a wrong positive number near it."""
    if rng.random() >= rate:
        return result
    return rng.choice([wrong for error in (-10, -2, -1, 1, 2, 10) if (wrong := result + error) > 0])


def make_problem(rng: random.Random, slips: float = 0.0) -> Problem:
    """Return a problem. Each calculation has a wrong result with probability `slips`; the solution goes on with it."""
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(OBJECTS), "containers": rng.choice(CONTAINERS)}
    quantity, factor, start = _start(rng)
    template = rng.choice(START_PRODUCT if factor else START)
    story = [template.format(k=factor, n=start, **words)]
    calculations = []
    if factor:
        quantity = _slip(rng, quantity, slips)
        calculations.append(f"{factor}*{start}={quantity}")
    for _ in range(rng.randint(1, 2) if factor else 2):
        op, n, result = _change(rng, quantity)
        result = _slip(rng, result, slips)
        story.append(rng.choice(CHANGES[op]).format(n=n, **words))
        calculations.append(f"{quantity}{op}{n}={result}")
        quantity = result
    story.append(rng.choice(QUESTIONS).format(**words))
    solution = [rng.choice(STEPS).format(calc=calculation, **words) for calculation in calculations]
    return Problem(" ".join(story), " ".join([*solution, ANSWER.format(answer=quantity)]), quantity)


def make_problems(seed: int, slips: float = 0.0) -> Iterator[Problem]:
    """Yield problems without end, no question twice."""
    rng, seen = random.Random(seed), set()
    while True:
        problem = make_problem(rng, slips)
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem
