"""A harvest holds the values of `capture` at the tokens that count, each with its document and position."""

import weakref

import peft
import pytest
import torch
import transformers
from packaging.version import Version

from hf_gated_sae import SAEModel, capture, harvest
from hf_gated_sae.errors import InputError, ShapeError, SiteError, UnknownNameError
from tests.hooks.support import (
    ARCHITECTURES,
    SITE,
    close,
    counted,
    hooks_on,
    joined,
    make_cross_layer,
    make_sae,
    model_of,
    padded_batches,
    placed,
)
from tests.support.tiny_models import HIDDEN, TINY_NAMES, tiny_model

SITES = ["resid_post.0", "mlp_out.1"]
WITHOUT_PADDING = ("deepseek_v4", "recurrent_gemma", "rwkv")
"""Families in which padding changes the other tokens, whatever the inputs."""


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_can_be_traced_back(side):
    model, sae, batches = model_of("llama"), make_sae(), padded_batches(side=side)
    harvests = list(harvest(model, [*SITES, sae], batches))
    documents = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    seen = 0
    for each in harvests:
        for number, (token, document, position) in enumerate(
            zip(each.token_ids.tolist(), each.documents.tolist(), each.positions.tolist(), strict=True)
        ):
            ids, mask = documents[document]
            real = ids[mask == 1]
            assert real[position] == token and token > 2
            alone = capture(model, SITES, input_ids=real[None])  # the document alone, without padding
            for site in SITES:
                assert torch.allclose(each[site][number], alone[site][0, position], atol=1e-5)
            seen += 1
    assert seen == sum(int(counted(batch).sum()) for batch in batches) == sum(map(len, harvests))


@pytest.mark.parametrize("family", [name for name in TINY_NAMES if name not in WITHOUT_PADDING])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_activation(family, side):
    model = tiny_model(family)
    if family == "doge" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip(
            "in this version of transformers, padding or a cache changes doge's activations, with nothing attached"
        )
    site, [batch] = "resid_post.2", padded_batches(1, side=side)
    [each] = harvest(model, site, [batch], special_tokens=True)
    rows = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    alone = torch.cat([capture(model, site, input_ids=row[None])[site][0] for row in rows])
    assert torch.equal(each.token_ids, torch.cat(rows))
    assert torch.allclose(each[site], alone, atol=1e-4 * float(alone.abs().max()))


def test_given_position_ids_are_kept():
    model, [batch] = tiny_model("gpt2"), padded_batches(1)
    places = torch.arange(7).expand(4, -1)
    [each] = harvest(model, SITES, [{**batch, "position_ids": places}])
    expected = capture(model, SITES, **batch)  # without position ids, the model counts columns
    assert all(torch.equal(each[site], expected[site][counted(batch)]) for site in SITES)
    [derived] = harvest(model, SITES, [batch])
    assert not torch.allclose(derived[SITES[0]], each[SITES[0]], atol=0.1)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # peft passes it
def test_padding_changes_no_activation_behind_a_prefix_in_the_cache():
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, [batch] = peft.get_peft_model(tiny_model("gpt2"), config).eval(), padded_batches(1)
    [each] = harvest(model, SITES[0], [batch], special_tokens=True)
    rows = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    alone = [harvest(model, SITES[0], [row], special_tokens=True) for row in rows]
    assert torch.allclose(each[SITES[0]], torch.cat([next(one)[SITES[0]] for one in alone]), atol=1e-5)


def test_values_are_those_of_capture():
    model, batches = model_of("llama"), padded_batches()
    saes = [make_sae(architecture) for architecture in ARCHITECTURES] + [make_cross_layer()]
    for batch, each in zip(batches, harvest(model, [*SITES, *saes], batches), strict=True):
        for key, value in capture(model, [*SITES, *saes], **placed(batch)).items():
            expected = value[counted(batch)]
            if key in SITES:
                assert torch.equal(each[key], expected)
            else:
                assert torch.allclose(each[key].dense(), expected, atol=1e-5)
                assert len(each[key].values) == (expected != 0).sum() < expected.numel()


def test_a_slice_of_an_sae_keeps_the_indices_of_its_latents(tmp_path):
    model, sae, batches = model_of("llama"), make_sae(), padded_batches(1)
    sae.save_pretrained(tmp_path)
    some = SAEModel.from_pretrained(tmp_path, latents=[5, 11, 58])
    [each] = harvest(model, [sae, some], batches)
    expected = each[sae].dense()
    assert expected[:, [5, 11, 58]].any()
    assert torch.allclose(each[some].dense()[:, [5, 11, 58]], expected[:, [5, 11, 58]], atol=1e-6)
    assert set(each[some].indices.tolist()) <= {5, 11, 58}


@pytest.mark.parametrize("side", ["left", "right"])
def test_latents_that_depend_on_other_tokens_are_computed_per_document(side):
    model, sae, [batch] = model_of("llama"), make_sae("temporal"), padded_batches(1, side=side)
    ids, mask = batch["input_ids"], batch["attention_mask"].clone()
    ids[3], mask[3] = 0, 0  # a row of nothing but padding
    batch["attention_mask"] = mask
    [each] = harvest(model, [SITES[0], sae], [batch])
    dense, row = each[sae].dense(), 0
    for document in range(3):
        real = ids[document][mask[document] == 1]
        alone = capture(model, sae, input_ids=real[None])[sae][0]
        for position in (real > 2).nonzero().flatten().tolist():
            assert (each.documents[row], each.positions[row]) == (document, position)
            assert torch.allclose(dense[row], alone[position], atol=2e-6) and alone[position].any()
            row += 1
    assert row == len(each)
    assert torch.equal(capture(model, sae, **placed(batch))[sae][counted(batch)], dense)


def test_autocast_does_not_reach_the_latents():
    model, saes, [batch] = model_of("llama"), [make_sae("temporal"), make_sae()], padded_batches(1)
    with torch.autocast("cpu", torch.bfloat16):
        [each] = harvest(model, saes, [batch["input_ids"]])
        x = capture(model, "resid_post.1", input_ids=batch["input_ids"])["resid_post.1"]
    for sae in saes:
        expected = sae.encode(x)[counted({**batch, "attention_mask": batch["input_ids"] != 0})]
        assert torch.allclose(each[sae].dense(), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("settings", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_virtual_tokens_are_left_out(settings):
    config = settings(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model, sae, [batch] = peft.get_peft_model(tiny_model("llama"), config).eval(), make_sae(), padded_batches(1)
    given = batch if settings is peft.PromptTuningConfig else placed(batch)  # PEFT drops position ids in prompt tuning
    expected = capture(model, ["resid_post.1", sae], **given)
    [each] = harvest(model, ["resid_post.1", sae], [batch])
    assert torch.equal(each["resid_post.1"], expected["resid_post.1"][:, -7:][counted(batch)])
    assert torch.allclose(each[sae].dense(), expected[sae][:, -7:][counted(batch)], atol=1e-6)
    assert not torch.allclose(each["resid_post.1"], next(harvest(tiny_model("llama"), SITE, [batch]))[SITE])


def test_a_site_without_one_vector_per_token_is_refused():
    rotations = "model.rotary_emb.output"
    for what in (rotations, make_sae(site=rotations, d_in=8)):
        with pytest.raises(ShapeError, match=r"\[1, 7, 8\].*4 rows of 7 tokens"):
            next(harvest(model_of("llama"), what, padded_batches(1, side="right")))


def test_special_tokens_can_be_kept_but_never_padding():
    batches = padded_batches()
    kept = list(harvest(model_of("llama"), SITES, batches, special_tokens=True))
    assert sum(map(len, kept)) == sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert any((each.token_ids == 1).any() for each in kept) and all((each.token_ids != 0).all() for each in kept)


def test_tokens_can_be_left_out_by_the_norm_of_their_activation():
    model, sae, [batch] = model_of("llama"), make_sae(), padded_batches(1)
    [every] = harvest(model, [*SITES, sae], [batch])
    length = {site: every[site].norm(dim=-1) for site in SITES}
    limit = float(length[SITES[0]].median())
    for given, kept in (
        ({SITES[0]: limit}, length[SITES[0]] <= limit),
        (dict.fromkeys(SITES, limit), (length[SITES[0]] <= limit) & (length[SITES[1]] <= limit)),
    ):
        [some] = harvest(model, [*SITES, sae], [batch], norm_limit=given)
        assert 0 < len(some) == int(kept.sum()) < len(every)
        for name in ("token_ids", "documents", "positions"):
            assert torch.equal(getattr(some, name), getattr(every, name)[kept])
        assert torch.equal(some[SITES[1]], every[SITES[1]][kept])
        assert torch.allclose(some[sae].dense(), every[sae].dense()[kept], atol=1e-6)
    x = next(harvest(model, SITE, [batch]))[SITE].norm(dim=-1)
    for each in (sae, make_sae("temporal")):  # a single number applies to all sites that are read
        [some] = harvest(model, each, [batch], norm_limit=float(x.median()))
        assert torch.equal(some.token_ids, every.token_ids[x <= x.median()])


def test_special_ids_can_be_given():
    [batch] = padded_batches(1)
    [some] = harvest(model_of("llama"), SITES, [batch], special_ids=[2])
    real = batch["input_ids"][batch["attention_mask"] == 1]
    assert torch.equal(some.token_ids, real[real != 2]) and (some.token_ids == 1).any()


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        ({"resid_post.1": 3.0}, UnknownNameError, "norm_limit"),
        (-1.0, InputError, "positive"),
        ({"resid_post.0": True}, InputError, "positive"),
    ],
)
def test_invalid_norm_limits_are_refused(limit, error, message):
    with pytest.raises(error, match=message):
        harvest(model_of("llama"), SITES, [], norm_limit=limit)


def test_a_batch_may_have_no_token_that_counts():
    empty = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    [nothing, something] = harvest(model_of("llama"), [SITES[0], make_sae()], [empty, torch.tensor([5, 6, 7])])
    assert len(nothing) == 0 and nothing[SITES[0]].shape == (0, HIDDEN)
    assert something.documents.tolist() == [2, 2, 2] and something.positions.tolist() == [0, 1, 2]


def test_only_one_batch_is_held():
    released = []

    def batches():
        for _ in range(4):
            yield padded_batches(1)[0]

    stream, previous = harvest(model_of("llama"), [*SITES, make_sae()], batches), None
    for each in stream:
        released.append(previous is None or previous() is None)
        previous = weakref.ref(each[SITES[0]])
        del each
    assert released == [True] * 4


def test_the_model_runs_in_evaluation_mode_and_its_modes_are_restored():
    model, batches = tiny_model("gpt2", resid_pdrop=0.5), padded_batches(2)
    expected = [each[SITES[0]] for each in harvest(model, SITES, batches)]
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    for each, value in zip(harvest(model, SITES, batches), expected, strict=True):
        assert torch.equal(each[SITES[0]], value)
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ShapeError):
        next(harvest(model, SITES, [torch.zeros(1, 1, 1, dtype=torch.long)]))
    with pytest.raises(IndexError):
        next(harvest(model, SITES, [torch.tensor([[500]])]))
    assert [module.training for module in model.modules()] == modes
    assert hooks_on(model) == ({}, [])


def test_dtype():
    sae = make_sae()
    [each] = harvest(model_of("llama"), [SITES[0], sae], padded_batches(1), dtype=torch.float16)
    assert each[SITES[0]].dtype == each[sae].values.dtype == torch.float16
    with pytest.raises(InputError, match="floating"):
        harvest(model_of("llama"), SITES, [], dtype=torch.int8)


def test_harvests_in_inference_mode_are_ordinary_tensors():
    sae = make_sae()
    with torch.inference_mode():
        [each] = harvest(model_of("llama"), [SITES[0], sae], padded_batches(1))
    assert not each[SITES[0]].is_inference() and not each[sae].values.is_inference()


@pytest.mark.parametrize(
    ("what", "batches", "error", "message"),
    [
        ([], [], InputError, "no sites or SAEs"),
        ("resid_pots.1", [], SiteError, "resid_post"),
        ("resid_post.9", [], SiteError, r"resid_post\.9"),
        (make_sae(d_in=16), [], ShapeError, "16"),
    ],
)
def test_what_cannot_be_harvested_is_refused_before_the_first_batch(what, batches, error, message):
    with pytest.raises(error, match=message):
        harvest(model_of("llama"), what, batches)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 4)}, ShapeError, r"\[2, 4\]"),
        ({"ids": torch.ones(2, 5)}, InputError, "input_ids"),
        ("text", InputError, "input_ids"),
        (torch.rand(2, 5), ShapeError, "float32"),
    ],
)  # fmt: skip
def test_a_batch_that_cannot_be_run_is_an_error(batch, error, message):
    with pytest.raises(error, match=message):
        list(harvest(model_of("llama"), SITES, [batch]))


def test_one_batch_instead_of_several_is_an_error():
    with pytest.raises(InputError, match="expected batches"):
        list(harvest(model_of("llama"), SITES, padded_batches()[0]))


def test_a_site_that_was_not_harvested_is_an_error():
    [each] = harvest(model_of("llama"), SITES, padded_batches(1))
    with pytest.raises(UnknownNameError, match=r"mlp_out\.1"):
        each["mlp_out.0"]


def test_sequences_packed_into_one_row_are_separate_documents():
    """Only position ids separate them, as `DataCollatorWithFlattening` gives them."""
    model = model_of("llama")
    one, two = torch.tensor([[11, 54, 33, 78]]), torch.tensor([[60, 41, 22]])
    packed = {"input_ids": torch.cat([one, two], 1), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]])}
    temporal = make_sae("temporal")
    apart = list(harvest(model, [SITE, temporal], [one, two]))
    [together] = harvest(model, [SITE, temporal], [packed])
    assert together.documents.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert together.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    close(together[SITE], joined(apart, SITE), 1e-5)
    close(together[temporal].dense(), joined(apart, temporal), 1e-4)
    [after] = list(harvest(model, SITE, [packed, one]))[1:]
    assert after.documents.tolist() == [2, 2, 2, 2]
