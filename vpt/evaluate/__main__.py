"""python -m vpt.evaluate run=RUN: metrics of a trained run on one of its splits."""

import sys
from dataclasses import dataclass
from pathlib import Path

from vpt.config.command_line import INTERRUPTED, check_file, escape_output, fail, is_for_user, parse_options
from vpt.config.schema import OnError, option

USAGE = """python -m vpt.evaluate: metrics of a trained run on one split of its data.

Example: python -m vpt.evaluate run=runs/quickstart split=val"""


@dataclass
class EvaluateOptions:
    """Options of `python -m vpt.evaluate`."""

    run: str = option(about="a run folder, such as runs/quickstart", shown="FOLDER")
    split: str | None = option(None, "train, val or test; by default test if the data have it, else val")
    root: str | None = option(None, "the data, if they have moved", shown="PATH")
    checkpoint: str | None = option(None, "weights of the backbone, if they have moved", shown="FILE")
    output: str | None = option(None, "a file for the metrics", shown="FILE.json")
    confusion: str | None = option(None, "a file for the counts of true and predicted classes", shown="FILE.csv")
    batch_size: int | None = option(
        None, "images per batch; by default as in training, since losses of boxes are means over a batch", low=1
    )
    num_workers: int = option(0, "loader processes", low=0)
    device: str = option("auto", "auto, cpu, cuda, ...")


def main() -> None:
    """Read the options, evaluate, print a table."""
    escape_output()
    try:
        evaluate_run(parse_options(EvaluateOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted before the metrics were computed; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)


def evaluate_run(options: EvaluateOptions) -> dict[str, float]:
    """Evaluate a run on a split, print tables of the metrics and of the classes, return the metrics."""
    from vpt import build
    from vpt.engine.console import warn
    from vpt.engine.trainer import evaluate
    from vpt.runs import summary as report
    from vpt.runs.data import read_run
    from vpt.storage.files import write_bytes, write_json
    from vpt.storage.text import to_csv

    output = None if options.output is None else Path(options.output).expanduser()
    confusion = None if options.confusion is None else Path(options.confusion).expanduser()
    if output is not None:
        check_file("output", output, (".json",))
    if confusion is not None:
        check_file("confusion", confusion, (".csv",))
    run = build.load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    if options.split != "train":
        run.config.data.on_error = OnError.stop  # only train images are skipped
    typed = [] if options.split is None else [options.split]
    task_type, data = read_run(
        run, typed, root=options.root, batch_size=options.batch_size, num_workers=options.num_workers
    )
    split = options.split or ("test" if "test" in data.samples else "val")
    if options.split is None and split == "val":
        warn("the data have no test split: val is evaluated, which also chose the epoch; split=SPLIT names another one")
    evaluator = task_type.evaluator(data, split)
    precision = build.choose_precision(run.config, next(run.model.parameters()).device)
    values = evaluate(run.model, data.loaders[split], evaluator, precision=precision, description=split)
    print(report.result_table({split: values}))
    print(task_type.class_table(evaluator, data, split), flush=True)
    for line in report.describe_small_splits(data.samples, {split: values}):
        warn(line)
    if output is not None:
        write_json(output, {"run": options.run, "split": split, "metrics": values})
    if confusion is not None:
        counts = task_type.confusion_counts(evaluator, data)
        write_bytes(confusion, to_csv(["class", "predicted", "count"], counts))
    return values


if __name__ == "__main__":
    main()
