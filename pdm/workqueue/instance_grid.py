"""A test grid as an instance sees it: what its ``grid.json`` says about sites, authorities and users."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen


class InstanceError(Exception):
    """An instance cannot be made or changed as asked; the text says why and what to do."""


@frozen
class Identity:
    """A certificate to call the service with."""

    name: str
    certificate: Path
    key: Path


@frozen
class Grid:
    """A test grid, as its ``grid.json`` describes it.

    Attributes:
        folder: of the grid.
        trust: its hashed directory of authorities.
        sites: name → what is said about the site.
        users: who can act at its sites, and so should call the service.
    """

    folder: Path
    trust: Path
    sites: Mapping[str, Mapping[str, Any]]
    users: Sequence[Identity]

    @classmethod
    def read(cls, folder: Path) -> Grid:
        """Read the description of a grid.

        Raises:
            InstanceError: there is none, or it is not what it should be.
        """
        file = folder / "grid.json"
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
            return cls(
                folder,
                Path(said["ca_dir"]),
                {str(name): dict(site) for name, site in said["sites"].items()},
                [Identity(str(name), Path(user["cert"]), Path(user["key"])) for name, user in said["users"].items()],
            )
        except OSError as error:
            raise InstanceError(
                f"{file}: {error.strerror}; start a grid with: python -m pdm.testgrid up {folder}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InstanceError(f"{file} is no description of a grid: {type(error).__name__}: {error}") from error
