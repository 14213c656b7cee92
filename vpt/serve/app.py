"""Web application around a task bank: routes, refusals and shutdown.

The body of a request is read up to a limit, into memory only; it gets places in the queue, or 429; its images are
decoded by a few processes and prepared by a few threads; the batcher runs them, mixed with those of other requests.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import TypeAdapter
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from vpt.config.errors import did_you_mean
from vpt.data.images import ImageError
from vpt.models.bank import TaskBank
from vpt.serve.batcher import QueueFull
from vpt.serve.bodies import Bodies
from vpt.serve.schemas import Answer, Health, Problem, Ready, TaskDescription, clean_name
from vpt.serve.service import ModelError, Service, Settings
from vpt.task_types.base import AnswerLimits
from vpt.version import __version__

TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
MAX_TOP = 1000  # classes or boxes of an image and a task
DESCRIPTIONS = TypeAdapter(list[TaskDescription])
HOW_TO_ALLOW = "task files cannot be changed; start the server with uploads=true"

BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "required": ["images"], "properties": {"images": {"type": "array", "items": BINARY}}}
IMAGE_TYPES = {"multipart/form-data": {"schema": FORM}, "image/*": {"schema": BINARY}}
FILE_TYPES = {"application/octet-stream": {"schema": BINARY}}
IMAGES: dict[str, Any] = {"requestBody": {"required": True, "content": IMAGE_TYPES}}
TASK_FILE: dict[str, Any] = {"requestBody": {"required": True, "content": FILE_TYPES}}
STATUSES = {QueueFull: 429, ImageError: 422, ModelError: 500, RequestValidationError: 422, ClientDisconnect: 400}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Descriptions of refusals in /openapi.json."""
    return {status: {"model": Problem} for status in statuses}


def make_app(bank: TaskBank, settings: Settings | None = None) -> FastAPI:
    """Create the application, the only user of the bank until it ends."""
    settings = settings or Settings()
    service, bodies = Service(bank, settings), Bodies(settings.max_body)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    checks = [Depends(_check_query)]
    app = FastAPI(title="vpt", version=__version__, lifespan=lifespan, redoc_url=None, dependencies=checks)
    if settings.is_local:
        app.add_middleware(LocalHosts)
    _add_handlers(app)
    _add_page(app)
    _add_predict(app, service, bodies)
    _add_tasks(app, service, bodies)
    return app


def _add_predict(app: FastAPI, service: Service, bodies: Bodies) -> None:
    settings = service.settings

    @app.post(
        "/predict",
        response_model=Answer,
        openapi_extra=IMAGES,
        responses=problems(404, 409, 413, 415, 422, 429, 500, 504),
    )
    async def predict(
        request: Request,
        task: Annotated[list[str], Query(description="name of a task; may be repeated")],
        top_k: Annotated[int, Query(ge=1, le=MAX_TOP, description="classification: most classes per image")] = 5,
        min_score: Annotated[float, Query(ge=0, le=1, description="detection: lowest score of a box")] = 0.25,
        max_detections: Annotated[int, Query(ge=1, le=MAX_TOP, description="detection: most boxes per image")] = 100,
    ) -> Response:
        """Predict one or more images with one or more tasks."""
        tasks = service.tasks(task)
        async with _limited(request, bodies, settings.timeout_s):
            uploads = await bodies.images(request)
            if len(uploads) * len(tasks) > settings.max_queue:
                what = f"{len(uploads)} images for {len(tasks)} tasks are more than {settings.max_queue} predictions"
                raise HTTPException(413, f"{what}; send fewer at a time")
            answer = await service.predict(uploads, tasks, AnswerLimits(top_k, min_score, max_detections))
        return Response(answer, media_type="application/json")

    @app.get("/ready", responses=problems(503))
    async def ready() -> Ready:
        """Whether predictions are accepted now."""
        if not service.bank.names:
            raise HTTPException(503, "there is no task yet")
        if service.batcher.taken >= settings.max_queue:
            raise HTTPException(503, f"all {settings.max_queue} places of the queue are taken")
        return Ready()

    @app.get("/health")
    async def health() -> Health:
        """State of the server, which answers also while it accepts no predictions."""
        totals = service.batcher.totals
        return Health(
            tasks=len(service.bank.names),
            waiting=service.batcher.taken,
            predictions=totals.jobs,
            batches=totals.batches,
            failed_batches=totals.failed_batches,
            max_queue=settings.max_queue,
            max_body_bytes=settings.max_body,
            uploads=settings.folder is not None,
        )


def _add_tasks(app: FastAPI, service: Service, bodies: Bodies) -> None:
    settings = service.settings

    @app.get("/tasks", response_model=list[TaskDescription])
    async def list_tasks() -> Response:
        """Describe all tasks."""
        answer = await asyncio.to_thread(lambda: DESCRIPTIONS.dump_json(service.describe_all()))
        return Response(answer, media_type="application/json")

    @app.get("/tasks/{name}", responses=problems(404))
    async def show_task(name: str) -> TaskDescription:
        """Describe one task."""
        return service.describe(name)

    @app.put(
        "/tasks/{name}",
        openapi_extra=TASK_FILE,
        responses=problems(403, 409, 413, 422, 429, 504, 507) | {201: {"model": TaskDescription}},
    )
    async def put_task(
        request: Request, response: Response, name: Annotated[str, Path(description="letters, digits, _ and -")]
    ) -> TaskDescription:
        """Upload a task file, replacing the task of this name; only with uploads=true."""
        _check_change(settings)
        if not TASK_NAME.fullmatch(name):
            raise HTTPException(422, "the name of a task must have 1 to 64 of the characters a-z, A-Z, 0-9, _ and -")
        async with _limited(request, bodies, settings.timeout_s):
            data = await bodies.read(request)
            is_new, description = await asyncio.wrap_future(service.changes.submit(service.put, name, data))
        if is_new:
            response.status_code = 201
        return description

    @app.delete("/tasks/{name}", status_code=204, responses=problems(403, 404))
    async def delete_task(name: str) -> None:
        """Remove a task and delete its file; only with uploads=true."""
        _check_change(settings)
        await asyncio.wrap_future(service.changes.submit(service.delete, name))


@asynccontextmanager
async def _limited(request: Request, bodies: Bodies, timeout_s: float) -> AsyncIterator[None]:
    """Limit the time of a request, and free its body at the end."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise HTTPException(504, f"not answered within {timeout_s:g} s; send less at a time, or try later") from error
    finally:
        bodies.release(request)


def _check_change(settings: Settings) -> None:
    if settings.folder is None:
        raise HTTPException(403, HOW_TO_ALLOW)


def _check_query(request: Request) -> None:
    """Refuse query parameters that the route does not have."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            what = did_you_mean(name, known) if known else "; there are none here"
            raise HTTPException(422, f"{clean_name(name)}: no such query parameter{what}")


class LocalHosts:
    """Refuses requests under the host name of a web page that points to this machine (DNS rebinding)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its host is this machine."""
        app = self.app
        if scope["type"] == "http" and re.sub(r":\d+$", "", Headers(scope=scope).get("host", "")) not in LOCAL_HOSTS:
            app = JSONResponse({"detail": f"send the request to {' or '.join(LOCAL_HOSTS)}"}, 403)
        await app(scope, receive, send)


def _add_page(app: FastAPI) -> None:
    """The page at /, whose policy allows its own script only."""
    html = files("vpt.serve").joinpath("page.html").read_text(encoding="utf-8")
    hashes = {}  # of the only element of each name
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        hashes[tag] = "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def _add_handlers(app: FastAPI) -> None:
    """Every refusal is {"detail": one line}."""

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        detail, headers = str(error), None
        if isinstance(error, QueueFull):
            detail, headers = f"{error}; try again", {"Retry-After": "1"}
        elif isinstance(error, RequestValidationError):
            first = error.errors()[0]
            detail = f"{first['loc'][-1]}: {first['msg']}; see /docs"
        elif isinstance(error, ClientDisconnect):
            detail = "the client disconnected"
        status = next(status for error_type, status in STATUSES.items() if isinstance(error, error_type))
        return JSONResponse({"detail": detail}, status, headers)

    for error_type in STATUSES:
        app.add_exception_handler(error_type, refuse)
