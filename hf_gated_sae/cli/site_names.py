"""Parsing names of sites, including those of other libraries."""

from __future__ import annotations

from ..errors import SiteError, did_you_mean


def site_of(name: str) -> str:
    """Return the index's name of a site, or of a kind of sites.

    Args:
        name: a name of this package, such as ``"resid_post"`` or ``"resid_post.12"``, or one that
            `hf_gated_sae.sites.read_name` reads, with or without layer: ``"blocks.12.hook_resid_post"``,
            ``"model.layers.12"``.

    Returns:
        ``"resid_post.12"`` or ``"resid_post"``. A name similar to one of this package is returned unchanged, so that
        the search reports close matches.

    Raises:
        SiteError: if no library has a similar name; the message lists close matches.

    >>> site_of("blocks.12.hook_resid_post"), site_of("hook_resid_pre")
    ('resid_post.12', 'resid_pre')
    """
    from ..catalog.index_search import SITES
    from ..sites import read_name

    kind = name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name
    if kind in SITES:
        return name
    try:
        return str(read_name(name))
    except SiteError as error:
        try:
            return str(read_name(name, layer=0)).removesuffix(".0")
        except SiteError:
            if did_you_mean(kind, SITES):
                return name
            raise error from None
