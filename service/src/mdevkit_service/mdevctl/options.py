"""The command line of mdevctl 1.4, option by option: what it takes, what excludes what, and how it says so.

A table and a parser of its own, since no library that could be told mdevctl's rules is imported as fast as the whole command is
to run. Reads only what it is given.
"""

from __future__ import annotations

from mdevkit.cli.output import as_bytes, is_utf8

from mdevkit_service.definitions import uuid_of

TYPE_CHECKING = False  # typing is what takes time
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Final

#: Largest --index.
_INDEX_MAX: Final = 2**32 - 1

_FORCE_HELP: Final = "Go on even if a callout script objects"


class UsageError(Exception):
    """A command line that is not right; the text is all there is to say. `code` is the exit code: 0 for help."""

    def __init__(self, text: str, code: int = 2) -> None:
        super().__init__(text)
        self.code: Final = code


class Option:
    """One option. Without `value`, the name of what follows, it is a switch."""

    def __init__(self, name: str, short: str = "", value: str = "", doc: str = "") -> None:
        self.name: Final = name
        self.short: Final = short
        self.value: Final = value
        self.doc: Final = doc

    def __str__(self) -> str:
        return f"--{self.name} <{self.value}>" if self.value else f"--{self.name}"


class Command:
    """One command: its options, and which of them exclude, need or replace each other."""

    def __init__(
        self,
        about: str,
        options: Sequence[Option],
        *,
        usage: str = "[OPTIONS]",
        required: Sequence[str] = (),
        one_of: Sequence[str] = (),
        conflicts: Sequence[tuple[str, Sequence[str]]] = (),
        needs: Sequence[tuple[str, str]] = (),
        words: Sequence[str] = (),
        hidden: bool = False,
    ) -> None:
        self.about: Final = about
        self.options: Final = {option.name: option for option in options}
        self.usage: Final = usage
        self.required: Final = required
        #: At least one of these is wanted.
        self.one_of: Final = one_of
        self.conflicts: Final = {frozenset((name, other)) for name, others in conflicts for other in others}
        self.needs: Final = needs
        #: What follows without dashes; all of it is required.
        self.words: Final = words
        self.hidden: Final = hidden


_UUID: Final = Option("uuid", "u", "UUID", "The device")
_PARENT: Final = Option("parent", "p", "PARENT", "The parent device")
_TYPE: Final = Option("type", "t", "type", "The type of the device")
_JSONFILE: Final = Option("jsonfile", "", "JSONFILE", "Take type, start mode and attributes from a file")
_FORCE: Final = Option("force", "f", "", _FORCE_HELP)
_AUTO: Final = Option("auto", "a", "", "Start the device when its parent becomes available")
_DUMPJSON: Final = Option("dumpjson", "", "", "Print JSON")

COMMANDS: Final = {
    "define": Command(
        "Store the definition of a device",
        [_UUID, _AUTO, _PARENT, _TYPE, _JSONFILE, _FORCE],
        one_of=("uuid", "parent"),
        conflicts=[("jsonfile", ("type", "auto"))],
    ),
    "undefine": Command(
        "Remove definitions of a device: those of all parents, or one parent's",
        [_UUID, _PARENT, _FORCE],
        usage="[OPTIONS] --uuid <UUID>",
        required=("uuid",),
    ),
    "modify": Command(
        "Change the definition of a device, or with --live the running device",
        [
            _UUID,
            _PARENT,
            _TYPE,
            Option("addattr", "", "attr_name", "Add an attribute"),
            Option("delattr", "", "", "Remove an attribute"),
            Option("index", "i", "INDEX", "Where in the list of attributes; its end by default"),
            Option("value", "", "attr_value", "Value of the added attribute"),
            _AUTO,
            Option("manual", "m", "", "Start the device by hand only"),
            Option("live", "l", "", "Change the running device, not its definition unless --defined is given too"),
            Option("defined", "d", "", "Change the definition"),
            _JSONFILE,
            _FORCE,
        ],
        usage="[OPTIONS] --uuid <UUID> <--auto|--manual|--addattr <attr_name>|--delattr|--jsonfile <JSONFILE>>",
        required=("uuid",),
        one_of=("auto", "manual", "addattr", "delattr", "jsonfile"),
        conflicts=[
            ("jsonfile", ("type", "addattr", "delattr", "index", "value", "auto", "manual")),
            ("auto", ("addattr", "delattr", "index", "value", "manual")),
            ("manual", ("addattr", "delattr", "index", "value")),
            ("delattr", ("addattr", "value")),
            ("live", ("type", "index", "value")),
        ],
        needs=[("addattr", "value")],
    ),
    "start": Command(
        "Start a device, by its definition or by parent and type",
        [_UUID, _PARENT, _TYPE, _JSONFILE, _FORCE],
        one_of=("uuid", "parent"),
        conflicts=[("jsonfile", ("type",))],
    ),
    "stop": Command("Stop a device", [_UUID, _FORCE], usage="[OPTIONS] --uuid <UUID>", required=("uuid",)),
    "list": Command(
        "List running devices, or with --defined the definitions",
        [
            Option("defined", "d", "", "List definitions"),
            _DUMPJSON,
            Option("verbose", "v", "", "Print attributes too"),
            _UUID,
            _PARENT,
            Option("version", "V", "", "Print the version"),
        ],
    ),
    "types": Command("List the types of devices that parents can make", [_PARENT, _DUMPJSON]),
    "start-parent-mdevs": Command(
        "Start the devices of a parent that are defined to start with it", [], usage="<PARENT>", words=("PARENT",), hidden=True
    ),
}


def parse(program: str, name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options of command `name` by name, and its words; UsageError with all there is to say. `program` is for usage."""
    command = COMMANDS[name]
    found, words = _Reader(program, command).read(arguments)
    if "help" in found:
        raise UsageError(help_of(program, name), 0)
    _check(command, program, found, words)
    return {option.replace("-", "_"): value for option, value in found.items()} | dict(zip(command.words, words, strict=True))


class _Reader:
    """Reads words and options, one after the other."""

    def __init__(self, program: str, command: Command) -> None:
        self._program: Final = program
        self._command: Final = command
        help_option = Option("help", "h", "", "Print help")
        self._options: Final = {**command.options, "help": help_option}
        self._short: Final = {option.short: option for option in self._options.values() if option.short}
        self._found: Final[dict[str, Any]] = {}
        self._words: Final[list[str]] = []

    def read(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Return options and words."""
        rest = list(arguments)
        while rest:
            argument = rest.pop(0)
            if argument == "--":
                for word in rest:
                    self._word(word)
                break
            if argument.startswith("--"):
                self._long(argument, rest)
            elif argument.startswith("-") and argument != "-":
                self._bundle(argument, rest)
            else:
                self._word(argument)
        return self._found, self._words

    def _word(self, word: str) -> None:
        if len(self._words) >= len(self._command.words):
            raise self._unexpected(word)
        if not is_utf8(word):
            raise self._wrong(f"'{as_bytes(word)}' is not UTF-8")
        self._words.append(word)

    def _long(self, argument: str, rest: list[str]) -> None:
        name, equals, value = argument[2:].partition("=")
        if name not in self._options:
            raise self._unexpected(f"--{name}")
        option = self._options[name]
        if equals and not option.value:
            message = f"unexpected value '{value}' for '{option}' found; no more were expected"
            raise self._wrong(message)
        self._take(option, value if equals else None, rest)

    def _bundle(self, argument: str, rest: list[str]) -> None:
        """Read ``-dv`` and ``-uUUID``."""
        letters = argument[1:]
        while letters:
            option = self._short.get(letters[0])
            if option is None:
                raise self._unexpected(f"-{letters[0]}")
            letters = letters[1:]
            if option.value and letters:
                self._take(option, letters.removeprefix("="), rest)
                return
            self._take(option, None, rest)

    def _take(self, option: Option, value: str | None, rest: list[str]) -> None:
        if option.name in self._found:
            raise self._wrong(f"the argument '{option}' cannot be used multiple times")
        if not option.value:
            self._found[option.name] = True
            return
        if value is None:
            if not rest or (rest[0].startswith("-") and rest[0] != "-"):
                if rest and option.name == "index":
                    raise self._unexpected(rest[0])
                raise UsageError(f"error: a value is required for '{option}' but none was supplied{_MORE}")
            value = rest.pop(0)
        self._found[option.name] = _converted(option, value)

    def _unexpected(self, argument: str) -> UsageError:
        return self._wrong(f"unexpected argument '{argument}' found")

    def _wrong(self, message: str) -> UsageError:
        return _usage_error(message, self._program, self._command)


_MORE: Final = "\n\nFor more information, try '--help'."


def _usage_error(message: str, program: str, command: Command) -> UsageError:
    return UsageError(f"error: {message}\n\nUsage: {program} {command.usage}{_MORE}")


def _converted(option: Option, text: str) -> Any:
    """Return the value of an option's text. Files alone may have names that are not UTF-8."""
    if option.value != "JSONFILE" and not is_utf8(text):
        raise _refusal(option, as_bytes(text), "it is not UTF-8")
    if option.value == "UUID":
        uuid = uuid_of(text)
        if not uuid:
            raise _refusal(option, text, _wrong_uuid(text))
        return uuid
    if option.value == "INDEX":
        if not text.lstrip("+-").isdecimal() or not text.isascii():
            raise _refusal(option, text, "invalid digit found in string")
        if not 0 <= int(text) <= _INDEX_MAX:
            raise _refusal(option, text, f"{text} is not in 0..={_INDEX_MAX}")
        return int(text)
    return text


def _refusal(option: Option, text: str, reason: str) -> UsageError:
    return UsageError(f"error: invalid value '{text}' for '{option}': {reason}{_MORE}")


def _wrong_uuid(text: str) -> str:
    """Tell what is wrong with a UUID, in mdevctl's words."""
    bare = text.removeprefix("urn:uuid:")
    for position, char in enumerate(bare, len(text) - len(bare) + 1):
        if char not in "0123456789abcdefABCDEF-{}":
            wanted = "expected an optional prefix of `urn:uuid:` followed by [0-9a-fA-F-]"
            return f"invalid character: {wanted}, found `{char}` at {position}"
    if "-" in bare:
        return "invalid group count or length: expected 8-4-4-4-12 hexadecimal digits"
    return f"invalid length: expected length 32 for simple format, found {len(bare)}"


def _check(command: Command, program: str, found: dict[str, Any], words: list[str]) -> None:
    """Check what excludes and what needs what."""
    for name in found:
        others = [other for other in command.options if frozenset((name, other)) in command.conflicts and other in found]
        if others:
            raise _usage_error(_conflict(command, name, others), program, command)
    missing = [str(command.options[name]) for name in command.required if name not in found]
    missing += [str(command.options[other]) for name, other in command.needs if name in found and other not in found]
    if command.one_of and not any(name in found for name in command.one_of):
        missing += _alternatives(command)
    missing += [f"<{word}>" for word in command.words[len(words) :]]
    if missing:
        lines = "".join(f"\n  {item}" for item in missing)
        raise _usage_error(f"the following required arguments were not provided:{lines}", program, command)


def _conflict(command: Command, name: str, others: list[str]) -> str:
    start = f"the argument '{command.options[name]}' cannot be used with"
    if len(others) == 1:
        return f"{start} '{command.options[others[0]]}'"
    return start + ":" + "".join(f"\n  {command.options[other]}" for other in others)


def _alternatives(command: Command) -> list[str]:
    options = [str(command.options[name]) for name in command.one_of]
    return options if len(options) == 2 else [f"<{'|'.join(options)}>"]


def help_of(program: str, name: str) -> str:
    """Return the help of a command."""
    command = COMMANDS[name]
    rows = [*command.options.values(), Option("help", "h", "", "Print help")]
    options = "\n".join(f"  {f'-{option.short},' if option.short else '   '} {option!s:24} {option.doc}" for option in rows)
    return f"{command.about}\n\nUsage: {program} {command.usage}\n\nOptions:\n{options}"


def overview(program: str) -> str:
    """Return the help of the program."""
    shown = {name: command.about for name, command in COMMANDS.items() if not command.hidden}
    shown["help"] = "Print this, or the help of a command"
    commands = "\n".join(f"  {name:9} {about}" for name, about in shown.items())
    about = "Manage mediated devices"
    options = "  -h, --help     Print help\n  -V, --version  Print version"
    return f"{about}\n\nUsage: {program} <COMMAND>\n\nCommands:\n{commands}\n\nOptions:\n{options}"
