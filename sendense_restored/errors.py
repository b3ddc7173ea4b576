"""The closed list of errors.

Class name = D-Bus error name = REST ``code``; each class carries its HTTP status and the exit code of the
command line, so that every side maps an error through this one table. A message says what to do next and
never holds a traceback or a host path.
"""

from __future__ import annotations

from typing import ClassVar

DBUS_PREFIX = "com.sendense.Restore1.Error."


class RestoreError(Exception):
    """Base of the list; never raised itself."""

    http_status: ClassVar[int]
    exit_code: ClassVar[int]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    @classmethod
    def dbus_name(cls) -> str:
        """The error's name on the bus."""
        return DBUS_PREFIX + cls.__name__


class Failed(RestoreError):
    """An internal error; the journal has the details."""

    http_status, exit_code = 500, 1


class InvalidOption(RestoreError):
    """An option or argument that is unknown, of the wrong type or out of range."""

    http_status, exit_code = 400, 2


class InvalidPath(RestoreError):
    """A guest path that is malformed: relative, with ``..``, NUL, too long or not in the canonical text form."""

    http_status, exit_code = 422, 2


class Unauthenticated(RestoreError):
    """The gateway does not know the caller. Reserved: this version never answers it."""

    http_status, exit_code = 401, 3


class NotAuthorized(RestoreError):
    """polkit said no."""

    http_status, exit_code = 403, 3


class NotAuthorizedCanObtain(RestoreError):
    """polkit would say yes after an authentication, which the caller did not allow."""

    http_status, exit_code = 403, 3


class BackupNotFound(RestoreError):
    """No such backup or disk in the catalogue."""

    http_status, exit_code = 404, 4


class MountNotFound(RestoreError):
    """No such mount."""

    http_status, exit_code = 404, 4


class PathNotFound(RestoreError):
    """No such file in the guest."""

    http_status, exit_code = 404, 4


class JobNotFound(RestoreError):
    """No such job. Reserved: this version never answers it."""

    http_status, exit_code = 404, 4


class NotAFile(RestoreError):
    """A regular file was asked for and something else stands there."""

    http_status, exit_code = 409, 5


class NotADirectory(RestoreError):
    """A directory was asked for and something else stands there."""

    http_status, exit_code = 409, 5


class BackupNotReady(RestoreError):
    """The backup is not complete, or is being written."""

    http_status, exit_code = 409, 6


class ImageRefused(RestoreError):
    """The image or its chain is damaged, or points where it must not."""

    http_status, exit_code = 422, 7


class NoMountableVolume(RestoreError):
    """The disk is readable but nothing on it can be mounted."""

    http_status, exit_code = 422, 7


class VolumeUnavailable(RestoreError):
    """The volume is there but not open (unsupported, encrypted, damaged, ...)."""

    http_status, exit_code = 409, 8


class Unreadable(RestoreError):
    """The guest's file system cannot give this file faithfully."""

    http_status, exit_code = 409, 8


class Busy(RestoreError):
    """Somebody still reads from the mount, or a mount still needs what was to be removed or ended."""

    http_status, exit_code = 409, 11


class LimitReached(RestoreError):
    """A limit, configured or fixed, is used up."""

    http_status, exit_code = 429, 12


class NoDevice(RestoreError):
    """No block device is free, or none can be used for this image."""

    http_status, exit_code = 503, 12


class NoSpace(RestoreError):
    """There is too little memory, or space for overlays, for another mount."""

    http_status, exit_code = 507, 12


class Expired(RestoreError):
    """The mount existed and has ended."""

    http_status, exit_code = 410, 13


class Timeout(RestoreError):
    """Something did not answer in time."""

    http_status, exit_code = 504, 14


class CatalogUnavailable(RestoreError):
    """A database cannot be used: that of the backups, or that of our own records."""

    http_status, exit_code = 503, 15


class Unavailable(RestoreError):
    """The service or the mount cannot answer now."""

    http_status, exit_code = 503, 15


class Cancelled(RestoreError):
    """The operation was cancelled."""

    http_status, exit_code = 499, 16


class TooLarge(RestoreError):
    """A configured size limit would be exceeded, or an answer does not fit into a message."""

    http_status, exit_code = 413, 17


class WrongSecret(RestoreError):
    """The passphrase or key does not open the volume. Reserved: this version never answers it."""

    http_status, exit_code = 403, 18


NOT_OURS = "the catalogue belongs to the appliance, or to another program that fills it; change it there"
"""What is said to who would change one, as InvalidOption."""

BY_NAME: dict[str, type[RestoreError]] = {cls.__name__: cls for cls in RestoreError.__subclasses__()}


def from_dbus(name: str, message: str) -> RestoreError:
    """The error of the list that a D-Bus error reply stands for.

    Of the names outside the list, those of the bus daemon that have a counterpart here become that.
    """
    if name.startswith(DBUS_PREFIX) and (cls := BY_NAME.get(name.removeprefix(DBUS_PREFIX))):
        return cls(message)
    if name == _FREEDESKTOP + "AccessDenied":
        return NotAuthorized(f"the bus policy does not allow it: {message}")
    if name == _FREEDESKTOP + "UnknownInterface":
        # That of the catalogue is the one that a service may be without, and it would be in vain to try again.
        return InvalidOption(
            NOT_OURS if "Restore1.Catalog'" in message else f"the service is of another version: {message}"
        )
    if name == _FREEDESKTOP + "LimitsExceeded":
        return LimitReached(f"the message bus is at one of its limits; try again in a moment: {message}")
    if name.startswith((_FREEDESKTOP + "Spawn.", "org.freedesktop.systemd1.")) or name in _UNREACHABLE:
        return Unavailable(f"the restore service cannot be reached: {message}")
    return Failed(f"{name}: {message}")


_FREEDESKTOP = "org.freedesktop.DBus.Error."
_UNREACHABLE = frozenset(
    _FREEDESKTOP + name
    for name in ("ServiceUnknown", "NameHasNoOwner", "NoReply", "Disconnected", "NoServer", "TimedOut")
)
