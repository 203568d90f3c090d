"""Licences as people write them, and as the Hub spells them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.errors import InputError
from hf_gated_sae.hub.licences import LICENCES, OTHER, normalise

DETAILS = {OTHER: {"name": "my-licence-1.0", "link": "LICENSE"}}


@pytest.mark.parametrize("identifier", LICENCES)
def test_identifiers_and_full_names_are_understood(identifier: str) -> None:
    """No two licences are confused."""
    for text in (
        identifier,
        identifier.upper(),
        f" {identifier} ",
        LICENCES[identifier],
        LICENCES[identifier].lower(),
    ):
        assert normalise(text, **DETAILS.get(identifier, {})) == identifier


@pytest.mark.parametrize(
    ("written", "identifier"),
    [
        ("MIT License", "mit"),
        ("The MIT licence", "mit"),
        ("Apache 2.0", "apache-2.0"),
        ("Apache License, Version 2.0", "apache-2.0"),
        ("apache2", "apache-2.0"),
        ("GPLv3", "gpl-3.0"),
        ("GNU GPL v3.0", "gpl-3.0"),
        ("CC BY-NC 4.0", "cc-by-nc-4.0"),
        ("Creative Commons Attribution 4.0 International", "cc-by-4.0"),
        ("BSD 3-Clause", "bsd-3-clause"),
        ("Llama 3.1", "llama3.1"),
    ],
)
def test_usual_spellings(written: str, identifier: str) -> None:
    assert normalise(written) == identifier


@pytest.mark.parametrize(
    ("written", "suggestion"),
    [
        ("apche-2.0", "Did you mean 'apache-2.0'"),
        ("Apache", "Did you mean 'apache-2.0'"),  # the version is not guessed
        ("CC0", "'cc0-1.0'"),
        ("GPL-3.0-or-later", "Did you mean 'gpl-3.0'"),
        ("Creative Commons Attribution", "Creative Commons Attribution 4.0"),
        ("proprietary", "license='other' with license_name= and license_link="),
        ("", "such as 'apache-2.0'"),
        (3, "license is 3; expected"),
    ],
)
def test_what_the_hub_does_not_know_is_refused(written: str, suggestion: str) -> None:
    with pytest.raises(InputError) as raised:
        normalise(written)
    assert suggestion in str(raised.value)


@pytest.mark.parametrize("details", [{}, {"name": "my-licence-1.0"}, {"link": "LICENSE"}, {"name": " ", "link": "x"}])
def test_other_needs_a_name_and_a_link(details: dict[str, str]) -> None:
    with pytest.raises(InputError, match="'other', which needs a name and a link: pass license_name=.*license_link="):
        normalise("Other", **details)
    assert normalise("Other", **DETAILS[OTHER]) == OTHER


def test_a_listed_licence_has_no_other_name() -> None:
    with pytest.raises(InputError, match="are only for license='other': omit them"):
        normalise("MIT", name="my-licence")


@given(st.text(max_size=20))
def test_any_text_is_a_licence_or_an_error(text: str) -> None:
    try:
        found = normalise(text)
    except InputError:
        return
    assert found in LICENCES and normalise(found) == found
