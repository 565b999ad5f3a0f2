"""GET and DELETE /v1/jobs/{id}: what became of a request that was asked with `Prefer: respond-async`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from pingjia.gateway.jobs import Jobs
from pingjia.gateway.responses import JobOut
from pingjia.gateway.routes import caller_of, errors_of

router = APIRouter()
JobId = Annotated[str, Path(alias="id")]


def _jobs(request: Request) -> Jobs:
    jobs: Jobs = request.app.state.jobs
    return jobs


@router.get(
    "/v1/jobs/{id}", response_model=JobOut, response_model_exclude_unset=True, responses=errors_of(401, 404, 500)
)
async def get_job(job_id: JobId, request: Request) -> Response:
    """The state of a job, and its result once it has one."""
    return _json(await _jobs(request).get(job_id, caller_of(request)))


@router.delete(
    "/v1/jobs/{id}", response_model=JobOut, response_model_exclude_unset=True, responses=errors_of(401, 404, 500)
)
async def cancel_job(job_id: JobId, request: Request) -> Response:
    """Cancel a job that has not ended."""
    return _json(await _jobs(request).cancel(job_id, caller_of(request)))


def _json(job: JobOut) -> Response:
    return Response(job.dump(), media_type="application/json")
