"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
// a double click that resets would go back to the range that the figure opened with
const config = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "autosize"};

function command(says, line) {
  const row = document.createElement("p"), label = document.createElement("span"), code = document.createElement("code");
  row.className = "command";
  code.tabIndex = 0;
  label.textContent = says;
  code.textContent = line;
  row.append(label, code);
  return row;
}

function plain(html) {
  return new DOMParser().parseFromString(html.replaceAll("<br>", " "), "text/html").body.textContent;
}

function choose(trial, round) {
  const name = `${trial}/${round}`, text = data.texts[trial];
  if (!text) return;
  const [asked, ended] = text.split("<br><i>").map(plain), title = document.createElement("p");
  title.textContent = `Trial ${trial}, round ${round}${ended ? ` (${ended})` : ""}`;
  const lines = [title];
  if (data.reported.includes(name)) {
    lines.push(command("choose it", `raysearch pick ${data.directory} --candidate ${name}`));
  } else {
    lines.push(command("not scored on the report split, by which a pick is judged; items beside dense",
                       `raysearch compare ${data.directory} dense ${name}`));
  }
  const given = asked.startsWith("--") ? asked : `--actions ${data.trial.replace("NUMBER", String(trial).padStart(5, "0"))}`;
  lines.push(command(`run its trial again, which has it after round ${round}`, `${data.prune} ${given} --out again`));
  document.getElementById("chosen").replaceChildren(...lines);
}

for (const [name, figure] of Object.entries(data.figures)) {
  const plot = document.getElementById(name), [menu] = figure.layout.updatemenus ?? [];
  delete figure.layout.updatemenus;
  figure.layout.margin.t = 40;
  for (const trace of figure.data) trace.text = trace.text?.map((of) => data.texts[of] ?? of);
  Plotly.newPlot(plot, figure.data, figure.layout, config);
  plot.on("plotly_click", ({points: [point]}) => choose(point.customdata?.[0], point.customdata?.[1]));
  for (const [index, {label, args}] of (menu?.buttons ?? []).entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.setAttribute("aria-pressed", index === 0);
    button.onclick = () => {
      for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
      Plotly.update(plot, ...args);
    };
    document.querySelector(`[data-for="${name}"]`).append(button);
  }
}

for (const table of document.querySelectorAll("table")) {  // on a telephone a row is a card, whose cells say what they are
  const names = [...table.querySelectorAll("th")].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, index) => { cell.dataset.label = names[index]; });
}

for (const button of document.querySelectorAll("[data-candidate]")) {
  button.onclick = () => {
    choose(...button.dataset.candidate.split("/"));
    document.getElementById("chosen").scrollIntoView({block: "nearest"});
  };
}
