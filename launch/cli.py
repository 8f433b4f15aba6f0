"""The command `ringhold`. Each subcommand lives in a module of its own that is imported when it is called.

`ringhold --help` has to answer at once, so nothing here imports torch, and neither do the modules named below until
their command runs.
"""

import sys
from importlib.metadata import version
from typing import Any

import click

from launch import console
from launch.lazy import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("launch.train:command", "Train a small language model with peers that come and go."),
    "demo": ("launch.demo:command", "Kill, stop and add peers in a minute's training, and prove the result."),
    "bench": ("launch.bench:command", "Measure the collectives against gloo and MPI, and check their values."),
    "attention": ("launch.attention:command", "Attend over a long sequence that is spread over ranks, and check it."),
    "simulate": ("launch.simulate:command", "Time a collective on a network that is described in a file."),
    "plan": ("launch.plan:command", "Plan where every tensor of a training step lives, and what that costs."),
    "predict": ("launch.predict:command", "Predict a transformer's training step on a cluster, on paper."),
    "ckpt": ("launch.ckpt:command", "Look at checkpoints, prove them, tidy them, convert them."),
    "churn": ("launch.churn:command", "Strike the processes of a run by a seeded plan, and check every result."),
    "lab": ("launch.lab:command", "Run a command on each host of an emulated network, and cut its cables."),
    "report": ("launch.report:command", "Show what happened in a run as a page to look at."),
    "trace": ("launch.trace:command", "Join the traces of a run's members in one file."),
    "signatures": ("launch.signatures:command", "Prove which placements each operation takes and gives."),
    "coordinator": ("launch.coordinator:command", "Run a coordinator alone, in the foreground."),
    "top": ("launch.top:command", "Show what the members of a running job do."),
    "doctor": ("launch.doctor:command", "Check what works on this machine, or look into a running job."),
}
"""Name of each subcommand: where it is, and its line in the help."""


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> Any:
    if wanted and not context.resilient_parsing:
        click.echo(f"ringhold {version('ringhold')}")
        context.exit()


@click.command(
    cls=LazyGroup,
    table=COMMANDS,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def ringhold(context: click.Context) -> None:
    """Fault-tolerant collectives and training on ordinary CPU processes.

    Exit codes: 0 ok, 1 wrong result or failed check, 2 usage, 3 peers lost and not recovered, 4 corrupt data,
    124 timeout, 130 Ctrl-C.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Entry point of the command `ringhold`."""
    sys.exit(console.run(ringhold))


if __name__ == "__main__":
    main()
