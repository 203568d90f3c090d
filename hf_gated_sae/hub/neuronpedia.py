"""The names of dashboards on Neuronpedia, and which SAE of the index each is of."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import InputError, SAEError, UnknownNameError, did_you_mean, unknown_name
from .index import KnownSAE, releases

PREFIX = "neuronpedia:"
FORM = "neuronpedia:MODEL/SAE, such as 'neuronpedia:gemma-2-2b/12-gemmascope-res-16k'"

_PAGE = re.compile(r"(?:https?://)?(?:www\.)?neuronpedia\.org/", re.IGNORECASE)


def sae_of_dashboards(text: str) -> KnownSAE | None:
    """Return the SAE that a name of dashboards is of.

    Args:
        text: ``gemma-2-2b/12-gemmascope-res-16k``, the same after ``neuronpedia:``, or the address of a page; letter
            case does not matter. Of the page of one latent, the latent's number is not used.

    Returns:
        The SAE; None for a text that is neither marked as Neuronpedia's nor in the index: it may be a repository.

    Raises:
        InputError: if it is marked as Neuronpedia's and has another form, or several SAEs have that name.
        UnknownNameError: if it is marked as Neuronpedia's and not in the index.

    >>> sae_of_dashboards("https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/1234").address
    'layer_12/width_16k/average_l0_82'
    """
    rest = text.removeprefix(PREFIX) if text.startswith(PREFIX) else _PAGE.sub("", text, count=1)
    marked = rest != text
    parts = re.split(r"[?#]", rest)[0].strip("/").split("/")
    if len(parts) == 3 and parts[2].isdigit():
        del parts[2]
    if len(parts) != 2 or not all(parts):
        if marked:
            raise InputError(f"Given {text!r}; expected {FORM}, or the address of its page.")
        return None
    name = "/".join(parts)
    found = {(sae.repo, sae.address): sae for sae in _shown(parts[0]) if _same(sae.neuronpedia, name)}
    if len(found) > 1:
        raise InputError(
            f"{name!r} is the Neuronpedia name of several SAEs. Pass the repository and the address of one: "
            f"{'; '.join(f'{repo!r}, {address!r}' for repo, address in found)}."
        )
    if not found and marked:
        models = {model for release in releases().values() for model in release.dashboard_models}
        raise unknown_dashboards(name) or unknown_name("model of Neuronpedia", parts[0], models)
    return next(iter(found.values()), None)


def unknown_dashboards(name: str) -> SAEError | None:
    """Return the error for a name that is not in the index; None unless it begins as the dashboards of a known model.

    Args:
        name: such as ``"gemma-2-2b/12-gemmascope-res-17k"``.
    """
    known = [sae.neuronpedia for sae in _shown(name.split("/")[0])] if "/" in name else []
    if not known:
        return None
    base_model = next((sae.base_model for sae in _shown(name.split("/")[0])), None)
    return UnknownNameError(
        f"No SAE is known by the name {name!r} on Neuronpedia.{did_you_mean(name, known)} search({base_model!r}) "
        "lists those of that model; one that is not in the index is loaded by its repository."
    )


def _shown(model: str) -> Iterator[KnownSAE]:
    """Return the SAEs that have dashboards of a model, without spelling out releases of other ones."""
    for release in releases().values():
        if model.lower() in release.dashboard_models:
            yield from (sae for sae in release.saes.values() if _same((sae.neuronpedia or "").split("/")[0], model))


def _same(known: str | None, given: str) -> bool:
    return known is not None and known.lower() == given.lower()
