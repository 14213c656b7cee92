"""Service: a bank behind a batcher, and the folder of its task files; what the web application asks."""

import asyncio
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import HTTPException

from vpt.config.errors import first_line
from vpt.models.bank import TaskBank
from vpt.models.task_file import read_task
from vpt.models.task_schema import TaskMetadata
from vpt.serve.batcher import Batcher
from vpt.serve.schemas import (
    Answer,
    Found,
    ImageAnswer,
    Job,
    TaskDescription,
    Upload,
    Wanted,
    clean_name,
    describe,
    prediction_of,
    prepare,
)
from vpt.storage.files import write_bytes

NUM_SHOWN = 50  # names in a message
ResultT = TypeVar("ResultT")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Args:
        max_batch: Most pictures in a batch.
        max_wait_ms: How long a picture may wait for others to share its batch, in milliseconds.
        max_queue: Most predictions (a picture and a task) that are accepted and not answered.
        max_body_mb: Size of a request, in millions of bytes.
        timeout_s: How long a request may take, in seconds.
        folder: Where uploaded task files go; None takes none.
        is_local: Whether only this machine can reach the server.
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 256
    max_body_mb: float = 20.0
    timeout_s: float = 30.0
    folder: Path | None = None
    is_local: bool = True

    @property
    def max_body(self) -> int:
        """Size of a request, in bytes."""
        return int(self.max_body_mb * 1_000_000)


class ModelError(Exception):
    """A batch could not be run, or what came out cannot be told."""


class Service:
    """A bank behind a batcher, and the folder of its task files; every method may be called from any thread.

    Args:
        bank: The bank; nothing but this service changes it any more.
        settings: Limits.
    """

    def __init__(self, bank: TaskBank, settings: Settings) -> None:
        self.bank, self.settings = bank, settings
        self.batcher: Batcher[Job, Found] = Batcher(
            self._run,
            group=lambda job: job.image.shape,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
        )
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="prepare")
        self.changes = ThreadPoolExecutor(1, thread_name_prefix="change")  # of the tasks, one after the other

    def close(self) -> None:
        """Finish what was accepted."""
        self.changes.shutdown()
        self.batcher.close()
        self.pool.shutdown()

    def tasks(self, names: Iterable[str]) -> dict[str, TaskMetadata]:
        """What the files of these tasks say of themselves."""
        return {name: self._metadata(name) for name in names}

    def describe(self, name: str) -> TaskDescription:
        """What a client should know of a task."""
        try:
            return describe(name, self.bank.metadata(name), self.bank.num_bytes(name))
        except ValueError:  # unknown, or just removed
            raise self._unknown(name) from None

    async def predict(self, uploads: Sequence[Upload], tasks: Mapping[str, TaskMetadata], wanted: Wanted) -> Answer:
        """Prepare pictures, run them with each task, and tell what was found."""
        with self.batcher.places(len(uploads) * len(tasks)):
            loop = asyncio.get_running_loop()
            prepared = await _all(loop.run_in_executor(self.pool, prepare, upload, tasks) for upload in uploads)
            jobs = [job for of_picture in prepared for job in of_picture]
            found = iter(await _all(asyncio.wrap_future(future) for future in self.batcher.submit(jobs)))
        images = []
        for upload, of_picture in zip(uploads, prepared, strict=True):
            predictions = {}
            for job in of_picture:
                try:
                    predictions[job.task] = prediction_of(next(found), job.size, wanted)
                except ArithmeticError as error:
                    raise ModelError(f"task {job.task}: {error}; train it anew") from error
            height, width = of_picture[0].size
            images.append(ImageAnswer(name=upload.name, width=width, height=height, tasks=predictions))
        return Answer(images=images)

    def put(self, name: str, data: bytes) -> bool:
        """Serve a task file, and keep it in the folder; returns whether the task is a new one.

        Raises:
            HTTPException: The file is refused, or cannot be written; nothing has changed then.
        """
        assert self.settings.folder is not None
        target = self.settings.folder / f"{name}.safetensors"
        is_new = name not in self.bank.names
        if is_new and target.exists():
            raise HTTPException(
                409, f"{target.name} lies in the folder already, but is not served; choose another name"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / target.name
            path.write_bytes(data)
            try:
                read_task(path)  # what is damaged is refused here, where it holds up no batch
                self._change(self.bank.load if is_new else self._swap, path, name)
            except (ValueError, TypeError, RuntimeError) as error:
                raise HTTPException(422, first_line(error).replace(str(path), name)) from error
        try:
            write_bytes(target, data)
        except OSError as error:
            self._change(self._take_back, name, None if is_new else target)
            raise HTTPException(
                507, f"{target.name} cannot be written ({error.strerror}); nothing has changed"
            ) from error
        return is_new

    def delete(self, name: str) -> None:
        """Serve a task no more, and delete its file."""
        assert self.settings.folder is not None
        self._metadata(name)
        self._change(self.bank.remove, name)
        (self.settings.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _change(self, change: Callable[..., Any], *arguments: Any) -> None:
        """Change the bank between two batches, so that a picture is prepared, run and told by one and the same task."""
        self.batcher.between_batches(lambda: change(*arguments)).result()

    def _swap(self, path: Path, name: str) -> None:
        self.bank.swap(name, path)

    def _take_back(self, name: str, old: Path | None) -> None:
        if old is None:
            self.bank.remove(name)
        else:
            self.bank.swap(name, old)

    def _run(self, jobs: list[Job]) -> list[Found | Exception]:
        """Run a mixed batch; those whose task is gone or wants its pictures otherwise now are told so."""
        current = {name: self.bank.metadata(name) for name in self.bank.names}
        fit = [job for job in jobs if job.task in current and current[job.task].preprocessing == job.preprocessing]
        results = self._ask_bank(fit) if fit else {}
        return [results[id(job)] if id(job) in results else self._gone(job) for job in jobs]

    def _ask_bank(self, jobs: list[Job]) -> dict[int, Found | Exception]:
        """What the tasks make of their pictures, in one call; if that fails each for itself, to spare the others."""
        tasks = list(dict.fromkeys(job.task for job in jobs))
        try:
            return self._ask_bank_once(jobs)
        except ModelError:
            if len(tasks) == 1:
                raise
        apart: dict[int, Found | Exception] = {}
        for task in tasks:
            own = [job for job in jobs if job.task == task]
            try:
                apart |= self._ask_bank_once(own)
            except ModelError as error:
                apart |= dict.fromkeys(map(id, own), error)
        return apart

    def _ask_bank_once(self, jobs: list[Job]) -> dict[int, Found | Exception]:
        names, sizes = [job.task for job in jobs], [job.inner for job in jobs]
        try:
            results = self.bank(torch.stack([job.image for job in jobs]), names, sizes=sizes)
            of_jobs = zip(jobs, results, strict=True)
            return {id(job): Found(self.bank.metadata(job.task), _on_cpu(result)) for job, result in of_jobs}
        except Exception as error:
            logger.exception("a batch of %s failed", ", ".join(sorted(set(names))))
            raise ModelError(f"the model could not run this batch ({first_line(error)})") from error

    def _gone(self, job: Job) -> HTTPException:
        if job.task not in self.bank.names:
            return self._unknown(job.task)
        return HTTPException(409, f"task {job.task} was replaced while the picture waited; send it again")

    def _metadata(self, name: str) -> TaskMetadata:
        try:
            return self.bank.metadata(name)
        except ValueError:
            raise self._unknown(name) from None

    def _unknown(self, name: str) -> HTTPException:
        names = self.bank.names
        known = ", ".join(names[:NUM_SHOWN]) + (f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else "")
        return HTTPException(404, f"no task {clean_name(name)}; there are {known or 'none'}")


async def _all(futures: Iterable["asyncio.Future[ResultT]"]) -> list[ResultT]:
    """The results of all; when one fails, or nobody waits any more, the others are cancelled."""
    started = list(futures)
    try:
        return await asyncio.gather(*started)
    except BaseException:
        for future in started:
            future.cancel()
        raise


def _on_cpu(result: Any) -> Any:
    """Logits or a detection, on the CPU."""
    return {key: value.cpu() for key, value in result.items()} if isinstance(result, dict) else result.cpu()
