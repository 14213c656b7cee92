"""One training run: prepare or restore, fit, evaluate, write the task file; or overfit one batch."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vpt import build
from vpt.build import Data
from vpt.config.errors import ConfigError
from vpt.config.saved import recipe, to_plain
from vpt.config.schema import Config, Mode, OnError
from vpt.data.samples import data_digest
from vpt.engine.checkpoint import Checkpoints, Saved, check_run_dir
from vpt.engine.console import warn
from vpt.engine.measure import describe_machine
from vpt.engine.monitor import Monitor, overview
from vpt.engine.signals import StopSignal
from vpt.engine.state import FitResult, RunState
from vpt.engine.steps import Callbacks, FitData, OutOfMemoryError
from vpt.engine.trainer import evaluate, fit, overfit
from vpt.models.task_file import save_task
from vpt.models.task_model import TaskModel
from vpt.models.tuning import pretrained_fingerprint
from vpt.models.vit import preprocessing_of
from vpt.runs import summary as report
from vpt.runs.folder import RunFolder
from vpt.runs.record import Record, changes, read_record, record_of, touched, write_record
from vpt.storage.files import write_json
from vpt.task_types.base import TaskType, task_type_of
from vpt.train import NotLearnedError
from vpt.train.caching import build_fit_inputs, plan_cache

Metrics = dict[str, dict[str, float]]  # by split


def run(
    config: Config, shown: Config | None = None, *, is_sweep: bool = False, stop: StopSignal | None = None
) -> Path | None:
    """Start or resume one training run; return its folder, or None for `mode=overfit`, which saves nothing.

    Args:
        config: The run's config.
        shown: The config as it may be saved, see `conceal`; None for the config itself.
        is_sweep: Whether it is one of several runs of one command, so that each requires a folder of its own.
        stop: The signals that end it; None for none.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("vpt trains in one process: type torchrun --nproc_per_node=1, or python -m vpt.train")
    if config.mode is Mode.overfit:
        _overfit(config, stop or StopSignal())
        return None
    with RunFolder(config, shown or config, is_sweep=is_sweep) as folder:
        if folder.is_finished:
            _report_finished(config, folder)
        else:
            _Training(config, shown or config, folder, stop or StopSignal()).run()
        return folder.path


def _report_finished(config: Config, folder: RunFolder) -> None:
    """Print the result of a finished run again; a ConfigError if its data or files changed since."""
    result, before = folder.result(), read_record(folder.path)
    note, remarks = "it has no record of its data, so whether they changed since cannot be known", []
    if before is not None:
        # Images are opened only where those that a run uses depend on it, or are chosen after that.
        is_chosen = config.data.on_error is OnError.skip or config.dataset.num_per_class is not None
        task_type = task_type_of(config)
        try:
            samples = task_type.read() if is_chosen else task_type.read_all()
            now = record_of(config, samples, before)
        except (ValueError, OSError) as error:
            note = f"whether its data changed since is not known: {error}"
        else:
            note = _refuse_changes(folder, before, now)
            remarks = report.describe_small_splits(samples, result["metrics"])
    if note:
        warn(f"{folder.path}: {note}; fresh=true would train on the data as they are now")
    print(f"{folder.path}: this run has finished, in {result['epochs']} epochs; fresh=true would start it anew")
    print(f"{report.result_table(result['metrics'])}\ntask file  {folder.task}", flush=True)
    for remark in remarks:
        warn(remark)


def _refuse_changes(folder: RunFolder, before: Record, now: Record) -> str:
    """Refuse data or files that changed since a run was started; return a note on images that may have changed."""
    if found := changes(before, now):
        raise ConfigError(
            f"{folder.path}: the data of this run changed since it was started: {'; '.join(found)}; type fresh=true to "
            "rename its folder and train on the data as they are now, or run.name=NAME to leave it where it is, or "
            "restore the data"
        )
    if not (names := touched(before, now)):
        return ""
    images = f"{len(names):,} image{'s' if len(names) > 1 else ''} of the same bytes (first {names[0]})"
    return f"modification times changed since it was started, perhaps the content as well: {images}"


class _Training:
    """A run, from its beginning or from its last checkpoint to its end."""

    def __init__(self, config: Config, shown: Config, folder: RunFolder, stop: StopSignal) -> None:
        self.config, self.shown, self.folder, self.stop = config, shown, folder, stop
        self.task_type, self.model, self.samples, data = _prepare(config)
        self.plan = plan_cache(config, self.model, data)
        self.data = self.plan.data
        self.extended_after: list[int] = []

    def run(self) -> None:
        config, task_type = self.config, self.task_type
        weights = pretrained_fingerprint(self.model.backbone.vit)
        made_from = {"images or labels": data_digest(self.samples), "backbone": weights}
        machine = describe_machine(build.pick_device(config.device))
        parts = ("threads", "cpu", "torch") if machine["gpu"] is None else ("gpu", "torch")
        checkpoints = Checkpoints(self.folder.path, made_from, {part: machine[part] for part in parts})
        before = read_record(self.folder.path)
        record = record_of(config, self.samples, before)
        is_begun = checkpoints.last.exists() or checkpoints.previous.exists()
        if before is not None and is_begun and (note := _refuse_changes(self.folder, before, record)):
            warn(f"{self.folder.path}: {note}")
        try:
            saved = checkpoints.load()
        except ValueError as error:
            raise ConfigError(f"{error}: type fresh=true to rename the folder and start anew") from error
        if saved is None:
            build.start_prompt(config, self.model, self.data)  # before there is a folder, if it is refused
        num_batches = len(self.data.loaders["train"])
        state = build.build_state(config, self.model, num_batches, 0 if saved is None else _last_extension(saved))
        resume_at = None if saved is None else _restore(saved, state)
        if self.folder.is_extended:
            _extend(config, saved, state, num_batches, checkpoints)
        summary = report.summarise(self.model, self.data, config, task_type.describe(self.samples), self.plan.text)
        summary += report.describe_schedules(state.result, config.train.epochs)
        print(summary, flush=True)
        self.folder.make()
        if saved is None or before is None:
            write_record(self.folder.path, record)
        print(f"{'run':<10} {self.folder.path} (tensorboard --logdir {config.run.root})", flush=True)
        prompt = self.model.backbone.prompt
        layout = overview(task_type.charts, None if prompt is None else prompt.blocks[-1])
        with Monitor(self.folder.path, layout=layout, resume_at=resume_at) as monitor:
            if resume_at is None:
                monitor.text("config", f"```yaml\n{self.folder.config_text}\n```")
                monitor.text("summary", f"```\n{summary}\n```")
                task_type.log_start(monitor, self.data)
            with _with_config_keys(config):
                self.extended_after = state.result.extended_after
                result = self._fit(state, checkpoints, monitor)
                evaluators, metrics = self._evaluate()
            monitor.scalars(task_type.class_scalars(evaluators["val"], self.data), result.best_step)
            best = {"val": result.best, **{split: values for split, values in metrics.items() if split == "test"}}
            results = {f"best/{split}_{name}": value for split in best for name, value in best[split].items()}
            monitor.hparams(to_plain(self.shown), results, usual=to_plain(Config()))
            monitor.sync()
            self._finish(result, metrics)
            for split, evaluator in evaluators.items():  # last: figures may take long, or fail for want of memory
                task_type.log_end(monitor, self.data, evaluator, split, result.best_step)
        if checkpoints.error is not None:
            raise OSError(
                f"the last checkpoint could not be written ({checkpoints.error}); all other files of the run are saved"
            )

    def _fit(self, state: RunState, checkpoints: Checkpoints, monitor: Monitor) -> FitResult:
        config, task_type, data = self.config, self.task_type, self.data
        inputs = build_fit_inputs(config, self.model, self.plan)
        if inputs.note is not None:
            print(inputs.note, flush=True)
        if config.compile:
            inputs.model.compile()
        evaluator = task_type.evaluator(data, "val")
        fit_data = FitData(
            inputs.train_loader,
            inputs.val_loader,
            task_type.losses(data),
            evaluator,
            build.names_in(inputs.train_loader, self.samples["train"].names),
        )
        callbacks = Callbacks(
            monitor,
            checkpoints,
            self.stop,
            build.build_watches(self.model),
            on_best=self._save_best,
            on_epoch=lambda epoch, step: task_type.log_epoch(monitor, data, evaluator, epoch, step),
        )
        return fit(
            inputs.model, fit_data, state, build.build_settings(config, state.device, task_type.select), callbacks
        )

    def _save_best(self, values: dict[str, float]) -> None:
        """Write the task of an epoch, which can be used while the run continues; a full disk is only a warning."""
        try:
            self._save_task({"val": values})
        except OSError as error:
            warn(f"the task of this epoch is not written: {error}")

    def _save_task(self, metrics: Metrics) -> None:
        check_run_dir(self.folder.path)
        preprocessing, config = self.data.preprocessing.to_dict(), recipe(self.shown)
        if self.extended_after:
            config["extended_after"] = self.extended_after
        save_task(self.model, self.folder.task, metrics=metrics, preprocessing=preprocessing, config=config)

    def _evaluate(self) -> tuple[dict[str, Any], Metrics]:
        """Evaluators and metrics of the best epoch on val, and on test if there is one."""
        settings = build.build_settings(self.config, next(self.model.parameters()).device, self.task_type.select)
        limits = {"precision": settings.precision, "max_batches": settings.max_batches}
        reading: dict[str, Any] = {**limits, "stop": self.stop}
        splits = [split for split in ("val", "test") if split in self.data.loaders]
        evaluators: dict[str, Any] = {split: self.task_type.evaluator(self.data, split) for split in splits}
        return evaluators, {
            split: evaluate(self.model, self.data.loaders[split], evaluator, description=split, **reading)
            for split, evaluator in evaluators.items()
        }

    def _finish(self, result: FitResult, metrics: Metrics) -> None:
        """Write the task file and, last, the file that marks the run as finished."""
        self._save_task(metrics)
        numbers = {name: value for name, value in asdict(result).items() if name != "best"}  # it is the val of metrics
        head = {"mode": self.config.mode.value, "select": self.task_type.select}
        numbers["planned_epochs"] = self.config.train.epochs
        write_json(self.folder.result_file, {**head, **numbers, "metrics": metrics})
        print(report.describe_result(result, metrics, self.folder.task), flush=True)
        for line in report.describe_small_splits(self.samples, metrics):
            warn(line)


@contextmanager
def _with_config_keys(config: Config) -> Iterator[None]:
    """Add to errors of the engine, which names no config keys, what to type."""
    try:
        yield
    except FloatingPointError as error:
        lower = "lower optim.prompt_lr, optim.head_lr or tuning.lr, and add fresh=true"
        skip = f"check these images, or allow such steps: train.skip_nonfinite={config.train.skip_nonfinite + 10}"
        advice = f"{lower}; or {skip}" if "skip_nonfinite" in str(error) else lower
        raise FloatingPointError(f"{error}; {advice}") from error
    except OutOfMemoryError as error:
        size, accumulation = config.train.batch_size, config.train.accumulation
        smaller = f"train.batch_size={max(1, size // 2)} train.accumulation={accumulation * (2 if size > 1 else 1)}"
        reason = str(error).partition("; try ")[0]  # of an evaluation, whose batch_size is that of the loader
        raise OutOfMemoryError(
            f"{reason}; type auto_batch=true, or {smaller}, or grad_checkpointing=true, or a smaller backbone.img_size"
        ) from error


def _prepare(config: Config) -> tuple[TaskType, TaskModel, Mapping[str, Any], Data]:
    """The task type, the model on its device, the samples by split, and the data without a cache."""
    build.seed_everything(config.seed, config.deterministic)
    device = build.pick_device(config.device)
    if config.compile:
        build.check_compiler(device)
    task_type = task_type_of(config)
    samples = task_type.read()
    model = task_type.build_model(samples["train"]).to(device)
    data = task_type.build_data(samples, preprocessing_of(model.backbone.vit))
    build.whiten_prompt(config, model, data)
    return task_type, model, samples, data


def _restore(saved: Saved, state: RunState) -> tuple[int, int]:
    """Load the state of a checkpoint; return its bytes of metrics.jsonl and its step."""
    try:
        state.load(saved.tensors, saved.numbers)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{saved.path}: {error}; type fresh=true to rename the folder and start anew") from error
    print(f"{'resuming':<10} after step {state.result.steps}, epoch {state.epoch}, from {saved.path}", flush=True)
    return int(saved.numbers["metrics_bytes"]), state.result.steps


def _last_extension(saved: Saved) -> int:
    """The number of epochs after which the last schedule began."""
    return int(max([0, *saved.numbers["result"].get("extended_after", [])]))


def _extend(config: Config, saved: Saved | None, state: RunState, num_batches: int, checkpoints: Checkpoints) -> None:
    """Begin a new schedule behind the epochs of a finished run, and save that before anything else is changed."""
    if saved is None:
        raise ConfigError(f"extend=true: there is no checkpoint at {checkpoints.last}; type fresh=true to start anew")
    if _last_extension(saved) == state.result.epochs:  # a process was killed behind this
        return
    state.extend(build.build_schedule(config, state.optimizer, num_batches, state.result.epochs))
    if not checkpoints.save(state.tensors(), {**state.numbers(), "metrics_bytes": saved.numbers["metrics_bytes"]}):
        raise OSError(f"the run is not extended: {checkpoints.error}")


def _overfit(config: Config, stop: StopSignal) -> None:
    """Check that one batch can be learned."""
    task_type, model, samples, data = _prepare(config)
    build.start_prompt(config, model, data)
    plan = plan_cache(config, model, data)
    print(report.summarise(model, plan.data, config, task_type.describe(samples), plan.text), flush=True)
    if config.compile:
        model.compile()
    batch = next(iter(data.loaders["train"]))
    steps = overfit(
        model,
        batch,
        losses=task_type.losses(data),
        evaluator=task_type.evaluator(data, None),
        select=task_type.main_metric,
        goal=task_type.overfit_goal,
        optimizer=build.build_optimizer(config, model),
        stop=stop,  # Python drops an exception that a signal raises while loader processes are forked
    )
    if steps is None:
        raise NotLearnedError("one batch was not learned: raise optim.prompt_lr or optim.head_lr, or check the data")
    print(f"learned {len(batch[0])} images in {steps} steps")
