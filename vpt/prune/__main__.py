"""python -m vpt.prune run=RUN keep=8,5 output=FOLDER: remove tokens from a trained prompt and measure the effect."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt.config.command_line import INTERRUPTED, check_folder, escape_output, fail, is_for_user, parse_options
from vpt.config.errors import ConfigError
from vpt.config.schema import option

if TYPE_CHECKING:
    from vpt.build import Data, TrainedRun
    from vpt.models.prompts import VisualPrompt
    from vpt.task_types.base import TaskType

Metrics = dict[int, dict[str, dict[str, float]]]  # by number of tokens and split

SCORED_IMAGES = 1024  # of train, at most
USAGE = f"""python -m vpt.prune: remove tokens from the prompt of a trained run and measure the effect on its metrics.

Tokens are scored on at most {SCORED_IMAGES:,} train images, by the change of the loss with the attention to them.
Each block keeps those with the largest scores; nothing is trained. Choose by val; test is read last, once.
Train a pruned prompt further: python -m vpt.train prompt.num_tokens=5 prompt.init_from=FOLDER/prompt_5.safetensors ...
Example: python -m vpt.prune run=runs/quickstart keep=8,5,2 output=pruned"""


@dataclass
class PruneOptions:
    """Options of `python -m vpt.prune`."""

    run: str = option(about="a run folder, such as runs/quickstart", shown="FOLDER")
    keep: tuple[int, ...] = option(about="tokens left in a prompted block, one number or several", low=1, shown="8,5,2")
    output: str = option(
        about="a folder for a task file each, such as prompt_8.safetensors, and prune.json with metrics and scores",
        shown="FOLDER",
    )
    root: str | None = option(None, "the data, if they have moved", shown="PATH")
    checkpoint: str | None = option(None, "weights of the backbone, if they have moved", shown="FILE")
    batch_size: int | None = option(None, "images per batch; by default as in training", low=1)
    num_workers: int = option(0, "loader processes", low=0)
    device: str = option("auto", "auto, cpu, cuda, ...")


def main() -> None:
    """Read the options and prune."""
    escape_output()
    try:
        prune_run(parse_options(PruneOptions, sys.argv[1:], USAGE))
    except KeyboardInterrupt:
        fail(RuntimeError("interrupted before the end; nothing was written"), INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error):
            raise
        fail(error)


def prune_run(options: PruneOptions) -> Metrics:
    """Prune the prompt of a run, write task files; returns the metrics by number of tokens and split."""
    keep = sorted(set(options.keep), reverse=True)
    check_folder("output", Path(options.output).expanduser())
    from vpt import build
    from vpt.prune.token_importance import keep_tokens, token_importance
    from vpt.runs.data import read_run

    run = build.load_run(Path(options.run).expanduser(), checkpoint=options.checkpoint, device=options.device)
    prompt = _prompt_of(options, run, keep)
    task_type, data = read_run(
        run, ["train", "val"], root=options.root, batch_size=options.batch_size, num_workers=options.num_workers
    )
    importance = token_importance(run.model, _train_batches(run, data), task_type.losses(data)).cpu()
    prompts = {prompt.num_tokens: prompt, **{num: keep_tokens(prompt, importance, num) for num in keep}}
    metrics = _evaluate(run, task_type, data, prompts)
    print(_table(task_type.main_metric, metrics))
    _write(options, run, prompts, metrics, importance.tolist())
    return metrics


def _prompt_of(options: PruneOptions, run: "TrainedRun", keep: list[int]) -> "VisualPrompt":
    """The prompt of the run, which must have more tokens than `keep`."""
    prompt = run.model.backbone.prompt
    if prompt is None:
        raise ConfigError(f"run={options.run}: has no prompt to prune; name a run with one")
    if keep[0] >= prompt.num_tokens:
        has = f"has {prompt.num_tokens} tokens in each block"
        raise ConfigError(f"keep={keep[0]}: the prompt of {options.run} {has}; keep fewer")
    return prompt


def _train_batches(run: "TrainedRun", data: "Data") -> Iterator[Any]:
    """Batches of train, on the device of the model."""
    from vpt.engine.steps import move

    device, num_batches = next(run.model.parameters()).device, -(-SCORED_IMAGES // run.config.train.batch_size)
    return (move(batch, device) for batch in islice(data.loaders["train"], num_batches))


def _evaluate(run: "TrainedRun", task_type: "TaskType", data: "Data", prompts: "dict[int, VisualPrompt]") -> Metrics:
    """Metrics by number of tokens and split; test last."""
    from vpt import build
    from vpt.engine.trainer import evaluate

    precision = build.choose_precision(run.config, next(run.model.parameters()).device)
    metrics: Metrics = {num: {} for num in prompts}
    for split in ("val", "test"):
        for num, prompt in prompts.items() if split in data.loaders else ():
            run.model.backbone.prompt = prompt
            evaluator, text = task_type.evaluator(data, split), f"{split}, {num} tokens"
            metrics[num][split] = evaluate(
                run.model, data.loaders[split], evaluator, precision=precision, description=text
            )
    return metrics


def _table(select: str, metrics: Metrics) -> str:
    """A line for each number of tokens, with the change from all tokens."""
    from vpt.engine.console import format_table, percent

    whole, *_ = metrics.values()
    rows = [[str(num)] for num in metrics]
    for row, of_splits in zip(rows, metrics.values(), strict=True):
        for split, values in of_splits.items():
            row += [percent(values[select]), f"{100 * (values[select] - whole[split][select]):+.1f}"]
    heads = [head for split in whole for head in (f"{split} {select}", "change")]
    return format_table(rows, ["tokens", *heads])


def _write(
    options: PruneOptions, run: "TrainedRun", prompts: "dict[int, VisualPrompt]", metrics: Metrics, scores: list[Any]
) -> None:
    """Write a task file for each smaller prompt, and a JSON file about all of them."""
    from vpt.models.task_file import save_task
    from vpt.storage.files import write_json

    output, (whole, *kept) = Path(options.output).expanduser(), prompts
    same: Any = {name: getattr(run.metadata, name) for name in ("preprocessing", "config", "licence")}
    for num in kept:
        run.model.backbone.prompt = prompts[num]
        note = f"{run.metadata.note} Pruned from {whole} to {num} tokens in a block.".strip()
        path = save_task(run.model, output / f"prompt_{num}.safetensors", metrics=metrics[num], note=note, **same)
        print(f"task file  {path} ({path.stat().st_size / 1000:,.0f} kB)")
    table = [{"num_tokens": num, "metrics": of_splits} for num, of_splits in metrics.items()]
    blocks = list(prompts[whole].blocks)
    write_json(output / "prune.json", {"run": options.run, "pruned": table, "blocks": blocks, "scores": scores})


if __name__ == "__main__":
    main()
