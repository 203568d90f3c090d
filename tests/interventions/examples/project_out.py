"""ProjectOut: directions are removed."""

import torch

from hf_gated_sae import ProjectOut
from tests.hooks.support import SITE, make_sae
from tests.support.tiny_models import HIDDEN

from . import Example

VECTOR = torch.linspace(-1, 1, HIDDEN)


def removed(directions):
    """Return a function that removes the span of some directions ``[n, d]``."""
    unit = torch.linalg.qr(directions.T).Q
    return lambda x: x - (x @ unit.to(x)) @ unit.T.to(x)


EXAMPLES = {
    "ProjectOut": Example(
        lambda sae, a, b, model: ProjectOut(sae, [a, b]), lambda sae, a, b, model: removed(sae.W_dec[[a, b]])
    ),
    "ProjectOut of a vector": Example(
        lambda sae, a, b, model: ProjectOut(SITE, VECTOR), lambda sae, a, b, model: removed(VECTOR.double()[None])
    ),
}


def plans(sae):
    return [
        ProjectOut(SITE, torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0))),
        ProjectOut(sae, [3, 4]),
    ]


def sae_with_equal_rows():
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[1] = 2 * sae.W_dec[2]
    return sae


REFUSED = {
    "no latents": (lambda sae: ProjectOut(sae, []), ["no latents", "0 .. 63"]),
    "the same twice over": (
        lambda sae: ProjectOut(sae_with_equal_rows(), [1, 2]),
        ["2 directions", "only 1 dimensions"],
    ),
    "zeros": (lambda sae: ProjectOut(SITE, torch.zeros(HIDDEN)), ["1 directions", "only 0 dimensions"]),
    "a word": (lambda sae: ProjectOut(SITE, "up"), ["ProjectOut", "'up'", "[d] or [n, d]"]),
}
