"""`ringhold ckpt`: look at checkpoints, prove them, tidy them, convert them. Each subcommand is a module of its own.

Nothing here imports torch, and neither do the commands: a checkpoint is inspected before torch would be loaded.
"""

import click

from launch.lazy import LazyGroup

COMMANDS: dict[str, tuple[str, str]] = {
    "ls": ("launch.ckpt_ls:command", "List the steps of a store."),
    "inspect": ("launch.ckpt_inspect:command", "Show the tensors, layouts and sizes of a step."),
    "verify": ("launch.ckpt_verify:command", "Read every byte and prove it."),
    "convert": ("launch.ckpt_convert:command", "Convert a checkpoint of one format into another."),
    "diff": ("launch.ckpt_diff:command", "Say which tensors of two checkpoints differ, and by how much."),
    "spec": ("launch.ckpt_spec:command", "List and check pattern files, and show what they make of a checkpoint."),
    "gc": ("launch.ckpt_gc:command", "Remove steps that are not to be kept, and what nobody needs."),
}
"""Name of each subcommand: where it is, and its line in the help."""


@click.command(
    "ckpt",
    cls=LazyGroup,
    table=COMMANDS,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"max_content_width": 100},
)
@click.pass_context
def command(context: click.Context) -> None:
    """Look at checkpoints, prove them, tidy them, convert them.

    A store is a folder or a URL that fsspec knows (memory://, s3://...); PATH@STEP is one step of it, PATH the newest.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
