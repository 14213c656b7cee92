"""python -m vpt.train: train a prompt and a head, keep what val chooses, read test once; again, it goes on."""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vpt.config.command_line import check_command_line, fail, is_for_user, quote_paths, tell
from vpt.config.composition import config_folder, register_schema
from vpt.config.errors import ConfigError
from vpt.config.saved import conceal, recipe, to_plain
from vpt.config.schema import Config, Mode
from vpt.config.validation import to_config
from vpt.engine.signals import STOPPED, Stopped, StopSignal

if TYPE_CHECKING:
    from vpt.build import Data, Model
    from vpt.engine.checkpoint import Checkpoints, Saved
    from vpt.engine.monitor import Monitor
    from vpt.engine.state import FitResult, RunState
    from vpt.runs.folder import RunFolder
    from vpt.task_types.base import Kind

NOT_LEARNED = 1
NOT_FINITE = 3
GO_ON = "type the same command again, and it goes on where it stopped"


def main() -> None:
    """Check the command line, then run the job; Hydra composes and runs the jobs of a sweep, and prints its help."""
    sys.argv[1:] = quote_paths(sys.argv[1:])
    is_help = bool({"-h", "--help", "--hydra-help", "--version"} & set(sys.argv))
    codes: list[int] = []
    try:
        line = None if is_help else check_command_line(sys.argv[1:])
        with StopSignal() as stop:
            if line is not None and not line.needs_hydra:
                codes.append(_run_or_explain(line.composed, stop, is_sweep=False))
            else:
                _run_hydra(lambda composed, is_sweep: codes.append(_run_or_explain(composed, stop, is_sweep=is_sweep)))
    except ConfigError as error:
        fail(error)
    except Stopped as error:
        fail(RuntimeError(f"stopped by {error}; {GO_ON}"), STOPPED)
    sys.exit(max(codes, default=0))


def _run_hydra(job: Callable[[DictConfig, bool], None]) -> None:
    """Run the job in Hydra's application, which calls it for each config of a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    def run_job(composed: DictConfig) -> None:
        job(composed, HydraConfig.get().mode is RunMode.MULTIRUN)

    register_schema()
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="train")(run_job)()


def _run_or_explain(composed: DictConfig, stop: StopSignal, *, is_sweep: bool) -> int:
    """Run one job; print an error as a user should see it, and return the exit code, so that a sweep continues."""
    try:
        config = to_config(composed)
        run(config, conceal(config, composed), is_sweep=is_sweep, stop=stop)
    except FloatingPointError as error:
        return tell(error, NOT_FINITE)
    except NotLearnedError as error:
        return tell(error, NOT_LEARNED)
    except Stopped as error:
        if config.mode is not Mode.train:
            fail(RuntimeError(f"stopped by {error}; mode={config.mode} keeps nothing"), 128 + error.number)
        then = "type the same command again, but without fresh=true, and it goes on" if config.fresh else GO_ON
        fail(RuntimeError(f"stopped by {error}; {then}"), STOPPED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return tell(error)
    return 0


class NotLearnedError(RuntimeError):
    """One batch could not be learned."""


def run(
    config: Config, shown: Config | None = None, *, is_sweep: bool = False, stop: StopSignal | None = None
) -> Path | None:
    """One training run, or what is left of it; return its folder, or None for `mode=overfit`, which keeps nothing.

    Args:
        config: What to train, on what, and how.
        shown: The config as it may be written down, see `conceal`; None for the config itself.
        is_sweep: Whether it is one of several runs of one command, so that each needs a name of its own.
        stop: The signals that end it; None listens to none.
    """
    stop, shown = stop or StopSignal(), shown or config
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("vpt trains in one process: type torchrun --nproc_per_node=1, or python -m vpt.train")
    with stop.patient():  # an exception in the middle of an import of C++ ends the process
        import vpt.runs.summary  # noqa: F401  # and with it torch and timm
        from vpt.runs.folder import RunFolder
    stop.check()
    if config.mode is Mode.overfit:
        _overfit(config)
        return None
    with RunFolder(config, shown, is_sweep=is_sweep) as folder:
        if folder.is_finished:
            _tell_finished(folder)
        else:
            _Training(config, shown, folder, stop).run()
        return folder.path


class _Training:
    """A run, from its beginning or from its last checkpoint to its end."""

    def __init__(self, config: Config, shown: Config, folder: "RunFolder", stop: StopSignal) -> None:
        from vpt.train.caching import plan_cache

        self.config, self.shown, self.folder, self.stop = config, shown, folder, stop
        self.kind, self.model, self.samples, data = _prepare(config)
        self.plan = plan_cache(config, self.model, data)
        self.data = self.plan.data

    def run(self) -> None:
        from vpt import build
        from vpt.engine.monitor import Monitor
        from vpt.runs import summary as report

        checkpoints = self._checkpoints()
        saved = checkpoints.load()
        if saved is None:
            build.start_prompt(self.config, self.model, self.data)  # before there is a folder, if it is refused
        summary = report.summarise(self.model, self.data, self.config, self.kind.describe(self.samples), self.plan.text)
        print(summary, flush=True)
        self.folder.make()
        print(f"{'run':<10} {self.folder.path} (tensorboard --logdir {self.config.run.root})", flush=True)
        state = build.build_state(self.config, self.model, len(self.data.loaders["train"]))
        going_on = None if saved is None else _restore(saved, state)
        with Monitor(self.folder.path, layout=self.kind.charts, going_on=going_on) as monitor:
            if going_on is None:
                report.log_start(monitor, self.folder.config_text, summary)
                self.kind.log_start(monitor, self.data)
            result = self._fit(state, checkpoints, monitor)
            found = self._evaluate(monitor, result)
            report.log_hparams(monitor, to_plain(self.shown), result, found.get("test", {}))
        self._finish(result, found)
        if checkpoints.error is not None:
            raise OSError(
                f"the last checkpoint could not be written ({checkpoints.error}); all else of the run is there"
            )

    def _checkpoints(self) -> "Checkpoints":
        from vpt.engine.checkpoint import Checkpoints
        from vpt.models.tuning import pretrained_fingerprint
        from vpt.runs.folder import digest_of

        weights = pretrained_fingerprint(self.model.backbone.vit)
        return Checkpoints(self.folder.path, {"pictures or labels": digest_of(self.samples), "backbone": weights})

    def _fit(self, state: "RunState", checkpoints: "Checkpoints", monitor: "Monitor") -> "FitResult":
        from vpt import build
        from vpt.engine.trainer import fit
        from vpt.train.caching import build_fit_inputs

        config, kind, data = self.config, self.kind, self.data
        inputs = build_fit_inputs(config, self.model, self.plan)
        if inputs.note is not None:
            print(inputs.note, flush=True)
        if config.compile:
            inputs.model.compile()
        evaluator, names = kind.evaluator(data, "val"), self.samples["train"].names
        return fit(
            inputs.model,
            inputs.train_loader,
            inputs.val_loader,
            state=state,
            losses=kind.losses(data),
            evaluator=evaluator,
            settings=build.build_settings(config, state.device, kind.select),
            checkpoints=checkpoints,
            monitor=monitor,
            stop=self.stop,
            watches=build.build_watches(self.model),
            names_of=build.names_in(inputs.train_loader, names),
            on_best=self._keep_best,
            on_epoch=lambda epoch, step: kind.log_epoch(monitor, data, evaluator, epoch, step),
        )

    def _keep_best(self, values: dict[str, float]) -> None:
        """Write the task of an epoch, for those who cannot wait; a disk that is full is no reason to stop."""
        from vpt.engine.console import warn

        try:
            self._save_task({"val": values})
        except OSError as error:
            warn(f"the task of this epoch is not written: {error}")

    def _save_task(self, metrics: dict[str, dict[str, float]]) -> None:
        from vpt.models.task_file import save_task

        preprocessing = self.data.preprocessing.to_dict()
        save_task(self.model, self.folder.task, metrics=metrics, preprocessing=preprocessing, config=recipe(self.shown))

    def _evaluate(self, monitor: "Monitor", result: "FitResult") -> dict[str, dict[str, float]]:
        """Metrics of the best epoch on val, and on test if there is one."""
        from vpt import build
        from vpt.engine.trainer import evaluate

        settings = build.build_settings(self.config, next(self.model.parameters()).device, self.kind.select)
        reading: dict[str, Any] = {"precision": settings.precision, "max_batches": settings.max_batches}
        evaluator = self.kind.evaluator(self.data, "val")
        found = {"val": evaluate(self.model, self.data.loaders["val"], evaluator, **reading)}
        if "test" in self.data.loaders:
            of_test = self.kind.evaluator(self.data, "test")
            found["test"] = evaluate(self.model, self.data.loaders["test"], of_test, description="test", **reading)
        self.kind.log_end(monitor, self.data, evaluator, result)  # late: a run that dies here logs it once more
        return found

    def _finish(self, result: "FitResult", found: dict[str, dict[str, float]]) -> None:
        """Leave the task file and, last of all, what makes the run a finished one."""
        from vpt.runs import summary as report
        from vpt.storage.files import write_json

        self._save_task(found)
        numbers = {name: value for name, value in asdict(result).items() if name != "best"}  # it is the val of metrics
        write_json(self.folder.result_file, {"mode": self.config.mode.value, **numbers, "metrics": found})
        print(report.describe_result(result, found, self.folder.task))


def _prepare(config: Config) -> "tuple[Kind, Model, dict[str, Any], Data]":
    """The kind of task, the model on its device, the samples of each split, and the data without a cache."""
    from vpt import build
    from vpt.models.vit import preprocessing_of
    from vpt.task_types.base import kind_of

    build.seed_everything(config.seed, config.deterministic)
    device = build.pick_device(config.device)
    if config.compile:
        build.check_compiler(device)
    kind = kind_of(config)
    samples = kind.read()
    train = samples["train"]
    model = build.build_model(config, train.classes, getattr(train, "category_ids", None)).to(device)
    data = kind.build_data(samples, preprocessing_of(model.backbone.vit))
    build.whiten_prompt(config, model, data)
    return kind, model, samples, data


def _restore(saved: "Saved", state: "RunState") -> tuple[int, int]:
    """Become the state of a checkpoint; bytes of metrics.jsonl and step of it."""
    try:
        state.load(saved.tensors, saved.numbers)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{saved.path}: {error}; type fresh=true to put the run away and start anew") from error
    print(f"{'going on':<10} behind step {state.result.steps}, epoch {state.epoch}, from {saved.path}", flush=True)
    return int(saved.numbers["metrics_bytes"]), state.result.steps


def _tell_finished(folder: "RunFolder") -> None:
    from vpt.runs import summary as report

    result = folder.result()
    print(f"{folder.path}: this run has finished, in {result['epochs']} epochs; fresh=true would start it anew")
    print(f"{report.result_table(result['metrics'])}\ntask file  {folder.task}")


def _overfit(config: Config) -> None:
    from vpt import build
    from vpt.engine.trainer import overfit
    from vpt.runs import summary as report
    from vpt.train.caching import plan_cache

    kind, model, samples, data = _prepare(config)
    build.start_prompt(config, model, data)
    plan = plan_cache(config, model, data)
    print(report.summarise(model, plan.data, config, kind.describe(samples), plan.text), flush=True)
    if config.compile:
        model.compile()
    batch = next(iter(data.loaders["train"]))
    steps = overfit(
        model,
        batch,
        losses=kind.losses(data),
        evaluator=kind.evaluator(data, None),
        select=kind.select,
        goal=kind.goal,
        optimizer=build.build_optimizer(config, model),
    )
    if steps is None:
        raise NotLearnedError("one batch was not learned: raise optim.prompt_lr or optim.head_lr, or look at the data")
    print(f"learned {len(batch[0])} pictures in {steps} steps")


if __name__ == "__main__":
    main()
