"""READMEs that people and this package write together."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gated_sae.errors import PublishError
from hf_gated_sae.publishing.markdown import cell, decoded, marked, merge, split_front_matter, with_front_matter

OURS = with_front_matter({"library_name": "hf-gated-sae", "tags": ["x"], "license": "mit"}, marked("card", "# New\n"))
prose = st.text(alphabet="ab #|-*\n", max_size=60).filter(lambda text: "---" not in text)


def test_without_a_readme_the_card_is_the_readme() -> None:
    assert merge(None, OURS, "card") == OURS


def test_publishing_again_changes_nothing() -> None:
    assert merge(OURS, OURS, "card") == OURS


@given(before=prose, after=prose)
def test_what_people_wrote_around_the_section_stays(before: str, after: str) -> None:
    old = with_front_matter({"tags": ["mine"]}, before + "\n" + marked("card", "# Old\n") + "\n" + after)
    text = merge(old, OURS, "card")
    _, body = split_front_matter(text)
    outside = body.split("<!-- hf-gated-sae card")[0], body.split("card: end -->")[1]
    assert outside[0].strip("\n") == before.strip("\n") and outside[1].strip("\n") == after.strip("\n")
    assert "# New" in body and "# Old" not in body
    assert merge(text, OURS, "card") == text


@given(text=prose)
def test_a_readme_without_a_section_gets_one_at_its_end(text: str) -> None:
    merged = merge(text, OURS, "card")
    _, body = split_front_matter(merged)
    assert body.strip().startswith(text.strip()) and body.rstrip().endswith("card: end -->")
    assert merge(merged, OURS, "card") == merged


def test_keys_of_the_front_matter() -> None:
    old = "---\nlicense: gpl\nlanguage: de\ntags: mine\n---\nhello"
    data, _ = split_front_matter(merge(old, OURS, "card"))
    assert data == {"license": "mit", "language": "de", "tags": ["mine", "x"], "library_name": "hf-gated-sae"}
    data, _ = split_front_matter(merge(old, OURS, "card", yielding=("license",)))
    assert data["license"] == "gpl"


@pytest.mark.parametrize("yielding", [(), ("license",)])
def test_the_name_and_link_of_a_licence_are_replaced_or_kept_with_it(yielding: tuple[str, ...]) -> None:
    other = "---\nlicense: other\nlicense_name: x-1.0\nlicense_link: LICENSE\n---\nhello"
    data, _ = split_front_matter(merge(other, OURS, "card", yielding=yielding))
    expected = (
        {"license": "other", "license_name": "x-1.0", "license_link": "LICENSE"} if yielding else {"license": "mit"}
    )
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    ours = with_front_matter({"license": "other", "license_name": "x-1.0"}, marked("card", "# New\n"))
    data, _ = split_front_matter(merge("---\nlicense: mit\n---\n", ours, "card", yielding=yielding))
    expected = {"license": "mit"} if yielding else {"license": "other", "license_name": "x-1.0"}
    assert {key: value for key, value in data.items() if key.startswith("license")} == expected
    bare = with_front_matter({}, marked("card", "# New\n"))
    assert "license_name: x-1.0" in merge(other, bare, "card", yielding=yielding)


@given(text=st.text(max_size=30))
def test_utf_8_is_read_with_and_without_a_byte_order_mark(text: str) -> None:
    plain = text.replace("\r\n", "\n").removeprefix("\ufeff")
    assert decoded(text.encode(), "it").removeprefix("\ufeff") == plain.removeprefix("\ufeff")
    assert decoded(b"\xef\xbb\xbf" + text.encode(), "it") == text.replace("\r\n", "\n")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-32"])
def test_another_encoding_is_refused_in_one_sentence(encoding: str) -> None:
    with pytest.raises(PublishError, match=r"README.md of me/x is not in UTF-8 \(byte \d+ is 0x.*save it as UTF-8"):
        decoded("# Ergebnisse für alle".encode(encoding), "README.md of me/x")


def test_two_sections_live_side_by_side() -> None:
    index = with_front_matter({}, marked("index", "# List\n"))
    both = merge(OURS, index, "index")
    assert "# New" in both and "# List" in both
    assert merge(merge(both, OURS, "card"), index, "index") == both


@pytest.mark.parametrize(
    "old, phrase",
    [
        ("---\na: [1\n---\nhello", "front matter is broken"),
        ("---\n- a\n---\nhello", "holds a list; expected YAML keys"),
        ("---\nday: 2020-99-99\n---\nhello", "front matter is broken"),
        (OURS.replace("<!-- hf-gated-sae card: end -->", ""), "restore it"),
    ],
)
def test_a_readme_that_cannot_be_understood_is_not_touched(old: str, phrase: str) -> None:
    with pytest.raises(PublishError, match=phrase):
        merge(old, OURS, "card")


def test_windows_line_ends() -> None:
    data, body = split_front_matter("---\r\nlicense: mit\r\n---\r\n# Hi\r\n")
    assert data == {"license": "mit"} and body.startswith("# Hi")


@given(st.text(max_size=40))
def test_a_cell_stays_one_cell(text: str) -> None:
    row = f"| {cell(text)} |"
    assert "\n" not in row and row.replace("\\|", "").count("|") == 2 and "<" not in row
