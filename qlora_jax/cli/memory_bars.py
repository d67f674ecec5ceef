"""The memory of a run beside that of the other methods, for its report."""

from qlora_jax.cli.plan_table import TITLES
from qlora_jax.cli.planning import METHODS
from qlora_jax.cli.sizes import size
from qlora_jax.memory.plan import Breakdown, plan
from qlora_jax.models.config import ModelConfig
from qlora_jax.train.config import Config
from qlora_jax.train.page import Bar, BarChart
from qlora_jax.train.setup import with_method

# Colours of the methods, on every page.
STYLES = {"full": "second", "lora": "first", "qlora": "third"}


def memory_bars(config: Config, geometry: ModelConfig) -> BarChart:
    """What a train step of `config` needs by each method, by arithmetic; the base's weights first in each bar."""
    breakdowns = {method: plan(with_method(config, method), geometry) for method in METHODS}
    return BarChart(
        title="Memory of the train step, by method",
        bars=[bar(method, one, method == config.method) for method, one in breakdowns.items()],
        note="By the arithmetic of scripts/plan.py, for a GPU. Dark: the base's weights; light: adapters, gradients, "
        "optimizer state and activations.",
    )


def bar(method: str, breakdown: Breakdown, chosen: bool) -> Bar:
    return Bar(
        name=TITLES[method] + (" (this run)" if chosen else ""),
        value=breakdown.base,
        rest=breakdown.peak - breakdown.base,
        words=f"{size(breakdown.base)} weights, {size(breakdown.peak)} in all",
        style=STYLES[method],
        chosen=chosen,
    )
