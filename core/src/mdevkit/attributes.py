"""Typed attributes of parents, types and devices: what sysfs shows, and what ``--set NAME=VALUE`` takes.

A vendor states an `Attribute` once; core parses and checks text, refuses bad values before the vendor is called, and
formats values for display. `show` and `store` are vendor calls: core holds no lock while they run, and they may be
called from any thread.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mdevkit.errors import Guard, MdevError, shown

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")


class Kind(Generic[T]):
    """How the text of an attribute becomes a value and back. Subclasses raise ValueError with the accepted range."""

    def parse(self, text: str) -> T:
        """Return the value of `text`; ValueError with a sentence that says what is accepted."""
        raise ValueError(text)

    def check(self, value: Any) -> T:
        """Return `value` if it is acceptable; ValueError otherwise. Text is parsed."""
        return self.parse(value if isinstance(value, str) else self.format(value))

    def format(self, value: T) -> str:
        """Return the text of `value`, without newline."""
        return str(value)


@dataclass(frozen=True)
class Int(Kind[int]):
    """A whole number from `low` to `high`, both included; text may be decimal, 0x, 0o or 0b."""

    low: int = 0
    high: int = 2**64 - 1

    def parse(self, text: str) -> int:
        """See `Kind.parse`."""
        try:
            value = int(text, 0)
        except ValueError:
            raise ValueError(f"a whole number is wanted, not {shown(text)}") from None
        if not self.low <= value <= self.high:
            raise ValueError(f"{shown(text.strip())[1:-1]} is not between {self.low} and {self.high}")
        return value


@dataclass(frozen=True)
class Bool(Kind[bool]):
    """Yes or no: 1/0, yes/no, true/false, on/off; shown as 1 or 0, as in sysfs."""

    def parse(self, text: str) -> bool:
        """See `Kind.parse`."""
        lowered = text.lower()
        if lowered in {"1", "y", "yes", "true", "on"}:
            return True
        if lowered in {"0", "n", "no", "false", "off"}:
            return False
        raise ValueError(f"yes or no is wanted, not {shown(text)}")

    def check(self, value: Any) -> bool:
        """See `Kind.check`: not every value that Python takes for true is a yes."""
        return value if isinstance(value, bool) else self.parse(str(value))

    def format(self, value: bool) -> str:
        """See `Kind.format`."""
        return "1" if value else "0"


@dataclass(frozen=True)
class Choice(Kind[str]):
    """One of a fixed set of words."""

    words: tuple[str, ...]

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        if text not in self.words:
            raise ValueError(f"one of {', '.join(self.words)} is wanted, not {shown(text)}")
        return text


@dataclass(frozen=True)
class Text(Kind[str]):
    """Free text that fits a pattern; `expects` completes the sentence "... is wanted"."""

    pattern: str = r"[^\x00-\x1f\x7f]*"
    expects: str = "text without control characters"
    longest: int = 4095

    def __post_init__(self) -> None:
        re.compile(self.pattern)  # a wrong pattern is found where it is stated, not when a user sets a value

    def check(self, value: Any) -> str:
        """See `Kind.check`: only text is text."""
        if isinstance(value, str):
            return self.parse(value)
        raise ValueError(f"text is wanted, not {shown(value)}")

    def parse(self, text: str) -> str:
        """See `Kind.parse`."""
        if len(text) > self.longest:
            raise ValueError(f"at most {self.longest} characters are allowed, not {len(text)}")
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"{self.expects} is wanted, not {shown(text)}")
        return text


@dataclass(frozen=True)
class Attribute(Generic[T]):
    """One named, typed attribute.

    `name` is the sysfs file, with at most one folder (``vendor/sample_mdev_dev``). `show(obj)` returns the value and
    `store(obj, value)` sets it, where `obj` is the `Parent`, the type or the device it belongs to; without `store`
    the attribute is read-only. `create` lets the attribute be given as a create parameter: the vendor's
    ``parent_create`` then finds a checked value, or `default`, in its `params`. A `counter` is shown as a number that only
    grows while its device lives, or as several with blanks between, one for each queue: ``mdevkit top`` shows how fast.
    """

    name: str
    kind: Kind[T]
    doc: str
    show: Callable[[Any], T] | None = None
    store: Callable[[Any, T], None] | None = None
    create: bool = False
    default: T | None = None
    counter: bool = False

    def __post_init__(self) -> None:
        if self.counter and (self.show is None or self.store is not None):
            raise ValueError(f"attribute {self.name}: a counter is there to be read")
        if not _NAME.fullmatch(self.name) or not {".", ".."}.isdisjoint(self.name.split("/")):
            raise ValueError(f"attribute name {self.name!r} is not a file name, or a folder and a file name")

    @property
    def mode(self) -> str:
        """``r``, ``w`` or ``rw``; ``c`` when it is a create parameter only."""
        return ("r" if self.show else "") + ("w" if self.store else "") or "c"

    def parse(self, text: Any, subject: Any = None) -> T:
        """Return the checked value of `text`; MdevError EINVAL names the attribute and the accepted range."""
        with Guard(f"attribute {self.name}", subject):
            try:
                return self.kind.check(text)
            except ValueError as error:
                raise MdevError(errno.EINVAL, f"attribute {self.name}: {error}", subject) from None


class AttributeTable(Mapping[str, "Attribute[Any]"]):
    """The attributes of one object, by name, in the vendor's order. Immutable; safe on any thread."""

    def __init__(self, attributes: Iterable[Attribute[Any]]) -> None:
        self._by_name: dict[str, Attribute[Any]] = {}
        for attribute in attributes:
            if attribute.name in self._by_name:
                raise MdevError(errno.EEXIST, f"attribute {attribute.name} is stated twice")
            self._by_name[attribute.name] = attribute

    def __getitem__(self, name: str) -> Attribute[Any]:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def find(self, name: str, subject: Any) -> Attribute[Any]:
        """Return the attribute, or raise ENOENT with the names there are."""
        try:
            return self._by_name[name]
        except KeyError:
            known = ", ".join(self._by_name) or "none"
            raise MdevError(errno.ENOENT, f"{subject} has no attribute {name!r} (there are: {known})", subject) from None

    def read(self, name: str, subject: Any) -> Any:
        """Read an attribute of `subject`: EACCES if it cannot be read, else what the vendor's `show` returns or raises."""
        attribute = self.find(name, subject)
        if attribute.show is None:
            raise MdevError(errno.EACCES, f"attribute {name} of {subject} cannot be read", subject)
        with Guard(f"{subject}: reading {name}", subject):
            return attribute.show(subject)

    def write(self, name: str, value: Any, subject: Any) -> None:
        """Check and store a value: ENOENT, EACCES (read-only), EINVAL, or what the vendor's `store` raises."""
        attribute = self.find(name, subject)
        if attribute.store is None:
            raise MdevError(errno.EACCES, f"attribute {name} of {subject} is read-only", subject)
        checked = attribute.parse(value, subject)
        with Guard(f"{subject}: setting {name}", subject):
            attribute.store(subject, checked)

    def read_all(self, subject: Any) -> dict[str, str]:
        """Return the text of every attribute that can be read; one that fails shows its errno, as ``<EIO>``."""
        texts = {}
        for name, attribute in self._by_name.items():
            if attribute.show is not None:
                try:
                    value = self.read(name, subject)
                    with Guard(f"{subject}: showing {name}", subject):
                        texts[name] = attribute.kind.format(value)
                except MdevError as error:
                    texts[name] = f"<{error.name}>"
        return texts

    def parameters(self, given: Mapping[str, Any], subject: Any) -> dict[str, Any]:
        """Return checked create parameters, defaults filled in; ENOENT for a name that is not one, EINVAL for a value."""
        allowed = AttributeTable(attribute for attribute in self._by_name.values() if attribute.create)
        values = {name: attribute.default for name, attribute in allowed.items()}
        for name, value in given.items():
            if name in self._by_name and name not in allowed:
                raise MdevError(errno.EACCES, f"attribute {name} of {subject} cannot be set at creation", subject)
            values[name] = allowed.find(name, subject).parse(value, subject)
        return values
