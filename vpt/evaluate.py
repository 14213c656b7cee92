"""python -m vpt.evaluate run=RUN: the metrics of a trained run on one of its splits."""

import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vpt.command_line import INTERRUPTED, check_file, fail, is_for_user, parse_options
from vpt.config import ConfigError, OnError, number

USAGE = """python -m vpt.evaluate: metrics of a trained run on one split of its data.

  run=FOLDER         a run folder, such as runs/quickstart
  split=test         train, val or test
  root=PATH          where the data lie now, when they have moved
  checkpoint=FILE    weights of the backbone, when they have moved
  output=FILE.json   write the metrics there too
  batch_size=N       pictures at a time; as in training when left out, since losses of boxes are means over a batch
  num_workers=0  device=auto

Example: python -m vpt.evaluate run=runs/quickstart split=val"""


@dataclass
class EvaluateOptions:
    """Options of `python -m vpt.evaluate`."""

    run: str
    split: str = "test"
    root: str | None = None
    checkpoint: str | None = None
    output: str | None = None
    batch_size: int | None = number(None, low=1)
    num_workers: int = number(0, low=0)
    device: str = "auto"


def main() -> None:
    """Read the options, evaluate, print a table."""
    try:
        evaluate_run(parse_options(EvaluateOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted before the metrics were known; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)


def evaluate_run(options: EvaluateOptions) -> dict[str, float]:
    """Evaluate a run on a split, print a table of the metrics and one of the classes, return the metrics."""
    from vpt import build, report
    from vpt.engine.trainer import evaluate
    from vpt.files import write_json
    from vpt.kinds.kind import kind_of

    output = None if options.output is None else Path(options.output).expanduser()
    if output is not None:
        check_file("output", output, (".json",))
    run = build.load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    config = run.config
    config.dataset.root = options.root or config.dataset.root
    config.train.batch_size, config.num_workers = options.batch_size or config.train.batch_size, options.num_workers
    config.augment.transforms = []  # train is evaluated as the others are
    if options.split != "train":
        config.data.on_error = OnError.stop  # none but train pictures are skipped, so that none need be decoded twice
    kind = kind_of(config)
    samples = kind.read()
    if options.split not in samples:
        raise ConfigError(f"split={options.split}: this data set has {', '.join(samples)}")
    _check_classes(options, samples[options.split], run.model)
    data = kind.build_data(samples, run.metadata.preprocessing)
    evaluator = kind.evaluator(data, options.split)
    precision = build.choose_precision(config, next(run.model.parameters()).device)
    values = evaluate(run.model, data.loaders[options.split], evaluator, precision=precision, description=options.split)
    print(report.result_table({options.split: values}))
    print(kind.class_table(evaluator, data, options.split))
    if output is not None:
        write_json(output, {"run": options.run, "split": options.split, "metrics": values})
    return values


def _check_classes(options: EvaluateOptions, samples: Any, model: Any) -> None:
    """Labels must mean the same to the data as to the model."""
    given = f"run={options.run}" if options.root is None else f"root={options.root}"
    for key in ("classes", "category_ids"):
        of_data, of_task = getattr(samples, key, None) or (), getattr(model, key, None) or ()
        for label, (one, other) in enumerate(zip_longest(of_data, of_task, fillvalue="missing")):
            if one != other:
                raise ConfigError(
                    f"{given}: {key}[{label}] is {one} in the data, and {other} in the task file; the data must have "
                    f"what the task file has, in this order: {', '.join(map(str, of_task[:20]))}"
                )


if __name__ == "__main__":
    main()
