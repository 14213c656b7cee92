"""Service: a bank behind a batcher, and the folder of uploaded task files."""

import asyncio
import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from fastapi import HTTPException

from vpt.config.errors import first_line
from vpt.models.bank import TaskBank
from vpt.models.task_file import read_task
from vpt.models.task_schema import TaskMetadata
from vpt.serve.batcher import Batcher
from vpt.serve.decoding import Decoders, Upload
from vpt.serve.schemas import Found, ImageAnswer, Job, TaskDescription, clean_name, describe, prepare
from vpt.storage.files import write_bytes
from vpt.task_types.base import AnswerLimits, task_type_named

NUM_SHOWN = 50  # names in a message
MAX_ANSWER = 8_000_000  # bytes of an answer
ResultT = TypeVar("ResultT")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Limits of a server."""

    max_batch: int = 32  # images
    max_wait_ms: float = 5.0  # longest wait of an image for others to share its batch
    max_queue: int = 256  # predictions (an image and a task) that are accepted and not yet answered
    max_body_mb: float = 20.0  # millions of bytes of a request
    timeout_s: float = 30.0  # longest duration of a request
    decode_s: float = 5.0  # longest processor time for the decoding of an image
    folder: Path | None = None  # of uploaded task files; None refuses uploads
    is_local: bool = True  # only this machine can reach the server

    @property
    def max_body(self) -> int:
        """Size of a request, in bytes."""
        return int(self.max_body_mb * 1_000_000)


class ModelError(Exception):
    """A batch could not be run, or its output is not finite."""


class Service:
    """Predictions of a bank, which only this service may change from now on; methods may be called from any thread."""

    def __init__(self, bank: TaskBank, settings: Settings) -> None:
        self.bank, self.settings = bank, settings
        self.batcher: Batcher[Job, Found] = Batcher(
            self._run,
            group=lambda job: job.image.shape,
            max_batch=settings.max_batch,
            max_wait_ms=settings.max_wait_ms,
            max_queue=settings.max_queue,
        )
        count = min(4, os.cpu_count() or 1)
        self.decoders = Decoders(count, settings.decode_s)
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="prepare")
        self.changes = ThreadPoolExecutor(1, thread_name_prefix="change")  # of the tasks, one at a time

    def close(self) -> None:
        """Finish all requests that wait for an answer; the decoding of images for which nobody waits ends at once."""
        self.changes.shutdown()
        self.batcher.close()
        self.decoders.kill()
        self.pool.shutdown(cancel_futures=True)

    def tasks(self, names: Iterable[str]) -> dict[str, TaskMetadata]:
        """Metadata of these tasks."""
        return {name: self._metadata(name) for name in names}

    def describe_all(self) -> list[TaskDescription]:
        """The public descriptions of all tasks."""
        found = []
        for name in self.bank.names:
            with contextlib.suppress(HTTPException):  # just removed
                found.append(self.describe(name))
        return found

    def describe(self, name: str) -> TaskDescription:
        """The public description of a task."""
        try:
            return describe(name, self.bank.metadata(name), self.bank.num_bytes(name))
        except ValueError:  # unknown, or just removed
            raise self._unknown(name) from None

    async def predict(self, uploads: Sequence[Upload], tasks: Mapping[str, TaskMetadata], limits: AnswerLimits) -> str:
        """Prepare images, run them with each task, and return the predictions: an `Answer` as JSON."""
        with self.batcher.places(len(uploads) * len(tasks)):
            loop = asyncio.get_running_loop()
            prepared = await _all(loop.run_in_executor(self.pool, self._prepare, upload, tasks) for upload in uploads)
            jobs = [job for of_image in prepared for job in of_image]
            found = await _all(asyncio.wrap_future(future) for future in self.batcher.submit(jobs))
            return await asyncio.to_thread(self._to_json, uploads, prepared, iter(found), limits)

    def _prepare(self, upload: Upload, tasks: Mapping[str, TaskMetadata]) -> list[Job]:
        return prepare(partial(self.decoders.decode, upload), tasks)

    def _to_json(
        self, uploads: Sequence[Upload], prepared: Sequence[list[Job]], found: Iterator[Found], limits: AnswerLimits
    ) -> str:
        """The answer to a request; HTTPException if it is too large."""
        images: list[str] = []
        size = 0
        for upload, of_image in zip(uploads, prepared, strict=True):
            predictions = {}
            for job in of_image:
                try:
                    result = next(found)
                    task_type = task_type_named(result.metadata.task_type)
                    predictions[job.task] = task_type.to_answer(result.metadata, result.output, job.size, limits)
                except ArithmeticError as error:
                    raise ModelError(f"task {job.task}: {error}; train it again") from error
            height, width = of_image[0].size
            answer = ImageAnswer(name=upload.name, width=width, height=height, tasks=predictions)
            images.append(answer.model_dump_json(by_alias=True))
            size += len(images[-1].encode())
            if size > MAX_ANSWER:
                what = "send fewer images, or a smaller top_k or max_detections"
                raise HTTPException(413, f"the answer is larger than {MAX_ANSWER:,} bytes; {what}")
        return f'{{"images":[{",".join(images)}]}}'

    def put(self, name: str, data: bytes) -> tuple[bool, TaskDescription]:
        """Serve and store a task file: whether it is new, and what it is. HTTPException, and no change, if refused."""
        assert self.settings.folder is not None
        target = self.settings.folder / f"{name}.safetensors"
        is_new = name not in self.bank.names
        if is_new and target.exists():
            raise HTTPException(409, f"{target.name} exists in the folder, but is not served; choose another name")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / target.name
            path.write_bytes(data)
            try:
                read_task(path)  # a damaged file is refused here, outside the batcher's thread
                self._change(self._put_into_bank, name, path)
            except (ValueError, TypeError, RuntimeError) as error:
                raise HTTPException(422, first_line(error).replace(str(path), name)) from error
        try:
            write_bytes(target, data)
        except OSError as error:
            self._change(self._put_into_bank, name, None if is_new else target)
            what = f"{target.name} cannot be written ({error.strerror})"
            raise HTTPException(507, f"{what}; nothing has changed") from error
        return is_new, self.describe(name)  # before the next change, which may delete it

    def delete(self, name: str) -> None:
        """Remove a task from the server, and delete its file."""
        assert self.settings.folder is not None
        self._metadata(name)
        self._change(self.bank.remove, name)
        (self.settings.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def _change(self, change: Callable[..., Any], *arguments: Any) -> None:
        """Change the bank between two batches, so that each image is prepared, run and answered by the same task."""
        self.batcher.between_batches(lambda: change(*arguments)).result()

    def _put_into_bank(self, name: str, path: Path | None) -> None:
        """Load, replace or, without a file, remove a task."""
        if path is None:
            self.bank.remove(name)
        elif name in self.bank.names:
            self.bank.swap(name, path)
        else:
            self.bank.load(path, name)

    def _run(self, jobs: list[Job]) -> list[Found | Exception]:
        """Run a mixed batch; a job whose task was removed, or replaced by one of other preprocessing, gets an error."""
        current = {name: self.bank.metadata(name) for name in self.bank.names}
        fit = [job for job in jobs if job.task in current and current[job.task].preprocessing == job.preprocessing]
        results = self._run_bank(fit) if fit else {}
        return [results[id(job)] if id(job) in results else self._replaced(job) for job in jobs]

    def _run_bank(self, jobs: list[Job]) -> dict[int, Found | Exception]:
        """Outputs by id of the job, of one call; if that fails, of a call for each task, so that others succeed."""
        tasks = list(dict.fromkeys(job.task for job in jobs))
        try:
            return self._run_bank_once(jobs)
        except ModelError:
            if len(tasks) == 1:
                raise
        apart: dict[int, Found | Exception] = {}
        for task in tasks:
            own = [job for job in jobs if job.task == task]
            try:
                apart |= self._run_bank_once(own)
            except ModelError as error:
                apart |= dict.fromkeys(map(id, own), error)
        return apart

    def _run_bank_once(self, jobs: list[Job]) -> dict[int, Found | Exception]:
        names, sizes = [job.task for job in jobs], [job.inner for job in jobs]
        try:
            results = self.bank(torch.stack([job.image for job in jobs]), names, sizes=sizes)
            of_jobs = zip(jobs, results, strict=True)
            return {id(job): Found(self.bank.metadata(job.task), _on_cpu(result)) for job, result in of_jobs}
        except Exception as error:
            logger.exception("a batch of %s failed", ", ".join(sorted(set(names))))
            raise ModelError(f"the model could not run this batch ({first_line(error)})") from error

    def _replaced(self, job: Job) -> HTTPException:
        if job.task not in self.bank.names:
            return self._unknown(job.task)
        return HTTPException(409, f"task {job.task} was replaced while the image waited; send it again")

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
    """The results of all; when one fails, or the request is cancelled, the others are cancelled."""
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
