"""Callout and notifier scripts, as mdevctl 1.4 runs them: a vendor's say in what is done to a device of its type.

A callout is asked before (``pre``) and told after (``post``) an action; the first that does not answer "not mine" (exit code 2) is
the device's. One that states its capabilities (a *versioned* one) is preferred, and can do more: say which attributes a running
device has, and change them. Notifiers are told of everything, and cannot object. Scripts run in the process of the command, with
its user's rights; one that somebody else could have written is not run. Called on the command's only thread.

Imports little: where there are no scripts, commands start as fast as without this.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress

from mdevkit.errors import MdevError

from mdevkit_service.definitions import SCRIPTS, check_attributes

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Callable
    from subprocess import CompletedProcess
    from typing import Any, Final, TypeVar

    from mdevkit_service.definitions import Attribute, Definition

    T = TypeVar("T")

_ACTIONS: Final = ("start", "stop", "define", "undefine", "modify", "attributes", "capabilities")
_EVENTS: Final = ("pre", "post", "notify", "get", "live")
#: What a script is offered when it is asked for its capabilities.
_PROVIDES: Final = {"provides": {"version": 2, "actions": list(_ACTIONS), "events": list(_EVENTS)}}

#: A script's "this device is not of a type of mine".
_NOT_MINE: Final = 2

NO_LIVE: Final = (
    "Live modification is not supported for this device type. Changing the device configuration requires stopping and "
    "restarting the device."
)


class Scripts:
    """Where scripts are: those of packages first, then those beside the definitions.

    `warn` is told of what is odd about them, `pass_on` gets what they write to stderr.
    """

    def __init__(self, packaged: str, definitions: str, warn: Callable[[str], None], pass_on: Callable[[str], None]) -> None:
        self._folders: Final = [packaged, os.path.join(definitions, SCRIPTS)]  # noqa: PTH118
        self._found: Final[dict[str, list[str]]] = {}
        self.warn: Final = warn
        self.pass_on: Final = pass_on

    def callouts(self) -> list[str]:
        """Return the callout scripts in the order they are asked."""
        return self._scripts("callouts")

    def notifiers(self) -> list[str]:
        """Return the notifier scripts in the order they are told."""
        return self._scripts("notifiers")

    def _scripts(self, kind: str) -> list[str]:
        if kind not in self._found:
            folders = [os.path.join(folder, kind) for folder in self._folders]  # noqa: PTH118
            self._found[kind] = [path for folder in folders for path in self._in(folder)]
        return self._found[kind]

    def _in(self, folder: str) -> list[str]:
        try:
            names = sorted(os.listdir(folder), key=os.fsencode)  # noqa: PTH208
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self.warn(f"scripts in {folder} are not run: {error.strerror}")
            return []
        if names and (objection := _objection(folder)):
            self.warn(f"scripts in {folder} are not run: {objection}")
            return []
        return [path for name in names if self._runs(path := os.path.join(folder, name))]  # noqa: PTH118

    def _runs(self, path: str) -> bool:
        if os.path.isdir(path):  # noqa: PTH112
            return False
        objection = _objection(path) or ("" if os.access(path, os.X_OK) else "it is not executable")
        if objection:
            self.warn(f"{path} is not run: {objection}")
        return not objection


def _objection(path: str) -> str:
    """Tell why what is at `path` is not to be trusted; empty when it is."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        return str(error.strerror)
    if status.st_uid not in {0, os.geteuid()}:
        return f"it belongs to user {status.st_uid}, neither to root nor to this user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others can write it (chmod go-w)"
    return ""


class Callout:
    """The script of one device, in one command. Scripts are asked for their capabilities when it first matters."""

    def __init__(self, scripts: Scripts, device: Definition, *, force: bool = False) -> None:
        self._scripts: Final = scripts
        self._device: Final = device
        self._force: Final = force
        self._asked = False
        #: The script that answers for the device, once that is known.
        self._script: str | None = None
        #: What it supports; None for an unversioned one.
        self._supports: dict[str, Any] | None = None

    # -- an action -----------------------------------------------------------------------------------------------------

    def around(self, action: str, work: Callable[[], T]) -> T:
        """Do `work` between the script's ``pre`` and ``post``; ECANCELED when the script objects, unless it is forced."""
        config = _config(self._device)
        try:
            self._pre(action, config)
        except MdevError as error:
            if not self._force:
                self._notify(action, "none")
                raise
            self._scripts.warn(f"Forcing operation '{action}' despite callout failure. Error was: {error}")
        state = "failure"
        try:
            result = work()
            state = "success"
        finally:
            self._post(action, state, config)
            self._notify(action, state)
        return result

    def _pre(self, action: str, config: str) -> None:
        done = self._call("pre", action, "none", config)
        if done is not None and done.returncode:
            raise _script_failed(done)

    def _post(self, action: str, state: str, config: str) -> None:
        """Tell the script how it went. Whatever it answers, it has happened."""
        with suppress(MdevError):
            self._call("post", action, state, config)

    def _notify(self, action: str, state: str) -> None:
        for script in self._scripts.notifiers():
            self._run(script, "notify", action, state, "")

    # -- what versioned scripts can do beside --------------------------------------------------------------------------

    def attributes(self) -> list[Attribute]:
        """Return the attributes a running device has, as its script knows them; none without a script.

        ECANCELED when the script fails, EINVAL when it answers something else, EOPNOTSUPP when it is versioned and cannot.
        """
        done = self._call("get", "attributes", "none", "")
        if done is None:
            return []
        if done.returncode:
            raise _script_failed(done)
        answer = done.stdout.rstrip(b"\0").strip()
        if not answer:
            return []
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise MdevError(errno.EINVAL, "Invalid JSON received from callout script") from error
        return check_attributes(value)

    def check_live(self) -> None:
        """Raise EOPNOTSUPP unless there is a script that changes running devices of this type."""
        self._find()
        if self._supports is None:
            raise MdevError(errno.EOPNOTSUPP, NO_LIVE)
        self._check_supported("live", "modify")

    def live(self) -> None:
        """Have the script make the running device what the definition says; ECANCELED when it fails."""
        self.check_live()
        done = self._call("live", "modify", "none", _config(self._device))
        self._notify("modify", "none")
        if done is not None and done.returncode:
            raise _script_failed(done)

    # -- finding and running -------------------------------------------------------------------------------------------

    def _find(self) -> None:
        """Look for a versioned script."""
        if self._asked:
            return
        self._asked = True
        offer = json.dumps(_PROVIDES, separators=(",", ":"))
        for script in self._scripts.callouts():
            done = self._run(script, "get", "capabilities", "none", offer)
            supports = _capabilities(done) if done is not None else None
            if supports is not None:
                self._warn_unknown(script, supports)
                self._script, self._supports = script, supports
                return

    def _warn_unknown(self, script: str, supports: dict[str, Any]) -> None:
        for key, known, kind in (("actions", _ACTIONS, "Action"), ("events", _EVENTS, "Event")):
            if any(name not in known for name in supports[key]):
                self._scripts.warn(f'Callout script "{script}" provides unknown {kind} type')

    def _call(self, event: str, action: str, state: str, config: str) -> CompletedProcess[bytes] | None:
        """Run the device's script; None when there is none. EOPNOTSUPP for what a versioned one does not know."""
        self._find()
        if self._supports is not None:
            self._check_supported(event, action)
        if self._script is not None:
            return self._run(self._script, event, action, state, config)
        for script in self._scripts.callouts():
            done = self._run(script, event, action, state, config)
            if done is not None and done.returncode != _NOT_MINE:
                self._script = script
                return done
        return None

    def _check_supported(self, event: str, action: str) -> None:
        for kind, name in (("action", action), ("event", event)):
            if self._supports is not None and name not in self._supports[f"{kind}s"]:
                message = f"Script \"{self._script}\" does not support {kind} '{name.capitalize()}'"
                raise MdevError(errno.EOPNOTSUPP, message, self._script)

    def _run(self, script: str, event: str, action: str, state: str, config: str) -> CompletedProcess[bytes] | None:
        """Run a script to its end and pass on what it complains about; None when it did not get to an end of its own."""
        import subprocess

        device = self._device
        options = ["-t", device.mdev_type, "-e", event, "-a", action, "-s", state, "-u", device.uuid, "-p", device.parent]
        try:
            done = subprocess.run([script, *options], input=config.encode(), capture_output=True, check=False)
        except (OSError, ValueError) as error:
            self._scripts.warn(f"{script} cannot be run: {error}")
            return None
        if done.stderr:
            text = done.stderr.decode(errors="replace").rstrip("\n")
            self._scripts.pass_on(f"{os.path.basename(script)}: {text}")  # noqa: PTH119
        if done.returncode < 0:
            self._scripts.warn(f'callout script "{script}" was terminated by a signal')
            return None
        return done


def _config(device: Definition) -> str:
    """Return what a script reads: one compact line."""
    return json.dumps(device.config, separators=(",", ":"), ensure_ascii=False)


def _capabilities(done: CompletedProcess[bytes]) -> dict[str, Any] | None:
    """Return what a script says it supports, None for an unversioned script."""
    if done.returncode == _NOT_MINE:
        return None
    try:
        supports = json.loads(done.stdout.rstrip(b"\0").strip())["supports"]
        version, lists = supports["version"], [supports["actions"], supports["events"]]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return supports if isinstance(version, int) and all(isinstance(names, list) for names in lists) else None


def _script_failed(done: CompletedProcess[bytes]) -> MdevError:
    script = done.args[0]
    return MdevError(errno.ECANCELED, f"Script '\"{script}\"' failed with status '{done.returncode}'", script)


def running(scripts: Scripts, device: Definition) -> Definition:
    """Return a running device with the attributes its script says it has; none where the script cannot say."""
    try:
        return device.changed(attrs=Callout(scripts, device).attributes())
    except MdevError:
        return device
