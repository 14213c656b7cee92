"""python -m vpt.train: train a prompt and a head, select on val, evaluate test once; typed again, it resumes."""

import os
import sys
from collections.abc import Callable, Sequence

from omegaconf import DictConfig

from vpt.config.command_line import check_command_line, escape_output, fail, is_for_user, refuse_unread, tell
from vpt.config.composition import config_folder, register_schema
from vpt.config.errors import ConfigError
from vpt.config.help import answer_help
from vpt.config.naming import run_title
from vpt.config.saved import conceal
from vpt.config.schema import Mode, schema_options
from vpt.config.validation import to_config
from vpt.engine.signals import STOPPED, Stopped, StopSignal
from vpt.train import NotLearnedError

NOT_LEARNED = 1
NOT_FINITE = 3
RESUME = "type the same command again, and it resumes where it stopped"


def main() -> None:
    """Check the command line, then run the job; Hydra composes and runs the jobs of a sweep, and prints its help."""
    escape_output()
    is_help = bool({"-h", "--help", "--hydra-help"} & set(sys.argv))
    codes: list[int] = []
    try:
        answer_help(sys.argv[1:], dict(schema_options()))
        line = None if is_help else check_command_line(sys.argv[1:])
        if line is not None:
            refuse_unread(line)
            sys.argv[1:] = line.arguments
        with StopSignal() as stop:
            if line is not None and not line.needs_hydra:
                codes.append(_run_or_explain(line.composed, line.arguments, stop, is_sweep=False))
            else:
                _run_hydra(
                    lambda composed, words, is_sweep: codes.append(
                        _run_or_explain(composed, words, stop, is_sweep=is_sweep)
                    )
                )
    except ConfigError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        fail(error)
    except Stopped as error:
        fail(RuntimeError(f"stopped by {error}; {RESUME}"), STOPPED)
    sys.exit(max(codes, default=0))


def _run_hydra(job: Callable[[DictConfig, Sequence[str], bool], None]) -> None:
    """Run the job in Hydra's application, which calls it for each config of a sweep and its overrides."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    def run_job(composed: DictConfig) -> None:
        config = HydraConfig.get()
        job(composed, [*config.overrides.task], config.mode is RunMode.MULTIRUN)

    register_schema()
    hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="train")(run_job)()


def _run_or_explain(composed: DictConfig, words: Sequence[str], stop: StopSignal, *, is_sweep: bool) -> int:
    """Run one job; print an error as a user should see it, and return the exit code, so that a sweep continues."""
    try:
        config = to_config(composed)
        shown = conceal(config, composed)
        config.run.title = shown.run.title = run_title(shown, words)
        with stop.deferred():  # an exception in the middle of an import of C++ ends the process
            from vpt.train.training import run
        stop.check()
        run(config, shown, is_sweep=is_sweep, stop=stop)
    except FloatingPointError as error:
        return tell(error, NOT_FINITE)
    except NotLearnedError as error:
        return tell(error, NOT_LEARNED)
    except Stopped as error:
        if config.mode is not Mode.train:
            fail(RuntimeError(f"stopped by {error}; mode={config.mode} saves nothing"), 128 + error.number)
        then = "type the same command again, but without fresh=true, and it resumes" if config.fresh else RESUME
        fail(RuntimeError(f"stopped by {error}; {then}"), STOPPED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not is_for_user(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        return tell(error)
    return 0


if __name__ == "__main__":
    main()
