"""The fields that are read from Megatron-Core's source are those of its class."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from megatron_gkd.config.megatron_fields import REFUSED, describe_problems, field_types


@pytest.fixture(scope="module")
def config_class():
    import megatron_gkd.runtime.preload  # noqa: F401

    from megatron.core.transformer import TransformerConfig

    return TransformerConfig


def test_the_fields_and_their_types_are_those_of_the_class(config_class):
    found, types = field_types(), typing.get_type_hints(config_class)
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert found.keys() == fields
    simple = (int, float, bool, str, type(None))
    for name in fields:
        alternatives = typing.get_args(types[name]) or (types[name],)
        if typing.get_origin(types[name]) is typing.Union and all(one in simple for one in alternatives):
            assert found[name] == types[name], name
        elif types[name] in simple:
            assert found[name] is types[name], name


def test_each_default_that_a_recipe_can_contain_has_its_type(config_class):
    simple = (int, float, str, bool)
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in defaults.items() if isinstance(value, simple) and name not in REFUSED}
    values = {name: value for name, value in values.items() if type(value) in simple}
    assert len(values) > 60
    assert list(describe_problems(values)) == []


def test_what_is_refused_exists():
    assert field_types().keys() >= REFUSED.keys()
