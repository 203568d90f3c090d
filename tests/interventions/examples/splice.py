"""Splice: the activation is replaced by its reconstruction."""

import torch

from hf_gated_sae import Splice

from . import Example

EXAMPLES = {
    "Splice": Example(lambda sae, a, b, model: Splice(sae), lambda sae, a, b, model: lambda x: sae(x).reconstruction),
    "Splice with the error": Example(
        lambda sae, a, b, model: Splice(sae, error=True), lambda *_: torch.clone, changes=False
    ),
}


def plans(sae):
    return [Splice(sae, error=True, rows=1)]


REFUSED = {
    "error neither kept nor lost": (lambda sae: Splice(sae, error="yes"), ["error='yes'", "True or False"]),
    "a model": (lambda sae: Splice(torch.nn.Linear(2, 2)), ["Splice", "Linear", "expected an SAE"]),
}
