"""Records of files that other programs stored: written ahead of a crawl, read when a job asks for one.

What may live here: the bodies of verbs of ``Jobs`` and ``Admin`` for such files. The digest of a file is
stored as an operation without a job (the effect: the file was adopted as a blob), under a key made from its
name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Final

from sqlalchemy import and_, bindparam, select
from sqlalchemy.dialects.postgresql import Insert  # SQLite understands it too

from scrapy_streaming.protocol.jobs import NotedFile, OperationState, operation_key
from scrapy_streaming.storage.blob_state import BlobState
from scrapy_streaming.storage.ledger.prepared import Session
from scrapy_streaming.storage.ledger.queries import recorded_blobs
from scrapy_streaming.storage.ledger.schema import ARTIFACTS, blob, completion, job, operation
from scrapy_streaming.storage.ledger.statements import WorkerIdentity

#: The kind of such an operation in the table.
KIND: Final = "adopt"


def _key(path: str) -> str:
    return operation_key(KIND, "", path=path)


def note(
    session: Session, worker: WorkerIdentity, found: Mapping[str, tuple[NotedFile, bytes]]
) -> frozenset[str]:
    """Carry out ``Admin.note_files``."""
    blobs = {f"sha256:{noted.hexadecimal}": (noted.size, stamp) for noted, stamp in found.values()}
    fresh = Insert(blob).values(
        digest=bindparam("new_digest"),
        size=bindparam("new_size"),
        state=BlobState.PRESENT.value,
        stored_at=worker.now,
        verified_at=worker.now,
        found_at=worker.now,
        stamp=bindparam("new_stamp"),
    )
    back = fresh.on_conflict_do_update(
        index_elements=[blob.c.digest],
        set_={"state": BlobState.PRESENT.value, "verified_at": worker.now, "stamp": fresh.excluded.stamp},
        where=and_(blob.c.size == fresh.excluded.size, blob.c.state != BlobState.DELETING.value),
    )
    rows = [
        {"new_digest": digest, "new_size": size, "new_stamp": stamp}
        for digest, (size, stamp) in sorted(blobs.items())
    ]
    session.connection.execute(back, rows)
    known = recorded_blobs(session, blobs)
    right = {
        path: file
        for path, (file, _) in found.items()
        if (row := known.get(f"sha256:{file.hexadecimal}"))
        and (row.state, row.size) == (BlobState.PRESENT, file.size)
    }
    _put_notes(session, worker, right)
    return frozenset(right)


def _put_notes(session: Session, worker: WorkerIdentity, noted: Mapping[str, NotedFile]) -> None:
    fresh = Insert(operation).values(
        op_key=bindparam("new_key"),
        kind=KIND,
        state=OperationState.OK.value,
        fence=0,
        attempt=1,
        result=bindparam("new_result"),
        updated_at=worker.now,
    )
    newer = fresh.on_conflict_do_update(
        index_elements=[operation.c.op_key],
        set_={"result": fresh.excluded.result, "updated_at": fresh.excluded.updated_at},
    )
    rows = [{"new_key": _key(path), "new_result": _text(noted[path])} for path in noted]
    if rows:
        session.connection.execute(newer, sorted(rows, key=lambda row: row["new_key"]))


def _text(file: NotedFile) -> str:
    return json.dumps({"sha256": file.hexadecimal, "size": file.size, "stamp": file.stamp.hex()})


def noted(session: Session, paths: Collection[str]) -> dict[str, NotedFile]:
    """Carry out ``Jobs.noted_files``."""
    keys = {_key(path): path for path in paths}
    wanted = select(operation.c.op_key, operation.c.result).where(
        operation.c.op_key.in_(keys), operation.c.kind == KIND
    )
    return {keys[row.op_key]: _noted(row.result) for row in session.connection.execute(wanted)}


def _noted(result: str) -> NotedFile:
    document = json.loads(result)
    return NotedFile(document["sha256"], document["size"], bytes.fromhex(document["stamp"]))


def is_adoptable(session: Session, digest: str, path: str) -> bool:
    """Carry out ``Jobs.adoptable``, as ``FilesPipeline`` would decide (C6, C11).

    False if the blob is not present, or if an artifact with this name was completed with it: its bytes may
    be those of another selection (R40).
    """
    row = session.connection.execute(
        select(blob.c.state, blob.c.found_at).where(blob.c.digest == digest)
    ).one_or_none()
    if row is None or (row.state == BlobState.PRESENT and row.found_at is not None):
        return True  # no completion names it: another program stored it, or the ledger was removed (I16)
    if row.state != BlobState.PRESENT:
        return False
    others = select(completion.c.job_id).where(
        completion.c.job_id.in_(select(job.c.id).where(ARTIFACTS)),
        completion.c.path == path,
        completion.c.digest == digest,
    )
    return session.connection.execute(others.limit(1)).one_or_none() is None
