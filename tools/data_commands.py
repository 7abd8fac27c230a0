"""`python data.py toy | convert | check | select`: samples, made, converted, checked and selected."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from data import VideoSettings
from lib import toy
from lib.flags import COUNT, FRAME_RATE, FRAMES, PIXELS, SEED, WORKERS, Parser, number
from lib.samples import parse_entry
from lib.terminal import errors_in_one_sentence
from tools import check, convert, select


SEEN = {"target_fps": FRAME_RATE, "max_frames": FRAMES, "total_pixels": PIXELS, "min_pixels": PIXELS}  # of VideoSettings


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="data.py", description="Samples: make, convert, check and select them.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    synthetic = command("toy", "write synthetic videos (.mp4) with train.jsonl and eval.jsonl")
    synthetic.add_argument("--out", type=Path, required=True, help="folder to write")
    synthetic.add_argument("--train", type=number(int, *COUNT), default=200, help="clips to train on (1 to 10^6; %(default)s)")
    synthetic.add_argument("--eval", type=number(int, *COUNT), default=50, help="clips to evaluate on (1 to 10^6; %(default)s)")
    synthetic.add_argument("--seed", type=number(int, *SEED), default=0, help="of everything random in them (0 to 2^32 - 1; %(default)s)")

    published = command("convert", "turn a published annotation format into samples")
    published.add_argument("name", metavar="NAME", help=f"the format: {', '.join(convert.FORMATS)}")
    published.add_argument("--src", type=Path, required=True, help="its annotation file or folder")
    published.add_argument("--out", type=Path, required=True, help="jsonl file to write")
    published.add_argument("--split", help="one of the format's splits (its first)")

    decoded = command("check", "decode every video and picture as training would; exit status 0 only if all are good")
    decoded.add_argument("data", metavar="DATA", help="FILE[@VIDEO_ROOT][:N] or FILE[@VIDEO_ROOT][:P%%]")
    decoded.add_argument("--video_root", help="folder of the videos (the folder of DATA)")
    decoded.add_argument("--out", type=Path, help="folder for good.jsonl and bad.jsonl (the folder of DATA)")
    decoded.add_argument("--num_workers", type=number(int, *WORKERS), default=4,
                         help="processes that decode (0 to 256; %(default)s); 0: this one, without a deadline")
    decoded.add_argument("--deadline", type=number(float, 0.1, 10**6), default=60.0,
                         help="seconds for one video (0.1 to 10^6; %(default)s)")
    for field in (field for field in fields(VideoSettings) if field.name in SEEN):
        decoded.add_argument(f"--{field.name}", type=number(field.type, *SEEN[field.name]), default=field.default,
                             help="as in train.py ({:g} to {:g}; %(default)s)".format(*SEEN[field.name]))

    select.add_arguments(command("select", "keep the samples whose K completions differ (variance-aware selection)"))
    return parser.parse_args(arguments)


def run_command(args: argparse.Namespace) -> int:
    """The exit status."""
    if args.command == "toy":
        toy.write_dataset(args.out, args.train, args.eval, args.seed)
    elif args.command == "convert":
        convert.convert(args.name, args.src, args.out, args.split)
    elif args.command == "check":
        settings = VideoSettings(**{name: getattr(args, name) for name in SEEN})
        out = args.out or parse_entry(args.data)[0].parent
        good, bad = check.check(args.data, out, video_root=args.video_root, settings=settings,
                                num_workers=args.num_workers, deadline=args.deadline)
        print(f"{good} good samples in {out / 'good.jsonl'}, {bad} bad ones with the reason in {out / 'bad.jsonl'}")
        return int(bad > 0)
    elif args.command == "select":
        select.run(args)
    return 0


def main() -> None:
    with errors_in_one_sentence():
        sys.exit(run_command(parse_arguments()))
