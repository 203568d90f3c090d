from __future__ import annotations

import json
import warnings
from itertools import islice

import pytest
import torch
from transformers import HfArgumentParser, PrinterCallback, TrainerCallback

from hf_gated_sae import GatedSAE, SAEModel
from hf_gated_sae.errors import CheckpointError, InputError, ShapeError, UnknownNameError
from hf_gated_sae.functional import FidelityAccumulator
from hf_gated_sae.training import ModelActivations, SAETrainer, SAETrainingArguments
from hf_gated_sae.training.streams import TensorActivations
from tests.support.tiny_models import tiny_model

from .worlds import D_IN, FEATURES, activations, build, features

pytestmark = pytest.mark.slow


def quiet(trainer: SAETrainer) -> SAETrainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


def measured(sae: SAEModel, x: torch.Tensor):
    accumulator = FidelityAccumulator(sae.config.d_sae, sae.b_dec)
    with torch.no_grad():
        output = sae(x)
    accumulator.update(x, output.reconstruction, output.latents)
    return accumulator.compute()


def recovered(sae: SAEModel) -> float:
    """Return the share of true features that match some decoder row with a cosine above 0.9."""
    return ((sae.W_dec @ features().T).max(0).values > 0.9).float().mean().item()


class Watch(TrainerCallback):
    """Records norms and gradients of decoder rows, and the learning rate, at every step."""

    def __init__(self) -> None:
        self.norm_errors: list[float] = []
        self.parallel: list[float] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        rows = kwargs["model"].W_dec
        along = (rows.grad * rows).sum(-1).abs().max() / rows.grad.norm(dim=-1).max()
        self.parallel.append(along.item())

    def on_step_end(self, args, state, control, **kwargs):
        self.norm_errors.append((kwargs["model"].W_dec.norm(dim=-1) - 1).abs().max().item())
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A gated SAE and a 1.5 times wider baseline, trained to about the same L0 on the same activations."""
    train, held_out = activations(60_000, seed=0), activations(5_000, seed=1)
    results = {}
    for name, width, coefficient in (("gated", FEATURES, 2.0), ("standard", 3 * FEATURES // 2, 3.0)):
        sae = build(name, D_IN, width)
        args = SAETrainingArguments(
            output_dir=str(tmp_path_factory.mktemp(name)),
            use_cpu=True,
            max_steps=1500,
            activation_batch_size=512,
            sparsity_coefficient=coefficient,
            learning_rate=3e-3,
            warmup_steps=50,
            sparsity_warmup_steps=200,
            resample_steps=[400],
            dead_after_activations=50_000,
            lr_dip_steps=100,
            logging_steps=300,
        )
        before = measured(sae, held_out)
        trainer = quiet(SAETrainer(sae, args, train))
        trainer.train()
        results[name] = (sae, before, measured(sae, held_out), trainer)
    return results


def test_training_explains_unseen_activations_and_finds_their_features(trained):
    for name, (sae, before, after, _) in trained.items():
        assert after.fvu < 0.4 and after.fvu < 0.5 * before.fvu, name
        assert after.l0 < 8, name
        assert recovered(sae) > 0.75 > 10 * recovered(build(name, D_IN, sae.config.d_sae)), name


def test_gated_is_unbiased_where_the_baseline_shrinks(trained):
    gated, standard = trained["gated"][2], trained["standard"][2]
    assert abs(gated.l0 - standard.l0) < 1.5
    assert 0.97 <= gated.relative_reconstruction_bias <= 1.03
    assert standard.relative_reconstruction_bias < 0.8
    assert gated.fvu < standard.fvu


def test_the_trained_sae_reads_raw_activations_and_has_their_statistics(trained):
    sae = trained["gated"][0]
    x = activations(60_000, seed=0)
    latents = sae.encode(x)
    torch.testing.assert_close(sae.max_activation, latents.amax(0))
    torch.testing.assert_close(sae.mean_activation, latents.mean(0), rtol=1e-4, atol=1e-6)
    assert sae.config.recorded_tokens == len(x)
    assert not sae.training
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.config.d_sae))


def test_every_term_and_metric_is_logged(trained):
    for name, terms in (
        ("gated", {"reconstruction", "sparsity", "auxiliary"}),
        ("standard", {"reconstruction", "sparsity"}),
    ):
        logs = [entry for entry in trained[name][3].state.log_history if "loss" in entry]
        assert [entry["step"] for entry in logs] == [300, 600, 900, 1200, 1500]
        for entry in logs:
            assert {key.removeprefix("loss_") for key in entry if key.startswith("loss_")} == terms
            assert {"l0", "fvu", "relative_reconstruction_bias", "dead_latents", "learning_rate"} <= set(entry)
        assert logs[-1]["fvu"] < logs[0]["fvu"]


def test_decoder_rows_have_unit_norm_after_every_step(architecture, arguments):
    watch = Watch()
    sae = build(architecture, D_IN)
    unit = {} if sae.homogeneous else {"activation_scale": "none"}
    quiet(SAETrainer(sae, arguments(max_steps=25, **unit), activations(2000, seed=0), callbacks=[watch])).train()
    assert len(watch.norm_errors) == 25
    assert max(watch.norm_errors) < 1e-6
    assert max(watch.parallel) < 1e-5


def test_without_the_constraint_decoder_rows_change_their_length(arguments):
    watch = Watch()
    args = arguments(max_steps=25, unit_norm_decoder=False)
    quiet(SAETrainer(build("gated", D_IN), args, activations(2000, seed=0), callbacks=[watch])).train()
    assert max(watch.norm_errors) > 1e-3


def test_dead_latents_are_resampled_and_the_learning_rate_dips(arguments):
    sae = build("gated", D_IN)
    sae.b_gate.data[:10] = -1e6  # the gate of these can never open
    watch = Watch()
    args = arguments(
        max_steps=40, resample_steps=[20], dead_after_activations=19 * 64, lr_dip_steps=10, learning_rate=1e-3
    )
    trainer = quiet(SAETrainer(sae, args, activations(2000, seed=0), callbacks=[watch]))
    trainer.train()
    assert trainer.trainees[""].remedy.resampled >= 10
    assert sae.b_gate.min() > -1e5
    rates = [rate / 1e-3 for rate in watch.rates]  # each is the rate of the next step
    assert rates[:19] == pytest.approx([1.0] * 19)
    assert rates[19] == pytest.approx(0.1)
    assert rates[24] == pytest.approx(0.55)
    assert rates[30:] == pytest.approx([1.0] * 10)


@pytest.mark.parametrize(("scale", "norm"), [("sqrt_d_in", D_IN**0.5), ("unit", 1.0), ("none", None)])
def test_training_sees_activations_of_the_requested_size(arguments, scale, norm):
    seen = []

    class Spy(SAETrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append((inputs[""] * self.trainees[""].scale_in).square().sum(-1).mean().sqrt().item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    x = activations(2000, seed=0, scale=100.0)
    quiet(Spy(build("gated", D_IN), arguments(activation_scale=scale, activation_batch_size=1000), x)).train()
    expected = norm if norm is not None else x.square().sum(-1).mean().sqrt().item()
    assert seen == pytest.approx([expected] * 10, rel=0.05)


@pytest.mark.parametrize("name", ["gated", "jumprelu", "batch_topk"])
def test_the_unit_of_the_activations_does_not_matter(arguments, name):
    """The same run on activations a thousand times larger gives the same SAE in their unit."""
    saes = []
    for scale in (1.0, 1000.0):
        sae = build(name, D_IN)
        quiet(SAETrainer(sae, arguments(max_steps=30), activations(2000, seed=0, scale=scale))).train()
        saes.append(sae)
    x = activations(100, seed=5, scale=1.0)
    small, large = saes[0](x).reconstruction, saes[1](1000 * x).reconstruction / 1000
    torch.testing.assert_close(large, small, rtol=1e-3, atol=1e-3)


def test_b_dec_starts_from_the_mean(arguments):
    x = activations(500, seed=0) + 7
    sae = build("gated", D_IN)
    args = arguments(max_steps=1, learning_rate=0.0)
    quiet(SAETrainer(sae, args, x)).train()
    torch.testing.assert_close(sae.b_dec.data, x.mean(0), rtol=1e-4, atol=1e-4)
    sae.b_dec.data.fill_(3.0)  # a b_dec from an earlier training is kept
    quiet(SAETrainer(sae, args, x)).train()
    torch.testing.assert_close(sae.b_dec.data, torch.full((D_IN,), 3.0))


def test_a_frozen_b_dec_is_kept(arguments):
    baseline = build("standard", D_IN)
    sae = GatedSAE.from_standard(baseline)
    args = arguments(objective={"rescale_and_shift": True}, dead_latent_remedy=None, learning_rate=1e-2)
    quiet(SAETrainer(sae, args, activations(500, seed=0) + 7)).train()
    for name in ("W_enc_T", "W_dec", "b_dec"):
        assert torch.equal(getattr(sae, name), getattr(baseline, name)), name
    assert sae.r_mag.any()


def test_a_result_that_cannot_be_written_stays_in_memory(arguments, tmp_path):
    class Block(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            (tmp_path / "run" / "config.json").mkdir(parents=True)  # in place of the file

    sae = build("gated", D_IN)
    with pytest.raises(CheckpointError, match="could not be written .* still in memory: free disk space"):
        quiet(SAETrainer(sae, arguments(), activations(500, seed=0), callbacks=[Block()])).train()
    sae.save_pretrained(tmp_path / "elsewhere")
    assert SAEModel.from_pretrained(tmp_path / "elsewhere").config.recorded_tokens


def test_a_trainer_trains_once(arguments):
    trainer = quiet(SAETrainer(build("gated", D_IN), arguments(), activations(500, seed=0)))
    trainer.train()
    with pytest.raises(InputError, match="has trained already"):
        trainer.train()


def test_normalising_the_decoder_first_gives_a_warning(arguments):
    sae = build("gated", D_IN)
    sae.W_dec.data *= 2
    with pytest.warns(UserWarning, match="norms of 2 to 2 and are normalised to 1"):
        quiet(SAETrainer(sae, arguments(), activations(500, seed=0))).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quiet(SAETrainer(sae, arguments(), activations(500, seed=0))).train()


def test_checkpoints_load_as_saes_and_training_resumes(arguments, tmp_path):
    x = activations(2000, seed=0, scale=50.0)
    sae = build("gated", D_IN)
    settings = {"save_strategy": "steps", "save_steps": 10, "recorded_activations": 0}
    trainer = quiet(SAETrainer(sae, arguments(max_steps=10, **settings), x))
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-10"
    loaded = SAEModel.from_pretrained(checkpoint)
    assert torch.equal(loaded(x[:50]).reconstruction, sae(x[:50]).reconstruction)

    files = {file.name for file in checkpoint.iterdir()}
    assert "training_args.bin" not in files and not (tmp_path / "run" / "README.md").exists()
    recipe = json.loads((checkpoint / "training_args.json").read_text())
    assert recipe["adam_beta1"] == 0.0 and recipe["sparsity_coefficient"] == 1.0
    assert str(tmp_path) not in json.dumps(recipe)

    resumed = build("gated", D_IN)
    trainer = quiet(SAETrainer(resumed, arguments(max_steps=20, **settings), x))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 20
    assert measured(resumed, x).fvu < measured(sae, x).fvu < 1


def test_an_interrupted_run_leaves_an_sae_that_reads_raw_activations(arguments):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    x = activations(2000, seed=0, scale=1000.0)
    sae = build("gated", D_IN)
    with pytest.raises(KeyboardInterrupt):
        quiet(
            SAETrainer(sae, arguments(learning_rate=1e-4, statistics_activations=2000), x, callbacks=[Stop()])
        ).train()
    torch.testing.assert_close(sae.b_dec.data, x.mean(0), rtol=0.02, atol=2.0)


def test_a_run_leaves_the_language_model_unchanged(arguments):
    model = tiny_model("llama")
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = list(torch.randint(3, 97, (8, 4, 16), generator=torch.Generator().manual_seed(0)))
    stream = ModelActivations(model, "resid_post.1", batches, buffer_size=256)
    sae = build("gated", 32, site="resid_post.1")
    x = torch.cat([batch["resid_post.1"] for batch in islice(stream.batches(64), 4)])
    before = measured(sae, x).fvu
    quiet(SAETrainer(sae, arguments(max_steps=40, sparsity_coefficient=0.3), stream)).train()
    assert measured(sae, x).fvu < 0.7 * before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_half_precision_stream_trains_a_float32_sae(arguments):
    sae = build("gated", D_IN)
    x = activations(2000, seed=0)
    quiet(SAETrainer(sae, arguments(max_steps=20), TensorActivations(x.half()))).train()
    assert sae.dtype == torch.float32 and measured(sae, x).fvu < 1


def test_the_configuration_is_saved_without_foreign_keys(arguments, tmp_path):
    sae = build("gated", D_IN, site="resid_post.1")
    quiet(SAETrainer(sae, arguments(), activations(500, seed=0))).train()
    sae.save_pretrained(tmp_path / "sae")
    assert "use_cache" not in (tmp_path / "sae" / "config.json").read_text()
    assert SAEModel.from_pretrained(tmp_path / "sae").config.site == "resid_post.1"


def test_every_argument_is_also_a_flag(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--resample_steps", "10", "20", "--lr_dip", "0.5"]
    (args,) = HfArgumentParser(SAETrainingArguments).parse_args_into_dataclasses(flags)
    assert args.resample_steps == [10, 20] and args.lr_dip == 0.5
    assert (args.adam_beta1, args.adam_beta2, args.learning_rate) == (0.0, 0.999, 3e-4)
    assert (args.max_grad_norm, args.report_to, args.dead_latent_remedy) == (0.0, [], "resample")


def test_unusable_settings_are_explained(arguments):
    with pytest.raises(UnknownNameError, match="Did you mean 'resample'"):
        arguments(dead_latent_remedy="resampel")
    with pytest.raises(UnknownNameError, match="activation scale"):
        arguments(activation_scale="huge")
    with pytest.raises(InputError, match="max_steps is -1"):
        arguments(max_steps=-1)
    with pytest.raises(InputError, match="push_to_hub"):
        arguments(push_to_hub=True)


def test_unusable_activations_are_explained(arguments):
    with pytest.raises(ShapeError, match="width 5 to read and 5 to write; this SAE reads d_in = 32"):
        quiet(SAETrainer(build("gated", D_IN), arguments(), torch.randn(500, 5))).train()
    broken = activations(500, seed=0)
    broken[7, 3] = float("inf")
    with pytest.raises(InputError, match="1 of 500 activations are NaN or infinite"):
        quiet(SAETrainer(build("gated", D_IN), arguments(), broken)).train()
    with pytest.raises(InputError, match="all sampled|All sampled"):
        quiet(SAETrainer(build("gated", D_IN), arguments(), torch.zeros(500, D_IN))).train()


def test_a_dip_is_counted_in_steps_of_the_run(arguments):
    """The schedule sees fewer steps if some are skipped, as with float16."""
    made = quiet(SAETrainer(build("gated", D_IN), arguments(lr_dip=0.1, lr_dip_steps=4), activations(500, seed=0)))
    made.create_optimizer_and_scheduler(10)
    rates = []
    for done in range(10):
        made.state.global_step = done
        made.optimizer.step()
        if done == 4:
            made.trainees[""].dip.start(5)
        if done not in (1, 2):
            made.lr_scheduler.step()
        rates.append(made.lr_scheduler.get_last_lr()[0] / made.args.learning_rate)
    assert made.lr_scheduler.last_epoch == 8
    assert rates[:4] == [1.0] * 4 and rates[4] == pytest.approx(0.1) and rates[8:] == [1.0] * 2
    assert rates[4:9] == sorted(rates[4:9])


def test_the_schedules_of_transformers_work(arguments):
    watch = Watch()
    args = arguments(lr_scheduler_type="linear", learning_rate=1.0e-3)
    quiet(SAETrainer(build("gated", D_IN), args, activations(500, seed=0), callbacks=[watch])).train()
    assert watch.rates == pytest.approx([1e-3 * (1 - step / 10) for step in range(1, 11)])
