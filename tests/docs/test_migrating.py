"""The guide for users of other trainers is the tables of their names."""

import write_migration_guide

from megatron_gkd.config import keys
from megatron_gkd.config.aliases import ALIASES, HELD, UNSUPPORTED
from megatron_gkd.migration import nemo_tables


def test_the_page_is_current():
    text = write_migration_guide.PAGE.read_text(encoding="utf-8")
    assert text == write_migration_guide.page(), "run python scripts/write_migration_guide.py"


def test_every_name_is_on_the_page():
    text = write_migration_guide.page()
    names = [*ALIASES, *HELD, *UNSUPPORTED, *nemo_tables.COMMON, *nemo_tables.MEGATRON, *nemo_tables.DTENSOR]
    of_nemo = {name for name, one in (HELD | UNSUPPORTED).items() if one.tools == ("NeMo-RL",)}
    assert [name for name in names if name not in of_nemo and f"`{name}`" not in text] == []


def test_names_that_are_the_same_are_keys():
    names = [name for names in write_migration_guide.SAME_NAMES.values() for name in names.split(", ")]
    assert names and set(names) <= keys.SECTION_OF.keys()
