"""The learning curve as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama32.train.loop import Point


def draw_curve(curve: Sequence[Point], file: str | Path, title: str = "") -> None:
    """Losses by step, as the type of file that its name says (.png, .svg, .pdf)."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, color in (("train", "#2f6f9f"), ("held_out", "#d9822b")):
        points = [(point.step, getattr(point, name)) for point in curve]
        known = [(step, loss) for step, loss in points if loss is not None]
        if known:
            steps, losses = zip(*known, strict=True)
            marker = "o" if len(known) < 30 else None
            label = f"{name.replace('_', ' ')}, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, color=color, marker=marker, markersize=4, label=label)
    axes.set(title=title, xlabel="steps", ylabel="loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
