"""The SAEs of one repository as a mapping, pinned to one commit and loaded on request."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakValueDictionary

from ..errors import CheckpointError, InputError, UnknownNameError, did_you_mean, unknown_name
from ..formats import locate_sae, open_at, sae_addresses
from ..functional.short_repr import few_lines
from ..hub.location import Location
from ..modeling.checkpoint import Checkpoint
from ..modeling.loading import PLACE_ARGUMENTS, load
from ..modeling.model import SAEModel

LOADING_ARGUMENTS = ("latents", "dtype", "torch_dtype", "device_map", "max_memory")
CONNECTIONS = 8
SHOWN = 12

_log = logging.getLogger(__name__)


class SAESet(Mapping[str, SAEModel]):
    """The SAEs of a repository (or of a folder in it) by address; ``sae_set["resid_post.3"]`` finds one by its site.

    Addresses need one listing, sites and configurations the headers of the files; weights are read when an SAE is
    requested. The set holds only weak references to SAEs: one that is still in use is returned again, another is
    loaded again. So a loop over all of them needs the memory of one.

    Build one with `from_pretrained`.

    Args:
        location: folder of the SAEs.
        addresses: addresses of the SAEs in the set.
        variant: which of several sets of weights.
        options: loading arguments of `SAEModel.from_pretrained`.
    """

    def __init__(
        self, location: Location, addresses: Iterable[str], options: Mapping[str, Any], variant: str | None = None
    ) -> None:
        self.location = location
        self._addresses = tuple(addresses)
        self._options = dict(options)
        self._variant = variant
        self._described: dict[str, Checkpoint] = {}
        self._unusable: dict[str, CheckpointError] = {}
        self._loaded: WeakValueDictionary[str, SAEModel] = WeakValueDictionary()

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike[str],
        subfolder: str = "",
        *,
        sites: str | Sequence[str] | None = None,
        addresses: str | Sequence[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        variant: str | None = None,
        **options: Any,
    ) -> SAESet:
        """Pin a repository to a commit and list its SAEs; no weights are read.

        Args:
            repo: repository id, ``repository@revision``, or folder.
            subfolder: include only SAEs in this folder.
            sites: include only SAEs at these sites, such as ``"resid_post.3"`` or ``"resid_post.*"``. Sites are not
                in the listing: this reads the headers of every SAE that `addresses` includes.
            addresses: include only these addresses, such as ``"layer_*/width_16k/average_l0_7?"``.
            revision: branch, tag, ``refs/pr/1`` or commit.
            token: access token; None uses the stored one, False none.
            cache_dir: folder of the Hub cache.
            local_files_only: use only cached files.
            force_download: download files even if they are cached.
            variant: which of several sets of weights.
            **options: for every SAE that is loaded: ``dtype``, ``device_map``, ``latents`` ...

        Raises:
            CheckpointError: if an address that has to be read is not an SAE in a known format.
            InputError: if an argument is not known.
            MissingFileError: if there is no such folder, repository or revision, or no SAE in it.
            UnknownNameError: if no SAE is at one of the given sites or addresses.
        """
        _require_known(options)
        location = locate_sae(
            os.fspath(repo),
            subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        found = sae_addresses(location)
        if location.file is not None:
            found = [address for address in found if address == location.address]
        if not found:
            found = [open_at(location, variant=variant).origin.subfolder]  # or its error, which lists the files
        if addresses is not None:
            wanted = _matching("address", addresses, found)
            found = [address for address in found if address in wanted]
        whole = cls(location, found, options, variant)
        return whole if sites is None else whole._at(sites)

    def _at(self, sites: str | Sequence[str]) -> SAESet:
        """Return the SAEs that read one of the sites.

        Raises:
            UnknownNameError: if no SAE is at one of them.
        """
        sites_of = self._sites_of()
        try:
            wanted = _matching("site", sites, self.sites)
        except UnknownNameError as error:
            raise next(iter(self._unusable.values()), error) from None
        addresses = [address for address in self._addresses if wanted.intersection(sites_of.get(address, ()))]
        chosen = type(self)(self.location, addresses, self._options, self._variant)
        chosen._described = {address: self._described[address] for address in addresses}
        return chosen

    # ------------------------------------------------------------------ contents

    @property
    def repo(self) -> str:
        """Repository id or folder."""
        return self.location.repo

    @property
    def revision(self) -> str | None:
        """The commit; None for a local folder."""
        return self.location.revision

    @property
    def addresses(self) -> list[str]:
        """Folders (or files) of the SAEs, relative to the repository's root, ``layer_2`` before ``layer_10``."""
        return list(self._addresses)

    @property
    def sites(self) -> list[str]:
        """Sites of the SAEs, each once, in the order of the addresses; reads every SAE's headers, once.

        An SAE that cannot be opened is skipped, with a warning; access by its address raises.
        """
        return list(dict.fromkeys(site for sites in self._sites_of().values() for site in sites))

    def describe(self, key: str) -> Checkpoint:
        """Return an SAE's configuration, origin and stored shapes; only headers are read.

        Args:
            key: address or site.
        """
        address = self._address(key)
        if address not in self._described:
            self._described[address] = self._open(address)
        return self._described[address]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the addresses."""
        return iter(self._addresses)

    def __len__(self) -> int:
        """Return the number of SAEs."""
        return len(self._addresses)

    def __contains__(self, key: object) -> bool:
        """Whether an SAE is at this address, or one or several at this site."""
        return key in self._addresses or key in self.sites

    def __repr__(self) -> str:
        """Show the location and the number of SAEs."""
        return few_lines([f"{type(self).__name__}({self.location}, {len(self)} SAEs)"])

    # Mappings compare their values, for which all SAEs would have to be loaded; compare identity instead.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    # ------------------------------------------------------------------ loading

    def __getitem__(self, key: str) -> SAEModel:
        """Load the SAE at an address, or the only one at a site.

        Raises:
            InputError: if several SAEs are at the site.
            UnknownNameError: if there is none.
        """
        address = self._address(key)
        sae = self._loaded.get(address)
        if sae is None:
            sae = self._loaded[address] = self.load(address)
        return sae

    def load(self, key: str, **options: Any) -> SAEModel:
        """Load an SAE with other options than those of the set, such as ``latents=[3, 7]``; a new object each time.

        Args:
            key: address or site.
            **options: ``dtype``, ``device_map``, ``latents`` ...
        """
        _require_known(options)
        # Opened again: an SAE may change its configuration, and open files count the bytes read from them.
        return load(self._open(self._address(key)), None, {**self._options, **options})[0]

    def _open(self, address: str) -> Checkpoint:
        """Find and identify one SAE."""
        try:
            return open_at(self.location.at(address), variant=self._variant)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} To exclude it from a set, pass addresses= that do not match it."
            ) from error

    def _address(self, key: str) -> str:
        """Return the address for a key: the key itself, if it is one, else that of the only SAE at a site."""
        if key in self._addresses:
            return key
        found = [address for address, sites in self._sites_of().items() if key in sites]
        if len(found) > 1:
            raise InputError(
                f"{len(found)} SAEs of {self.location} are at the site {key!r}: {_shown(found)}. Name one by its "
                "address, or narrow the set with addresses=."
            )
        if not found and self._unusable:  # the SAE may be among those that could not be opened
            raise next(iter(self._unusable.values()))
        if not found:
            below = [address for address in self._addresses if address.startswith(f"{key}/")]
            raise unknown_name("SAE", key, below or {*self.sites, *self._addresses})
        return found[0]

    def _sites_of(self) -> dict[str, list[str]]:
        """Return the sites that every SAE reads, by address; SAEs that have not been opened yet are, in parallel."""
        known = {*self._described, *self._unusable}
        unknown = [address for address in self._addresses if address not in known]
        if unknown:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                for address, found in zip(unknown, pool.map(self._open_or_error, unknown), strict=True):
                    if isinstance(found, Checkpoint):
                        self._described[address] = found
                    else:
                        self._unusable[address] = found
                        _log.warning("Skipped in the sites of %s: %s", self.location, found)
        if self._addresses and not self._described:
            raise next(iter(self._unusable.values()))
        usable = [address for address in self._addresses if address in self._described]
        return {address: self._described[address].config.sites_read for address in usable}

    def _open_or_error(self, address: str) -> Checkpoint | CheckpointError:
        """Return one SAE, or the error if it cannot be opened, so that the others still can."""
        try:
            return self._open(address)
        except CheckpointError as error:
            return error


def _require_known(options: Mapping[str, Any]) -> None:
    """Raise unless all options are loading arguments; a configuration key for all SAEs would be wrong for most.

    Raises:
        InputError: with close matches.
    """
    known = ("sites", "addresses", *PLACE_ARGUMENTS, *LOADING_ARGUMENTS)
    for name in options:
        if name not in LOADING_ARGUMENTS:
            raise InputError(
                f"SAESet has no argument {name!r}.{did_you_mean(name, known)} Its loading arguments are "
                f"{', '.join(LOADING_ARGUMENTS)}; to set others, load one SAE with SAEModel.from_pretrained."
            )


def _matching(kind: str, patterns: str | Sequence[str], names: Sequence[str]) -> set[str]:
    """Return the names that match one of the patterns.

    Raises:
        UnknownNameError: for a pattern that matches none.
    """
    wanted: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise unknown_name(kind, pattern, dict.fromkeys(names))
        wanted |= found
    return wanted


def _shown(names: Sequence[str]) -> str:
    """Return names for a message."""
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
