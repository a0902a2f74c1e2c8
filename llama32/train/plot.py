"""A picture of the learning curve."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llama32.train.loop import CurvePoint


def draw_curve(curve: Sequence[CurvePoint], file: str | Path, title: str = "") -> None:
    """Plot losses by step. The suffix of `file` sets the format (.png, .svg, .pdf)."""
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, color in (("train", "#2f6f9f"), ("held_out", "#d9822b")):
        points = [(point.step, getattr(point, name)) for point in curve]
        measured = [(step, loss) for step, loss in points if loss is not None]
        if measured:
            steps, losses = zip(*measured, strict=True)
            marker = "o" if len(measured) < 30 else None
            label = f"{name.replace('_', ' ')}, {losses[-1]:.3f} at the end"
            axes.plot(steps, losses, color=color, marker=marker, markersize=4, label=label)
    axes.set(title=title, xlabel="steps", ylabel="loss, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
