"""python -m vpt.train: train a prompt and a head, keep what val chooses, read test once."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vpt.command_line import check_command_line, fail
from vpt.config import Config, ConfigError, Mode, config_folder, register_schema, to_config

if TYPE_CHECKING:
    from vpt.build import Data
    from vpt.models.classification import ClassificationModel

NOT_FINITE = 3
INTERRUPTED = 130
NOT_LEARNED = 1


def main() -> None:
    """Check the command line, then let Hydra compose the config and call `run`, once for each job of a sweep."""
    arguments = sys.argv[1:]
    register_schema()
    try:
        folder = str(config_folder())
        if not {"-h", "--help", "--hydra-help", "--version"} & set(arguments):
            check_command_line(arguments)
    except ConfigError as error:
        fail(error)
    hydra.main(version_base="1.3", config_path=folder, config_name="train")(_job)()


def _job(composed: DictConfig) -> None:
    try:
        run(to_config(composed), OmegaConf.to_yaml(composed, resolve=True))
    except FloatingPointError as error:
        fail(error, NOT_FINITE)
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted; checkpoints of the finished epochs are in the run folder"), INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(error)


def run(config: Config, config_text: str) -> Path | None:
    """One training run; return its folder, or None for `mode=overfit`, which keeps nothing.

    Args:
        config: What to train, on what, and how.
        config_text: The resolved config as YAML, kept in the run folder.
    """
    from vpt import build, report
    from vpt.models.backbone import preprocessing_of

    build.seed_everything(config.seed, config.deterministic)
    device = build.pick_device(config.device)
    samples = build.build_samples(config.dataset)
    model = build.build_model(config, samples["train"].classes).to(device)
    data = build.build_data(config, samples, preprocessing_of(model.backbone.vit))
    summary = report.summarise(model, data, config)
    print(summary, flush=True)
    if config.mode is Mode.overfit:
        _overfit(config, model, data)
        return None
    run_dir = build.make_run_dir(config.run.root, config.run.name)
    print(f"{'run':<10} {run_dir} (tensorboard --logdir {config.run.root})", flush=True)
    _train(config, config_text, model, data, run_dir, summary)
    return run_dir


def _train(
    config: Config, config_text: str, model: "ClassificationModel", data: "Data", run_dir: Path, summary: str
) -> None:
    from vpt import build, report
    from vpt.engine.checkpoint import Checkpoints
    from vpt.engine.metrics import ClassificationMetrics
    from vpt.engine.monitor import Monitor
    from vpt.engine.trainer import evaluate, fit
    from vpt.files import write_bytes, write_json
    from vpt.models.task_file import save_task
    from vpt.models.tuning import tuned_parameters

    write_bytes(run_dir / "config.yaml", config_text.encode())
    settings = build.build_settings(config, next(model.parameters()).device)
    optimizer = build.build_optimizer(config, model)
    metrics = ClassificationMetrics(model.num_classes)
    with Monitor(run_dir) as monitor:
        report.log_start(monitor, data, config_text, summary)
        result = fit(
            model,
            data.loaders["train"],
            data.loaders["val"],
            loss_function=build.build_loss(config, data.samples["train"]).to(next(model.parameters()).device),
            metrics=metrics,
            optimizer=optimizer,
            schedule=build.build_schedule(config, optimizer, len(data.loaders["train"])),
            settings=settings,
            checkpoints=Checkpoints(run_dir, tuned_parameters(model)),
            monitor=monitor,
            average=build.build_average(config, model),
            watches=build.build_watches(model),
        )
        reading: dict[str, Any] = {"precision": settings.precision, "max_batches": settings.max_batches}
        found = {"val": evaluate(model, data.loaders["val"], metrics, **reading)}
        if "test" in data.loaders:
            test_metrics = ClassificationMetrics(model.num_classes)
            found["test"] = evaluate(model, data.loaders["test"], test_metrics, description="test", **reading)
        report.log_end(monitor, data, metrics, result, asdict(config), found.get("test", {}))
    task = save_task(
        model,
        run_dir / "task.safetensors",
        classes=data.classes,
        preprocessing=data.preprocessing.to_dict(),
        metrics=found,
    )
    numbers = {name: value for name, value in asdict(result).items() if name != "best"}  # it is the val of metrics
    write_json(run_dir / "result.json", {**numbers, "metrics": found})
    print(f"\nbest epoch {result.best_epoch} of {result.epochs}, {result.steps} steps, {result.seconds:.0f} s")
    print(report.result_table(found))
    print(f"task file  {task} ({task.stat().st_size / 1000:,.0f} kB)")


def _overfit(config: Config, model: "ClassificationModel", data: "Data") -> None:
    from vpt import build
    from vpt.engine.trainer import overfit

    batch = next(iter(data.loaders["train"]))
    loss_function = build.build_loss(config, data.samples["train"]).to(next(model.parameters()).device)
    optimizer = build.build_optimizer(config, model)
    steps = overfit(model, batch, loss_function=loss_function, optimizer=optimizer)
    if steps is None:
        fail(
            RuntimeError("one batch was not learned: raise optim.prompt_lr or optim.head_lr, or look at the data"),
            NOT_LEARNED,
        )
    print(f"learned {len(batch[1])} pictures in {steps} steps")


if __name__ == "__main__":
    main()
