"""The plot of docs/results/search.png: hypervolume over seconds, simulated and real.

    python benchmarks/search/plot.py simulate.curves.json end_to_end.json search.html
    chromium --headless --no-sandbox --window-size=1200,560 --screenshot=docs/results/search.png search.html
"""

import json
import sys
from pathlib import Path

import numpy as np
from plotly.subplots import make_subplots

COLOURS = {"plain": "#636363", "plain, warm": "#bdbdbd", "ours": "#08519c", "ours, no forks": "#6baed6", "random": "#fdae6b",
           "NSGA-II": "#74c476", "MO-ASHA": "#d62728"}


def main() -> None:
    simulated, real = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    figure = make_subplots(1, 2, subplot_titles=["simulated, 4 workers: median and quartiles",
                                                 "real, 1 worker: median and every seed"])
    for name, colour in COLOURS.items():
        low, median, high = simulated["curves"][name]
        times = simulated["times"]
        if name in ("plain", "ours"):
            figure.add_scatter(x=[*times, *times[::-1]], y=[*high, *low[::-1]], fill="toself", line_width=0, opacity=0.25,
                               fillcolor=colour, showlegend=False, row=1, col=1)
        figure.add_scatter(x=times, y=median, name=name, line_color=colour, row=1, col=1)
    for name, curves in real["curves"].items():
        for curve, width in [*((curve, 0.6) for curve in curves), (np.median(curves, axis=0), 3)]:
            figure.add_scatter(x=real["times"], y=curve, line={"color": COLOURS[name], "width": width}, showlegend=False,
                               row=1, col=2)
    final = [median[-1] for _, median, _ in simulated["curves"].values()]
    figure.update_yaxes(title_text="hypervolume", range=[0.85 * min(final), 1.01 * max(final)], row=1, col=1)
    figure.update_xaxes(title_text="seconds")
    figure.update_layout(width=1200, height=560, template="plotly_white", legend={"orientation": "h", "y": -0.15})
    figure.write_html(sys.argv[3], include_plotlyjs=True)


if __name__ == "__main__":
    main()
