"""Selecting tokens, over every layout of padding, cache and prompt that can occur."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gated_sae.errors import AttachError, InputError
from hf_gated_sae.interventions import TokenContext, special_token_ids, special_token_mask
from hf_gated_sae.interventions.positions import check_positions
from tests.support.tiny_models import tiny_model


@st.composite
def layouts(draw):
    """Rows with their padding on the left, cut into a part that is cached and a part that is computed."""
    rows, prompt, new = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(0, 4))
    pads = [draw(st.integers(0, prompt - 1)) for _ in range(rows)]
    total = prompt + new
    start = draw(st.integers(0, total - 1))
    end = draw(st.integers(start + 1, total))
    return pads, prompt, start, end


def context(pads, prompt, start, end):
    index = torch.tensor([[max(column - pad, -1) for column in range(start, end)] for pad in pads])
    return TokenContext(
        index=index,
        prompt_length=torch.tensor([[prompt - pad] for pad in pads]),
        special=index < 0,
        phase="prompt" if end <= prompt else "generated" if start >= prompt else "mixed",
        end=end,
    )


def plain(positions, column, pad, prompt):
    index = column - pad
    if index < 0:
        return False
    length = prompt - pad
    if isinstance(positions, str):
        return {
            "all": True,
            "prompt": index < length,
            "generated": index >= length,
            "last_prompt": index == length - 1,
        }[positions]
    return index in [p if p >= 0 else length + p for p in positions]


@given(
    layouts(),
    st.one_of(
        st.sampled_from(["all", "prompt", "generated", "last_prompt"]),
        st.lists(st.integers(-8, 11), max_size=4),
        st.integers(-8, 11),
    ),
)
@settings(max_examples=300, deadline=None)
def test_selection_does_not_depend_on_how_the_row_is_cut(layout, positions):
    pads, prompt, start, end = layout
    tokens = context(*layout)
    chosen = tokens.select(check_positions(positions), special_tokens=False)
    wanted = [positions] if isinstance(positions, int) else positions
    expected = [[plain(wanted, column, pad, prompt) for column in range(start, end)] for pad in pads]
    found = torch.as_tensor(chosen).expand(tokens.shape).tolist()
    assert found == expected


ends = st.none() | st.integers(-8, 11)


@given(layouts(), ends, ends)
@settings(max_examples=200, deadline=None)
def test_a_span_selects_as_a_python_slice_whatever_the_cut(layout, first, last):
    """Spans count real tokens; negative ends count from the end of the prompt, after which the row may continue."""
    pads, prompt, start, end = layout
    try:
        span = check_positions(slice(first, last))
    except InputError:
        assert not range(20)[slice(first, last)], "refused, although it may hold tokens"
        return
    chosen = torch.as_tensor(context(*layout).select(span, special_tokens=False)).expand(len(pads), end - start)
    for row, pad in enumerate(pads):
        length = prompt - pad
        low = 0 if first is None else first if first >= 0 else length + first
        high = 99 if last is None else last if last >= 0 else length + last
        assert chosen[row].tolist() == [max(low, 0) <= column - pad < high for column in range(start, end)]


@given(layouts(), st.integers(1, 9), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_a_mask_counts_columns_whatever_the_cut(layout, columns, each_row, seed):
    pads, _, start, end = layout
    shape = (len(pads), columns) if each_row else (columns,)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    chosen = torch.as_tensor(context(*layout).select(check_positions(mask), special_tokens=False))
    whole = torch.zeros(len(pads), 20, dtype=torch.bool)
    whole[:, :columns] = mask
    real = torch.tensor([[column >= pad for column in range(start, end)] for pad in pads])
    assert torch.equal(chosen.expand(len(pads), end - start), whole[:, start:end] & real)


@pytest.mark.parametrize("positions", ["prompt", "generated", "last_prompt", -1, [0, -2]])
def test_packed_rows_have_no_prompt_end(positions):
    tokens = TokenContext(
        index=torch.tensor([[0, 1, 0]]), prompt_length=torch.tensor([[3]]), special=None, phase="packed", end=3
    )
    with pytest.raises(AttachError, match="packs several sequences"):
        tokens.select(check_positions(positions), special_tokens=True)
    assert tokens.select("all", special_tokens=True) is True
    assert tokens.select(check_positions([0]), special_tokens=True).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    ("given_as", "means"),
    [(3, (3,)), ([3, -1], (3, -1)), (range(2), (0, 1)), (torch.tensor([4]), (4,)), (iter([1, 1]), (1, 1)), ([], ())],
)
def test_positions_are_kept_as_plain_numbers(given_as, means):
    assert check_positions(given_as) == means


def test_special_ids_are_those_that_the_models_configurations_name():
    model = tiny_model("llama")
    assert special_token_ids(model) == [0, 1, 2]
    model.generation_config.eos_token_id = [2, 40]
    assert special_token_ids(model) == [0, 1, 2, 40]
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    assert special_token_ids(model) == [1, 2, 40]


def test_special_masks_join_padding_and_ids():
    model = tiny_model("llama")
    ids, mask = torch.tensor([[0, 1, 54, 0, 2]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert special_token_mask(model, ids, mask).tolist() == [[True, True, False, True, True]]
    assert special_token_mask(model, None, mask).tolist() == [[True, False, False, False, False]]
    assert special_token_mask(model, ids[:, 2:], mask).tolist() == [[False, True, True]]
    assert special_token_mask(model, None, None) is None
