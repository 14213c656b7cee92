"""python -m vpt.train: train a prompt and a head, keep what val chooses, read test once."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from vpt.command_line import INTERRUPTED, check_command_line, fail, quote_paths, tell
from vpt.config import Config, ConfigError, Mode, config_folder, recipe, register_schema, to_config

if TYPE_CHECKING:
    from vpt.build import Data, Model
    from vpt.caching import CachePlan
    from vpt.kinds.kind import Kind

NOT_FINITE = 3
NOT_LEARNED = 1


def main() -> None:
    """Check the command line, then let Hydra compose the config and run the job, or each job of a sweep."""
    register_schema()
    sys.argv[1:] = quote_paths(sys.argv[1:])
    try:
        folder = str(config_folder())
        if not {"-h", "--help", "--hydra-help", "--version"} & set(sys.argv):
            check_command_line(sys.argv[1:])
    except ConfigError as error:
        fail(error)
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        codes.append(_run_or_explain(composed))  # a failed run of a sweep does not stop the others

    hydra.main(version_base="1.3", config_path=folder, config_name="train")(job)()
    sys.exit(max(codes, default=0))


def _run_or_explain(composed: DictConfig) -> int:
    """Run one job; print an error as a user should see it, and return the exit code."""
    try:
        run(to_config(composed), OmegaConf.to_yaml(composed, resolve=True))
    except FloatingPointError as error:
        return tell(error, NOT_FINITE)
    except NotLearnedError as error:
        return tell(error, NOT_LEARNED)
    except KeyboardInterrupt:
        tell(RuntimeError("interrupted; if an epoch had ended, the run folder holds the task of the best one"))
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return tell(error)
    return 0


class NotLearnedError(RuntimeError):
    """One batch could not be learned."""


def run(config: Config, config_text: str) -> Path | None:
    """One training run; return its folder, or None for `mode=overfit`, which keeps nothing.

    Args:
        config: What to train, on what, and how.
        config_text: The resolved config as YAML, kept in the run folder.
    """
    from vpt import build, report
    from vpt.caching import plan_cache
    from vpt.kinds.kind import kind_of
    from vpt.models.vit import preprocessing_of

    build.seed_everything(config.seed, config.deterministic)
    device = build.pick_device(config.device)
    if config.compile:
        build.check_compiler(device)
    kind = kind_of(config)
    samples = kind.read()
    train = samples["train"]
    model = build.build_model(config, train.classes, getattr(train, "category_ids", None)).to(device)
    plan = plan_cache(config, model, kind.build_data(samples, preprocessing_of(model.backbone.vit)))
    summary = report.summarise(model, plan.data, config, kind.describe(samples), plan.text)
    print(summary, flush=True)
    if config.mode is Mode.overfit:
        _overfit(config, kind, model, plan.data)
        return None
    suffix = "_dry" if config.mode is Mode.dry else ""
    run_dir = build.make_run_dir(config.run.root, config.run.name + suffix)
    print(f"{'run':<10} {run_dir} (tensorboard --logdir {config.run.root})", flush=True)
    _train(config, kind, config_text, model, plan, run_dir, summary)
    return run_dir


def _train(
    config: Config,
    kind: "Kind",
    config_text: str,
    model: "Model",
    plan: "CachePlan",
    run_dir: Path,
    summary: str,
) -> None:
    from vpt import build, report
    from vpt.caching import build_fit_inputs
    from vpt.engine.checkpoint import Checkpoints
    from vpt.engine.monitor import Monitor
    from vpt.engine.trainer import evaluate, fit
    from vpt.files import write_bytes, write_json
    from vpt.models.task_file import save_task
    from vpt.models.tuning import tuned_parameters

    data = plan.data
    task = run_dir / "task.safetensors"
    described: dict[str, Any] = {"preprocessing": data.preprocessing.to_dict(), "config": recipe(config)}
    settings = build.build_settings(config, next(model.parameters()).device, kind.select)
    optimizer = build.build_optimizer(config, model)
    evaluator = kind.evaluator(data, "val")
    write_bytes(run_dir / "config.yaml", config_text.encode())
    with Monitor(run_dir, layout=kind.charts) as monitor:
        report.log_start(monitor, config_text, summary)
        kind.log_start(monitor, data)
        inputs = build_fit_inputs(config, model, plan)
        if inputs.note is not None:
            print(inputs.note, flush=True)
        if config.compile:
            inputs.model.compile()
        result = fit(
            inputs.model,
            inputs.train_loader,
            inputs.val_loader,
            losses=kind.losses(data),
            evaluator=evaluator,
            optimizer=optimizer,
            schedule=build.build_schedule(config, optimizer, len(data.loaders["train"])),
            settings=settings,
            checkpoints=Checkpoints(run_dir, tuned_parameters(model)),
            monitor=monitor,
            average=build.build_average(config, model),
            watches=build.build_watches(model),
            on_best=lambda val: save_task(model, task, metrics={"val": val}, **described),
            on_epoch=lambda epoch, step: kind.log_epoch(monitor, data, evaluator, epoch, step),
        )
        reading: dict[str, Any] = {"precision": settings.precision, "max_batches": settings.max_batches}
        found = {"val": evaluate(model, data.loaders["val"], evaluator, **reading)}
        kind.log_end(monitor, data, evaluator, result)
        if "test" in data.loaders:
            of_test = kind.evaluator(data, "test")
            found["test"] = evaluate(model, data.loaders["test"], of_test, description="test", **reading)
        report.log_hparams(monitor, config, result, found.get("test", {}))
    save_task(model, task, metrics=found, **described)
    numbers = {name: value for name, value in asdict(result).items() if name != "best"}  # it is the val of metrics
    write_json(run_dir / "result.json", {"mode": config.mode.value, **numbers, "metrics": found})
    print(report.describe_result(result, found, task))


def _overfit(config: Config, kind: "Kind", model: "Model", data: "Data") -> None:
    from vpt import build
    from vpt.engine.trainer import overfit

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
