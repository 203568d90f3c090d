"""Sites as users of any library write them."""

from __future__ import annotations

from ..errors import SiteError, did_you_mean


def site_of(name: str) -> str:
    """Return a site, or a kind of sites, as the index names it.

    Args:
        name: one of ours, such as ``"resid_post"`` or ``"resid_post.12"``, or what `hf_gated_sae.sites.read_name`
            reads, with its layer or without: ``"blocks.12.hook_resid_post"``, ``"model.layers.12"``.

    Returns:
        ``"resid_post.12"`` or ``"resid_post"``; a name that is like one of ours is returned as it is, for what
        searches to say what there is.

    Raises:
        SiteError: if nobody's name is like it; the message lists close matches.

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
