"""Offline check of a node's SSD directory: reads every block, and drops bad records if told to."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
from google.protobuf.message import DecodeError
from kvstore_proto import master_pb2

from kvstore.core.fsck import Examination, Finding
from kvstore.core.types import IoOutcome
from kvstore.errors import ConfigError, CorruptError, KVStoreError
from kvstore.node import translate
from kvstore.node.block_reader import BlockReader, runs_of
from kvstore.node.dir_lock import LOCK_NAME, DirectoryInUseError, DirectoryLock
from kvstore.node.index_rebuild import IndexRebuild
from kvstore.node.ssd_file import DATA_NAME
from kvstore.node.ssd_index import INDEX_NAME, SsdIndex, refused

READ_BYTES = 8 << 20
DROPS_PER_COMMIT = 16384

Progress = Callable[[int, int], None]  # bytes read, bytes to read


@dataclass(frozen=True)
class Report:
    """What a check found. A size that was never noted, or a file that is missing, is None."""

    folder: Path
    records: int
    read_bytes: int
    findings: Sequence[Finding]
    data_bytes: int | None
    data_bytes_noted: int | None
    repaired: bool
    index_damage: str = ""  # of the old index; without ``repaired`` it kept records from being read

    @property
    def wrong_size(self) -> bool:
        """Whether the data file is not as long as its node made it."""
        return self.data_bytes_noted is not None and self.data_bytes != self.data_bytes_noted

    @property
    def clean(self) -> bool:
        """Whether nothing was found."""
        return not (self.findings or self.wrong_size or self.index_damage)


def fsck(folder: Path, *, repair: bool, progress: Progress) -> Report:
    """Checks the SSD directory ``folder``; with ``repair``, bad records are gone durably.

    Raises ConfigError if it is no such directory, of another format version, or in use by a
    running node; CorruptError if its index is damaged: with ``repair`` a new one is made of the
    records that can still be read, and whose blocks have their bytes. Without ``repair`` nothing is
    changed.
    """
    if not (folder / INDEX_NAME).is_dir() and not (folder / DATA_NAME).is_file():
        SsdIndex.existing(folder, read_only=True)  # says why, and makes no lock file
    with contextlib.ExitStack() as resources:
        made = not (folder / LOCK_NAME).exists()
        try:
            resources.callback(DirectoryLock(folder).release, remove=made)
        except DirectoryInUseError:
            raise ConfigError(
                f"{folder} is in use by a running node; stop the node first"
            ) from None
        try:
            index = SsdIndex.existing(folder, read_only=not repair)
        except CorruptError as error:
            if not repair:
                raise
            return _rebuild(folder, str(error), progress)
        resources.callback(index.close)
        report = _check(folder, index, progress)
        if not repair:
            return report
        _drop(index, report.findings)
        if report.wrong_size:
            index.note_data_bytes(None)  # the node sizes the file, and notes it, when it starts
        return dataclasses.replace(report, repaired=True)


def unreadable(folder: Path, damage: CorruptError) -> Report:
    """The report on a directory whose records a damaged index keeps from being read."""
    data_bytes = _data_bytes(folder / DATA_NAME)
    return Report(folder, 0, 0, (), data_bytes, None, repaired=False, index_damage=str(damage))


def _check(folder: Path, index: SsdIndex, progress: Progress) -> Report:
    keys, values = index.entries()
    examination, report = _examine(folder, keys, values, index.namespaces(), progress)
    index.go_on_after(examination.sequences)
    return dataclasses.replace(report, data_bytes_noted=index.data_bytes())


def _rebuild(folder: Path, damage: str, progress: Progress) -> Report:
    """Makes a new index of what the pages of the damaged one hold and the data file confirms."""
    with contextlib.closing(IndexRebuild(folder)) as rebuild:
        saved = rebuild.saved
        keys, values = [key for key, _ in saved.entries], [value for _, value in saved.entries]
        examination, report = _examine(folder, keys, values, saved.namespaces, progress)
        rebuild.replace(examination.kept.values(), examination.sequences)
    return dataclasses.replace(report, repaired=True, index_damage=damage)


def _examine(
    folder: Path,
    keys: Sequence[bytes],
    values: Sequence[bytes],
    namespaces: Mapping[bytes, bytes],
    progress: Progress,
) -> tuple[Examination, Report]:
    path = folder / DATA_NAME
    data_bytes = _data_bytes(path)
    examination = Examination(keys, values, _block_bytes(namespaces), data_bytes or 0)
    read_bytes = _read_all(path, examination, progress) if examination.sound else 0
    findings = examination.finish()
    records = len(set(keys))
    report = Report(folder, records, read_bytes, findings, data_bytes, None, repaired=False)
    return examination, report


def _data_bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _block_bytes(namespaces: Mapping[bytes, bytes]) -> dict[bytes, int | None]:
    """Size of a block in each namespace, by root; None where this build cannot read it."""
    sizes: dict[bytes, int | None] = {}
    for root, encoded in namespaces.items():
        sizes[root] = None
        with contextlib.suppress(DecodeError, KVStoreError):
            report = master_pb2.NamespaceReport.FromString(encoded)
            sizes[root] = translate.spec_from_message(report.spec).block_bytes
    return sizes


def _read_all(path: Path, examination: Examination, progress: Progress) -> int:
    """Reads and judges every sound block; the bytes read."""
    total = sum(record.nbytes for record in examination.sound)
    done = 0
    try:
        reader = BlockReader(path)
    except OSError as error:
        raise ConfigError(f"data file {path}: {os.strerror(error.errno or 0)}") from None
    with contextlib.closing(reader):
        for run in runs_of(examination.sound, READ_BYTES):
            for record, outcome in zip(run, reader.outcomes(run), strict=True):
                examination.read(record, outcome)
                done += record.nbytes if outcome is not IoOutcome.FAILED else 0
            progress(done, total)
    return done


def _drop(index: SsdIndex, findings: Sequence[Finding]) -> None:
    """Removes the records; killed halfway, a next run removes the rest."""
    for first in range(0, len(findings), DROPS_PER_COMMIT):
        some = findings[first : first + DROPS_PER_COMMIT]
        try:
            index.apply((finding.key, None) for finding in some)
        except lmdb.Error as error:
            raise refused(index.path, error) from None
