"""File-level restore from QCOW2 backups (see README.md)."""

__version__ = "0.1.0"
