(async () => {
  // Plotly comes packed with gzip. A script element made here runs because the policy of the page lists the hash of its text.
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);

  const root = document.documentElement;
  const button = document.getElementById("theme");
  const plots = [...document.querySelectorAll(".plot")];
  const font = getComputedStyle(document.body).fontFamily;

  // The resolved value: custom properties keep light-dark() unresolved.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  };

  // Width of a figure on A4 or letter paper; null for that of its card.
  let paper = null;

  // As many labels as fit side by side, at equal distances.
  const thin = (axis, room, size) => {
    if (!axis.ticktext) return;
    const every = Math.max(1, Math.ceil((axis.ticktext.length * size(axis.ticktext)) / Math.max(room, 1)));
    axis.tickvals = axis.tickvals.filter((_, index) => index % every === 0);
    axis.ticktext = axis.ticktext.filter((_, index) => index % every === 0);
  };

  const draw = (plot) => {
    const { data, layout } = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const ink = colour("ink-soft"), line = colour("line"), card = colour("card");
    for (const trace of data) {
      if (trace.meta.colours) {
        trace.colorbar.tickfont = { color: ink, size: 11, family: font };
      } else if (trace.meta.cells) {
        // Numbers in the cells only where they have the room.
        trace.visible = ((paper ?? plot.clientWidth) - 170) / trace.meta.cells > 42;
      } else {
        const shade = colour(trace.meta.muted ? "muted" : `series-${trace.meta.series % 8}`);
        Object.assign(trace.line, { color: shade });
        Object.assign(trace.marker, { color: shade, line: { color: card, width: 1 } });
      }
    }
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { color: ink, gridcolor: line, linecolor: line, zerolinecolor: line, tickfont: { size: 11, family: font } });
      axis.title = { text: axis.title.text, standoff: 10, font: { size: 12, color: ink, family: font } };
    }
    if (paper) layout.width = paper;
    thin(layout.xaxis, (paper ?? plot.clientWidth) - 110, (labels) => Math.max(...labels.map((label) => label.length)) * 6.6 + 10);
    thin(layout.yaxis, layout.height - 64, () => 14);
    Object.assign(layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: font, size: 12 },
      hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: card, family: font, size: 12 }, align: "left" },
    });
    return Plotly.react(plot, data, layout, { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false });
  };
  const drawAll = () => plots.forEach(draw);

  const show = (theme) => {
    root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    drawAll();
  };
  button.addEventListener("click", () => {
    const theme = root.dataset.theme === "dark" ? "light" : "dark";
    // Some browsers keep nothing for files.
    try { localStorage.setItem("lata-theme", theme); } catch (error) { /* then it is forgotten */ }
    show(theme);
  });

  let before = root.dataset.theme;
  addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    paper = 620;
    show("light");
  });
  addEventListener("afterprint", () => {
    paper = null;
    show(before);
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) drawAll();
    width = innerWidth;
  });

  show(root.dataset.theme);
})();
