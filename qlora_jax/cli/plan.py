"""`scripts/plan.py`: does a run fit a GPU? Neither the GPU nor a download is needed."""

import json
import sys
from collections.abc import Sequence

from qlora_jax.cli import environment
from qlora_jax.cli.arguments import config_parser, parse_with_config
from qlora_jax.cli.errors import reports_errors


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table, or one JSON object, on standard output; exit code 0 whether the run fits or not."""
    from qlora_jax.memory.targets import GPUS, Card, find_card

    parser = config_parser("plan.py", "Say how much GPU memory a training run needs, and whether it fits.")
    parser.add_argument("--gpu", required=True, metavar="GPU", help=f"one of {', '.join(GPUS)}, or a size such as 48GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options, config = parse_with_config(parser, argv)
    try:
        card: Card = find_card(options.gpu)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    environment.prepare()
    from qlora_jax.cli.plan_table import print_report
    from qlora_jax.run.plan import plan

    with environment.planning():
        report = plan(config, card, progress=True)
    if options.json:
        print(json.dumps(report.to_json()))
    else:
        print_report(report, options.config, sys.stdout)
    return 0
