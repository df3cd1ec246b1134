"""Write a model's adapters as a folder that `PeftModel.from_pretrained` opens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_gkd.checkpoint_format.adapter_files import BASE, CONFIG, adapter_config
from megatron_gkd.checkpoint_format.fingerprint import weights_fingerprint
from megatron_gkd.models.export import write_tokenizer
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import publish
from megatron_gkd.runtime.quiet import hidden_stderr


def export_adapters(model: MegatronModel, directory: str | Path) -> Path:
    """Write the whole factors, adapter_config.json and the tokenizer into `directory`. All ranks must call it.

    The files are bit-identical under every layout. They are written beside `directory`, which they replace when all are
    there.

    Raises:
        UserError: in all ranks; the folder can't be written.
    """
    directory = Path(directory)
    unfinished = directory.with_name(directory.name + ".unfinished")
    adapters = model.adapters
    if adapters is None:
        raise ValueError("the model has no adapters to export")

    def prepare() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        name = model.checkpoint.hub_id or str(model.checkpoint.path)
        config = adapter_config(adapters.layers, adapters.base_layers, name, adapters.options.rules.rank)
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        fingerprint = {"path": name, "weights": weights_fingerprint(model.checkpoint.path)}
        (unfinished / BASE).write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf-8")
        write_tokenizer(model.checkpoint, unfinished)
        publish(unfinished, directory, remove=shutil.rmtree)

    run_on_main(prepare, os_error=f"{directory}: can't be written to")
    with model.exporting_adapters() as bridge, hidden_stderr():
        bridge.save_weights(model.chunks, str(unfinished), peft_format=True)
    run_on_main(finish, os_error=f"{directory}: can't be written to")
    return directory
