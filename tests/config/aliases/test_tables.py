"""The tables of other tools' names fit the recipe's keys, and name each setting once."""

import pytest

from megatron_gkd.config import keys
from megatron_gkd.config.aliases import ALIASES, HELD, SECTIONS, UNSUPPORTED, VALUES
from megatron_gkd.config.aliases.readers import GROUPS
from megatron_gkd.config.renamed import NEW_NAMES


def test_a_name_is_in_one_table_and_is_no_key():
    tables = [ALIASES.keys(), HELD.keys(), UNSUPPORTED.keys(), keys.SECTION_OF.keys(), NEW_NAMES.keys()]
    assert len(set().union(*tables)) == sum(map(len, tables))
    assert not SECTIONS.keys() & keys.SECTIONS.keys()


def test_aliases_and_values_are_of_keys():
    assert {leaf for alias in ALIASES.values() for leaf in alias.leaves} <= keys.SECTION_OF.keys()
    assert VALUES.keys() <= keys.SECTION_OF.keys()


def test_an_alias_sets_keys_of_one_section():
    for alias in ALIASES.values():
        assert len({keys.SECTION_OF[leaf] for leaf in alias.leaves}) == 1


def test_groups_have_readers():
    assert {alias.group for alias in ALIASES.values()} - {""} == GROUPS.keys()


@pytest.mark.parametrize("table", [HELD, UNSUPPORTED])
def test_reasons_are_short_texts_without_a_full_stop(table):
    for name, one in table.items():
        assert one.reason and len(one.reason) < 140 and not one.reason.endswith("."), name


def test_reasons_name_keys_that_exist():
    """As in `data.max_length`: a dotted word whose first part is a section."""
    texts = [f"{held.reason} {held.otherwise}" for held in HELD.values()] + [one.reason for one in UNSUPPORTED.values()]
    words = {word.strip("():,;`") for text in texts for word in text.split()}
    dotted = [word.split(".") for word in words if word.count(".") == 1]
    named = [(section, leaf) for section, leaf in dotted if section in keys.SECTIONS]
    assert len(named) > 30
    assert [(section, leaf) for section, leaf in named if leaf not in keys.SECTIONS[section]] == []
