"""Read a name of another library into a site, in a model where the name alone does not tell."""

from __future__ import annotations

from torch import nn

from ...errors import SiteError, did_you_mean
from ..resolver import resolve
from ..site import Site
from ..site_map import SiteMap
from ._meanings import explain, meanings
from .base import LAST, LAYER, Library, Meaning, libraries


def read(
    name: str, library: str | None = None, *, layer: int | None = None, model: nn.Module | SiteMap | None = None
) -> Site:
    """Return the site that a name of another library stands for.

    Args:
        name: such as ``"blocks.12.hook_resid_post"``, ``"layers_output[3]"`` or ``"layers.3.mlp"``.
        library: whose name it is, one of `libraries`. If None, one of ours stays what it is, and otherwise all
            libraries that know the name must mean the same.
        layer: the block, where the name does not say it; also put in place of ``{layer}`` in it.
        model: the model, or its sites; needed where a name stands for another tensor in every family.

    Returns:
        The site; in a given model, only one that is proven there.

    Raises:
        SiteError: if the name is unknown or ambiguous, the layer or the model is missing, or the site is not proven.
        UnknownNameError: if the library is unknown.

    >>> str(read("blocks.3.ln2.hook_normalized"))
    'resid_mid.3|norm_no_gain'
    >>> str(read("mlp_out_post.3", "interp_engine"))
    'mlp_out.3'
    """
    if not isinstance(name, str):
        raise SiteError(f"A place is named by a string, not by {name!r}.")
    text = name if layer is None else name.replace(LAYER, str(layer))
    meaning: Meaning | None
    if library is None:
        meaning = _ours(text) or _agreed(text)
    else:
        meaning = _of(libraries[library], text)
        if meaning is None:
            names = _known(libraries[library])
            raise SiteError(
                f"{name!r} is not a name of {libraries[library].title} that is known here."
                f"{did_you_mean(text, names)} Known: {', '.join(names)}."
            )
    sites = model if isinstance(model, SiteMap) or model is None else resolve(model)
    return _site(name, meaning, layer, sites)


def _ours(text: str) -> Meaning | None:
    """Return a name of our own grammar as it is."""
    try:
        return Meaning(str(Site.parse(text)))
    except SiteError:
        return None


def _agreed(text: str) -> Meaning:
    """Return what all libraries mean by a name that know it.

    Raises:
        SiteError: if none does, or they do not agree.
    """
    found = meanings(text)
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise SiteError(f"{text!r} is {explain(text)}: say which, with library=..., of {', '.join(libraries)}.")
    names = [name for library in libraries.values() for name in library.known]
    titles = ", ".join(library.title for library in libraries.values())
    raise SiteError(f"{text!r} is no site, and no name of {titles} that is known here.{did_you_mean(text, names)}")


def _of(library: Library, text: str) -> Meaning | None:
    """Return what a name stands for in a library, its own names before the ones that it borrows."""
    meaning = library.meaning(text)
    for other in library.borrows:
        meaning = meaning or libraries[other].meaning(text)
    return meaning


def _known(library: Library) -> tuple[str, ...]:
    return (*library.known, *(name for other in library.borrows for name in libraries[other].known))


def _site(name: str, meaning: Meaning, layer: int | None, sites: SiteMap | None) -> Site:
    """Return the site that is meant."""
    if None not in (meaning.layer, layer) and meaning.layer != layer:
        raise SiteError(f"{name!r} names layer {meaning.layer}, and layer={layer} was given; leave one out.")
    text, block = meaning.site, layer if meaning.layer is None else meaning.layer
    if LAYER in text:
        if block is None:
            raise SiteError(f"{name!r} stands for {meaning} in some block L; say which, with layer=....")
        text = text.replace(LAYER, str(block))
    if sites is None and (LAST in text or meaning.of_module):
        raise SiteError(
            f"{name!r} stands for {meaning}, which is at another place in every family: give the model, with "
            "model=..., or name the place by its module path, such as 'model.layers.0.mlp.output'."
        )
    if sites is None:
        return Site.parse(text)
    slot = sites[text.replace(LAST, str(max(sites.n_layers - 1, 0)))]
    return Site(slot.place.path, port="output") if meaning.of_module else slot.site
