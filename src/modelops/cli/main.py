"""The `modelops` command. Commands are imported when they are run, so that help stays fast."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import click

from modelops import __version__
from modelops.cli.errors import report_error

# name -> (module:attribute, one line for the listing). In the order of a release.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("modelops.cli.demo:demo", "Run the whole chain on OpenMoji, images to release."),
    "init": ("modelops.cli.init:init", "Write charter, config and policy for a new project."),
    "data": ("modelops.cli.data:data", "Make and check manifests, splits and shards."),
    "train": ("modelops.cli.train:train", "Train a model from a config."),
    "fit-lit": ("modelops.cli.lit:fit_lit", "Fit the offline text-image alignment model."),
    "sample": ("modelops.cli.sample:sample", "Make images from fixed seeds."),
    "eval": ("modelops.cli.eval:evaluate", "Measure a model source; writes a record."),
    "report": ("modelops.cli.report:report", "Print an evaluation record as a page to read."),
    "compare": ("modelops.cli.compare:compare", "Say which of two evaluations is better."),
    "abtest": ("modelops.cli.abtest:abtest", "Ask people which of two sources is better, blind."),
    "export": ("modelops.cli.export:export", "Export a checkpoint to ONNX or INT8."),
    "bench": ("modelops.cli.bench:bench", "Measure the latency and throughput of a source."),
    "card": ("modelops.cli.card:card", "Write and check model and dataset cards."),
    "gate": ("modelops.cli.gate:gate", "Decide a release by a policy; exit code = answer."),
    "sign-off": ("modelops.cli.gate:sign_off", "Sign a verdict; lapses when it changes."),
    "release": ("modelops.cli.release:release", "Build and verify a release directory."),
    "serve": ("modelops.cli.serve:serve", "Serve a release with BentoML."),
    "monitor": ("modelops.cli.monitor:monitor", "Test whether a served release has drifted."),
    "watermark": ("modelops.cli.watermark:watermark", "Make a watermark key; find the watermark."),
    "replay": ("modelops.cli.replay:replay", "Make a served image again from its receipt."),
    "doctor": ("modelops.cli.doctor:doctor", "Report what this machine can do."),
}  # fmt: skip


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not close:
                raise
            message = f"{error.format_message()} Did you mean {close[0]!r}?"
            raise click.UsageError(message, ctx) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="modelops")
def cli() -> None:
    """Release engineering for image generators.

    \b
    Try it (about 20 minutes on two CPU cores, or 3 with --budget smoke):
      modelops demo my-demo
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; never prints a traceback without --debug.

    `--debug` may be anywhere on the line.
    """
    args = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in args
    args = [argument for argument in args if argument != "--debug"]
    try:
        result = cli.main(args=args, prog_name="modelops", standalone_mode=False)
    except BaseException as error:
        return report_error(error, debug=debug, as_json="--json" in args)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
