"""The commands with a recipe: train, check, score and generate. Each returns its work, after all checks."""

from megatron_gkd.commands.parts import Work, imports, load_recipe, print_text, take


def train(path: str, overrides: list[str], world_size: int) -> Work:
    """Train the student of a recipe."""
    recipe = load_recipe(path, overrides, world_size)

    def work() -> None:
        with imports():
            from megatron_gkd.training.run import train

        train(recipe)

    return work


def score(path: str, arguments: list[str], world_size: int) -> Work:
    """Write the teacher's log-probabilities of each row."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.SCORE)
    recipe = load_recipe(path, overrides, world_size, commands.SCORES)

    def work() -> None:
        with imports():
            from megatron_gkd.training.score import score

        score(recipe, **options)

    return work


def generate(path: str, arguments: list[str], world_size: int) -> Work:
    """Write a model's completions of each prompt."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.GENERATE)
    source = options.pop("from")
    checks = commands.TEACHER_GENERATES if source == "teacher" else commands.STUDENT_GENERATES
    recipe = load_recipe(path, overrides, world_size, checks)

    def work() -> None:
        with imports():
            from megatron_gkd.training.generate import generate

        generate(recipe, source, **options)

    return work


def check(path: str, arguments: list[str], world_size: int) -> Work:
    """Load a recipe's plugins, and print it and its layout over `--nproc` processes, not over those that run."""
    from megatron_gkd.config import commands

    options, overrides = take(arguments, commands.CHECK)
    recipe = load_recipe(path, overrides, options["nproc"])

    def work() -> None:
        from megatron_gkd.config.layout import describe_layout
        from megatron_gkd.data.plugins import load_plugins

        load_plugins(recipe.data.external_plugins)
        lines = [f"{name + ':':8} {text}" for name, text in describe_layout(recipe, options["nproc"]).items()]
        print_text("\n".join([recipe.to_yaml(), *lines]))

    return work
