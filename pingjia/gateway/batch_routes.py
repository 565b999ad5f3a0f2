"""/v1/files and /v1/batches, as far as OpenAI's clients need them for batches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse

from pingjia.errors import RequestError, StorageError
from pingjia.gateway.batches import ENDPOINTS, Batch, Batches
from pingjia.gateway.bodies import Body
from pingjia.gateway.files import FileRecord, FileStore
from pingjia.gateway.responses import Out
from pingjia.gateway.routes import JSON_ONLY, caller_of, errors_of

router = APIRouter()
Id = Annotated[str, Path(alias="id")]
_PIECE = 1 << 20
_FAILED = "batch_failed"


class FileOut(Out):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class FileList(Out):
    object: Literal["list"] = "list"
    data: list[FileOut]
    has_more: bool = False


class FileDeleted(Out):
    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchBody(Body):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str = Field(description="the lines' own url is not read", json_schema_extra={"enum": list(ENDPOINTS)})
    completion_window: Literal["24h"] | None = None
    metadata: dict[str, str] | None = None


class BatchCounts(Out):
    total: int
    completed: int
    failed: int


class BatchFault(Out):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchFaults(Out):
    object: Literal["list"] = "list"
    data: list[BatchFault]


class BatchOut(Out):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Literal["validating", "in_progress", "completed", "failed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    errors: BatchFaults | None
    created_at: int
    expires_at: int
    completed_at: int | None
    failed_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str]


class BatchList(Out):
    object: Literal["list"] = "list"
    data: list[BatchOut]
    has_more: bool = False


def _files(request: Request) -> FileStore:
    files: FileStore = request.app.state.files
    return files


def _batches(request: Request) -> Batches:
    batches: Batches = request.app.state.batches
    return batches


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}
_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "the lines", "content": {"application/jsonl": {"schema": {"type": "string"}}}}
}


@router.post("/v1/files", openapi_extra=_FORM, responses=errors_of(400, 401, 408, 413, 500, 507))
async def upload_file(request: Request) -> FileOut:
    """Keep a file of requests, one per line."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise RequestError("send the file as multipart/form-data with the fields purpose and file", param="file")
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            upload = form.get("file")
            if form.get("purpose") != "batch":
                raise RequestError("purpose: must be batch; other files are of no use here", param="purpose")
            if not isinstance(upload, UploadFile):
                raise RequestError("file: missing; send one file", param="file")
            owner = caller_of(request).key.owner
            return _file_out(await _files(request).upload(owner, upload.filename or "batch.jsonl", _pieces(upload)))
    except (MultiPartException, HTTPException) as e:  # starlette makes the second of the first
        why = e.message if isinstance(e, MultiPartException) else e.detail
        raise RequestError(f"the form cannot be read: {why}", param="file", code="invalid_body") from None
    except OSError as e:  # the part of a large form that lies on disk while it is read
        raise StorageError(f"the file could not be kept: {e.strerror}") from None


@router.get("/v1/files", responses=errors_of(401, 500))
async def list_files(request: Request) -> FileList:
    """The caller's files."""
    return FileList(object="list", data=[_file_out(r) for r in _files(request).of(caller_of(request).key.owner)])


@router.get("/v1/files/{id}", responses=errors_of(401, 404, 500))
async def get_file(file_id: Id, request: Request) -> FileOut:
    """One of them."""
    return _file_out(_files(request).find(file_id, caller_of(request).key.owner))


@router.get("/v1/files/{id}/content", response_class=Response, responses={**_CONTENT, **errors_of(401, 404, 500)})
async def get_content(file_id: Id, request: Request) -> Response:
    """What is in it."""
    record = _files(request).find(file_id, caller_of(request).key.owner)
    return FileResponse(_files(request).path(record.id), media_type="application/jsonl")


@router.delete("/v1/files/{id}", responses=errors_of(401, 404, 500))
async def delete_file(file_id: Id, request: Request) -> FileDeleted:
    """Remove a file."""
    _files(request).remove(file_id, caller_of(request).key.owner)
    return FileDeleted(id=file_id, object="file", deleted=True)


@router.post("/v1/batches", dependencies=JSON_ONLY, responses=errors_of(400, 401, 404, 413, 415, 500, 507))
async def create_batch(body: BatchBody, request: Request) -> BatchOut:
    """Begin a batch over an uploaded file."""
    key = caller_of(request).key
    try:
        batch = _batches(request).create(key, body.input_file_id, body.endpoint, body.metadata or {})
    except OSError as e:
        raise StorageError(f"the batch could not be kept: {e.strerror}; it is not begun") from None
    return _batch_out(batch)


@router.get("/v1/batches", responses=errors_of(400, 401, 500))
async def list_batches(
    request: Request, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> BatchList:
    """The caller's batches, the newest first."""
    found = _batches(request).of(caller_of(request).key.owner)
    start = next((i + 1 for i, batch in enumerate(found) if batch.id == after), 0)
    shown = [_batch_out(batch) for batch in found[start : start + limit]]
    return BatchList(object="list", data=shown, has_more=len(found) > start + limit)


@router.get("/v1/batches/{id}", responses=errors_of(401, 404, 500))
async def get_batch(batch_id: Id, request: Request) -> BatchOut:
    """How one stands."""
    return _batch_out(_batches(request).find(batch_id, caller_of(request).key.owner))


@router.post("/v1/batches/{id}/cancel", responses=errors_of(401, 404, 500))
async def cancel_batch(batch_id: Id, request: Request) -> BatchOut:
    """Stop one; its answers so far stay."""
    return _batch_out(_batches(request).cancel(batch_id, caller_of(request).key.owner))


async def _pieces(upload: UploadFile) -> AsyncIterator[bytes]:
    while piece := await upload.read(_PIECE):
        yield piece


def _file_out(record: FileRecord) -> FileOut:
    return FileOut(
        id=record.id,
        object="file",
        bytes=record.num_bytes,
        created_at=record.created_at,
        filename=record.filename,
        purpose=record.purpose,
        status="processed",
    )


def _batch_out(batch: Batch) -> BatchOut:
    faults = BatchFaults(object="list", data=[BatchFault(code=_FAILED, message=batch.error)])
    return BatchOut(
        id=batch.id,
        object="batch",
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        completion_window="24h",
        status=batch.status,
        output_file_id=batch.output_file_id if batch.is_over and batch.completed else None,
        error_file_id=batch.error_file_id if batch.is_over and batch.failed else None,
        errors=faults if batch.error else None,
        created_at=batch.created_at,
        expires_at=batch.expires_at,
        completed_at=batch.ended_at if batch.status == "completed" else None,
        failed_at=batch.ended_at if batch.status == "failed" else None,
        cancelled_at=batch.ended_at if batch.status == "cancelled" else None,
        request_counts=BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=batch.metadata,
    )
