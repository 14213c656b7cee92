"""python -m vpt.serve tasks=FOLDER: predictions over HTTP, many tasks on one backbone."""

import contextlib
import importlib.util
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vpt.config.command_line import check_folder, escape_output, fail, name_task_files, parse_options
from vpt.config.errors import ConfigError, config_keys, first_line
from vpt.config.schema import option

if TYPE_CHECKING:
    from vpt.models.bank import TaskBank

ENDING = ".safetensors"
LOCAL = ("127.0.0.1", "localhost", "::1")
INSTALL = 'uv pip install -p .venv -e ".[serve]" -c constraints.txt'

USAGE = """python -m vpt.serve: predictions for images over HTTP, many tasks on one backbone.

The page is at /, the API at /docs. Ctrl-C ends it after all accepted requests are answered.
Example: python -m vpt.serve tasks=runs/pets/task.safetensors,runs/flowers/task.safetensors"""


@dataclass
class ServeOptions:
    """Options of `python -m vpt.serve`."""

    tasks: str = option(
        about="task files, each named as its file, a task.safetensors as its folder, which must all be usable; or a "
        "folder of them or of runs, whose unusable files are skipped",
        shown="FILE,FILE",
    )
    backbone: str | None = option(None, "timm name of the backbone; by default that of the first task", shown="NAME")
    checkpoint: str | None = option(None, "weights of the backbone, if not those of timm, or moved", shown="FILE")
    port: int = option(8000, "0 takes a free one", low=0, high=65535)
    host: str = option("127.0.0.1", "this machine only; host=0.0.0.0 admits everybody who can reach it")
    device: str = option("auto", "auto, cpu, cuda, ...")
    max_batch: int = option(32, "most images in a batch, of any tasks", low=1)
    max_wait_ms: float = option(5.0, "how long an image may wait for others", low=0, high=10_000)
    max_queue: int = option(256, "predictions (an image and a task) that wait; more are refused with 429", low=1)
    max_body_mb: float = option(20.0, "size of a request; more is refused with 413", above=0, high=2000)
    timeout_s: float = option(30.0, "time of a request, then 504", above=0)
    uploads: bool = option(
        False,
        "true: task files may be uploaded, replaced and deleted: PUT and DELETE /tasks/NAME; with backbone= the folder "
        "may be empty",
    )


def main() -> None:
    """Read the options, and serve until interrupted."""
    escape_output()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # some imports swallow KeyboardInterrupt
    try:
        serve(parse_options(ServeOptions, sys.argv[1:], USAGE))
    except (ValueError, TypeError, OSError) as error:
        fail(error)


def serve(options: ServeOptions) -> None:
    """Load the tasks, and answer until SIGTERM or SIGINT; then finish accepted requests."""
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} is not installed: run {INSTALL}")
    paths, folder = _find_tasks(options)
    with _listen(options.host, options.port) as listener:
        from vpt.serve.app import make_app
        from vpt.serve.connections import make_server
        from vpt.serve.service import Settings

        bank = _open_bank(options, paths)
        limits = (options.max_batch, options.max_wait_ms, options.max_queue, options.max_body_mb, options.timeout_s)
        app = make_app(bank, Settings(*limits, folder=folder, is_local=options.host in LOCAL))
        server = make_server(app, options.timeout_s)
        for line in _greeting(options, listener, bank.names):
            print(line, flush=True)
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after its shutdown
            server.run(sockets=[listener])
    print("ended; all accepted requests are answered")


def _find_tasks(options: ServeOptions) -> tuple[dict[str, Path], Path | None]:
    """Task files by name, and the folder for uploads if they are allowed."""
    root = Path(options.tasks).expanduser()
    if not root.is_dir():
        if options.uploads:
            raise ConfigError(f"uploads=true requires a folder, and tasks={options.tasks} is none")
        return name_task_files("tasks", options.tasks), None
    paths = {path.stem: path for path in sorted(root.glob(f"*{ENDING}")) if not path.name.startswith(".")}
    if not paths and not options.uploads:  # a folder of runs
        runs = [path.parent for path in sorted(root.rglob(f"task{ENDING}"))]
        paths = {"_".join(run.relative_to(root).parts): run / f"task{ENDING}" for run in runs}
    if not paths and not (options.uploads and options.backbone):
        raise ConfigError(
            f"tasks={options.tasks}: contains no task file ({ENDING}); copy one into it, or use "
            "uploads=true and backbone=NAME"
        )
    if not options.uploads:
        return paths, None
    check_folder("tasks", root)
    return paths, root


def _open_bank(options: ServeOptions, paths: dict[str, Path]) -> "TaskBank":
    """The tasks on their backbone. Named files must be valid; invalid ones of a folder are skipped."""
    from vpt import build

    if not Path(options.tasks).expanduser().is_dir():
        return build.open_bank(paths, backbone=options.backbone, checkpoint=options.checkpoint, device=options.device)
    from vpt.models.bank import TaskBank
    from vpt.models.task_file import read_task

    unusable, valid = ConfigError(f"tasks={options.tasks}: none of its task files can be used"), {}
    for name, path in paths.items():
        with _skip_errors():
            valid[name] = read_task(path)
    if paths and not valid:
        raise unusable
    first = next(iter(valid.values()), None)
    with config_keys(name="backbone"):
        bank = TaskBank(
            options.backbone or (first.backbone if first is not None else ""),
            checkpoint=options.checkpoint,
            img_size=None if first is None else tuple(first.preprocessing["size"]),
            device=build.pick_device(options.device),
        )
    for name in valid:
        with _skip_errors():
            bank.load(paths[name], name)
    if paths and not bank.names:
        raise unusable
    return bank


@contextlib.contextmanager
def _skip_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        print(f"skipped: {first_line(error)}", file=sys.stderr, flush=True)


def _listen(host: str, port: int) -> socket.socket:
    """Take the port, so that one in use is noticed before anything is loaded; the server listens when it can answer."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address[:2])
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        what = str(error.strerror).partition(" (")[0]
        raise ConfigError(f"host={host} port={port}: {what}; choose another, or port=0") from error


def _greeting(options: ServeOptions, listener: socket.socket, names: tuple[str, ...]) -> list[str]:
    """Lines with the address, the tasks, and a warning if others can connect."""
    shown = f"[{options.host}]" if ":" in options.host else options.host
    shown = "127.0.0.1" if shown == "0.0.0.0" else "[::1]" if shown == "[::]" else shown
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    what = "1 task" if len(names) == 1 else f"{len(names)} tasks"
    what = f"{what} ({listed})" if names else "no task yet"
    lines = [f"{what} at http://{shown}:{listener.getsockname()[1]}; Ctrl-C ends"]
    if options.host not in LOCAL:
        what = "use it, and change its tasks" if options.uploads else "use it"
        lines.append(f"host={options.host}: everybody who can reach this machine can {what}; there is no password")
    return lines


if __name__ == "__main__":
    main()
