"""The adapter's learning curve and what moved it, from the reports that training leaves.

    python benchmarks/adapter_training.py --main kangaroo/assets/demo/adapter --run "exit layer 1=DIR" --run ...

Every DIR holds the report.json of one `kangaroo train adapter`; the runs next to the main one are short and differ
from each other in one setting.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from kangaroo.bench.record import markdown_table, stamp, stamp_text, write_result

METRICS = ("loss", "top1", "top3", "expected_acceptance", "ctar_1", "ctar_3", "ctar_6", "expected_tokens_per_step")
PLAN = ("exit_layer", "num_steps", "learning_rate", "initialization")


def read_report(folder: str) -> dict[str, Any]:
    """A run's report without the settings that do not differ."""
    report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return report


def curve(report: dict[str, Any]) -> str:
    """Held-out metrics over the steps, at most a dozen rows."""
    history = report["history"]
    shown = history[:: max(1, len(history) // 12)]
    if shown[-1] is not history[-1]:
        shown.append(history[-1])
    rows = [[row["step"], *(row[name] for name in METRICS)] for row in shown]
    return markdown_table(["step", *METRICS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--main", required=True, help="folder of the shipped adapter's training")
    parser.add_argument("--run", action="append", default=[], help="LABEL=DIR of a short run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/adapter_training"))
    args = parser.parse_args()
    reports = {"shipped": read_report(args.main)}
    reports |= {label: read_report(folder) for label, folder in (pair.split("=", 1) for pair in args.run)}
    rows = [
        [label, *(report["plan"][name] for name in PLAN), report["num_tokens_seen"], f"{report['wall_time_s']:.0f}",
         *(report["metrics"][name] for name in METRICS)]
        for label, report in reports.items()
    ]  # fmt: skip
    shipped = reports["shipped"]
    facts = stamp()
    text = "\n\n".join([
        "# Training the demo adapter", stamp_text(facts),
        f"{shipped['num_parameters']:,} parameters beside the shared head. Metrics are on texts held out of each run's "
        "data, teacher-forced (own text is more regular than source files): loss is the soft cross-entropy in nats, "
        "top-1 the agreement with the target's choice, expected_tokens_per_step is 1 + the sum of CTAR@1..6.",
        "## What moves it", markdown_table(["run", *PLAN, "tokens", "s", *METRICS], rows),
        "## Learning curve of the shipped adapter", curve(shipped),
    ])  # fmt: skip
    write_result(args.output, {"stamp": facts, "reports": reports}, text=text)
    print(text)


if __name__ == "__main__":
    main()
