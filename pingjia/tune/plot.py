"""training_loss.png: the loss of every update, smoothed, and the validation loss where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pingjia.tune.journal import StepLog

SMOOTHING = 0.9


def plot_loss(logs: Sequence[StepLog], file: Path) -> None:
    """Draw the curve of a run. Labels are English so that no Chinese font is needed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    steps = [log.step for log in logs]
    axes.plot(steps, [log.loss for log in logs], color="#9db4d6", linewidth=1, label="training, each update")
    axes.plot(steps, _smooth([log.loss for log in logs]), color="#1f4e9c", linewidth=2, label="training, smoothed")
    evals = [(log.step, log.eval_loss) for log in logs if log.eval_loss is not None]
    if evals:
        axes.plot(*zip(*evals, strict=True), color="#d1495b", marker="o", label="held-out rows")
    axes.set(xlabel="update", ylabel="loss (nats per learnt token)", ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, started without a bias towards zero."""
    smoothed, weight, mean = [], 0.0, 0.0
    for value in values:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(mean / weight)
    return smoothed
