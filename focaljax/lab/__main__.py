"""`python -m focaljax.lab compare`, `detect` or `tag`: every loss on real imbalanced data."""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """To stderr, with exit status 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def parser() -> Parser:
    """With a subcommand for each experiment."""
    main = Parser(prog="focaljax.lab", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    for name, told, seeds, steps in (
        (
            "compare",
            "tables: car crashes, digits with a long tail, several labels, or a CSV",
            8,
            1000,
        ),
        ("detect", "digits on cluttered canvases, by a small RetinaNet", 1, 600),
        ("tag", "names in Chinese newspaper text", 3, 500),
    ):
        add = commands.add_parser(name, help=told, description=told).add_argument
        add("--losses", nargs="+", metavar="NAME", help="some of the losses, by name [all]")
        add("--seeds", type=int, default=seeds, help=f"runs of each loss [{seeds}]")
        add("--steps", type=int, default=steps, help=f"training steps [{steps}]")
        add("--out", type=Path, default=Path("results") / name, help="folder for what it writes")
        if name == "compare":
            add("--csv", type=Path, help="your own table, with a header line")
            add("--target", help="its column with the classes, two or more")
            add("--positive", help="make it two classes, this one against the rest")
            add("--batch", type=int, default=256, help="examples in a step [256]")
    return main


def compare(options: argparse.Namespace) -> None:
    """Of one's own table, or of three that are at hand."""
    from focaljax.lab import compare, report, tables

    if options.csv is None:
        problems = [tables.car_crashes(), tables.long_tail(), tables.word_classes()]
    else:
        frame = tables.read_csv(options.csv, options.target)
        name = options.csv.name
        problems = [tables.make_problem(name, options.target, frame, options.positive)]
    settings = options_of(options) | {"batch": options.batch}
    runs, sections, drawn = [], [], {}
    for problem in problems:
        compared = compare.compare(problem, **settings)
        told = [compare.describe(compared), *compare.verdicts(compared)]
        sections.append((compare.score_tables(compared), told))
        report.tell(sections[-1])
        runs.append(compared.runs.assign(problem=problem.kind))
        drawn |= compare.figures(compared)
    report.save(options.out, pd.concat(runs), sections, drawn, settings)


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """What all commands have."""
    return {"names": options.losses, "seeds": options.seeds, "steps": options.steps}


def train(options: argparse.Namespace) -> None:
    """The detector or the tagger."""
    from focaljax.lab import detect, report, tag

    lab, score, form = {"detect": (detect, "AP", ".1f"), "tag": (tag, "F1", ".3f")}[options.command]
    compared = lab.compare(**options_of(options))
    section = lab.score_tables(compared), [report.verdict(compared.runs, score, form)]
    report.tell(section)
    report.save(options.out, compared.runs, [section], lab.figures(compared), options_of(options))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; a bad file or option is told in one line, with exit status 2."""
    whole = parser()
    options = whole.parse_args(arguments)
    least = 2 if options.command == "compare" else 1  # there they are compared in pairs
    if options.seeds < least or options.steps < 1:
        whole.error(f"--seeds must be at least {least}, --steps at least 1")
    if options.command == "compare":
        if (options.csv is None) != (options.target is None):
            whole.error("--csv FILE and --target COLUMN go together")
        if options.positive is not None and options.csv is None:
            whole.error("--positive VALUE needs --csv FILE and --target COLUMN")
        if options.batch < 1:
            whole.error("--batch must be at least 1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (compare if options.command == "compare" else train)(options)
    except OSError as error:
        whole.error(f"cannot write to the folder {options.out}: {error.strerror}")
    except ValueError as error:
        whole.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
