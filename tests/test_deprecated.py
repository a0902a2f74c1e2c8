"""Deprecated names still work, and warn with the new name and the release of the removal."""

import pytest

import llama32


@pytest.mark.parametrize(("old", "new"), llama32.DEPRECATED.items())
def test_a_deprecated_name_warns_and_is_the_new_name(old, new):
    message = rf"llama32\.{old} is deprecated and goes away in release 0\.3: use llama32\.{new}"
    with pytest.warns(DeprecationWarning, match=message):
        found = getattr(llama32, old)
    assert found is getattr(llama32, new)
    assert new in llama32.__all__
    assert old not in llama32.__all__


def test_put_lora_can_still_be_imported():
    with pytest.warns(DeprecationWarning, match="llama32.attach_lora"):
        from llama32 import put_lora
    assert put_lora is llama32.attach_lora


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'llama32' has no attribute 'no_such_name'"):
        _ = llama32.no_such_name
