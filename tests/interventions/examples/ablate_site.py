"""AblateSite: the activation becomes zero, or a constant vector."""

import torch

from hf_gated_sae import AblateSite, Site
from hf_gated_sae.interventions import TokenIds
from tests.hooks.support import SITE
from tests.support.tiny_models import HIDDEN

from . import Example

VECTOR = torch.linspace(0, 1, HIDDEN)
EXAMPLES = {
    "AblateSite": Example(lambda sae, a, b, model: AblateSite(SITE), lambda sae, a, b, model: torch.zeros_like),
    "AblateSite to a vector": Example(
        lambda sae, a, b, model: AblateSite(SITE, VECTOR),
        lambda sae, a, b, model: lambda x: VECTOR.to(x).expand_as(x),
    ),
}


def plans(sae):
    return [
        AblateSite(SITE, VECTOR, positions="generated"),
        AblateSite(Site.parse("resid_post.2|center"), positions=TokenIds([96])),
    ]


REFUSED = {
    "a value that is no tensor": (lambda sae: AblateSite(SITE, 0.0), ["AblateSite", "0.0", "None for zeros"]),
}
