"""The memory of a run beside that of the other methods, for its report."""

from qlora_jax.config import Config
from qlora_jax.memory.plan import Breakdown, plan
from qlora_jax.models.config import ModelConfig
from qlora_jax.report.methods import SHORT_TITLES, STYLES
from qlora_jax.report.page import Bar, BarChart
from qlora_jax.report.words import size
from qlora_jax.run.plan import METHODS
from qlora_jax.training.setup import with_method


def memory_bars(config: Config, model_config: ModelConfig) -> BarChart:
    """What a train step of `config` needs by each method, by arithmetic; the base's weights first in each bar."""
    breakdowns = {method: plan(with_method(config, method), model_config) for method in METHODS}
    return BarChart(
        title="Memory of the train step, by method",
        bars=[bar(method, one, method == config.method) for method, one in breakdowns.items()],
        note="By the arithmetic of scripts/plan.py, for a GPU. Dark: the base's weights; light: adapters, gradients, "
        "optimizer state and activations.",
    )


def bar(method: str, breakdown: Breakdown, chosen: bool) -> Bar:
    return Bar(
        name=SHORT_TITLES[method] + (" (this run)" if chosen else ""),
        value=breakdown.base,
        rest=breakdown.peak - breakdown.base,
        words=f"{size(breakdown.base)} weights, {size(breakdown.peak)} in all",
        style=STYLES[method],
        chosen=chosen,
    )
