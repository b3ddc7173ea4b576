"""Units of work on the virtual machines that have backups.

The catalogue has no table of them but, maybe, one that says what the appliance calls them. See ``catalogue.py`` for
how a catalogue is read that is not ours.
"""

from __future__ import annotations

import logging
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import peewee

from . import cursors
from .engine import here
from .models import BackupJob, VmContext, table_of
from .records import Vm
from .rows import LONGEST_TEXT, Row, Shortened, fetch, in_parts, last_cursor, meant, paged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

log = logging.getLogger(__name__)

_VM = "vm:"
_CONTEXT = {
    "context_id": Shortened(VmContext.context_id),
    "vm_name": Shortened(VmContext.vm_name),
    "repository_id": VmContext.repository_id,
}


class _Counted(NamedTuple):
    """A virtual machine with its number of backups and the time of the newest, also as the database compares it."""

    name: str
    backups: int
    stored: str
    newest: datetime | None


_TABLE = table_of(VmContext)
_COUNTED = ("vm_name", "backups", "created_at")
_LONGEST_KEY = 1000
"""Bytes of a name by which partitions are told apart. MySQL and MariaDB look at 1024 (``max_sort_length``)."""


def vms(limit: int, cursor: str) -> tuple[list[Vm], str]:
    """A page of the virtual machines that have backups, by name, and the cursor of the next. Raises InvalidOption."""
    cursors.check_limit(limit)
    name = here().exact(BackupJob.vm_name)
    query = BackupJob.select(
        Shortened(name, 4 * LONGEST_TEXT), peewee.fn.COUNT(BackupJob.id), peewee.fn.MAX(BackupJob.created_at)
    )
    query = query.where(BackupJob.vm_name.is_null(is_null=False))
    if cursor:
        place = cursors.decode(cursor, "virtual machines")
        if not place.startswith(_VM):
            raise cursors.foreign("virtual machines")
        query = query.where(name > place.removeprefix(_VM))

    query = query.group_by(name).order_by(name)
    page, more, stopped = paged(query, BackupJob, _COUNTED, limit, lambda _: _counted, "virtual machine")
    repositories = _newest_in(page)
    contexts = _contexts([vm.name for vm in page])
    found = []
    for vm in page:
        repository_id = repositories.get(vm.name, "")
        known = contexts.get(vm.name, {})
        context_id = known.get(repository_id) or min(known.values(), default=vm.name)
        found.append(Vm(context_id, vm.name, repository_id, vm.backups, vm.newest))
    return found, cursors.encode(_VM + page[-1].name) if more else last_cursor(stopped, _cursor)


def _cursor(row: Row) -> str:
    return cursors.encode(_VM + row.text("vm_name"))


def _counted(row: Row) -> _Counted:
    return _Counted(row.text("vm_name"), row.number("backups"), row.stored("created_at"), row.moment("created_at"))


def _newest_in(page: Sequence[_Counted]) -> dict[str, str]:
    """The repository of each one's newest backup; of several of that moment, of the first in the list of backups.

    However many are of one moment, or of none, each machine has one row of the answer.
    """
    found: dict[str, str] = {}
    exact, name, created_at = here().exact, BackupJob.vm_name, BackupJob.created_at
    # Those that may be the newest of their machine, which are few, so that the others need not be put in order.
    moments = [peewee.Value(vm.stored, converter=False) for vm in page if vm.stored]
    may_be = created_at.in_(moments) | created_at.is_null()
    order = [created_at.desc(), exact(BackupJob.id).desc()]
    number = peewee.fn.ROW_NUMBER().over(partition_by=[exact(name)], order_by=order)
    names = [vm.name for vm in page]
    short = [each for each in names if len(each.encode()) <= _LONGEST_KEY]
    alone = [[each] for each in names if len(each.encode()) > _LONGEST_KEY]
    for some in chain(in_parts(short), alone):
        ranked = BackupJob.select(name, BackupJob.repository, number.alias("number"))
        ranked = ranked.where(name.in_(some) & exact(name).in_(some) & may_be).alias("ranked")
        query = peewee.Select([ranked], [ranked.c.vm_name, ranked.c.repository_id]).where(ranked.c.number == 1)
        rows = fetch(query, BackupJob, ("vm_name", "repository_id"))
        found.update(meant(rows, lambda row: (row.text("vm_name"), row.text("repository_id")), "a backup of"))
    return found


def _contexts(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What the appliance calls these virtual machines, by name and repository, where it keeps that."""
    found: dict[str, dict[str, str]] = {}
    if names and here().has_table(_TABLE):
        for some in in_parts(names):
            query = VmContext.select(*_CONTEXT.values()).where(VmContext.vm_name.in_(some))
            # Of several the first: it comes last, in the place of those before it.
            try:
                rows = fetch(query.order_by(here().exact(VmContext.context_id).desc()), VmContext, _CONTEXT)
            except peewee.DatabaseError as error:
                if not here().is_missing(error):
                    raise
                log.warning("virtual machines go by their names: %s cannot be read: %s", _TABLE, error)
                return {}
            for context_id, name, repository_id in meant(rows, _context, "virtual machine"):
                found.setdefault(name, {})[repository_id] = context_id
    return found


def _context(row: Row) -> tuple[str, str, str]:
    return row.text("context_id"), row.text("vm_name"), row.text("repository_id")
