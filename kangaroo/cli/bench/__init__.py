"""kangaroo bench: measurements of decoding, a verb a file."""

from __future__ import annotations

import typer

from kangaroo.cli.bench.compare import compare_app
from kangaroo.cli.bench.limits import limits_app
from kangaroo.cli.bench.prompts import prompts_app
from kangaroo.cli.bench.report import report_app
from kangaroo.cli.bench.spec_bench import spec_bench_app

bench_app = typer.Typer(no_args_is_help=True, help="Measure decoding: Spec-Bench, other prompts, limits, contenders.")
for verb in (spec_bench_app, prompts_app, compare_app, limits_app, report_app):
    bench_app.add_typer(verb)
