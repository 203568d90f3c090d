"""The README of hf_gated_sae/training has the results of the plan's arithmetic, which agrees with the code."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import hf_gated_sae
from hub_scripts.training_plan import PRODUCTS, Job, Machine, main, plan, plans, table
from tests.training.worlds import build

README = (Path(hf_gated_sae.__file__).parent / "training" / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_table_that_the_script_prints(capsys):
    main()
    printed = capsys.readouterr().out.strip()
    assert printed == table(plans()) and printed in README


def test_the_readme_states_the_assumptions():
    machine, job = Machine(), Job()
    for number in (
        f"{machine.operations / 1e12:.0f} TFLOP/s",
        f"{machine.bandwidth / 1e12:.1f} TB/s",
        f"{machine.memory / 1e9:.0f} GB",
        f"{machine.link / 1e9:.0f} GB/s",
        f"{machine.network / 1e9:.0f} GB/s",
        f"{machine.utilisation:.0%}",
        f"${machine.price:.0f}",
        f"{job.d_sae:,}",
        f"layer {job.layer}",
    ):
        assert number in README, number


def test_the_layouts_fit():
    for each in plans():
        assert sum(each.memory.values()) < Machine().memory


def test_a_dense_step_takes_the_planned_number_of_products():
    sae = build("gated", 8, 48).requires_grad_(True)
    x = torch.randn(16, 8)
    with FlopCounterMode(display=False) as counter:
        sae.training_loss(x, sparsity_coefficient=1.0).total.backward()
    product = 2 * 16 * 8 * 48
    assert PRODUCTS <= counter.get_total_flops() / product < PRODUCTS + 0.1  # the rest centres the input


def test_twice_the_devices_do_no_more_than_twice_the_work():
    job = Job(tokens=131_072)
    one, two = (plan(devices, 8, job=job) for devices in (8, 16))
    assert 1 < two.tokens_per_second / one.tokens_per_second < 2
    assert two.seconds["SAE"] == pytest.approx(one.seconds["SAE"] / 2)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(path):
    assert (Path(hf_gated_sae.__file__).parent / "training" / path).exists()
