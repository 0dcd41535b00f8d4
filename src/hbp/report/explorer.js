// Zoomable timelines on one canvas: ranks over time, work cut into its parts or coloured by packing group.
// Wheel with Ctrl (or a pinch) zooms, dragging pans, a double click shows everything; so do the buttons and keys.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const box = document.getElementById("explorer"), canvas = box.querySelector("canvas");
  const tip = box.querySelector(".tip"), legend = box.querySelector(".legend"), pen = canvas.getContext("2d");
  const LEFT = 62, ROW = 15, TITLE = 26, AXIS = 26;
  const list = x => (Array.isArray(x[0]) ? x : null);
  const beginOf = (lane, rank, m) => (list(lane.begin) ? lane.begin[rank][m] : lane.begin[m]);
  const wallOf = (lane, rank, m) => (list(lane.wall) ? lane.wall[rank][m] : lane.wall[m]);
  const end = Math.max(...data.lanes.map(l => {
    const m = l.step.length - 1;
    return m < 0 ? 0 : Math.max(...l.cell.map((_, rank) => beginOf(l, rank, m) + wallOf(l, rank, m)));
  }), 1e-9);
  let from = 0, to = end * 1.01, mode = "parts";

  let top = 0;
  for (const lane of data.lanes) {
    lane.top = top + TITLE;
    top = lane.top + ROW * lane.cell.length + 6;
  }
  const height = top + AXIS;
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const width = () => canvas.clientWidth - LEFT - 8;
  const x = seconds => LEFT + ((seconds - from) / (to - from)) * width();

  function draw() {
    const ratio = devicePixelRatio || 1;
    canvas.style.height = height + "px";
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = height * ratio;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, height);
    pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
    const ink = css("--ink"), wait = css("--wait"), rule = css("--rule");
    axis(ink, rule);
    for (const lane of data.lanes) {
      pen.fillStyle = ink;
      pen.fillText(lane.title, LEFT, lane.top - 9);
      lane.cell.forEach((row, rank) => {
        const y = lane.top + rank * ROW;
        pen.fillStyle = css("--soft");
        pen.fillText("rank " + rank, 4, y + 11);
        pen.save();
        pen.beginPath();
        pen.rect(LEFT, y, width(), ROW);
        pen.clip();
        row.forEach((cell, m) => {
          const begin = beginOf(lane, rank, m), wall = wallOf(lane, rank, m);
          if (begin + wall < from || begin > to) return;
          bar(begin, wall, y, wait);
          if (cell < 0) return;
          const pack = lane.packs[cell];
          let at = begin;
          lane.parts.forEach((part, i) => {
            const seconds = pack[3 + i];
            const colour = mode === "parts" || pack[0] < 0 ? data.parts[part].colour : data.groups[pack[0]].colour;
            if (seconds > 0) bar(at, seconds, y, colour);
            at += seconds;
          });
        });
        pen.restore();
      });
    }
  }

  function bar(begin, seconds, y, colour) {
    const a = x(begin), b = x(begin + seconds);
    pen.fillStyle = colour;
    pen.fillRect(a, y + 1.5, Math.max(b - a - (b - a > 6 ? 0.6 : 0), 0.15), ROW - 3);
  }

  function axis(ink, rule) {
    const rough = (to - from) / Math.max(3, width() / 110), power = 10 ** Math.floor(Math.log10(rough));
    const gap = [1, 2, 5, 10].map(k => k * power).find(g => g >= rough);
    const digits = Math.max(0, -Math.floor(Math.log10(gap)));
    pen.textAlign = "center";
    for (let t = Math.ceil(from / gap) * gap; t <= to; t += gap) {
      pen.fillStyle = rule;
      pen.fillRect(x(t), 0, 1, height - AXIS + 4);
      pen.fillStyle = ink;
      pen.fillText(t.toFixed(digits) + " s", x(t), height - 8);
    }
    pen.textAlign = "left";
  }

  function key() {
    const shown = mode === "parts"
      ? Object.keys(data.parts).filter(p => data.lanes.some(l => l.parts.includes(p))).map(p => data.parts[p])
      : [...new Map(data.groups.map(g => [g.kind, { name: g.kind, colour: g.colour }])).values()];
    const entries = [...shown, { name: "waiting", colour: "var(--wait)" }];
    legend.replaceChildren(...entries.map(({ name, colour }) => {
      const item = document.createElement("span"), patch = document.createElement("i");
      patch.style.background = colour;
      item.append(patch, name);
      return item;
    }));
  }

  function zoom(factor, centre = (from + to) / 2) {
    const span = Math.min(Math.max((to - from) * factor, end * 1e-5), end * 1.01);
    const share = (centre - from) / (to - from);
    move(centre - share * span, span);
  }
  function move(begin, span = to - from) {
    from = Math.min(Math.max(begin, 0), Math.max(0, end * 1.01 - span));
    to = from + span;
    draw();
  }
  const everything = () => move(0, end * 1.01);
  const seconds = event => from + ((event.offsetX - LEFT) / width()) * (to - from);

  function found(event) {
    for (const lane of data.lanes) {
      const rank = Math.floor((event.offsetY - lane.top) / ROW), t = seconds(event);
      if (rank < 0 || rank >= lane.cell.length || event.offsetX < LEFT) continue;
      const m = lane.step.findIndex((_, i) => {
        const begin = beginOf(lane, rank, i);
        return t >= begin && t < begin + wallOf(lane, rank, i);
      });
      if (m >= 0) return { lane, rank, m };
    }
    return null;
  }
  const time = s => (s >= 1 ? s.toFixed(3) + " s" : (1000 * s).toFixed(s < 0.01 ? 2 : 1) + " ms");
  function describe({ lane, rank, m }) {
    const wall = wallOf(lane, rank, m), cell = lane.cell[rank][m];
    const lines = [`rank ${rank} · step ${lane.step[m]} · micro-step ${m} · ${time(wall)}`];
    let busy = 0;
    if (cell >= 0) {
      const [group, tokens, documents, ...spent] = lane.packs[cell];
      if (group >= 0) lines.push(data.groups[group].name);
      if (tokens !== null) lines.push(`${tokens.toLocaleString("en")} tokens in ${documents.toLocaleString("en")} samples`);
      spent.forEach((s, i) => {
        busy += s;
        if (s > 0) lines.push(`${data.parts[lane.parts[i]].name}: ${time(s)}`);
      });
    } else lines.push("no pack: idle");
    lines.push(`waiting: ${time(Math.max(0, wall - busy))}`);
    return lines.join("\n");
  }

  let held = null;
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(1.25 ** Math.sign(event.deltaY), seconds(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", event => {
    held = { at: event.clientX, from };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => (held = null));
  canvas.addEventListener("pointermove", event => {
    if (held) return move(held.from - ((event.clientX - held.at) / width()) * (to - from));
    const here = found(event);
    tip.hidden = !here;
    if (!here) return;
    tip.textContent = describe(here);
    tip.style.left = Math.min(event.offsetX + 14, canvas.clientWidth - tip.offsetWidth - 6) + "px";
    tip.style.top = event.offsetY + 18 + "px";
  });
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  canvas.addEventListener("dblclick", everything);
  canvas.addEventListener("keydown", event => {
    const span = to - from;
    const act = {
      "+": () => zoom(0.7), "=": () => zoom(0.7), "-": () => zoom(1 / 0.7), 0: everything,
      ArrowLeft: () => move(from - span / 5), ArrowRight: () => move(from + span / 5),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  box.querySelector("[data-act=in]").onclick = () => zoom(0.5);
  box.querySelector("[data-act=out]").onclick = () => zoom(2);
  box.querySelector("[data-act=all]").onclick = everything;
  box.querySelector("select").onchange = event => {
    mode = event.target.value;
    key();
    draw();
  };
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  key();
  draw();
})();
