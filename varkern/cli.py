"""``varkern <command>``: generate, reconstruct, edit, train, evaluate, measure, and say what runs where.

Every command works offline with the bundled digits model, and with any checkpoint `varkern.load` takes. Errors print
as one line on stderr with exit status 2 (``VARKERN_DEBUG=1`` shows the traceback); an interrupt exits with 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from varkern import commands
from varkern._version import __version__
from varkern.edit import Box
from varkern.models import CheckpointError
from varkern.photograph import LONGEST_SEAM

__all__ = ["build_parser", "main"]

# What a user can set right; anything else is a defect and keeps its traceback. Backends refuse with RuntimeError.
ERRORS = (CheckpointError, RuntimeError, ValueError, TypeError, OSError, ImportError, FloatingPointError)

EXAMPLES = {
    "sample": """
  varkern sample                                   one of each bundled digit, in out/samples/
  varkern sample --class 3,7 --num 16 --seed 1 --out digits.png
  varkern sample --checkpoint var_d16.pth --vae vae_ch160v4096z32.pth --class 207 --top-k 900 --top-p 0.96
  varkern sample --checkpoint user/model --class none --cfg 0""",
    "reconstruct": """
  varkern reconstruct                              held-out digits through the bundled tokenizer (needs scikit-learn)
  varkern reconstruct cat.jpg dog.png --vae vae_ch160v4096z32.pth --out pairs.png""",
    "edit": """
  varkern edit photo.jpg --mask region.png --seam 8 --checkpoint runs/d16 --out edited.png
  varkern edit digit.png --box 0.5,0,1,1 --num 8 --seed 0 --out edits.png
  varkern edit digit.png --box 0.25,0.25,0.75,0.75 --mode outpaint
  varkern edit digit.png --mask region.png --mode class --class 8""",
    "train-tokenizer": """
  varkern train-tokenizer --data digits --image-size 32 --channels 1 --ch 32 --ch-mult 1,1,2,2 --patch-nums 1,2,3,4 \\
      --vocab-size 64 --batch-size 64 --epochs 20 --out runs/tokenizer
  varkern train-tokenizer --data imagenet/train --augment --precision bfloat16 --out runs/tokenizer --resume""",
    "train": """
  varkern train --data digits --tokenizer runs/tokenizer --depth 4 --batch-size 64 --out runs/var
  varkern train --data imagenet/train --tokenizer vae_ch160v4096z32.pth --precision bfloat16 --out runs/d16""",
    "evaluate": """
  varkern evaluate                                 the bundled model on the held-out digits
  varkern evaluate --generate --cfg 2 --out result.json
  varkern evaluate --model runs/var --data imagenet/val --held-out 0 --part train""",
    "bench": """
  varkern bench                                    everything, within ten minutes, into benchmarks/results/
  varkern bench --only attention,norm              some of it; other rows of the recorded run stay
  varkern bench --smoke                            does every benchmark run? nothing is recorded
  varkern bench --markdown README.md docs/performance.md docs/engine.md docs/ops/*.md    and renew the tables there""",
    "info": """
  varkern info
  varkern info --json""",
}


class Parser(argparse.ArgumentParser):
    """Raises ``ValueError`` for a bad command line, so that it is reported as every other error is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _int(low: int, what: str, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.strip().removeprefix("-").isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{what} of at least {low} is needed, got {text!r}")
        if high is not None and int(text) > high:
            raise argparse.ArgumentTypeError(f"{what} of at most {high} is needed, got {text!r}")
        return int(text)

    return parse


def _box(text: str) -> Box:
    try:
        top, left, bottom, right = (float(edge) for edge in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"give four fractions TOP,LEFT,BOTTOM,RIGHT of the image such as 0.25,0.25,0.75,0.75, got {text!r}"
        ) from None
    return top, left, bottom, right


def _model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model (default: the bundled digits)")
    group.add_argument("--checkpoint", metavar="PATH", help="folder, Hub repository, or weights file")
    group.add_argument("--vae", metavar="PATH", help="the tokenizer, where the checkpoint has none: the same kinds")
    group.add_argument(
        "--patch-nums",
        type=_reader(tuple[int, ...]),
        metavar="N,N,...",
        help="sides of the token maps, where the weights do not tell them",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    group.add_argument(
        "--dtype", choices=commands.DTYPES, default="float32", help="of the weights (default: %(default)s)"
    )


def _sampling_options(parser: Parser, num: str) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--num", type=_int(1, "a number", 10**7), help=num)
    group.add_argument(
        "--seed",
        type=_int(0, "a seed"),
        help="seed of the run; image i draws with a mix of it and i (default: a new one, printed)",
    )
    group.add_argument(
        "--cfg", type=float, default=1.5, help="classifier-free guidance; 0 is off (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens (default: all)")
    group.add_argument(
        "--top-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep the likeliest tokens up to probability P (default: all)",
    )
    group.add_argument("--more-smooth", action="store_true", help="soft tokens: smoother images, for show")
    _batch_option(group)


def _batch_option(parser: Any) -> None:
    parser.add_argument(
        "--batch-size", type=_int(1, "a number"), default=16, help="images at a time (default: %(default)s)"
    )


def _class_option(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--class",
        dest="classes",
        action="extend",
        type=lambda text: [part.strip() for part in text.split(",")],
        metavar="CLASSES",
        help="numbers, names in the checkpoint's classes.json, or 'none' (no class); "
        f"separate several by commas ({default})",
    )


def _out_option(parser: Parser, default: str, png: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        help=f"a folder, where numbered files are added and none is overwritten, or a .png, which is replaced: {png} "
        "(default: %(default)s)",
    )


_METAVARS = {int: "N", float: "X", str: "TEXT", tuple[int, ...]: "N,N,..."}


def _config_options(parser: Parser, config: type, optional: Sequence[str] = ()) -> None:
    """One option for each field of a config dataclass; only those given reach the namespace."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind, text = hints[field.name], field.metadata["help"].replace("%", "%%")
        needed = field.default is dataclasses.MISSING and field.name not in optional
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "required": needed}
        if field.default is not dataclasses.MISSING:
            shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            text += f" (default: {shown})"
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": _reader(kind), "metavar": _METAVARS.get(kind, "X")}
        parser.add_argument("--" + field.name.replace("_", "-"), help=text, **settings)


def _reader(kind: Any) -> Callable[[str], Any]:
    """How a field of type int, float, str, a tuple of one of them, or one of them or None is read from text."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = next(part for part in typing.get_args(kind) if part is not type(None))
        read = _reader(inner)
        return lambda text: None if text == "none" else read(text)
    if typing.get_origin(kind) is tuple:
        read = _reader(typing.get_args(kind)[0])

        def several(text: str) -> tuple[Any, ...]:
            return tuple(read(part) for part in text.split(","))

        several.__name__ = "comma-separated list"
        return several
    return kind


def _bench_options(parser: Parser) -> None:
    parser.add_argument(
        "--only",
        type=lambda text: [part.strip() for part in text.split(",")],
        default=[],
        metavar="NAMES",
        help="which of benchmarks/bench_NAME.py to run, separated by commas (default: all)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one, else cpu)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, every call checked and made once")
    parser.add_argument("--full", action="store_true", help="more shapes, more rounds, torch.compile, no time limit")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the reference as a provider")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="after so many minutes the rest is left out (default: 10; --full: no limit)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the record to write, where rows of benchmarks that did not run stay (default: "
        "benchmarks/results/<device>.json; --smoke: none)",
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="the run to compare with (default: that of --out)")
    parser.add_argument(
        "--markdown",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="renew the tables of these pages, between the comments 'benchmarks: begin' and 'benchmarks: end', "
        "'benchmarks-summary: ...', or for every case of bench_norm.py 'benchmarks-norm: ...'",
    )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; ``options.run(options)`` runs the command that was chosen."""
    parser = Parser(
        prog="varkern", description="Visual AutoRegressive (VAR) image models: generate, edit, train, measure."
    )
    parser.add_argument("--version", action="version", version=f"varkern {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> Parser:
        sub = subparsers.add_parser(name, help=text, description=text, epilog="examples:" + EXAMPLES[name])
        sub.set_defaults(run=run)
        return sub

    sub = command("sample", commands.sample, "generate images of classes")
    _class_option(sub, "default: every class in turn")
    _out_option(sub, "out/samples", "several images as a grid")
    _sampling_options(sub, "number of images (default: one of each class named; without --class, 10)")
    _model_options(sub)

    sub = command("reconstruct", commands.reconstruct, "images through the tokenizer and back, with their PSNR")
    sub.add_argument(
        "images", nargs="*", default=[], type=Path, help="image files of any size, resized and centre-cropped"
    )
    sub.add_argument(
        "--num",
        type=_int(1, "a number"),
        default=10,
        help="number of held-out digits, without files (default: %(default)s)",
    )
    _batch_option(sub)
    _out_option(sub, "out/reconstructions", "originals above their reconstructions")
    _model_options(sub)

    sub = command("edit", commands.edit_image, "generate a part of an image anew, without training")
    sub.add_argument("image", type=Path, help="an image file of any shape, edited in a square around the region")
    sub.add_argument("--box", type=_box, metavar="T,L,B,R", help="the region: fractions of the image, 0 to 1")
    sub.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="the region as a picture instead, white inside, of the image's shape",
    )
    sub.add_argument(
        "--mode",
        choices=("inpaint", "outpaint", "class"),
        default="inpaint",
        help="generate the inside of the region, its outside, or the inside as --class (default: %(default)s)",
    )
    sub.add_argument(
        "--paste-back",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the whole image, its own outside the region (default), or the square as the model makes it",
    )
    sub.add_argument(
        "--seam",
        type=_int(0, "a number of pixels", LONGEST_SEAM),
        default=0,
        metavar="N",
        help="fade what is generated over N pixels inside its edge (default: %(default)s)",
    )
    _class_option(sub, "with --mode class")
    _out_option(sub, "out/edits", "several results as a grid")
    _sampling_options(sub, "number of results (default: one, or one of each class named)")
    _model_options(sub)

    from varkern.eval import EvaluateConfig
    from varkern.train import TokenizerConfig, TransformerConfig

    sub = command("train-tokenizer", commands.train_tokenizer, "train the multi-scale VQVAE tokenizer")
    _config_options(sub, TokenizerConfig)
    sub = command("train", commands.train, "train the transformer on a frozen tokenizer")
    _config_options(sub, TransformerConfig)
    sub = command(
        "evaluate", commands.evaluate, "reconstruction, codebook usage, token loss, quality of generated digits"
    )
    _config_options(sub, EvaluateConfig, optional=("model", "data"))
    sub = command("bench", commands.bench, "measure speed and memory in a checkout, and compare with the recorded run")
    _bench_options(sub)
    sub = command("info", commands.info, "versions, devices, and which backend runs each op where and why")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _open_streams() -> None:
    """Somewhere to print to where a stream is closed, and signs for what its encoding has not."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, ``sys.argv`` by default; returns the exit status."""
    _open_streams()
    try:
        options = build_parser().parse_args(argv)
        status: int = options.run(options) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as stop:  # a training run tells where it stopped
        print(f"varkern: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)
    except BrokenPipeError:  # the reader of a pipe left, as head does; 141 is what SIGPIPE gives
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ERRORS as error:
        if os.environ.get("VARKERN_DEBUG") == "1":
            raise
        print(f"varkern: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return status
