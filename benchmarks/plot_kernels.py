"""The plot of docs/results/kernels.json: what the dispatcher's choice gains, by shape and number of tokens.

    python benchmarks/plot_kernels.py docs/results/kernels.json kernels.html
    chromium --headless --no-sandbox --window-size=1200,830 --screenshot=docs/results/kernels.png kernels.html
"""

import json
import sys
from pathlib import Path

from plotly.subplots import make_subplots

COLOURS = {("unstructured", 1, 0.5): "#9ecae1", ("unstructured", 1, 0.7): "#4292c6", ("unstructured", 1, 0.9): "#08519c",
           ("2:4", 1, 0.5): "#31a354", ("block", 16, 0.9): "#fdd0a2", ("block", 32, 0.9): "#fc9272",
           ("block", 64, 0.8): "#fb6a4a", ("block", 64, 0.9): "#de2d26", ("block", 128, 0.9): "#7f0000"}


def main() -> None:
    grid = json.loads(Path(sys.argv[1]).read_text())["gpu_grid"]
    shapes = list(dict.fromkeys((record["outputs"], record["inputs"]) for record in grid["records"]))
    figure = make_subplots(2, 2, subplot_titles=[f"{outputs} x {inputs}" for outputs, inputs in shapes],
                           vertical_spacing=0.14)
    for (pattern, block, sparsity), colour in COLOURS.items():
        name = f"{pattern if block == 1 else f'{pattern} {block}'}, {sparsity:.0%}"
        for place, shape in enumerate(shapes):
            cells = [r for r in grid["records"] if (r["outputs"], r["inputs"]) == shape
                     and (r["pattern"], r["block"], r["sparsity"]) == (pattern, block, sparsity)]
            figure.add_scatter(x=[r["num_tokens"] for r in cells], y=[r["dispatched_ratio"] for r in cells], name=name,
                               legendgroup=name, showlegend=place == 0, line_color=colour, row=place // 2 + 1,
                               col=place % 2 + 1)
    figure.add_hline(y=1, line_dash="dot", line_color="grey")
    figure.update_xaxes(type="log", dtick=1, title="tokens")
    figure.update_yaxes(rangemode="tozero", title="dense / dispatched")
    figure.update_layout(template="plotly_white", width=1180, height=800, title=(
        f"The dispatcher's choice, ratio to dense cuBLAS: {grid['device']}, bf16, {grid['date']}, torch {grid['torch']}"))
    figure.write_html(sys.argv[2], config={"displayModeBar": False})


if __name__ == "__main__":
    main()
