"""SAEs of the index by the names of their dashboards on Neuronpedia."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import InputError, SAEError, UnknownNameError, did_you_mean, unknown_name
from .index import KnownSAE, releases

PREFIX = "neuronpedia:"
FORM = "neuronpedia:MODEL/SAE, such as 'neuronpedia:gemma-2-2b/12-gemmascope-res-16k'"

_PAGE = re.compile(r"(?:https?://)?(?:www\.)?neuronpedia\.org/", re.IGNORECASE)


def sae_of_dashboards(text: str) -> KnownSAE | None:
    """Return the SAE of a dashboard name.

    Args:
        text: ``gemma-2-2b/12-gemmascope-res-16k``, the same after ``neuronpedia:``, or the URL of a page; letter case
            does not matter. In the URL of one latent's page, the latent's number is ignored.

    Returns:
        The SAE; None if the text is not in the index and neither a URL nor prefixed: it may be a repository.

    Raises:
        InputError: if a prefixed name or URL has another form, or several SAEs have that name.
        UnknownNameError: if a prefixed name or URL is not in the index.

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
            raise InputError(f"Given {text!r}; expected {FORM}, or the URL of its page.")
        return None
    name = "/".join(parts)
    found = {(sae.repo, sae.address): sae for sae in _with_dashboards(parts[0]) if _same(sae.neuronpedia, name)}
    if len(found) > 1:
        raise InputError(
            f"{name!r} is the Neuronpedia name of several SAEs. Pass the repository and address of one: "
            f"{'; '.join(f'{repo!r}, {address!r}' for repo, address in found)}."
        )
    if not found and marked:
        models = {model for release in releases().values() for model in release.dashboard_models}
        raise unknown_dashboards(name) or unknown_name("model of Neuronpedia", parts[0], models)
    return next(iter(found.values()), None)


def unknown_dashboards(name: str) -> SAEError | None:
    """Return the error for a dashboard name that is not in the index; None if its model is unknown, too.

    Args:
        name: such as ``"gemma-2-2b/12-gemmascope-res-17k"``.
    """
    known = [sae.neuronpedia for sae in _with_dashboards(name.split("/")[0])] if "/" in name else []
    if not known:
        return None
    base_model = next((sae.base_model for sae in _with_dashboards(name.split("/")[0])), None)
    return UnknownNameError(
        f"No SAE is known by the name {name!r} on Neuronpedia.{did_you_mean(name, known)} search({base_model!r}) "
        "lists those of that model; to load one that is not in the index, pass its repository."
    )


def _with_dashboards(model: str) -> Iterator[KnownSAE]:
    """Yield the SAEs that have dashboards of a model; releases for other models are not expanded."""
    for release in releases().values():
        if model.lower() in release.dashboard_models:
            yield from (sae for sae in release.saes.values() if _same((sae.neuronpedia or "").split("/")[0], model))


def _same(known: str | None, given: str) -> bool:
    return known is not None and known.lower() == given.lower()
