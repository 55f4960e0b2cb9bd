"""What mdevctl's commands do, with the service in sysfs's place. Errors are mdevctl's sentences, with an errno.

A `Manager` belongs to one command, and is used on its only thread.
"""

from __future__ import annotations

import errno
import json
import os

from mdevkit.errors import MdevError

from mdevkit_service.callouts import Callout, Scripts, running
from mdevkit_service.definitions import BadDefinition, Definition, already_defined, from_config, usable
from mdevkit_service.mdevctl.store import ServiceStore, quote

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Final

    from mdevkit.client import Client

    from mdevkit_service.definitions import Attribute
    from mdevkit_service.mdevctl.store import Store

#: How often a change is tried that others get ahead of.
_ATTEMPTS: Final = 20


class Manager:
    """Carries out commands. `warn` is told what goes wrong without ending the command, `pass_on` what scripts complain about."""

    def __init__(
        self, client: Client, store: Store, packaged: str, warn: Callable[[str], None], pass_on: Callable[[str], None]
    ) -> None:
        self._client: Final = client
        self._warn: Final = warn
        self.store: Final = store
        self.scripts: Final = Scripts(packaged, store.root, warn, pass_on)

    # -- looking -------------------------------------------------------------------------------------------------------

    def devices(self, parent: str | None = None) -> list[Definition]:
        """Return the running devices (of a parent), by parent and UUID, without attributes."""
        found = [_running(facts) for facts in self._client.get("/v1/devices")]
        wanted = [device for device in found if parent in {None, device.parent}]
        return sorted(wanted, key=lambda device: (os.fsencode(device.parent), device.uuid))

    def device(self, uuid: str) -> Definition | None:
        """Return a running device."""
        try:
            return _running(self._client.get(f"/v1/devices/{uuid}"))
        except MdevError as error:
            if error.errno != errno.ENODEV:
                raise
        return None

    def parents(self) -> list[dict[str, Any]]:
        """Return the parents with their types, both by name."""
        parents: list[dict[str, Any]] = self._client.get("/v1/parents")
        for parent in parents:
            parent["types"].sort(key=lambda type_: os.fsencode(type_["id"]))
        return sorted(parents, key=lambda parent: os.fsencode(parent["name"]))

    # -- definitions ---------------------------------------------------------------------------------------------------

    def define(
        self,
        *,
        uuid: str | None = None,
        parent: str | None = None,
        type: str | None = None,  # noqa: A002  (mdevctl's word)
        auto: bool = False,
        jsonfile: str | None = None,
        owner: str | None = None,
        force: bool = False,
    ) -> str:
        """Store a new definition and return the device's UUID."""
        active = self.device(uuid) if uuid else None
        uuid = uuid or _new_uuid()
        if jsonfile is not None:
            definition = self._from_file(uuid, parent, jsonfile, f'define device via "{jsonfile}"')
            if self.store.find(uuid, definition.parent):
                message = f"Cowardly refusing to overwrite existing config for {definition.parent}/{uuid}"
                raise MdevError(errno.EEXIST, message, uuid)
        else:
            definition = _wanted(uuid, parent, type, active).changed(start="auto" if auto else "manual")
            if found := self.store.find(uuid, definition.parent):
                raise already_defined(definition.parent, uuid, found[0])
        if owner is not None:
            definition = definition.changed(extra={"owner": owner})
        callout = Callout(self.scripts, definition, force=force)

        def store() -> None:
            known = definition
            if active is not None and jsonfile is None:
                known = definition.changed(attrs=callout.attributes())
            self.store.put(known, create=True)

        callout.around("define", store)
        return uuid

    def undefine(self, *, uuid: str, parent: str | None = None, force: bool = False) -> None:
        """Remove the definitions of a device; ENODEV when there is none, EIO after all have been tried."""
        entries = self.store.find(uuid, parent)
        if not entries:
            raise MdevError(errno.ENODEV, "No devices match the specified uuid", uuid)
        failed = False
        for entry in entries:

            def remove(parent: str = entry.parent) -> None:
                self.store.remove(parent, uuid)

            try:
                if isinstance(entry, BadDefinition):  # of no type that a script could answer for
                    remove()
                else:
                    Callout(self.scripts, entry, force=force).around("undefine", remove)
            except MdevError as error:
                self._warn(f"Undefine of {uuid} on parent {entry.parent} failed with error: {error}")
                failed = True
        if failed:
            raise MdevError(errno.EIO, "Undefine failed", uuid)

    def modify(self, *, live: bool = False, defined: bool = False, **options: Any) -> None:
        """Change a definition, or with `live` the running device, with `defined` then both. See `_modified` for the options."""
        if live:
            self._modify_live(also_defined=defined, **options)
        if defined or not live:
            self._modify_stored(**options)

    def _modify_stored(self, **options: Any) -> None:
        """Change a definition. Somebody else may change it meanwhile: then ours is made of theirs."""
        for attempt in range(_ATTEMPTS):
            try:
                self._modify_once(**options)
            except MdevError as error:
                if error.errno != errno.EAGAIN or attempt == _ATTEMPTS - 1:
                    raise
            else:
                return

    def _modify_once(self, *, uuid: str, parent: str | None = None, force: bool = False, **changes: Any) -> None:
        jsonfile = changes.pop("jsonfile", None)
        if jsonfile is not None:
            wanted = self._from_file(uuid, parent, jsonfile, "modify device via json file")
            stored = next((entry for entry in self.store.find(uuid, wanted.parent) if isinstance(entry, Definition)), None)
            definition = wanted if stored is None else stored.changed(**wanted.config)
            tag = stored.tag if stored else None
        else:
            stored = self.defined(uuid, parent)
            definition, tag = _modified(stored, **changes), stored.tag
        Callout(self.scripts, definition, force=force).around("modify", lambda: self.store.put(definition, tag=tag))

    def defined(self, uuid: str, parent: str | None = None) -> Definition:
        """Return the one definition of a device; ENODEV, EINVAL for several."""
        entries = self.store.find(uuid, parent)
        if not entries:
            raise MdevError(errno.ENODEV, f"Mediated device {_named(uuid, parent)} is not defined", uuid)
        if len(entries) > 1:
            raise MdevError(errno.EINVAL, f"Multiple definitions found for {uuid}, specify a parent", uuid)
        return usable(entries[0])

    def _modify_live(
        self,
        *,
        uuid: str,
        parent: str | None = None,
        jsonfile: str | None = None,
        also_defined: bool = False,
        auto: bool = False,
        manual: bool = False,
        **_others: Any,
    ) -> None:
        """Have the device's script change it. mdevctl never does it itself."""
        for name, given in (("auto", auto), ("manual", manual)):
            if given:
                raise MdevError(errno.EINVAL, f"'{name}' cannot be changed on active mdev", uuid)
        active = self.active(uuid, parent)
        running(self.scripts, active)
        if jsonfile is None:
            raise MdevError(errno.EINVAL, "'live' option must be used with 'jsonfile' option", uuid)
        wanted = self._from_file(uuid, active.parent, jsonfile, "")
        if wanted.mdev_type != active.mdev_type:
            raise MdevError(errno.EINVAL, "'type' cannot be changed on active mdev", uuid)
        if also_defined and self.defined(uuid, active.parent).mdev_type != active.mdev_type:
            raise MdevError(errno.EINVAL, "'type' of active and defined mdev does not match", uuid)
        Callout(self.scripts, wanted).live()

    def set_live(self, *, addattr: str | None = None, value: str | None = None, **options: Any) -> None:
        """Change a running device: by its script where one can, else by its attributes, all or none of them."""
        uuid, jsonfile = options["uuid"], options.get("jsonfile")
        active = self.active(uuid, options.get("parent"))
        if addattr is not None:
            attrs = [{addattr: value or ""}]
        elif jsonfile is None or self._has_live_script(active):
            self._modify_live(**options)
            return
        else:
            wanted = self._from_file(uuid, active.parent, jsonfile, "")
            if wanted.mdev_type != active.mdev_type:
                raise MdevError(errno.EINVAL, "'type' cannot be changed on active mdev", uuid)
            attrs = wanted.attrs
        values = {name: text for attribute in attrs for name, text in attribute.items()}
        self._client.patch(f"/v1/devices/{uuid}", {"attributes": values})

    def _has_live_script(self, active: Definition) -> bool:
        try:
            Callout(self.scripts, active).check_live()
        except MdevError:
            return False
        return True

    def active(self, uuid: str, parent: str | None = None) -> Definition:
        """Return a running device; ENODEV when it does not run, or on another parent."""
        active = self.device(uuid)
        if active is None or parent not in {None, active.parent}:
            raise MdevError(errno.ENODEV, f"Mediated device {_named(uuid, parent)} is not active", uuid)
        return active

    def _from_file(self, uuid: str, parent: str | None, jsonfile: str, doing: str) -> Definition:
        """Return the definition a file has; EINVAL, ENOENT and the like."""
        if parent is None:
            raise MdevError(errno.EINVAL, f"Parent device required to {doing}", uuid)
        return read_config(uuid, parent, jsonfile)

    # -- devices -------------------------------------------------------------------------------------------------------

    def start(
        self,
        *,
        uuid: str | None = None,
        parent: str | None = None,
        type: str | None = None,  # noqa: A002  (mdevctl's word)
        jsonfile: str | None = None,
        force: bool = False,
        ensure: bool = False,
    ) -> str:
        """Start a device, by its definition or by what is given, and return its UUID. `ensure`: it may run already."""
        definition = self.to_start(uuid, parent, type, jsonfile)
        active = self.device(definition.uuid) if ensure else None
        if active is None or (active.parent, active.mdev_type) != (definition.parent, definition.mdev_type):
            self._start(definition, force=force)
        return definition.uuid

    def to_start(self, uuid: str | None, parent: str | None, type_id: str | None, jsonfile: str | None) -> Definition:
        """Return what is to be started."""
        if jsonfile is not None:
            return self._from_file(uuid or _new_uuid(), parent, jsonfile, "start device via json file")
        entries = self.store.find(uuid, parent) if uuid else []
        if len(entries) > 1:
            raise MdevError(errno.EINVAL, f"Multiple definitions found for device {uuid}. Please specify a parent.", uuid)
        if entries:
            stored = usable(entries[0])
            if type_id not in {None, stored.mdev_type}:
                message = f"Device {uuid} already exists on parent {stored.parent} with type {stored.mdev_type}"
                raise MdevError(errno.EEXIST, message, uuid)
            return stored
        if type_id is not None and parent is None:
            raise MdevError(errno.EINVAL, "can't provide type without parent", uuid)
        if type_id is None or parent is None:
            raise MdevError(errno.EINVAL, "Device is insufficiently specified", uuid)
        return Definition(parent, uuid or _new_uuid(), type_id)

    def start_parent(self, parent: str) -> None:
        """Start what is defined to start with a parent; what cannot be started, or read, keeps nothing else from it."""
        for entry in self.store.entries(parent):
            try:
                definition = usable(entry)
                if definition.auto:
                    self._start(definition)
            except MdevError as error:
                self._warn(chain(error))

    def _start(self, definition: Definition, *, force: bool = False) -> None:
        def create() -> None:
            self._check_free(definition)
            self._check_room(definition)
            try:
                # The service notes how the start of a definition of its own went.
                stored = isinstance(self.store, ServiceStore) and definition.tag
                self._client.post(start_path(definition), None if stored else definition.config)
            except MdevError as error:
                where = f"{definition.uuid}, type {definition.mdev_type} on {definition.parent}"
                raise MdevError(error.errno or errno.EIO, f"Failed to create mdev {where}", definition.uuid) from error

        Callout(self.scripts, definition, force=force).around("start", create)

    def _check_free(self, definition: Definition) -> None:
        active = self.device(definition.uuid)
        if active is None:
            return
        reason = "Device already exists"
        if active.parent != definition.parent:
            reason = "Device exists under different parent"
        elif active.mdev_type != definition.mdev_type:
            reason = "Device exists with different type"
        raise MdevError(errno.EEXIST, reason, definition.uuid)

    def _check_room(self, definition: Definition) -> None:
        """Say in mdevctl's words what can be seen not to work. Who comes first is for the service to say."""
        parents = {parent["name"]: parent for parent in self.parents()}
        name, type_id = definition.parent, definition.mdev_type
        if name not in parents:
            similar = next((known for known in parents if known.lower() == name.lower()), None)
            hint = f". Did you mean '{similar}'?" if similar else ""
            raise MdevError(errno.ENODEV, f"Unable to find parent device '{name}'{hint}", name)
        found = next((type_ for type_ in parents[name]["types"] if type_["id"] == type_id), None)
        if found is None:
            raise MdevError(errno.ENODEV, f"Parent {name} does not support mdev type {type_id}", type_id)
        if found["available_instances"] == 0 and not parents[name].get("error"):
            raise MdevError(errno.ENOSPC, f"No available instances of {type_id} on {name}", type_id)

    def stop(self, *, uuid: str, force: bool = False) -> None:
        """Stop a device: ENODEV, EBUSY when its user does not let go. `force` is about scripts, not about users."""
        active = self.device(uuid)
        if active is None:
            raise MdevError(errno.ENODEV, f"Device {uuid} is not an active mdev", uuid)

        def remove() -> None:
            try:
                self._client.delete(f"/v1/devices/{uuid}")
            except MdevError as error:
                raise MdevError(error.errno or errno.EIO, f"Error removing device {uuid}", uuid) from error

        Callout(self.scripts, active, force=force).around("stop", remove)


def start_path(definition: Definition) -> str:
    """Return where to post what starts a definition."""
    return f"/v1/definitions/{quote(definition.parent)}/{definition.uuid}/start"


def read_config(uuid: str, parent: str, path: str) -> Definition:
    """Return the definition a file has, with the path in every error; the file is opened as it is named, below no root."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123  (pathlib takes as long to import as all else here)
            value = json.load(file)
    except OSError as error:
        number = error.errno or errno.EIO
        raise MdevError(number, f'Unable to read file "{path}"', path) from error
    except (ValueError, RecursionError) as error:
        raise MdevError(errno.EINVAL, f"{path}: invalid JSON: {error}", path) from None
    try:
        found = from_config(parent, uuid, value)
    except MdevError as error:
        raise MdevError(errno.EINVAL, f"{path}: {error}", path) from None
    return Definition(parent, uuid, found.mdev_type, found.start, found.attrs)


def chain(error: BaseException) -> str:
    """Return an error with its causes, in one line."""
    cause = error.__cause__
    return f"{error}: {reason(cause)}" if cause is not None else str(error)


def reason(error: BaseException) -> str:
    """Return what an error says, without its number."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def attribute_line(index: int, attribute: Attribute) -> str:
    """Return an attribute as mdevctl lists it."""
    return f"    @{{{index}}}: {json.dumps(attribute, separators=(',', ':'), ensure_ascii=False)}"


def _running(facts: dict[str, Any]) -> Definition:
    """Return a running device as a definition; mdevctl does not say how it was started."""
    return Definition(facts["parent"], facts["uuid"], facts["type"])


def _new_uuid() -> str:
    from uuid import uuid4  # takes as long to import as the interpreter to start

    return str(uuid4())


def _named(uuid: str, parent: str | None) -> str:
    return uuid if parent is None else f"{parent}/{uuid}"


def _wanted(uuid: str, parent: str | None, type_id: str | None, active: Definition | None) -> Definition:
    """Return a definition of what is given, completed with what runs; EINVAL when something is missing."""
    if parent is None and (active is None or type_id is not None):
        raise MdevError(errno.EINVAL, "No parent specified", uuid)
    if active is not None:
        return Definition(parent or active.parent, uuid, type_id or active.mdev_type)
    if not type_id:
        raise MdevError(errno.EINVAL, "No type specified", uuid)
    return Definition(parent or "", uuid, type_id)


def _modified(
    stored: Definition,
    *,
    type: str | None = None,  # noqa: A002  (mdevctl's word)
    auto: bool = False,
    manual: bool = False,
    addattr: str | None = None,
    value: str | None = None,
    delattr: bool = False,  # noqa: A002  (mdevctl's word)
    index: int | None = None,
) -> Definition:
    """Return a definition with changes. Without `index`, they are at the end of the attributes."""
    if auto and manual:
        raise MdevError(errno.EINVAL, "'auto' and 'manual' are mutually exclusive")
    attrs = list(stored.attrs)
    if addattr is not None:
        if value is None:
            raise MdevError(errno.EINVAL, "No attribute value provided")
        _check_index(stored, index, len(attrs) + 1)
        attrs.insert(len(attrs) if index is None else index, {addattr: value})
    elif delattr:
        _check_index(stored, index, len(attrs))
        if attrs:
            del attrs[-1 if index is None else index]
    start = "auto" if auto else "manual" if manual else stored.start
    return stored.changed(mdev_type=type or stored.mdev_type, start=start, attrs=attrs)


def _check_index(stored: Definition, index: int | None, end: int) -> None:
    if index is None or index < end:
        return
    lines = [attribute_line(number, attribute) for number, attribute in enumerate(stored.attrs)]
    attributes = "\n".join(["  Attrs:", *lines]) if lines else f"Device {stored.uuid} has no attributes"
    raise MdevError(errno.EINVAL, f"Attribute index {index} is invalid\n{attributes}", stored.uuid)
