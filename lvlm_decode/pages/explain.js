"use strict";
(() => {
  const percent = (p) => (p === null ? "–" : p >= 0.001 ? (100 * p).toFixed(1) + " %" : p > 0 ? "<0.1 %" : "0 %");
  const said = (text) => "“" + text.trim() + "”";

  // --- the answer
  const answer = byId("answer");
  const buttons = data.tokens.map((token, index) => {
    const button = make("button", token.text || "·");
    button.type = "button";
    button.tabIndex = index ? -1 : 0;
    button.style.setProperty("--d", token.distance === null ? 0 : Math.sqrt(token.distance));
    if (token.changed) button.classList.add("changed");
    if (token.special) button.classList.add("special");
    if (token.drafted) button.classList.add("drafted");
    const note = token.changed ? `, plain decoding takes ${token.plain_text.trim()}` : "";
    button.setAttribute("aria-label", `${token.text.trim()}${note}`);
    button.addEventListener("mouseenter", () => { if (!pinned) show(index); });
    button.addEventListener("focus", () => show(index));
    button.addEventListener("click", () => { pinned = true; show(index); });
    answer.append(button);
    return button;
  });
  let current = -1;
  // A click or a key keeps a token; hovering over others then leaves it.
  let pinned = false;

  answer.addEventListener("keydown", (event) => {
    const changed = data.tokens.map((t, i) => (t.changed ? i : -1)).filter((i) => i >= 0);
    const to = {
      ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: buttons.length - 1,
      ArrowDown: changed.find((i) => i > current), ArrowUp: changed.filter((i) => i < current).pop(),
    }[event.key];
    if (event.key === "Escape") pinned = false;
    if (to === undefined || !buttons[to]) return;
    event.preventDefault();
    pinned = true;
    buttons[to].focus();
  });

  // --- one token
  function bar(p, kind) {
    const cell = make("td");
    const box = make("span", percent(p), "p " + kind);
    const line = make("s");
    line.style.width = 100 * (p || 0) + "%";
    box.append(line);
    cell.append(box);
    return cell;
  }

  function sentences(token, index) {
    const out = [];
    if (token.changed) out.push(`Plain decoding takes ${said(token.plain_text)} here.`);
    else out.push("Plain decoding takes the same token here.");
    if (token.distance !== null)
      out.push(`The method moved ${percent(token.distance)} of the probability; this token's log-probability changed by ` +
        `${token.shift >= 0 ? "+" : "−"}${Math.abs(token.shift).toFixed(2)} nats.`);
    if (token.mask) {
      out.push(`The plausibility mask kept ${token.mask.kept} tokens and removed ${token.mask.removed}, which hold ` +
        `${percent(token.mask.removed_mass)} of the probability.`);
      if (token.mask.barred) out.push(`Without the mask ${said(token.mask.barred[1])} would have come.`);
    }
    for (const [name, value] of Object.entries(token.choices))
      out.push(`Chosen ${name}: ${Number.isInteger(value) ? value : value.toFixed(3)}.`);
    if (token.leans_on !== null && token.leans_on < index && data.tokens[token.leans_on])
      out.push(`The candidates lean most on token ${token.leans_on + 1}, ${said(data.tokens[token.leans_on].text)}.`);
    if (token.drafted !== null)
      out.push(token.drafted ? "The drafter proposed it and it was accepted." : "The model chose it; no accepted draft held it.");
    return out;
  }

  function show(index) {
    if (index === current) return;
    if (current >= 0) {
      buttons[current].removeAttribute("aria-current");
      buttons[current].tabIndex = -1;
    }
    current = index;
    buttons[index].setAttribute("aria-current", "true");
    buttons[index].tabIndex = 0;
    const token = data.tokens[index];
    const box = byId("token");
    const list = make("ul");
    for (const sentence of sentences(token, index)) list.append(make("li", sentence));
    const table = make("table");
    const head = make("tr");
    const searched = token.candidates.every((c) => c.method === null);
    const titles = ["Candidate", "Plain", ...data.views.map((v, i) => "View " + (i + 1)), ...(searched ? [] : ["Method"])];
    for (const title of titles) head.append(make("th", title));
    table.append(head);
    for (const candidate of token.candidates) {
      const line = make("tr", undefined, candidate.kept ? "" : "removed");
      if (candidate.id === token.id) line.classList.add("taken");
      const name = make("td", candidate.text.replace(/\n/g, "↵").trim() || "␣");
      if (!candidate.kept) name.title = "The mask removed it.";
      line.append(name, bar(candidate.plain, "plain"));
      data.views.forEach((view, i) => line.append(bar(i in candidate.views ? candidate.views[i] : null, "view")));
      if (!searched) line.append(bar(candidate.method, "method"));
      table.append(line);
    }
    const scroll = make("div", undefined, "scroll");
    scroll.append(table);
    box.replaceChildren(make("h2", `Token ${index + 1} of ${data.tokens.length}: ${said(token.text)}`), list, scroll);
    draw();
  }

  // --- the picture
  const select = byId("layer");
  const layers = data.overlays.map((overlay) => ({ title: overlay.title, grid: overlay.grid, of: () => overlay }));
  const rows = [...new Set(data.tokens.flatMap((token) => token.attention.map((row) => row.title)))];
  for (const title of rows)
    layers.push({
      title: title + " (per token)", grid: data.grid,
      of: (token) => {
        const row = token && token.attention.find((r) => r.title === title);
        return row && { weights: row.weights, chosen: row.chosen && row.chosen.flatMap((c, i) => (c ? [i] : [])) };
      },
    });
  if (layers.length) {
    layers.forEach((layer, i) => select.add(new Option(layer.title, i)));
    select.add(new Option("the picture alone", -1));
    byId("layers").hidden = false;
    select.addEventListener("change", draw);
  }

  function draw() {
    const canvas = byId("overlay");
    const pen = canvas.getContext("2d");
    canvas.width = canvas.height = 480;
    const layer = layers[Number(select.value)];
    const note = byId("look-note");
    note.textContent = "";
    const found = layer && layer.of(data.tokens[current]);
    if (!found) return;
    const chosen = new Set(found.chosen || []);
    if (!layer.grid) {
      note.textContent = `${chosen.size || "No"} places are marked; this model's image tokens do not lie on a grid of the picture.`;
      return;
    }
    const [lines, columns] = layer.grid;
    const [width, height] = [canvas.width / columns, canvas.height / lines];
    const most = found.weights ? Math.max(...found.weights) : 0;
    for (let i = 0; i < lines * columns; i++) {
      const [x, y] = [(i % columns) * width, Math.floor(i / columns) * height];
      if (most > 0) {
        pen.fillStyle = `rgba(255, 196, 0, ${(0.7 * found.weights[i]) / most})`;
        pen.fillRect(x, y, width, height);
      }
      if (chosen.has(i)) {
        pen.lineWidth = 3;
        pen.strokeStyle = "#fff";
        pen.strokeRect(x + 2, y + 2, width - 4, height - 4);
        pen.lineWidth = 2;
        pen.strokeStyle = "#d1242f";
        pen.strokeRect(x + 3, y + 3, width - 6, height - 6);
      }
    }
    note.textContent = `${layer.title}. ` + (most > 0 ? "Yellow: the weight of a place. " : "") +
      (chosen.size ? `Red frames: the ${chosen.size} chosen places of ${lines * columns}.` : "");
  }

  for (const line of document.querySelectorAll("#changed tr[data-token]"))
    line.addEventListener("click", () => buttons[Number(line.dataset.token)].focus());
  const first = data.tokens.findIndex((token) => token.changed);
  if (buttons.length) show(Math.max(first, 0));
  document.documentElement.dataset.ready = "true";
})();
