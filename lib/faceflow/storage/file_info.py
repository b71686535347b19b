"""What identifies one version of an input: of a file, of a table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FileInfo:
    """What identifies one version of a file: its address, size, ETag or modification time, and rows, if counted."""

    path: str
    size: int
    version: str
    rows: int | None = None

    @property
    def state(self) -> list[int | str | None]:
        """All of it but the address."""
        return [self.size, self.version, self.rows]


@dataclass(frozen=True)
class TableSnapshot:
    """Which state of a table an input is. format: delta or iceberg; snapshot: Delta's version or Iceberg's snapshot id."""

    format: str
    snapshot: int
