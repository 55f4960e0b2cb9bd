"""Where a command finds definitions: with the service, or in a folder it is pointed to. Both have the same methods.

Imports little: a command is started, asks, and ends.
"""

from __future__ import annotations

import errno
import os

from mdevkit.errors import MdevError

from mdevkit_service.definitions import BadDefinition, Definition, Definitions, already_defined

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from typing import Any, Final

    from mdevkit.client import Client

    from mdevkit_service.definitions import Entry

#: Scripts that packages bring.
_PACKAGED: Final = "usr/lib/mdevctl/scripts.d"


class ServiceStore:
    """The service's definitions; see `Definitions` for what the methods do."""

    def __init__(self, client: Client) -> None:
        self._client: Final = client

    @property
    def root(self) -> str:
        """The folder they are in."""
        return str(self._client.get("/v1/version")["definitions"])

    def entries(self, parent: str | None = None) -> list[Entry]:
        """Return every definition (of a parent)."""
        return self._get({"parent": parent})

    def find(self, uuid: str, parent: str | None = None) -> list[Entry]:
        """Return the definitions of a device."""
        return self._get({"uuid": uuid, "parent": parent})

    def put(self, definition: Definition, *, create: bool = False, tag: str | None = None) -> Definition:
        """Store a definition. Keys we do not know are kept by the service."""
        headers = {"if_none_match": "*"} if create else {"if_match": tag} if tag is not None else {}
        body = definition.config | {name: value for name, value in definition.extra.items() if name == "owner"}
        try:
            self._client.put(_path(definition.parent, definition.uuid), body, **headers)
        except MdevError as error:
            if create and error.errno == errno.EEXIST:
                raise already_defined(definition.parent, definition.uuid) from None
            raise
        return definition

    def remove(self, parent: str, uuid: str) -> None:
        """Remove a definition."""
        self._client.delete(_path(parent, uuid))

    def _get(self, query: dict[str, str | None]) -> list[Entry]:
        terms = "".join(f"&{name}={quote(value)}" for name, value in query.items() if value is not None)
        return [_entry(facts) for facts in self._client.get(f"/v1/definitions?drift=0{terms}")]


Store = Definitions | ServiceStore


def quote(text: str) -> str:
    """Return `text` as part of a path or a query."""
    if text.replace("-", "").replace("_", "").isalnum() and text.isascii():
        return text
    from urllib.parse import quote as quote_all  # takes as long to import as a request takes

    return quote_all(text, safe="")


def _path(parent: str, uuid: str) -> str:
    return f"/v1/definitions/{quote(parent)}/{uuid}"


def _entry(facts: dict[str, Any]) -> Entry:
    if not facts["mdev_type"]:
        error = facts["error"] or "mdev_type is empty"
        return BadDefinition(facts["parent"], facts["uuid"], facts["path"], error, facts["tag"])
    owner = {"owner": facts["owner"]} if facts.get("owner") is not None else {}
    return Definition(
        facts["parent"],
        facts["uuid"],
        facts["mdev_type"],
        facts["start"],
        facts["attrs"],
        owner,
        path=facts["path"],
        source=facts["tag"],
    )


def find_store(client: Client) -> tuple[Store, str]:
    """Return the definitions to use, and where packages' scripts are: below $MDEVCTL_ENV_ROOT where that is set."""
    root = os.environ.get("MDEVCTL_ENV_ROOT")
    if root:
        return Definitions(os.path.join(root, "etc/mdevctl.d")), os.path.join(root, _PACKAGED)  # noqa: PTH118
    return ServiceStore(client), f"/{_PACKAGED}"
