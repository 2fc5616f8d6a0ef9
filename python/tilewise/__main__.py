"""The command ``tilewise demo | info | bench``."""

import argparse
import sys


def _info(_arguments) -> None:
    import tilewise

    for name, value in tilewise.info().items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        print(f"{name.replace('_', ' ')}: {text or 'none'}")


def _bench(arguments) -> None:
    from tilewise import bench

    families = arguments.family or bench.FAMILIES
    bench.run(
        families,
        device=arguments.device,
        threads=arguments.threads,
        pattern=arguments.filter,
        json_path=arguments.json,
        plot_path=arguments.plot,
        markdown_path=arguments.markdown,
        pairs=arguments.pairs,
        promised=arguments.promised,
    )


def _demo(arguments) -> None:
    from tilewise import demo

    sys.exit(demo.run(text=arguments.text, out=arguments.out, steps=arguments.steps))


def _parser() -> argparse.ArgumentParser:
    from tilewise.bench import FAMILIES

    parser = argparse.ArgumentParser(prog="tilewise", description="CUDA kernels with native CPU twins.")
    commands = parser.add_subparsers(required=True, metavar="demo | info | bench")
    info = commands.add_parser("info", help="version, architectures, instruction set, threads and devices")
    info.set_defaults(run=_info)

    bench = commands.add_parser("bench", help="every kernel beside torch's best way to do the same")
    bench.add_argument("family", nargs="*", choices=[[], *FAMILIES], help="default: all")
    bench.add_argument("--device", default="cpu")
    bench.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    bench.add_argument("--filter", default="", help="only cases whose name has a match of this regular expression")
    bench.add_argument("--promised", action="store_true", help="only cases for which a ratio is promised")
    bench.add_argument("--pairs", type=int, default=15, help="alternations per case (default 15)")
    bench.add_argument("--json", help="write the results to this file")
    bench.add_argument("--markdown", help="write the tables to this Markdown file")
    bench.add_argument("--plot", help="write a bar chart to this PNG file")
    bench.set_defaults(run=_bench)

    demo = commands.add_parser("demo", help="train two small language models and decode with token trees")
    demo.add_argument("--text", help="a text file to train on (default: this Python's standard library)")
    demo.add_argument("--out", default="demo-report", help="folder for the report and the plot")
    demo.add_argument("--steps", type=int, help="training steps per run (default: as many as fit in four minutes)")
    demo.set_defaults(run=_demo)
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
